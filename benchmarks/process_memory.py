"""How much memory does a process take that stores, over what the cache accounts for? A case of `bench_costs`.

python -m benchmarks.process_memory zamba2-30m                            every checkpoint of 8 prompts is kept
python -m benchmarks.process_memory zamba2-30m --max-memory 96MiB --prompts 24      most of them are evicted again

A process serves the prompts in rounds: first it stores nothing, so that the heap grows to what prefills of just these
lengths need, which takes some 50 prompts, and in the last round every checkpoint. What it holds is looked at behind
each prompt. Another process stores nothing in the last round either: what it grows by nevertheless is not what is
stored. (One process cannot be taken off another: two that do the very same end up some 10 MiB apart.)
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
from transformers.utils import logging

from benchmarks.bench_planner import machine
from hf_sparse_cache.bench.contenders import Cached, EveryCut
from hf_sparse_cache.bench.workloads import WorkloadRequest
from hf_sparse_cache.tools.builtin import build_model


VOCABULARY = 8192
WARM_UP = 48  # prompts, in whole rounds
RESULTS = pathlib.Path(__file__).parent / "results" / "process_memory.json"


def memory(arguments, name):
    """What a process grows by over what it stores meanwhile, one value a repeat."""
    values = []
    for _ in range(min(3, arguments.repeats)):  # two processes each: slow, and nearly the same every time
        found = measured(name, arguments.tokens, 3 * arguments.prompts)
        values.append(found["growth"])
    return {f"growth / {found['stored'] / 2**20:,.0f} MiB stored": (values, "<= 1.05")}


def measured(model, tokens, prompts, max_memory=None, storage="exact"):
    """One process that stores, and one that does not.

    Args:
        tokens: of the longest prompt; others have down to half as many.
        max_memory: the budget; None for no limit.

    Returns:
        `stored` bytes at the end; the `ratio` to them of what the process has grown by since it served the same
        prompts uncached; `growth`, what it grew by in the second half over what was stored in it, None where as much
        was evicted; and `drift`, the bytes that the other process grew by in its last round.
    """
    command = [sys.executable, "-m", "benchmarks.process_memory", model, "--tokens", str(tokens)]
    command += ["--prompts", str(prompts), "--storage", storage]
    if max_memory is not None:
        command += ["--max-memory", str(max_memory)]
    runs = []
    rounds = ["none"] * -(-WARM_UP // prompts)
    for last in ("all", "none"):
        done = subprocess.run([*command, "--one", *rounds, last], check=True, capture_output=True, text=True)
        *_, before, found = json.loads(done.stdout.splitlines()[-1])
        runs.append(([held - before["resident"][-1] for held in found["resident"]], found["stored"]))
    (taken, stored), (drift, _) = runs
    half = (len(stored) - 1) // 2
    grew = stored[-1] - stored[half]
    growth = (taken[-1] - taken[half]) / grew if grew > stored[-1] // 10 else None
    return {"stored": stored[-1], "ratio": taken[-1] / stored[-1], "growth": growth, "drift": drift[-1]}


class Switched(EveryCut):
    """Every cut, while it is on; nothing is stored otherwise."""

    on = False

    def place(self, prompt):
        return super().place(prompt) if self.on else []


def resident_bytes():
    """Memory that is only this process's."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def one(arguments):
    """Serves the prompts in one or more rounds, and prints what the process holds behind each prompt."""
    model, policy = build_model(arguments.model, vocab_size=VOCABULARY), Switched()
    options = {"max_memory": arguments.max_memory, "storage": arguments.storage}
    contender = Cached(model, None, "memory", policy, grid=128, exactness="bitwise", **options)
    rounds = []
    for kept in arguments.one:
        policy.on = kept == "all"
        draw = np.random.RandomState(0)
        found = {"resident": [], "stored": []}
        for _ in range(arguments.prompts):
            length = draw.randint(arguments.tokens // 2, arguments.tokens + 1)
            contender.serve(WorkloadRequest("", draw.randint(3, VOCABULARY, length).astype(np.int32)), 1, False)
            found["resident"].append(resident_bytes())
            found["stored"].append(contender.handle.store.used_bytes)
        rounds.append(found)
    print(json.dumps(rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a built-in model")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-memory", help="the budget; by default there is none")
    parser.add_argument("--storage", default="exact")
    parser.add_argument("--write", metavar="LABEL", help=f"keep the figures under this label in {RESULTS.name}")
    parser.add_argument("--one", choices=("all", "none"), nargs="+", help="one process: what each round keeps")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    if arguments.one:
        one(arguments)
        return
    asked = {"tokens": arguments.tokens, "prompts": arguments.prompts, "max_memory": arguments.max_memory}
    asked["storage"] = arguments.storage
    found = {"model": arguments.model, **asked, **measured(arguments.model, **asked), "machine": machine()}
    print(json.dumps(found, indent=2))
    if arguments.write:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, arguments.write: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
