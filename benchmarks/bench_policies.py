"""Every policy and every rival on every workload, at equal memory: `python -m benchmarks.bench_policies WORKLOADS`.

Group 1: shared tokens recomputed a request, at most 4 new checkpoints a prompt, no memory limit. Group 2: capture rate
(resumed / overlap) under six budgets. 60 % of the requests warm up, 40 % are measured; groups arrive interleaved, with
one arrival order a seed (a trace with recorded times has one). Where a rival has a knob, the setting that is best for
the cell on the first seed counts. Finished cells are kept in `benchmarks/runs/policies.jsonl`, so that a run can be
resumed or split.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.clairvoyant import ClairvoyantEviction, ClairvoyantPolicy, Future
from benchmarks.policy_tables import write_tables
from benchmarks.rivals import RIVALS
from hf_sparse_cache.planning.policies import POLICIES, Policy, make_policy
from hf_sparse_cache.simulator import simulate
from hf_sparse_cache.store.evictions import Eviction, make_eviction
from hf_sparse_cache.tools.traces import Trace, load_trace


HERE = Path(__file__).parent
BUDGETS = {
    "64": (64, 1, 0),
    "256": (256, 1, 0),
    "1024": (1024, 1, 0),
    "2 GB": (2 * 10**9, 26_800_000, 65_536),
    "10 GB": (10 * 10**9, 26_800_000, 65_536),
    "40 GB": (40 * 10**9, 26_800_000, 65_536),
}
Parts = tuple[Callable[[], Policy], Callable[[], Eviction]]


class Runs:
    """Results by cell, appended to a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self.rows = {row["cell"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}

    def measure(self, cell: str, trace: Trace, parts: Parts, grid: int, **budget: int | None) -> dict[str, float]:
        """Runs a cell unless it is known."""
        if cell not in self.rows:
            policy, eviction = parts
            result = simulate(trace, policy=policy(), eviction=eviction(), grid=grid, warmup=0.6, **budget)
            row = {
                "cell": cell,
                "capture": result.capture_rate,
                "recomputed": result.recomputed_tokens,
                "checkpoints": result.checkpoints,
                "seconds": result.seconds,
                "plan_seconds": result.plan_seconds,
                "tokens": float(sum(len(ids) for ids in trace)),
                "requests": len(trace),
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.rows[cell] = row
            print(f"{cell:70s} capture {row['capture']:.3f}  recomputed {row['recomputed']:8.1f}", flush=True)
        return self.rows[cell]


def named(policy: str, eviction: str) -> Parts:
    """A policy and an eviction by name."""
    return (lambda: make_policy(policy)), (lambda: make_eviction(eviction))


def contenders(trace: Trace) -> Iterator[tuple[str, str, Parts]]:
    """Name, variant and parts of all that run under a budget."""
    yield "learned", "", named("learned", "learned")
    yield "learned + LRU", "", named("learned", "lru")
    yield "junction + LRU", "", named("junction", "lru")
    for rival in RIVALS:
        for variant, policy, eviction in rival.variants:
            yield rival.name, variant, (policy, eviction)
    future = Future(trace)
    yield "clairvoyant", "", ((lambda: ClairvoyantPolicy(future)), (lambda: ClairvoyantEviction(future, trace)))


def run(workloads: Path, names: list[str], seeds: list[int], runs: Runs, chosen: list[str] | None = None) -> None:
    """Measures all cells, or those of the `chosen` contenders, first seed first."""
    for seed in seeds:
        for name in names:
            recorded = (
                json.loads((workloads / name / "meta.json").read_text(encoding="utf-8"))["template"] == "hash_ids"
            )
            if recorded and seed != seeds[0]:
                continue
            trace = load_trace(workloads / name, seed=seed)
            assert isinstance(trace, Trace)
            grid = 512 if recorded else 64
            for policy in POLICIES if chosen is None else [name for name in POLICIES if name in chosen]:
                cell = f"{name}|{seed}|no limit|{policy}|"
                parts = named(policy, "learned" if policy == "learned" else "lru")
                runs.measure(cell, trace, parts, grid, state_bytes=1, max_checkpoints=4)
            for contender, variant, parts in contenders(trace):
                if chosen is not None and contender not in chosen:
                    continue
                for budget, (memory, state, kv) in BUDGETS.items():
                    first = f"{name}|{seeds[0]}|{budget}|{contender}|"
                    known = {cell: row["capture"] for cell, row in runs.rows.items() if cell.startswith(first)}
                    if seed != seeds[0] and known and max(known, key=lambda cell: known[cell]) != first + variant:
                        continue
                    cell = f"{name}|{seed}|{budget}|{contender}|{variant}"
                    sizes = {"max_memory": memory, "state_bytes": state, "kv_bytes_per_token": kv}
                    runs.measure(cell, trace, parts, grid, **sizes)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", type=Path, help="folder of workload folders")
    parser.add_argument("--only", nargs="*", help="names of workloads; default all")
    parser.add_argument("--contenders", nargs="*", help="names as in the tables; default all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[42, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=HERE / "runs" / "policies.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "policies.md")
    parser.add_argument("--tables-only", action="store_true", help="write the tables from finished cells")
    arguments = parser.parse_args()
    names = arguments.only or sorted(path.parent.name for path in arguments.workloads.glob("*/meta.json"))
    runs = Runs(arguments.runs)
    started = time.time()
    if not arguments.tables_only:
        run(arguments.workloads, names, arguments.seeds, runs, arguments.contenders)
        print(f"{time.time() - started:.0f} s")
    machine = f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    write_tables(runs.rows, list(BUDGETS), arguments.out, machine)


if __name__ == "__main__":
    main()
