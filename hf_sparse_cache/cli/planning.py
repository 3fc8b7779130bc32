"""Before memory is spent: what a checkpoint costs, where checkpoints would go, and what a trace would reuse."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import SparsePrefixCache
from ..planner import plan_checkpoints
from ..policies import NoCheckpoints, Prompt
from ..simulator import simulate
from ..sizes import parse_bytes
from ..stats import format_bytes
from .screen import Screen


@dataclass(frozen=True)
class Sizes:
    """What is stored for one model: bytes of a checkpoint's states, bytes of KV a token, tokens between cuts."""

    state_bytes: int
    kv_bytes_per_token: int
    grid: int

    @classmethod
    def of(cls, model: Any, grid: int | None) -> "Sizes":
        """Measured on the model."""
        with SparsePrefixCache(model, grid=grid, max_memory=None, policy="none") as cache:
            return cls(cache.size.state_bytes, cache.size.kv_bytes_per_token, cache.grid)


class _Listening(NoCheckpoints):
    """Stores nothing and notes how many tokens each prompt shares with earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.overlaps: list[int] = []

    def observe(self, prompt: Prompt) -> None:
        self.overlaps.append(prompt.overlap)


def overlap_weights(trace: Any) -> NDArray[np.float64]:
    """How many requests of a trace share exactly d tokens with earlier ones, `(deepest + 1,)`."""
    listener = _Listening()
    simulate(trace, policy=listener, state_bytes=1)
    return np.bincount(listener.overlaps).astype(np.float64)


def plan(sizes: Sizes, weights: NDArray[np.float64], memory: str, prompts: str, screen: Screen) -> dict[str, Any]:
    """Write the best placement for several numbers of checkpoints a prompt, next to equal spans.

    Args:
        weights: `(N + 1,)`, weight of each overlap depth.
        memory: what may be stored.
        prompts: how to name the prompts that the weights describe.
    """
    budget = parse_bytes(memory)
    if weights.sum() == 0 or len(weights) <= sizes.grid:
        raise ValueError(f"no overlap reaches the first cut at {sizes.grid} tokens: there is nothing to plan.")
    shares = weights / weights.sum()
    depths = np.arange(len(shares))
    cuts = np.arange(sizes.grid, len(shares), sizes.grid)
    rows: list[dict[str, Any]] = []
    for count in (1, 2, 4, 8, 16, 32):
        best = plan_checkpoints(shares, count, candidates=cuts)
        spans = cuts[np.linspace(0, len(cuts), min(count, len(cuts)) + 2)[1:-1].astype(int)] if len(cuts) > 1 else cuts
        stored = _bytes(sizes, best.positions)
        rows.append(
            {
                "checkpoints": len(best.positions),
                "positions": list(best.positions),
                "recomputed_tokens": best.expected_cost,
                "recomputed_tokens_equal_spans": float(shares @ (depths - _resumed(depths, spans))),
                "bytes_per_prompt": stored,
                "prompts_in_memory": None if budget is None or not stored else budget // stored,
            }
        )
        if len(best.positions) < count:
            break
    screen.say(
        f"A checkpoint: {format_bytes(sizes.state_bytes)} of states, {format_bytes(sizes.kv_bytes_per_token)} of keys "
        f"and values for each token below it; cuts every {sizes.grid} tokens.\n"
        f"Tokens shared with earlier prompts but computed again, mean over {prompts}:\n"
    )
    screen.table(
        ("checkpoints", "planned", "equal spans", "bytes a prompt", f"prompts in {memory}", "positions"),
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
    return {**asdict(sizes), "plans": rows}


def _resumed(depths: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The deepest position at or before each depth, 0 where there is none."""
    found: NDArray[np.int64] = np.concatenate([[0], positions])[np.searchsorted(positions, depths, side="right")]
    return found


def _bytes(sizes: Sizes, positions: Iterable[int]) -> int:
    """States at all positions, and one chain of KV up to the deepest."""
    positions = list(positions)
    return len(positions) * sizes.state_bytes + max(positions, default=0) * sizes.kv_bytes_per_token


def _short(positions: list[int]) -> str:
    shown = [f"{position:,}" for position in positions]
    return " · ".join(shown if len(shown) <= 5 else [*shown[:2], "…", *shown[-2:]])


def replay(
    trace: Path,
    sizes: Sizes,
    policies: list[str],
    screen: Screen,
    *,
    max_memory: str | None,
    max_checkpoints: int | None,
    warmup: float,
) -> dict[str, Any]:
    """Serve a trace without a model, once with each policy, and write what each would have reused."""
    results = {
        name: simulate(
            trace,
            policy=name,
            max_memory=max_memory,
            max_checkpoints=max_checkpoints,
            warmup=warmup,
            **asdict(sizes),
        )
        for name in policies
    }
    first = next(iter(results.values()))
    screen.say(
        f"{first.requests:,} requests of {first.prompt_tokens / max(1, first.requests):,.0f} tokens on average, "
        f"of which {first.overlap_tokens / max(1, first.prompt_tokens):.1%} were seen before.\n"
    )
    screen.table(
        ("policy", "of the prompt resumed", "of the overlap resumed", "checkpoints made", "peak"),
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
    return {**asdict(sizes), "max_memory": max_memory, "policies": rates}
