"""Every policy and every rival on every workload, at equal memory: `python -m benchmarks.bench_policies WORKLOADS`.

Group 1: shared tokens recomputed a request, at most 4 new checkpoints a prompt, no memory limit. Group 2: capture rate
(resumed / overlap) under six budgets. 60 % of the requests warm up, 40 % are measured; groups arrive interleaved, with
one arrival order a seed (a trace with recorded times has one). Where a rival has a knob, the setting that is best for
the cell on the first seed counts. Finished cells are kept in a file, so that a run can be resumed or split.

`--race` costs a quarter of that. On the first 1,000 requests of the first seed, every setting of every rival runs
under three budgets that speak for all (`RACES`). The other seeds, which alone are reported, run each rival's best
setting where it can win: within a tenth of the best rival of that workload there, and everywhere for the four that
are best over all.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clairvoyant import ClairvoyantEviction, ClairvoyantPolicy, Future
from benchmarks.policy_tables import write_tables
from benchmarks.rivals import RIVALS
from hf_sparse_cache.planning.cuts import Tokens
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
RACES = {"64": ("64",), "256": ("256", "1024"), "10 GB": ("2 GB", "10 GB", "40 GB")}  # which one speaks for which
RACE_REQUESTS, NEAR, LEADERS = 1000, 0.9, 4  # who stays in the race
RACED = f"""
Raced: on the first {RACE_REQUESTS:,} requests of one more arrival order, every setting of every rival ran under
the budgets {", ".join(RACES)}; its best setting ran here where the rival came within a tenth of the best
one, and everywhere for the {LEADERS} best of all. A setting that suits another budget, or a whole trace, better
can be missed."""
Parts = tuple[Callable[[], Policy], Callable[[], Eviction]]


class Runs:
    """Results by cell, appended to a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self.rows = {row["cell"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}

    def measure(self, cell: str, trace: Sequence[Tokens], parts: Parts, grid: int, **budget: Any) -> dict[str, float]:
        """Runs a cell unless it is known."""
        if cell not in self.rows:
            policy, eviction = parts
            started = time.process_time()
            result = simulate(trace, policy=policy(), eviction=eviction(), grid=grid, warmup=0.6, **budget)
            row = {
                "cell": cell,
                "capture": result.capture_rate,
                "recomputed": result.recomputed_tokens,
                "checkpoints": result.checkpoints,
                "seconds": result.seconds,
                "cpu_seconds": time.process_time() - started,
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


@dataclass(frozen=True)
class Workload:
    """A workload in one arrival order, and the cells that are measured on it."""

    folder: Path
    seed: int
    exactness: str = "bitwise"

    @property
    def recorded(self) -> bool:
        """Whether requests came at times that were recorded, so that there is one order."""
        return bool(json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))["template"] == "hash_ids")

    def trace(self) -> Trace:
        """The requests in order."""
        trace = load_trace(self.folder, seed=self.seed)
        assert isinstance(trace, Trace)
        return trace

    def measure(
        self, runs: Runs, trace: Sequence[Tokens], budget: str, contender: tuple[str, str], parts: Parts
    ) -> dict[str, float]:
        """One cell; `race BUDGET` counts apart, as does what is not bitwise."""
        memory, state, kv = BUDGETS[budget.removeprefix("race ")]
        sizes = {"max_memory": memory, "state_bytes": state, "kv_bytes_per_token": kv, "exactness": self.exactness}
        name, variant = contender
        mode = "" if self.exactness == "bitwise" else f"{self.exactness} "
        cell = f"{self.folder.name}|{self.seed}|{mode}{budget}|{name}|{variant}"
        return runs.measure(cell, trace, parts, 512 if self.recorded else 64, **sizes)


def race(workloads: list[Workload], runs: Runs) -> dict[tuple[str, str], dict[str, str]]:
    """The rivals that stay, with their best settings, by workload and the budget of the race."""
    best: dict[tuple[str, str], dict[str, tuple[float, float, str]]] = {}
    for workload in workloads:
        trace = workload.trace()[:RACE_REQUESTS]
        for rival in RIVALS:
            found = {
                variant: {
                    budget: workload.measure(runs, trace, f"race {budget}", (rival.name, variant), (policy, eviction))
                    for budget in RACES
                }
                for variant, policy, eviction in rival.variants
            }
            for budget in RACES:  # where settings tie, the other budgets decide
                best.setdefault((workload.folder.name, budget), {})[rival.name] = max(
                    (round(rows[budget]["capture"], 3), sum(row["capture"] for row in rows.values()), variant)
                    for variant, rows in found.items()
                )
    mean = {rival.name: np.mean([here[rival.name][0] for here in best.values()]) for rival in RIVALS}
    leaders = sorted(mean, key=lambda who: -mean[who])[:LEADERS]
    chosen = {}
    for key, here in best.items():
        bar = NEAR * max(capture for capture, *_ in here.values())
        chosen[key] = {who: v for who, (capture, _, v) in here.items() if capture >= bar or who in leaders}
    return chosen


def run_raced(folders: list[Path], seeds: list[int], runs: Runs, exactness: str = "bitwise") -> None:
    """The race on the first seed, and the cells of who stays in it on the others."""
    chosen = race([Workload(folder, seeds[0]) for folder in folders], runs)
    for seed in seeds[1:]:
        for folder in folders:
            workload = Workload(folder, seed, exactness)
            if workload.recorded and seed != seeds[1]:
                continue
            trace = workload.trace()
            for contender, variant, parts in contenders(trace):
                for raced, budgets in RACES.items():
                    ours = contender in ("learned", "clairvoyant")
                    if ours or chosen[folder.name, raced].get(contender) == variant:
                        for budget in budgets:
                            workload.measure(runs, trace, budget, (contender, variant), parts)


def run(workloads: Path, names: list[str], seeds: list[int], runs: Runs, chosen: list[str] | None = None) -> None:
    """Measures all cells, or those of the `chosen` contenders, first seed first."""
    for seed in seeds:
        for name in names:
            workload = Workload(workloads / name, seed)
            if workload.recorded and seed != seeds[0]:
                continue
            trace = workload.trace()
            grid = 512 if workload.recorded else 64
            for policy in POLICIES if chosen is None else [name for name in POLICIES if name in chosen]:
                cell = f"{name}|{seed}|no limit|{policy}|"
                parts = named(policy, "learned" if policy == "learned" else "lru")
                runs.measure(cell, trace, parts, grid, state_bytes=1, max_checkpoints=4)
            for contender, variant, parts in contenders(trace):
                if chosen is not None and contender not in chosen:
                    continue
                for budget in BUDGETS:
                    first = f"{name}|{seeds[0]}|{budget}|{contender}|"
                    known = {cell: row["capture"] for cell, row in runs.rows.items() if cell.startswith(first)}
                    if seed != seeds[0] and known and max(known, key=lambda cell: known[cell]) != first + variant:
                        continue
                    workload.measure(runs, trace, budget, (contender, variant), parts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", type=Path, help="folder of workload folders")
    parser.add_argument("--only", nargs="*", help="names of workloads; default all")
    parser.add_argument("--contenders", nargs="*", help="names as in the tables; default all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[42, 1, 2, 3, 4])
    parser.add_argument("--race", action="store_true", help="the first seed chooses, the others are reported")
    parser.add_argument("--exactness", default="bitwise", help="of the cells behind a race")
    parser.add_argument("--runs", type=Path, default=HERE / "runs" / "policies.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "policies.md")
    parser.add_argument("--tables-only", action="store_true", help="write the tables from finished cells")
    arguments = parser.parse_args()
    names = arguments.only or sorted(path.parent.name for path in arguments.workloads.glob("*/meta.json"))
    runs = Runs(arguments.runs)
    started = time.time()
    if arguments.race and len(arguments.seeds) < 2:
        parser.error("--race takes at least two --seeds: the first chooses, the others are reported")
    if arguments.race and not arguments.tables_only:
        run_raced([arguments.workloads / name for name in names], arguments.seeds, runs, arguments.exactness)
    elif not arguments.tables_only:
        run(arguments.workloads, names, arguments.seeds, runs, arguments.contenders)
        print(f"{time.time() - started:.0f} s")
    machine = f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    reported = {str(seed) for seed in arguments.seeds[1 if arguments.race else 0 :]}
    recorded = {name for name in names if Workload(arguments.workloads / name, 0).recorded}  # in one order
    rows = {
        cell: row
        for cell, row in runs.rows.items()
        if cell.split("|")[1] in reported or cell.split("|")[2] == "no limit" or cell.split("|")[0] in recorded
    }
    notes = [f"{machine}.", *([RACED] if arguments.race else [])]
    write_tables(rows, list(BUDGETS), arguments.out, notes)


if __name__ == "__main__":
    main()
