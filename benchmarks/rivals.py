"""What other systems do, as policies and evictions of the same store, so that only placement and eviction differ.

Each follows its published behaviour; where that has a knob, `RIVALS` holds several settings and the benchmark reports
the best one for each cell. Worked examples are in `tests/bench/test_rivals.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_sparse_cache.planning.policies import HistogramDP, Policy, Prompt
from hf_sparse_cache.planning.views import Floats
from hf_sparse_cache.store.eviction import FIFO, LRU, Eviction
from hf_sparse_cache.store.tree import Checkpoint, Node
from hf_sparse_cache.store.value import Scored


class VLLMAlign(Policy):
    """vLLM `--mamba-cache-mode align`: prefill steps are clipped to the block grid, and the state at the end of each
    step is kept, so a prompt leaves one state per step of `budget` tokens and one at its last full block.

    Source: vllm-project/vllm PR 30877 and its discussion in PRs 43628 and 50172. `budget` is `max_num_batched_tokens`.
    """

    def __init__(self, block: int = 512, budget: int = 8192) -> None:
        super().__init__()
        self.block, self.budget = block, budget

    def place(self, prompt: Prompt) -> list[int]:
        """Step ends, and the last full block."""
        last = len(prompt.ids) // self.block * self.block
        step = max(self.budget // self.block, 1) * self.block
        wanted = {*range(prompt.resumed + step, last, step), last}
        return [position for position in prompt.open_cuts.tolist() if position in wanted]


class VLLMAll(Policy):
    """vLLM `--mamba-cache-mode all`: the state at every block. Source: vllm-project/vllm PRs 25752 and 50172."""

    def __init__(self, block: int = 512) -> None:
        super().__init__()
        self.block = block

    def place(self, prompt: Prompt) -> list[int]:
        """Every block."""
        cuts = prompt.open_cuts
        positions: list[int] = cuts[cuts % self.block == 0].tolist()
        return positions


class SGLang(Policy):
    """SGLang's hybrid radix cache: the state at the last multiple of the tracking interval of each prompt, and the
    state at the branching point, aligned to the kernel's chunk, when a prompt leaves a stored edge. States have an LRU
    of their own, in which a match refreshes only the node it resumes at.

    Source: sgl-project/sglang, `srt/mem_cache/mamba_radix_cache.py`; PR 11214; `--mamba-track-interval` (256).
    """

    def __init__(self, interval: int = 256) -> None:
        super().__init__()
        self.interval = interval

    def place(self, prompt: Prompt) -> list[int]:
        """End and branch."""
        end = (len(prompt.ids) - 2) // self.interval * self.interval
        return prompt.snap([prompt.overlap, end] if prompt.overlap else [end])


class MarconiAdmission(Policy):
    """Marconi (Pan et al., MLSys 2025, arXiv 2411.19379, section 4.1): the state at the end of each sequence, and at
    the branch point that the speculative insertion of a new prompt finds.
    """

    def place(self, prompt: Prompt) -> list[int]:
        """End and branch-off point."""
        return prompt.snap([prompt.overlap, len(prompt.ids)] if prompt.overlap else [len(prompt.ids)])


class MarconiEviction(Scored):
    """Marconi (section 4.2): evicts the lowest `recency + alpha * FLOP efficiency`, both scaled to 0 .. 1, among nodes
    with at most one child. FLOP efficiency is the prefill saved over the node above per byte.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def values(self) -> Floats:
        """The score by slot; free slots last."""
        used = np.isfinite(self.gains)
        score = np.full(len(self.gains), np.inf)
        if used.any():
            score[used] = _scaled(self.ticks[used].astype(np.float64)) + self.alpha * _scaled(self.gains[used])
        return score

    def ranked(self) -> tuple[NDArray[np.int64], Floats]:
        """Leaves and nodes with one child first."""
        order, score = super().ranked()
        single = [slot for slot in order[:64].tolist() if len(self.items[slot].below(4)) <= 1]
        return (np.asarray(single, dtype=np.int64) if single else order), score

    def touched(self, slot: int, resumed: bool) -> bool:
        """Only the node that is hit is refreshed, not those above it."""
        return resumed


def _scaled(values: Floats) -> Floats:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


class SegLen(Scored):
    """SegLen, Marconi's successor in SGLang: evicts the lowest `weight * replay length + (1 - weight) * recency`, both
    scaled to 0 .. 1. The replay length is what must be computed again from the nearest state above; a hit refreshes
    the node that it used, and none above it.

    Source: sgl-project/sglang PR 22172, `--seglen-eff-weight` (0.85).
    """

    def __init__(self, weight: float = 0.85) -> None:
        super().__init__()
        self.weight = weight

    def touched(self, slot: int, resumed: bool) -> bool:
        """Only the node that is hit is refreshed, not those above it."""
        return resumed

    def gain(self, checkpoint: Checkpoint) -> float:
        """The replay length."""
        return _replay(checkpoint)

    def values(self) -> Floats:
        """The score by slot; free slots last."""
        used = np.isfinite(self.gains)
        score = np.full(len(self.gains), np.inf)
        if used.any():
            recency = _scaled(self.ticks[used].astype(np.float64))
            score[used] = self.weight * _scaled(self.gains[used]) + (1.0 - self.weight) * recency
        return score


class Thinning(Scored):
    """Thinning by coverage: of the states at the old end of the LRU order, the one goes whose loss uncovers the fewest
    tokens, the older one of two that tie; so an old path is thinned out and keeps every other state.

    Source: sgl-project/sglang PR 38000; a hit refreshes the node that it used alone (PR 31643). `tail` is the part of
    the order that is looked at.
    """

    def __init__(self, tail: float = 1.0) -> None:
        super().__init__()
        self.tail = tail

    def touched(self, slot: int, resumed: bool) -> bool:
        """Only the node that is hit is refreshed."""
        return resumed

    def gain(self, checkpoint: Checkpoint) -> float:
        """Tokens that are covered by no other state above."""
        return _replay(checkpoint)

    def values(self) -> Floats:
        """The tokens it uncovers in the old end, behind them all others by age; free slots last."""
        used = np.flatnonzero(np.isfinite(self.gains))
        score = np.full(len(self.gains), np.inf)
        order = used[np.argsort(self.ticks[used], kind="stable")]
        old = order[: max(1, round(self.tail * len(order)))]
        score[order] = 2.0**40 + np.arange(len(order))
        score[old] = self.gains[old] + np.arange(len(old)) / max(2 * len(old), 1)
        return score


class HitsPerToken(Scored):
    """Hits per token: frequency over size, the more recent one of two that tie stays.

    Source: sgl-project/sglang PR 30300, `--radix-eviction-policy hpt`. A node's size there is its edge in tokens;
    `by_bytes` takes what comes free here instead, state included.
    """

    def __init__(self, by_bytes: bool = False) -> None:
        super().__init__()
        self.by_bytes = by_bytes
        self._hits: dict[Checkpoint, int] = {}

    def stored(self, checkpoint: Checkpoint) -> None:
        """The request that brings it counts."""
        self._hits[checkpoint] = 1
        super().stored(checkpoint)

    def dropped(self, checkpoint: Checkpoint) -> None:
        """Its hits are forgotten."""
        super().dropped(checkpoint)
        del self._hits[checkpoint]

    def passed(self, path: Sequence[Node], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        """Every node that a prompt runs along is hit."""
        super().passed(path, overlap, resumed, now)
        for checkpoint in (item for node in path for item in node.checkpoints if item.position <= overlap):
            self._hits[checkpoint] += 1
            self.weigh(checkpoint)

    def gain(self, checkpoint: Checkpoint) -> float:
        """Hits over size."""
        return self._hits[checkpoint] / max(checkpoint.held if self.by_bytes else _replay(checkpoint), 1)

    def values(self) -> Floats:
        """Hits over size, then age; free slots last."""
        values: Floats = self.gains * (1.0 + 1e-9 * self.ticks)
        return values


def _replay(checkpoint: Checkpoint) -> float:
    above = checkpoint.above()
    return float(checkpoint.position - (above.position if above else 0))


class LlamaCpp(Policy):
    """llama.cpp's server: context checkpoints at least `step` tokens apart while the prompt is processed, and one near
    its end, at most 32 a slot; the oldest prompts leave the host cache first.

    Source: ggml-org/llama.cpp PRs 15293 and 16382, `--ctx-checkpoints`, `--checkpoint-min-step`.
    """

    def __init__(self, step: int = 8192, count: int = 32) -> None:
        super().__init__()
        self.step, self.count = step, count

    def place(self, prompt: Prompt) -> list[int]:
        """Steps and end."""
        steps = range(prompt.resumed + self.step, len(prompt.ids) - 2, self.step)
        return prompt.snap([*steps, len(prompt.ids)])[-self.count :]


class MLXLM(Policy):
    """mlx-lm's server: at most three segments, the end of the system prompt, of the last user message, and of the
    prompt.

    Source: ml-explore/mlx-lm, `mlx_lm/models/cache.py` (issues 980, 1162). `turn_end` is the token that ends a
    message; without one, as in plain text, only the end is known.
    """

    def __init__(self, turn_end: int = 248046) -> None:
        super().__init__()
        self.turn_end = turn_end

    def place(self, prompt: Prompt) -> list[int]:
        """System, user, tail."""
        turns = np.flatnonzero(prompt.ids == self.turn_end) + 1
        return prompt.snap([*turns[:1].tolist(), *turns[-1:].tolist(), len(prompt.ids)])


class PaperDP(HistogramDP):
    """The paper's cache (arXiv 2605.05219): `count` checkpoints a prompt by its DP on the global histogram, first in
    first out.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.default_limit = count


@dataclass(frozen=True)
class Rival:
    """A rival in its variants, each a way to build its policy and its eviction."""

    name: str
    variants: tuple[tuple[str, Callable[[], Policy], Callable[[], Eviction]], ...]


RIVALS = (
    Rival("vLLM align", (("block 512", VLLMAlign, LRU),)),
    Rival("vLLM all", (("block 512", VLLMAll, LRU),)),
    Rival("SGLang", (("interval 256", SGLang, LRU),)),
    Rival(
        "Marconi", tuple((f"alpha {a:g}", MarconiAdmission, lambda a=a: MarconiEviction(a)) for a in (0.2, 1.0, 5.0))
    ),
    Rival(
        "SegLen",
        tuple(
            (f"weight {w:g}, interval {i}", lambda i=i: SGLang(i), lambda w=w: SegLen(w))
            for w in (0.5, 0.85)
            for i in (64, 256)
        ),
    ),
    Rival(
        "thinning",
        tuple(
            (f"tail {t:g}, interval {i}", lambda i=i: SGLang(i), lambda t=t: Thinning(t))
            for t in (0.25, 1.0)
            for i in (64, 256)
        ),
    ),
    Rival(
        "hits per token",
        tuple(
            (f"by {'bytes' if b else 'tokens'}, interval {i}", lambda i=i: SGLang(i), lambda b=b: HitsPerToken(b))
            for b in (False, True)
            for i in (64, 256)
        ),
    ),
    Rival("llama.cpp", tuple((f"step {step}", lambda step=step: LlamaCpp(step), LRU) for step in (512, 2048, 8192))),
    Rival("mlx-lm", (("three segments", MLXLM, LRU),)),
    Rival("paper", tuple((f"M = {count}", lambda count=count: PaperDP(count), FIFO) for count in (1, 4, 16))),
)
