"""Many processes on one shared store while its files are deleted, cut and flipped, and they themselves are killed.

`python tests/chaos_shared.py --processes 8 --requests 500` serves prompts whose states and keys and values say what
a model would have computed for exactly these tokens, so that another prompt's state is noticed in the process that
resumed it. It fails on a wrong answer, on a request that takes too long, on growth beyond the budget, and on a fault
that nothing names.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

from reference_store import Blob, PledgedBlob
from sharing import Faulty, files_in, prompt, serve

from hf_sparse_cache.errors import UnprovedError
from hf_sparse_cache.store import keeper, shared
from hf_sparse_cache.store.store import CheckpointStore


BUDGET = 600_000  # a fraction of what is asked for
SLACK = 1.3  # one look at everything may come a few units late
LONGEST_SECONDS = 20.0  # of one request, on a machine that does other things too
LENGTHS = (300, 700, 1300, 2600)


def faults(seed: int) -> Any:
    """Storage that is slow, full or failing now and then."""
    chance = random.Random(seed)

    def rule(verb: str, name: str) -> None:
        drawn = chance.random()
        if drawn < 0.002:
            raise OSError(errno.EIO, "Input/output error")
        if drawn < 0.004 and verb == "put":
            raise OSError(errno.ENOSPC, "No space left on device")
        if drawn < 0.02:
            time.sleep(0.01)

    return rule


def worker(folder: str, seed: int, requests: int, budget: int, log: str) -> None:
    """Serves prompts, and writes a line for each; what is wrong is an AssertionError."""
    keeper.FRESH_SECONDS, keeper.GRACE_SECONDS, keeper.LEASE_SECONDS = 0.5, 5.0, 2.0
    shared.LOOK_SECONDS, shared.READ_SECONDS = 1.0, 2.0
    store = CheckpointStore("200KB", "lru", shared=folder, shared_memory=budget)
    store.read_with(PledgedBlob.from_bytes if seed % 2 else Blob.from_bytes)
    assert store.shared is not None
    store.shared.tier.storage = Faulty(Path(folder), faults(seed))
    store.shared.after_fork()
    chance = random.Random(seed)
    with open(log, "a") as file:
        for _ in range(requests):
            length = chance.choice(LENGTHS)
            common = chance.choice((length, length - 70, length // 2))
            ids = prompt(min(int(chance.expovariate(0.1)), 60), length, common, chance.randrange(3))
            started = time.monotonic()
            resumed = served(store, ids, tuple(sorted({length // 128 * 64, length // 64 * 64 - 64})))
            took = time.monotonic() - started
            about = {"deleted": store.shared.tier.keeper.deleted, "counts": store.shared.counts}
            print(json.dumps({"resumed": resumed, "seconds": took, **about}), file=file, flush=True)
        store.flush()
        print(json.dumps({"end": store.shared.counts}), file=file, flush=True)


def served(store: CheckpointStore, ids: list[int], positions: tuple[int, ...]) -> int:
    """Serves a prompt, and begins anew where what was handed on turns out not to be what was written."""
    for _ in range(8):
        try:
            return serve(store, ids, positions)
        except UnprovedError:
            store.verify()
    raise AssertionError("a request begins anew again and again")


def damage(folder: Path, chance: random.Random, done: Counter[str]) -> None:
    """Deletes, cuts or flips one file, of any kind."""
    found = files_in(folder)
    if not found:
        return
    path, kind = chance.choice(found), chance.choice(("deleted", "cut", "flipped", "emptied"))
    try:
        if kind == "deleted":
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            if kind == "flipped" and data:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(
                bytes(data) if kind == "flipped" else bytes(data[: len(data) // 2 if kind == "cut" else 0])
            )
    except FileNotFoundError:
        return
    done[kind] += 1


def total(folder: Path) -> int:
    found = 0
    for path in (Path(inside, name) for inside, _, names in os.walk(folder) for name in names):
        try:
            found += path.stat().st_size
        except FileNotFoundError:
            continue
    return found


def main(processes: int, requests: int, seed: int, most_seconds: float, budget: int = BUDGET) -> dict[str, Any]:
    """Runs it, and says what happened.

    Raises:
        SystemExit: something must not have happened.
    """
    chance, done = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder, logs = Path(name, "shared"), [Path(name, f"log{index}") for index in range(processes)]
        folder.mkdir()
        left = [requests] * processes
        running: dict[int, subprocess.Popen[bytes]] = {}
        errors: list[str] = []
        peak, began, again = 0, time.monotonic(), seed
        while (any(left) or running) and not errors:
            if time.monotonic() - began > most_seconds:
                errors.append(f"hang: {left} requests are left after {most_seconds} s")
            for index in range(processes):
                if index not in running and left[index]:
                    again += 1
                    numbers = map(str, (again, left[index], budget))
                    command = [sys.executable, __file__, "--worker", str(folder), *numbers]
                    with open(said_by(logs[index]), "wb") as said:  # a pipe that nobody reads would fill up
                        running[index] = subprocess.Popen([*command, str(logs[index])], stderr=said)
            time.sleep(0.1)
            damage(folder, chance, done)
            if chance.random() < 0.05 and running:
                running[chance.choice(list(running))].send_signal(signal.SIGKILL)
            peak = max(peak, total(folder))
            for index, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[index]
                served = sum('"resumed"' in line for line in read(logs[index]))
                left[index] = max(0, requests - served) if process.returncode else 0
                done["killed"] += process.returncode == -signal.SIGKILL
                if process.returncode not in (0, -signal.SIGKILL):
                    errors.append(said_by(logs[index]).read_text(errors="replace")[-2000:])
        for process in running.values():
            process.kill()
            process.wait()
        return judged([json.loads(line) for log in logs for line in read(log)], done, (peak, budget), errors)


def said_by(log: Path) -> Path:
    """Where what a process says of its end goes, beside its log."""
    return log.with_suffix(".errors")


def read(log: Path) -> list[str]:
    """The whole lines of a log; a killed process may leave half of one."""
    return [line for line in log.read_text().splitlines() if line.endswith("}}")] if log.exists() else []


def judged(
    lines: list[dict[str, Any]], done: Counter[str], size: tuple[int, int], errors: list[str]
) -> dict[str, Any]:
    """What happened, as numbers; with everything that must not have happened.

    Args:
        size: bytes at the most, and the budget.
    """
    peak, budget = size
    requests = [line for line in lines if "resumed" in line]
    named = Counter[str]()
    for line in lines:
        for what, count in line.get("counts", line.get("end")).items():
            named[what] = max(named[what], count)
    slowest = max((line["seconds"] for line in requests), default=0.0)
    resumed = sum(line["resumed"] > 0 for line in requests)
    errors += [f"a request took {slowest:.1f} s"] * (slowest > LONGEST_SECONDS)
    errors += [f"{peak} bytes at the most, with a budget of {budget}"] * (peak > SLACK * budget)
    deleted = max((line["deleted"] for line in requests), default=0)
    own = ("Arithmetic", "ZeroDivision", "Key", "Index", "Type", "Attribute", "Value", "Assertion", "Runtime")
    errors += [what for what in named if what.startswith("failed") and any(f": {kind}Error" in what for kind in own)]
    errors += ["nothing was resumed from the shared store"] * (not named["resumed from"])
    if done["flipped"] + done["cut"] + done["emptied"] > 50:
        errors += ["no damage is named"] * (not any("put aside" in what for what in named))
    if len(requests) > 500:
        errors += ["the budget was never reached: nothing was deleted"] * (not deleted)
        errors += ["no failure is named"] * (not any(what.startswith("failed") for what in named))
    report = {"requests": len(requests), "resumed": resumed, "slowest_seconds": slowest, "peak_bytes": peak}
    report |= {"budget": budget, "most_deleted": deleted}
    return {**report, "done": dict(done), "named": sorted(named), "errors": errors}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
        os._exit(0)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--requests", type=int, default=500, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1500.0, help="after which it hangs")
    parser.add_argument("--budget", type=int, default=BUDGET, help="bytes of the shared store")
    given = parser.parse_args()
    found = main(given.processes, given.requests, given.seed, given.seconds, given.budget)
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["errors"] else 0)
