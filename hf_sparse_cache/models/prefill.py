"""The prefill of one request: restore the deepest checkpoint, run the remaining segments, capture on the way.

A run that is resumed, and one from nothing over the same segments, execute the same forwards on the same states, which
is why their results agree bit for bit (see `planning.segments`). Every distinct row of a batch runs alone, without its
padding, and the rows are stacked afterwards.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from transformers.utils import logging

from ..errors import out_of_memory
from ..planning.lineage import Lineage
from ..request import Request
from . import states, watch
from .binding import Binding
from .inputs import Row
from .lazy_kv import settle
from .live import LiveCache
from .tensors import layer_tensors


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Timing:
    """Seconds of one row's prefill that an uncached run does not spend."""

    capture_seconds: float = 0.0
    restore_seconds: float = 0.0


class Tail:
    """The logits of a prompt's last tokens, which may span segments."""

    def __init__(self, row: Row) -> None:
        self._row, self._first = row, len(row) - row.tail
        self._found: list[torch.Tensor] = []

    def segment(self, binding: Binding, live: LiveCache, end: int) -> Any:
        """The output of the next segment, which gives the logits of those of its tokens that are wanted."""
        wanted = max(0, end - max(live.length, self._first))
        kwargs = {**self._row.kwargs, "logits_to_keep": max(1, wanted)}  # 0 would be all of them
        output = segment(binding, live, replace(self._row, kwargs=kwargs), end)
        if wanted:
            self._found.append(output.logits[:, -wanted:])
        if end == len(self._row):
            output.logits = torch.cat(self._found, dim=1)
        return output


def prefill_row(
    binding: Binding,
    live: LiveCache,
    row: Row,
    request: Request,
    check: Callable[[], None] = lambda: None,
) -> tuple[Any, Timing]:
    """Bring a fresh live cache to the end of one prompt.

    Args:
        binding: the model, whose own `prepare_inputs_for_generation` and forward run every segment.
        live: a fresh cache, filled in place.
        row: the prompt.
        request: its open request: what to restore, which segments to run, what to capture.
        check: called behind each forward whose results are kept, in a checkpoint or as the answer; raises where the
            model is no longer the one that the prompt is for.

    Returns:
        The model's output for the last segment, and what resuming and capturing cost.
    """
    clock = time.perf_counter()
    if request.checkpoint is not None:
        spans = [layer_tensors(payload) for payload in request.kv_payloads()]
        states.restore(live, layer_tensors(request.checkpoint.state), spans)
    restore_seconds = time.perf_counter() - clock
    capture_seconds = 0.0
    planned = set(request.planned)
    live.length = request.resumed_tokens
    if not request.segments:  # the same prompt was read to its end before
        assert request.checkpoint is not None
        settle(live.layers)
        check()
        logits = states.logits_of(layer_tensors(request.checkpoint.state))
        return binding.output(logits, live), Timing(0.0, restore_seconds)
    tail = Tail(row) if row.tail > 1 else None
    if tail is not None:
        # The last row of many may differ in its last bits from the row alone, which the identical prompt is to find.
        planned.discard(len(row))
    for end in request.segments:
        output = segment(binding, live, row, end) if tail is None else tail.segment(binding, live, end)
        if end in planned or end == len(row):
            check()
        if end in planned:
            clock = time.perf_counter()
            try:
                state, kv = states.capture_state(live), partial(states.capture_kv, live)
                state = states.with_logits(state, output.logits) if end == len(row) else state
                request.add(end, state, kv if live.full_attention_layers else None)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                logger.warning_once(f"No memory to capture a checkpoint; the request goes on without it: {error}")
            capture_seconds += time.perf_counter() - clock
    return output, Timing(capture_seconds, restore_seconds)


def replay(binding: Binding, live: LiveCache, row: Row, lineage: Lineage) -> Any:
    """Bring a fresh live cache to the end of a text by the segments of a lineage, from nothing.

    Tokens that were decoded run one by one, as they did then. Returns the model's output for the last segment.
    """
    output = None
    for step in lineage.steps():
        for end in range(step.start + 1, step.end + 1) if step.decoded else (step.end,):
            output = segment(binding, live, row, end)
    return output


def segment(binding: Binding, live: LiveCache, row: Row, end: int) -> Any:
    """Run the tokens of a row up to `end` that a live cache has not consumed yet, in one forward.

    Raises:
        ChangedPrefillError: What reached the layers is not these tokens, or not these alone.
    """
    model, start, ids = binding.model, live.length, row.ids[None, :end]
    asked = {"input_ids": ids[:, start:]}
    if _takes_positions(model):
        positions = torch.arange(start, end, device=ids.device)
        asked["position_ids"] = positions.expand(*row.position_dims, 1, end - start)
    inputs = model.prepare_inputs_for_generation(
        ids,
        next_sequence_length=end - start,
        is_first_iteration=True,
        attention_mask=None,
        **{binding.cache_name: live},
        **row.kwargs,
        **{name: value for name, value in asked.items() if name != "input_ids"},
    )
    watch.check_inputs(model, inputs, asked, live)
    if "logits_to_keep" in inputs and "logits_to_keep" in row.kwargs:  # some models put their configuration's there
        inputs["logits_to_keep"] = row.kwargs["logits_to_keep"]
    output = _uncompiled(model)(**inputs, return_dict=True)
    settle(live.layers)
    live.length = end
    watch.check_filled(live, end)
    return output


def _takes_positions(model: Any) -> bool:
    """Whether the model's forward takes `position_ids`; a forward put in its place may not say so."""
    own = type(model).forward
    return _names_positions(own) or ("forward" in vars(model) and _names_positions(model.forward))


@lru_cache(maxsize=64)
def _names_positions(forward: Callable[..., Any]) -> bool:
    return "position_ids" in inspect.signature(forward).parameters


def join_rows(binding: Binding, live: LiveCache, rows: Sequence[tuple[LiveCache, Any]], width: int) -> Any:
    """One output and one live cache for a whole batch from those of its rows.

    Args:
        binding: the model.
        live: a fresh cache, filled in place.
        rows: live cache and output of each row, in the order of the batch; equal rows may share them.
        width: columns of the left-padded batch.
    """
    states.stack(live, [cache for cache, _ in rows], width)
    live.length = width
    logits = torch.cat([output.logits[:, -1:] for _, output in rows])
    return binding.output(logits, live)


def _uncompiled(model: Any) -> Callable[..., Any]:
    """The model's call without `torch.compile`, which stays in use for decoding.

    A compiled prefill would be compiled anew for segments of new lengths, and kernels of another specialisation round
    differently, so that the result of a segment would depend on which lengths came before it.
    """
    original: Callable[..., Any] | None = getattr(model.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
    if original is not None:
        return original
    call: Callable[..., Any] = model if getattr(model, "_compiled_call_impl", None) is None else model._call_impl
    return call
