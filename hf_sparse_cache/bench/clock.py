"""One call of `generate()` by the clock, and everything that is noted about one request."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..exactness import greedy
from ..models import ambient


@dataclass
class Timed:
    """One request, served one way.

    Attributes:
        first_token_seconds: from the call of `generate()` to the first new token; with `max_new_tokens=1` its wall
            time.
        total_seconds: wall time of the whole call.
        new_tokens: tokens decoded, the first one included.
        tokens: these, shape `(new_tokens,)`.
        logits: of the first new token, float32 of shape `(vocabulary,)`; None where they were not asked for.
        prompt_tokens, overlap_tokens, resumed_tokens, computed_tokens: see `RequestInfo`; without a cache all is
            computed.
        prefill_seconds, match_seconds, plan_seconds, capture_seconds, restore_seconds, eviction_seconds: what the
            cache spent on this request, see `CacheStats`; eviction is not part of capture here. 0 where there is no
            cache.
        captured: positions of the checkpoints stored by this request.
        segments: ends of the segments behind the prefill's result; empty where there is no cache.
        checkpoints, checkpoint_bytes, kv_bytes: what is stored afterwards.
        device_peak_bytes: most bytes allocated on an accelerator during the call; 0 on a CPU.
        reason: why not more was resumed.
    """

    first_token_seconds: float
    total_seconds: float
    new_tokens: int
    tokens: torch.Tensor
    logits: torch.Tensor | None
    prompt_tokens: int
    overlap_tokens: int = 0
    resumed_tokens: int = 0
    computed_tokens: int = 0
    prefill_seconds: float = 0.0
    match_seconds: float = 0.0
    plan_seconds: float = 0.0
    capture_seconds: float = 0.0
    restore_seconds: float = 0.0
    eviction_seconds: float = 0.0
    captured: tuple[int, ...] = ()
    segments: tuple[int | tuple[int, ...], ...] = ()
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    kv_bytes: int = 0
    evictions: int = 0
    device_peak_bytes: int = 0
    reason: str = ""

    def row(self) -> dict[str, Any]:
        """What goes into a table: everything but the tensors and the segments."""
        row = {name: value for name, value in vars(self).items() if name not in ("tokens", "logits", "segments")}
        return {**row, "captured": list(self.captured)}


class _Clock(BaseStreamer):
    """Notes when the first new token came out; the first thing `generate()` streams is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def timed(model: Any, ids: torch.Tensor, max_new_tokens: int, *, logits: bool = False, **options: Any) -> Timed:
    """Greedy `generate()` on one prompt of shape `(1, length)`; `options` are its further keywords."""
    clock = _Clock()
    # One token needs no streamer: its time is the wall time of the call.
    streamer = {"streamer": clock} if max_new_tokens > 1 else {}
    _finish(ids)
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(ids.device)
    started = time.perf_counter()
    with ambient.off():
        result = model.generate(ids, **{**greedy(ids, max_new_tokens), "output_logits": logits, **streamer, **options})
    _finish(ids)
    ended = time.perf_counter()
    tokens = result.sequences[0, ids.shape[1] :].cpu()
    return Timed(
        first_token_seconds=(clock.times[1] if streamer else ended) - started,
        total_seconds=ended - started,
        new_tokens=len(tokens),
        tokens=tokens,
        logits=result.logits[0][0].float().cpu() if logits else None,
        prompt_tokens=ids.shape[1],
        computed_tokens=ids.shape[1],
        device_peak_bytes=torch.cuda.max_memory_allocated(ids.device) if ids.is_cuda else 0,
    )


def _finish(ids: torch.Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
