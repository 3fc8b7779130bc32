"""The paper's figure (arXiv 2605.05219): what is computed again against the number of checkpoints, policy by policy.

    python -m benchmarks.bench_paper WORKLOADS/docqa_squality WORKLOADS/sysprompts_open
    python -m benchmarks.bench_paper some/dataset --columns article question --split validation

Each source is a workload folder, a file, or the id of a dataset. Every prompt may leave at most M new checkpoints,
memory has no limit, cuts lie on a grid of 64 tokens for all. 60 % of the requests warm up. Counted are the shared
tokens that a request computes again, and the seconds that these take: the prefill of a purely recurrent built-in model
is measured at lengths up to 1,024 tokens, read off between them, and proportional behind them, so every
policy is timed by the same curve.

The abstract claims that placement by the distribution of overlap depths dominates every baseline of a fixed budget,
and gains most where checkpoints are few. Both are held against each point, for the paper's planner and for `learned`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.policy_tables import table
from hf_sparse_cache.bench.workloads import load_workload
from hf_sparse_cache.simulator import simulate
from hf_sparse_cache.stats import RequestInfo
from hf_sparse_cache.tools.builtin import build_model, build_tokenizer
from hf_sparse_cache.tools.machine import describe_machine
from hf_sparse_cache.tools.traces import Trace, load_trace


OUT = Path(__file__).parent / "results" / "paper"
BASELINES = ("block", "balanced", "sqrt", "dyadic")
AWARE = ("dp", "learned")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
WARMUP, GRID = 0.6, 64
LONGEST = 1024  # tokens of a timed prefill: recurrent layers take as long for each token behind it
EQUAL = 0.01  # of the tokens that are computed again: nearer than that two policies are the same


@dataclass
class Curve:
    """One workload: recomputed tokens and seconds a request, by policy, in the order of `COUNTS`."""

    name: str
    shared_tokens: float
    tokens: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


class PrefillClock:
    """Seconds of a prefill by its length, measured on a model whose layers are all recurrent."""

    def __init__(self, model: str, longest: int, repeats: int = 3) -> None:
        self.lengths = np.unique(np.geomspace(16, min(max(longest, 64), LONGEST), 6).astype(int))
        network = build_model(model).eval()
        times = []
        with torch.inference_mode():
            network(torch.ones((1, 64), dtype=torch.long))
            for length in self.lengths.tolist():
                ids = torch.randint(3, 1000, (1, length))
                times.append(statistics.median(self._once(network, ids) for _ in range(repeats)))
        self.times = np.asarray(times)

    @staticmethod
    def _once(network: Any, ids: torch.Tensor) -> float:
        start = time.process_time()
        network(ids, logits_to_keep=1)
        return time.process_time() - start

    def seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Of prefills of so many tokens, none for none."""
        found: np.ndarray = np.interp(tokens, np.append(0, self.lengths), np.append(0.0, self.times))
        return found * np.maximum(tokens / self.lengths[-1], 1.0)


def loaded(source: str, options: argparse.Namespace) -> Trace:
    """The requests of one source in order of arrival."""
    if (Path(source) / "meta.json").is_file():
        trace = load_trace(source, seed=options.seed)
        assert isinstance(trace, Trace)
        return trace
    workload = load_workload(source, columns=options.columns, config=options.config, split=options.split)
    tokenizer = build_tokenizer(workload.texts) if "text" in workload.data.column_names else None
    asked = workload.requests(tokenizer, seed=options.seed, max_prompt_tokens=None, vocabulary=2**31 - 1)
    return Trace([request.ids for request in asked])


def measured(name: str, trace: Trace, clock: PrefillClock, counts: tuple[int, ...]) -> Curve:
    """All policies at all counts on one workload."""
    skipped = int(WARMUP * len(trace))
    curve = Curve(name, 0.0)
    for policy in (*BASELINES, *AWARE):
        curve.tokens[policy], curve.seconds[policy] = [], []
        for count in counts:
            rows: list[RequestInfo] = []
            result = simulate(
                trace,
                policy=policy,
                eviction="lru",
                state_bytes=1,
                max_checkpoints=count,
                grid=GRID,
                warmup=WARMUP,
                on_request=rows.append,
                progress=False,
            )
            again = np.asarray([row.overlap_tokens - row.resumed_tokens for row in rows[skipped:]])
            curve.tokens[policy].append(result.recomputed_tokens)
            curve.seconds[policy].append(float(clock.seconds(again).mean()))
            curve.shared_tokens = result.overlap_tokens / result.requests
            print(f"{name:24s} {policy:9s} M = {count:2d}  {result.recomputed_tokens:8.1f} tokens", flush=True)
    return curve


def verdicts(curve: Curve, counts: tuple[int, ...], policy: str) -> list[list[str]]:
    """Point by point: the best baseline, what the policy does there, and whether the claim holds."""
    rows = []
    for index, count in enumerate(counts):
        best = min(BASELINES, key=lambda name: curve.tokens[name][index])
        bar, own = curve.tokens[best][index], curve.tokens[policy][index]
        holds = "yes" if own <= bar * (1.0 + EQUAL) else "no"
        gained = (bar - own) / curve.shared_tokens
        rows.append([str(count), f"{best} {bar:.1f}", f"{own:.1f}", f"{100 * gained:+.1f} %", holds])
    return rows


def gains_most_early(curve: Curve, counts: tuple[int, ...], policy: str) -> bool:
    """Whether the gain over the best baseline is largest at the smallest counts, and smaller at the largest ones."""
    bars = np.min([curve.tokens[name] for name in BASELINES], axis=0)
    return int(np.argmax(bars - np.asarray(curve.tokens[policy]))) < max(1, round(len(counts) / 3))


def page(curves: list[Curve], counts: tuple[int, ...], model: str) -> str:
    """The tables and the verdict, in Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items() if value)
    text = [
        "# Recomputed tokens against the number of checkpoints\n",
        "Made by `python -m benchmarks.bench_paper` (how: `benchmarks/bench_paper.py`); seconds are CPU time of",
        f"{model}; {machine}.\n",
        "![figure](paper.svg)\n",
    ]
    for curve in curves:
        text.append(f"## {curve.name}: {curve.shared_tokens:,.0f} shared tokens a request\n")
        for what, digits, unit in (("tokens", 1, "tokens"), ("seconds", 4, "seconds")):
            rows = [[name, *(f"{value:,.{digits}f}" for value in row)] for name, row in getattr(curve, what).items()]
            text.append(
                f"Shared {unit} computed again a request, by M:\n" if what == "tokens" else "Seconds of that:\n"
            )
            text.append(table(["policy", *(str(count) for count in counts)], rows))
        for policy in AWARE:
            points = verdicts(curve, counts, policy)
            held = sum(row[-1] == "yes" for row in points)
            early = "largest" if gains_most_early(curve, counts, policy) else "not largest"
            text.append(
                f"The claim for `{policy}`: at least as good as every baseline at {held} of {len(counts)} points; its"
                f" gain is {early} at small M.\n"
            )
            text.append(table(["M", "best baseline", policy, "gain, of all shared", "holds"], points))
    return "\n".join(text)


def draw(curves: list[Curve], counts: tuple[int, ...], path: Path) -> None:
    """One panel a workload, both axes on log scales."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf_sparse_cache", "font.size": 9}):
        figure = Figure(figsize=(5 * len(curves), 3.6), layout="constrained")
        for axes, curve in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves, strict=True):
            for name, row in curve.tokens.items():
                axes.plot(counts, row, marker="o", markersize=3, label=name, linewidth=2.2 if name in AWARE else 1.0)
            axes.set(xscale="log", yscale="log", xlabel="new checkpoints a prompt, M", title=curve.name)
            axes.set_xticks(counts, [str(count) for count in counts])
        axes.legend(frameon=False)
        figure.supylabel("shared tokens computed again a request")
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="workload folders, files or dataset ids")
    parser.add_argument("--columns", nargs="*", default=[], help="of a dataset: those that make up a prompt")
    parser.add_argument("--config", help="configuration of a dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=42, help="order of arrival")
    parser.add_argument("--counts", nargs="*", type=int, default=list(COUNTS))
    parser.add_argument("--model", default="mamba-21m", help="built-in model whose prefill is timed")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    counts = tuple(sorted(set(options.counts)))
    traces = {Path(source).name: loaded(source, options) for source in options.sources}
    clock = PrefillClock(options.model, max(len(ids) for trace in traces.values() for ids in trace))
    curves = [measured(name, trace, clock, counts) for name, trace in traces.items()]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "paper.md").write_text(page(curves, counts, options.model), encoding="utf-8")
    rows = [
        {"workload": c.name, "shared_tokens": c.shared_tokens, "tokens": c.tokens, "seconds": c.seconds}
        for c in curves
    ]
    (options.out / "paper.json").write_text(json.dumps({"counts": counts, "curves": rows}, indent=1), encoding="utf-8")
    draw(curves, counts, options.out / "paper.svg")


if __name__ == "__main__":
    main()
