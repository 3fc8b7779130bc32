"""What rounded states are worth at equal memory: `python -m benchmarks.bench_equal_memory WORKLOADS`.

Recorded requests through the simulator with the default policy and eviction, at the budgets of `bench_policies` with
keys and values (26.8 MB a state and 64 KiB of them a token, kept exactly): the share of the shared tokens that nothing
stored covers, for each storage. Keys and values once as those of a float32 model, once of a 16-bit one, whose
recurrent states are float32 all the same. 60 % of the requests warm up.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.bench_policies import BUDGETS
from benchmarks.outputs import results_file, write_results
from hf_sparse_cache.config import KEPT, STORAGES
from hf_sparse_cache.simulator import simulate
from hf_sparse_cache.tools.machine import describe_machine
from hf_sparse_cache.tools.traces import load_trace


RESULTS = Path(__file__).parent / "results" / "equal_memory.json"
HALVES = {"exact": 1.0, "bf16": 1.0, "int8": (1 + 1 / 32) / 2}  # of keys and values of 16 bits


def uncaptured(trace: Any, budget: str, storage: str, wide: bool, grid: int) -> float:
    """The share of what a trace shares that is computed again."""
    memory, state, kv = BUDGETS[budget]
    share = KEPT if wide else HALVES
    sizes = {"state_bytes": -int(-state * KEPT[storage] // 1), "kv_bytes_per_token": -int(-kv * share[storage] // 1)}
    return 1 - simulate(trace, max_memory=memory, grid=grid, warmup=0.6, **sizes).capture_rate


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", type=Path, help="folder of workload folders")
    parser.add_argument("--seed", type=int, default=42, help="of the arrival order")
    parser.add_argument("--out", type=results_file, default=RESULTS)
    asked = parser.parse_args()
    found: dict[str, Any] = {"machine": describe_machine(), "seed": asked.seed, "uncaptured": {}}
    for meta in sorted(asked.workloads.glob("*/meta.json")):
        recorded = json.loads(meta.read_text(encoding="utf-8"))["template"] == "hash_ids"
        trace = load_trace(meta.parent, seed=asked.seed)
        for budget in ("2 GB", "10 GB"):
            for wide in (True, False):
                row = {
                    storage: uncaptured(trace, budget, storage, wide, 512 if recorded else 64) for storage in STORAGES
                }
                name = f"{meta.parent.name}, {budget}, {'float32' if wide else '16-bit'}"
                found["uncaptured"][name] = row
                print(name, {storage: round(value, 4) for storage, value in row.items()}, flush=True)
    found["means"] = {}
    for kind in ("2 GB, float32", "10 GB, float32", "2 GB, 16-bit", "10 GB, 16-bit"):
        rows = [row for name, row in found["uncaptured"].items() if name.endswith(kind)]
        means = {storage: statistics.mean(row[storage] for row in rows) for storage in STORAGES}
        found["means"][kind] = means | {f"{name} / exact": means[name] / means["exact"] for name in ("bf16", "int8")}
        print(kind, found["means"][kind])
    write_results(asked.out, found)


if __name__ == "__main__":
    main()
