"""The advisor: what each policy would reuse of a trace under a budget, where, and what other budgets are worth."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..planning.cuts import MIN_SUFFIX_TOKENS, cut_positions
from ..planning.policies import POLICIES
from ..simulator import SimulationResult, simulate
from ..stats import RequestInfo, parse_bytes
from ..tools.builtin_sizes import SIZES
from ..tools.traces import Trace, load_trace
from .drawing import draw_advice
from .estimates import TIE, Inquiry, Sizes, placements, show_advice, show_placements, sizes_line
from .screen import Screen, Steps


BELOW, ABOVE = (16, 4), 4  # the budgets of the frontier: a 16th and a quarter, and four times as much
BINS = 16


def without_trace(sizes: Sizes, tokens: int, max_memory: str, png: Path | None, screen: Screen) -> dict[str, Any]:
    """The best placements for prompts of one length that part anywhere."""
    if png is not None:
        raise ValueError(f"--png {png} draws what a trace would reuse; give a TRACE.")
    budget = cast(int, parse_bytes(max_memory))
    rows = placements(sizes, np.ones(tokens + 1), budget)
    screen.say(f"{sizes_line(sizes)}\n")
    show_placements(rows, budget, f"prompts of {tokens:,} tokens that part anywhere", sizes.exactness, screen)
    return {**sizes.measured, "max_memory": budget, "plans": rows}


def on_trace(inquiry: Inquiry, png: Path | None, screen: Screen) -> dict[str, Any]:
    """Advise on a trace, and write and draw what was found."""
    found = advise(inquiry, screen)
    show_advice(found, inquiry.sizes, screen)
    prompts = f"the requests of {inquiry.name}"
    show_placements(found["plans"], found["max_memory"], prompts, inquiry.sizes.exactness, screen)
    if png is not None:
        draw_advice(found, png)
        screen.say(f"Pictures: {png}")
    return found


def trace_of(path: Path, requests: int | None) -> Trace:
    """A trace, or its first `requests` prompts.

    Raises:
        ValueError: it is the name of a model.
    """
    if not path.exists() and path.name in SIZES:
        raise ValueError(f"TRACE is {str(path)!r}, which is a model; a model goes by --model {path}.")
    trace = load_trace(path)
    return trace if requests is None else load_trace(trace[:requests])


def default_policies(cut_ids: Sequence[int]) -> list[str]:
    """All that keep something; `boundary` only where ends of segments are known."""
    return [name for name in POLICIES if name != "none" and (name != "boundary" or cut_ids)]


def advise(inquiry: Inquiry, screen: Screen) -> dict[str, Any]:
    """Serve the trace with every policy, and with the two best ones under other budgets.

    Returns:
        What was found, ready for JSON: `trace`, `policies`, `every_cut`, `tied` (the policies that resume most, and
        alike), `best` (of them), `kept_exactly` (what it would do without rounding, where storage rounds),
        `histogram`, `frontier`, `plans`.

    Raises:
        ValueError: No prompt of the trace shares its first cut with an earlier one.
    """
    rounded = inquiry.sizes.storage != "exact"
    runs = 1 + rounded + len(inquiry.policies) + (len(BELOW) + 1) * min(2, len(inquiry.policies))
    with screen.progress(runs * len(inquiry.trace), "overlap") as steps:
        overlaps = _serve(inquiry, steps, "none", None)[1]
        every_cut = _every_cut(inquiry, overlaps)
        counted = _counted(inquiry, overlaps)
        weights = np.bincount([row.overlap_tokens for row in counted]).astype(np.float64)
        usable = [_usable(row.overlap_tokens, row.prompt_tokens) for row in counted]
        lost = sum(row.overlap_tokens for row in counted) - sum(usable)
        depths = np.bincount(usable).astype(np.float64)
        plans = placements(inquiry.sizes, depths, inquiry.budget, lost / len(counted))
        served = {name: _serve(inquiry, steps, name, inquiry.budget) for name in inquiry.policies}
        results = {name: result for name, (result, _) in served.items()}
        tied = _tied(results)
        best, first = tied[0], inquiry.policies[0]
        order = [best, *sorted(results, key=lambda name: -results[name].resumed_tokens)]
        shown = list(dict.fromkeys([first, next((name for name in order if name != first), first)]))
        exact = replace(inquiry, sizes=inquiry.sizes.exact)
        unrounded = _serve(exact, steps, best, inquiry.budget)[0] if rounded else None
        frontier = _frontier(inquiry, {name: results[name] for name in shown}, steps)
    floor = every_cut["recomputed_tokens"]
    return {
        "trace": {
            "name": inquiry.name,
            "requests": results[best].requests,
            "prompt_tokens": results[best].prompt_tokens,
            "overlap_tokens": results[best].overlap_tokens,
        },
        **inquiry.sizes.measured,
        "max_memory": inquiry.budget,
        "policies": {name: _row(result, floor) for name, result in results.items()},
        "every_cut": every_cut,
        "kept_exactly": None if unrounded is None else _row(unrounded, floor),
        "best": best,
        "tied": tied,
        "histogram": _histogram(weights, _counted(inquiry, served[best][1])),
        "frontier": frontier,
        "plans": plans,
    }


def _usable(overlap: int, tokens: int) -> int:
    """How deep a prompt of so many tokens can resume, wherever checkpoints are."""
    return max(0, min(overlap, tokens - MIN_SUFFIX_TOKENS))


def _tied(results: dict[str, SimulationResult]) -> list[str]:
    """The policies that resume most, those that hold the fewest bytes first."""
    most = max(result.resumed_tokens for result in results.values())
    least = most - TIE * max(result.overlap_tokens for result in results.values())
    tied = [name for name, result in results.items() if result.resumed_tokens >= least]
    return sorted(tied, key=lambda name: (results[name].peak_bytes, results[name].checkpoints))


def _serve(
    inquiry: Inquiry, steps: Steps, policy: str, max_memory: int | None
) -> tuple[SimulationResult, list[RequestInfo]]:
    rows: list[RequestInfo] = []

    def count(row: RequestInfo) -> None:
        rows.append(row)
        steps.done(1)

    steps.now(policy)
    result = simulate(
        inquiry.trace,
        policy=policy,
        max_memory=max_memory,
        on_request=count,
        progress=False,
        **inquiry.options,
    )
    return result, rows


def _counted(inquiry: Inquiry, rows: list[RequestInfo]) -> list[RequestInfo]:
    return rows[int(len(rows) * inquiry.warmup) :]


def _row(result: SimulationResult, floor: float) -> dict[str, Any]:
    return {
        **asdict(result),
        "resume_rate": result.resume_rate,
        "capture_rate": result.capture_rate,
        "recomputed_tokens": result.recomputed_tokens,
        "regret_tokens": result.recomputed_tokens - floor,
    }


def _every_cut(inquiry: Inquiry, rows: list[RequestInfo]) -> dict[str, Any]:
    """The most that any policy can resume, and about what it would hold: nothing is ever evicted.

    In bitwise mode that is up to the last cut; in replayable mode there may be one at every token that is shared.
    """
    sizes, skipped = inquiry.sizes, len(rows) - len(_counted(inquiry, rows))
    resumed = checkpoints = peak = 0
    for index, (ids, row) in enumerate(zip(inquiry.trace, rows, strict=True)):
        cuts = cut_positions(ids, sizes.grid, inquiry.cut_ids)
        usable = _usable(row.overlap_tokens, len(ids))
        known, shared = (int(np.searchsorted(cuts, depth, side="right")) for depth in (usable, row.overlap_tokens))
        if index >= skipped:
            cut = int(cuts[known - 1]) if known else 0
            resumed += cut if sizes.exactness == "bitwise" else usable
        if shared < len(cuts):
            checkpoints += len(cuts) - shared
            spans = np.diff(cuts[shared:], prepend=cuts[shared - 1] if shared else 0)
            peak += sizes.taken(len(spans), *spans.tolist())
    counted = _counted(inquiry, rows)
    overlap, tokens = sum(row.overlap_tokens for row in counted), sum(row.prompt_tokens for row in counted)
    return {
        "resumed_tokens": resumed,
        "checkpoints": checkpoints,
        "peak_bytes": peak,
        "resume_rate": resumed / max(tokens, 1),
        "capture_rate": resumed / overlap if overlap else 1.0,
        "recomputed_tokens": (overlap - resumed) / len(counted),
    }


def _frontier(inquiry: Inquiry, known: dict[str, SimulationResult], steps: Steps) -> list[dict[str, Any]]:
    """Each policy under less memory than was used, under the budget, and under more where the budget was short."""
    used = min(inquiry.budget, max(result.peak_bytes for result in known.values()))
    sizes = inquiry.sizes
    one = sizes.taken(1, sizes.grid)  # with less, nothing could be kept
    budgets = {used // share for share in BELOW if used // share >= one}
    if any(result.evictions for result in known.values()):
        budgets.add(ABOVE * inquiry.budget)
    rows = [_point(name, inquiry.budget, result) for name, result in known.items()]
    rows += [_point(name, budget, _serve(inquiry, steps, name, budget)[0]) for name in known for budget in budgets]
    order = list(known)
    return sorted(rows, key=lambda row: (order.index(row["policy"]), row["max_memory"]))


def _point(name: str, budget: int, result: SimulationResult) -> dict[str, Any]:
    return {
        "policy": name,
        "max_memory": budget,
        "peak_bytes": result.peak_bytes,
        "recomputed_tokens": result.recomputed_tokens,
        "capture_rate": result.capture_rate,
    }


def _histogram(weights: Any, rows: list[RequestInfo]) -> dict[str, Any]:
    """Requests and captured checkpoints by depth, in bins of one power of two."""
    captured = Counter(position for row in rows for position in row.captured)
    deepest = max(len(weights) - 1, *captured, 1)
    width = 1
    while width * BINS <= deepest:
        width *= 2
    starts = np.arange(0, deepest + 1, width)
    deep = np.asarray(list(captured), dtype=np.int64)
    times = np.asarray(list(captured.values()), dtype=np.float64)
    return {
        "width_tokens": width,
        "starts": starts.tolist(),
        "requests": np.bincount(np.arange(len(weights)) // width, weights, len(starts)).astype(int).tolist(),
        "checkpoints": np.bincount(deep // width, times, len(starts)).astype(int).tolist(),
        "positions": sorted(captured),
    }
