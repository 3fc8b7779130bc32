"""Before memory is spent: what a checkpoint costs, where checkpoints would go, and what a trace would reuse."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import sub
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import SparsePrefixCache
from ..config import KEPT
from ..planning.planner import plan_checkpoints
from ..planning.views import Floats
from ..simulator import simulate
from ..stats import counted, format_bytes
from ..store.slabs import taken
from ..tools.traces import Trace
from .screen import Screen


TIE = 0.001  # of the overlap; policies whose resumed tokens differ by less are no better or worse than each other


@dataclass(frozen=True)
class Sizes:
    """What is stored for one model: bytes of a checkpoint's states, bytes of KV a token, and how prompts are cut.

    Attributes:
        grid: tokens between regular cuts, or in replayable mode between places where checkpoints may be planned.
        prefill_cost: what policies weigh; None for the number of tokens.
        assumed: whether nobody named the bytes.
        grid_assumed: whether nobody named the grid, nor a model that has one.
        exactness: the mode that figures are for.
        cut_tokens, pieces: of the model, see `simulate`.
        storage: how states are kept.
        share: bytes of a checkpoint and of a token's keys and values, relative to how they are.
        page_bytes: of what both take multiples in memory, see `simulate`.
    """

    state_bytes: int
    kv_bytes_per_token: int
    grid: int
    prefill_cost: Callable[[Floats], Floats] | None = None
    assumed: bool = False
    exactness: str = "bitwise"
    cut_tokens: float = 0.0
    pieces: int | None = None
    grid_assumed: bool = False
    storage: str = "exact"
    share: tuple[float, float] = (1.0, 1.0)
    page_bytes: int = 1

    @classmethod
    def of(cls, model: Any, grid: int | None, exactness: str = "bitwise", storage: str = "exact") -> "Sizes":
        """Measured on the model."""
        found: dict[str, Any] = {}
        for kept in dict.fromkeys((storage, "exact")):
            options: dict[str, Any] = {"grid": grid, "exactness": exactness, "storage": kept}
            with SparsePrefixCache(model, max_memory=None, policy="none", **options) as cache:
                size, found = cache.size, found or cache.simulation()
        share = (
            found["state_bytes"] / max(size.state_bytes, 1),
            found["kv_bytes_per_token"] / max(size.kv_bytes_per_token, 1),
        )
        names = ("state_bytes", "kv_bytes_per_token", "grid", "prefill_cost", "cut_tokens", "pieces", "page_bytes")
        return cls(**{name: found[name] for name in names}, exactness=exactness, storage=storage, share=share)

    def kept(self, storage: str) -> "Sizes":
        """What a storage keeps of these, which are those of float32 numbers as they are."""
        share = KEPT[storage]
        states, kv = (math.ceil(share * size) for size in (self.state_bytes, self.kv_bytes_per_token))
        both = (share, share)
        return replace(self, state_bytes=states, kv_bytes_per_token=kv, storage=storage, share=both)

    @property
    def exact(self) -> "Sizes":
        """The same of a handle that keeps everything as it is."""
        sizes = zip((self.state_bytes, self.kv_bytes_per_token), self.share, strict=True)
        states, kv = (round(size / share) if share else 0 for size, share in sizes)
        return replace(self, state_bytes=states, kv_bytes_per_token=kv, storage="exact", share=(1.0, 1.0))

    def taken(self, states: int, *spans: int) -> int:
        """Bytes of memory that so many states take, and the keys and values of spans of these lengths."""
        each = (taken(span * self.kv_bytes_per_token, self.page_bytes) for span in spans)
        return states * taken(self.state_bytes, self.page_bytes) + sum(each)

    @property
    def measured(self) -> dict[str, Any]:
        """The numbers, and the mode that they are for."""
        return {
            "state_bytes": self.state_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "page_bytes": self.page_bytes,
            "grid": self.grid,
            "exactness": self.exactness,
            "storage": self.storage,
        }

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `simulate`."""
        others = {"prefill_cost": self.prefill_cost, "cut_tokens": self.cut_tokens, "pieces": self.pieces}
        told = {name: value for name, value in self.measured.items() if name != "storage"}  # the sizes are as kept
        return {**told, **others}


@dataclass(frozen=True)
class Inquiry:
    """What is asked of a trace.

    Attributes:
        name: how to call the trace.
        trace: loaded once, served once for each policy and budget.
        policies: names; of the advisor's, the first is drawn on the frontier with the best of the others.
        max_memory: the budget in bytes; None for no limit.
        cut_ids: tokens after which a prompt may be cut.
        warmup: leading fraction that is served but not counted.
    """

    name: str
    trace: Trace
    sizes: Sizes
    policies: Sequence[str]
    max_memory: int | None
    max_checkpoints: int | None = None
    cut_ids: tuple[int, ...] = ()
    warmup: float = 0.0

    @property
    def budget(self) -> int:
        """The budget, for those who compare it with others.

        Raises:
            ValueError: there is none.
        """
        if self.max_memory is None:
            raise ValueError("max_memory is None, which is no budget to compare others with; give one, such as '2GiB'")
        return self.max_memory

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `simulate`, less the policy and the budget."""
        return {
            "max_checkpoints": self.max_checkpoints,
            "cut_ids": self.cut_ids,
            "warmup": self.warmup,
            **self.sizes.options,
        }


def sizes_line(sizes: Sizes) -> str:
    """What is stored, in one line."""
    assumed = " (assumed; give --model or --state-bytes)" if sizes.assumed else ""
    grid = (
        " (assumed, and finer than that of most models, which then resume less: give --grid or --model)"
        if sizes.grid_assumed
        else ""
    )
    bitwise = sizes.exactness == "bitwise"
    cuts, other = (
        ("cuts", "; a handle's default is --exactness replayable") if bitwise else ("places for checkpoints", "")
    )
    states, kv = sizes.share
    kept = f" Kept as {sizes.storage}: {states:.2f} of the bytes of states, {kv:.2f} of those of keys and values."
    kept = kept if sizes.storage != "exact" else ""
    return (
        f"A checkpoint: {format_bytes(sizes.state_bytes)} of states, {format_bytes(sizes.kv_bytes_per_token)} "
        f"of keys and values for each token below it{assumed}; {sizes.exactness} mode, {cuts} every {sizes.grid} "
        f"tokens{grid}{other}.{kept}"
    )


def placements(sizes: Sizes, weights: Floats, budget: int, lost: float = 0.0) -> list[dict[str, Any]]:
    """The best places for several numbers of checkpoints a prompt, next to equal spans; one row a number.

    Args:
        weights: `(N + 1,)`, weight of each depth up to which a prompt can resume.
        budget: bytes that may be stored.
        lost: tokens that a prompt shares behind that depth, in the mean, which are always computed.

    Raises:
        ValueError: No depth reaches the first cut.
    """
    if weights.sum() == 0 or len(weights) <= sizes.grid:
        raise ValueError(f"no overlap reaches the first cut at {sizes.grid} tokens: there is nothing to plan.")
    shares = weights / weights.sum()
    depths = np.arange(len(shares))
    cuts = np.arange(sizes.grid, len(shares), sizes.grid)
    rows: list[dict[str, Any]] = []
    for count in (1, 2, 4, 8, 16, 32):
        best = plan_checkpoints(shares, count, candidates=cuts)
        if rows and len(best.positions) == rows[-1]["checkpoints"]:
            break
        spans = cuts[np.linspace(0, len(cuts), min(count, len(cuts)) + 2)[1:-1].astype(int)] if len(cuts) > 1 else cuts
        stored = _bytes(sizes, best.positions)
        rows.append(
            {
                "checkpoints": len(best.positions),
                "positions": list(best.positions),
                "recomputed_tokens": best.expected_cost + lost,
                "recomputed_tokens_equal_spans": float(shares @ (depths - _resumed(depths, spans))) + lost,
                "bytes_per_prompt": stored,
                "prompts_in_memory": budget // stored if stored else None,
            }
        )
        if len(best.positions) < count:
            break
    return rows


def show_placements(rows: list[dict[str, Any]], budget: int, prompts: str, exactness: str, screen: Screen) -> None:
    """Write what `placements` found; `prompts` names the prompts that the weights describe."""
    screen.say(f"Tokens shared with earlier prompts but computed again, in {exactness} mode, mean over {prompts}:\n")
    screen.table(
        (
            "checkpoints",
            "planned",
            "equal spans",
            "bytes a prompt",
            f"prompts in {format_bytes(budget)}",
            "positions",
        ),
        [
            (
                str(row["checkpoints"]),
                f"{row['recomputed_tokens']:,.0f}",
                f"{row['recomputed_tokens_equal_spans']:,.0f}",
                format_bytes(row["bytes_per_prompt"]),
                f"{row['prompts_in_memory']:,}" if row["prompts_in_memory"] is not None else "",
                _short(row["positions"]),
            )
            for row in rows
        ],
    )


def show_advice(found: dict[str, Any], sizes: Sizes, screen: Screen) -> None:
    """Write what the advisor found: policies, where prompts part, and the frontier."""
    trace, best = found["trace"], found["best"]
    shared = trace["overlap_tokens"] / max(1, trace["prompt_tokens"])
    screen.say(
        f"{trace['name']}: {counted(trace['requests'], 'request')} of "
        f"{trace['prompt_tokens'] / max(1, trace['requests']):,.0f} tokens on average, {shared:.1%} of them shared "
        f"with earlier prompts.\n{sizes_line(sizes)}\nBudget {format_bytes(found['max_memory'])}.\n"
    )
    _show_policies(found, sizes, screen)
    histogram = found["histogram"]
    most = max(*histogram["requests"], 1)
    screen.table(
        ("tokens", "requests that share so many", f"checkpoints of {best}"),
        [
            (f"{start:,} to {start + histogram['width_tokens'] - 1:,} {_bar(count / most)}", f"{count:,}", f"{made:,}")
            for start, count, made in zip(
                histogram["starts"], histogram["requests"], histogram["checkpoints"], strict=True
            )
        ],
    )
    screen.table(
        (f"policy under a budget, {sizes.exactness}", "budget", "peak", "recomputed", "of the overlap"),
        [
            (
                row["policy"],
                format_bytes(row["max_memory"]),
                format_bytes(row["peak_bytes"]),
                f"{row['recomputed_tokens']:,.0f}",
                f"{row['capture_rate']:.1%}",
            )
            for row in found["frontier"]
        ],
    )


def _show_policies(found: dict[str, Any], sizes: Sizes, screen: Screen) -> None:
    """Every policy beside the most that could be resumed, and what the columns mean."""
    mode, bitwise = sizes.exactness, sizes.exactness == "bitwise"
    rows = [
        *found["policies"].items(),
        ("every cut, no limit" if bitwise else "all that is shared", found["every_cut"]),
    ]
    screen.table(
        (
            f"policy, {mode}",
            "of the prompt",
            "of the overlap",
            "recomputed",
            "regret",
            "checkpoints",
            "evictions",
            "peak",
        ),
        [
            (
                name,
                f"{row['resume_rate']:.1%}",
                f"{row['capture_rate']:.1%}",
                f"{row['recomputed_tokens']:,.0f}",
                f"{row.get('regret_tokens', 0.0):,.0f}",
                f"{row['checkpoints']:,}",
                f"{row.get('evictions', 0):,}",
                format_bytes(row["peak_bytes"]),
            )
            for name, row in rows
        ],
    )
    floor = (
        "with a checkpoint at every cut, which is the most that these cuts allow"
        if bitwise
        else "where every token that is shared has a checkpoint, which nothing that is kept can do"
    )
    screen.say(
        "Resumed of the prompt and of the overlap; recomputed: shared tokens that a request computes all the same; "
        f"regret: how many more than {floor} (the bytes of that row are an estimate).\n"
        f"{_recommendation(found)}{_worth(found)}\n"
    )


def _worth(found: dict[str, Any]) -> str:
    """What rounded storage brings, beside the same budget with everything as it is."""
    exact = found["kept_exactly"]
    if exact is None:
        return ""
    best = found["policies"][found["best"]]
    return (
        f" Kept as {found['storage']} it resumes {best['capture_rate']:.1%} of the overlap with "
        f"{best['checkpoints']:,} checkpoints; kept exactly, in the same budget, {exact['capture_rate']:.1%} with "
        f"{exact['checkpoints']:,}."
    )


def _recommendation(found: dict[str, Any]) -> str:
    """Which policy to take; of several that resume alike, the one that holds least."""
    tied, best = found["tied"], found["best"]
    if len(tied) == 1:
        return f"Most is resumed by {best}."
    others = ", ".join(tied[:-1])
    return (
        f"{others} and {tied[-1]} tie: they resume the same to within {TIE:.1%} of the overlap. Of them {best} holds "
        f"the fewest bytes, {format_bytes(found['policies'][best]['peak_bytes'])} at most: take that."
    )


def _bar(share: float, width: int = 20) -> str:
    return "█" * round(share * width) or ("▏" if share else "")


def _resumed(depths: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The deepest position at or before each depth, 0 where there is none."""
    found: NDArray[np.int64] = np.concatenate([[0], positions])[np.searchsorted(positions, depths, side="right")]
    return found


def _bytes(sizes: Sizes, positions: Iterable[int]) -> int:
    """States at all positions, and one chain of KV up to the deepest, in the spans that its mode makes of it."""
    positions = list(positions)
    cuts = range(sizes.grid, max(positions, default=0), sizes.grid) if sizes.exactness == "bitwise" else ()
    ends = sorted({*positions, *cuts})
    return sizes.taken(len(positions), *map(sub, ends, [0, *ends]))


def _short(positions: list[int]) -> str:
    shown = [f"{position:,}" for position in positions]
    return " · ".join(shown if len(shown) <= 5 else [*shown[:2], "…", *shown[-2:]])


def compare_policies(inquiry: Inquiry, screen: Screen) -> dict[str, Any]:
    """Serve a trace without a model, once with each policy, and write what each would have reused."""
    budget, sizes = inquiry.max_memory, inquiry.sizes
    results = {
        name: simulate(inquiry.trace, policy=name, max_memory=budget, **inquiry.options) for name in inquiry.policies
    }
    first = next(iter(results.values()))
    screen.say(
        f"{counted(first.requests, 'request')} of {first.prompt_tokens / max(1, first.requests):,.0f} tokens on "
        f"average, of which {first.overlap_tokens / max(1, first.prompt_tokens):.1%} were seen before.\n"
        f"{sizes_line(sizes)}\nBudget: {format_bytes(budget) if budget is not None else 'no limit'}.\n"
    )
    screen.table(
        (f"policy, {sizes.exactness}", "of the prompt resumed", "of the overlap resumed", "checkpoints made", "peak"),
        [
            (
                name,
                f"{result.resume_rate:.1%}",
                f"{result.capture_rate:.1%}",
                f"{result.checkpoints:,}",
                format_bytes(result.peak_bytes),
            )
            for name, result in results.items()
        ],
    )
    rates = {
        name: {**asdict(result), "resume_rate": result.resume_rate, "capture_rate": result.capture_rate}
        for name, result in results.items()
    }
    return {**sizes.measured, "policies": rates}
