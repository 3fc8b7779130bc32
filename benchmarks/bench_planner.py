"""How fast is the planner, how does its time grow, and how much memory does it take?

    python benchmarks/bench_planner.py            a small table
    python benchmarks/bench_planner.py --json     the same as one JSON object

1. Speed: N = 4,096 positions, M = 30 checkpoints, against the O(N^2 M) recurrence of arXiv 2605.05219 in vectorised
   numpy, in the same run and to the same optimum. Two forms of it: the recurrence as it is written (costs of spans
   from prefix sums, vectors over the predecessors), and the same rearranged by hand into the fewest numpy operations
   we know (lines, without the cost of spans), which is the hardest rival.
2. Growth: the exponent of N in the time from N = 16,384 to 1,048,576 at M = 32.
3. Memory: peak of the process above the inputs, in bytes per N * M.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from hf_sparse_cache.planning.planner import plan_checkpoints


def as_written(weights, prefill_cost, max_checkpoints):
    """paid(j) = min over i of paid(i) + cost of the depths in [i, j) when i is the last checkpoint."""
    end = len(weights)
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    work = np.concatenate([[0.0], np.cumsum(weights * prefill_cost)])
    paid = work - prefill_cost[0] * mass  # no checkpoint: the cost of the depths below each end
    for _ in range(max_checkpoints):
        longer = paid.copy()
        for j in range(2, end + 1):
            i = slice(1, j)
            spans = work[j] - work[i] - prefill_cost[i] * (mass[j] - mass[i])
            longer[j] = min(longer[j], (paid[i] + spans).min())
        paid = longer
    return paid[end] / mass[end]


def rearranged(weights, prefill_cost, max_checkpoints):
    """The same on savings: a line over the predecessors for each j, three numpy operations."""
    tail = np.cumsum(weights[::-1])[::-1]
    saved = (prefill_cost - prefill_cost[0]) * tail
    for layer in range(2, max_checkpoints + 1):
        more = np.full(len(weights), -np.inf)
        for j in range(layer, len(weights)):
            more[j] = (saved[1:j] - prefill_cost[1:j] * tail[j]).max() + prefill_cost[j] * tail[j]
        saved = more
    return (weights @ (prefill_cost - prefill_cost[0]) - saved[1:].max()) / weights.sum()


def timed(function, *arguments, clock=time.perf_counter, **options):
    """(seconds, result) of one call."""
    start = clock()
    result = function(*arguments, **options)
    return clock() - start, result


def random_weights(n_positions, seed):
    return np.random.default_rng(seed).random(n_positions + 1)


def speed(n_positions, max_checkpoints, repeats):
    """The fastest of some runs each: other work on the machine only ever adds time."""
    weights, costs = random_weights(n_positions, 0), np.arange(n_positions + 1.0)
    runs = [timed(plan_checkpoints, weights, max_checkpoints, prefill_cost=costs) for _ in range(50)]
    ours, expected_cost = min(seconds for seconds, _ in runs), runs[0][1].expected_cost
    rows = []
    for name, rival in (("as written", as_written), ("rearranged", rearranged)):
        runs = [timed(rival, weights, costs, max_checkpoints) for _ in range(repeats)]
        theirs, cost = min(runs)
        rows.append(
            {
                "numpy_form": name,
                "numpy_seconds": theirs,
                "planner_seconds": ours,
                "times_faster": theirs / ours,
                "relative_difference_of_optimum": abs(expected_cost / cost - 1),
            }
        )
    return rows


def growth(sizes, max_checkpoints):
    """Median over different weights, each solved once: branch prediction learns short weights by heart.

    In CPU time: a busy machine interrupts long runs and leaves short ones alone, which would look like growth.
    """
    rows = []
    for n_positions in sizes:
        draws = (random_weights(n_positions, seed) for seed in range(15))
        seconds = [timed(plan_checkpoints, weights, max_checkpoints, clock=time.thread_time)[0] for weights in draws]
        rows.append({"positions": n_positions, "seconds": statistics.median(seconds)})
    for before, row in itertools.pairwise(rows):
        row["exponent"] = exponent(before, row)
    return rows, exponent(rows[0], rows[-1])


def exponent(before, after):
    return math.log(after["seconds"] / before["seconds"]) / math.log(after["positions"] / before["positions"])


def memory(n_positions, max_checkpoints):
    """Measured in a process of its own: the peak of a process never falls again."""
    here = [sys.executable, __file__, "--peak-of", str(n_positions), str(max_checkpoints)]
    extra = int(subprocess.run(here, check=True, capture_output=True, text=True).stdout)
    used = {"positions": n_positions, "checkpoints": max_checkpoints, "extra_bytes": extra}
    return {**used, "bytes_per_position_and_checkpoint": extra / (n_positions * max_checkpoints)}


def peak_of(n_positions, max_checkpoints):
    weights = random_weights(n_positions, 0)
    plan_checkpoints(weights[:100], max_checkpoints)  # what is loaded once is not counted
    before = peak_bytes()
    plan_checkpoints(weights, max_checkpoints)
    return peak_bytes() - before


def peak_bytes():
    """Largest resident size so far. On Linux not from getrusage: that starts at the peak of the parent process."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine():
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {versions}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--peak-of", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(peak_of(*arguments.peak_of))
        return
    big, small = (65_536, 512) if arguments.quick else (1_048_576, 4_096)
    sizes = [size for size in (16_384, 65_536, 262_144, 1_048_576) if size <= big]
    compared = speed(small, 30, repeats=1 if arguments.quick else 3)
    grown, overall = growth(sizes, 32)
    used = memory(big, 32)
    if arguments.json:
        result = {"machine": machine(), "speed": compared, "growth": grown, "exponent": overall, "memory": used}
        print(json.dumps(result, sort_keys=True))
        return
    print(machine())
    print(f"\n| N = {small:,}, M = 30 | numpy | planner | times faster | optimum differs by |")
    print("|---|---|---|---|---|")
    for row in compared:
        times = f"{row['numpy_seconds']:.3f} s | {row['planner_seconds'] * 1e3:.3f} ms | {row['times_faster']:,.0f}"
        print(f"| {row['numpy_form']} | {times} | {row['relative_difference_of_optimum']:.0e} |")
    print("\n| N, M = 32 | CPU seconds | exponent |\n|---|---|---|")
    for row in grown:
        step = f"{row['exponent']:.2f}" if "exponent" in row else ""
        print(f"| {row['positions']:,} | {row['seconds']:.4f} | {step} |")
    print(f"| overall | | {overall:.2f} |")
    each, extra = used["bytes_per_position_and_checkpoint"], used["extra_bytes"] / 2**20
    print(f"\nextra memory at N = {used['positions']:,}, M = 32: {extra:.0f} MiB, {each:.1f} bytes x N x M")


if __name__ == "__main__":
    main()
