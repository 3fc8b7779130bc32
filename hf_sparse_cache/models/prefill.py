"""The prefill of one request: restore the deepest checkpoint, run the remaining segments, capture on the way.

A run that is resumed, and one from nothing over the same segments, execute the same forwards on the same states, which
is why their results agree bit for bit (see `planning.segments`). A row of a batch runs alone, without its padding, or
together with others (see `rows`), and all of them are stacked afterwards.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from transformers.utils import logging

from ..errors import out_of_memory
from ..planning.lineage import Lineage
from ..request import Request
from . import states, watch
from .binding import Binding
from .inputs import Row
from .interrupts import ask
from .lazy_kv import settle
from .live import LiveCache
from .rounding import NotRoundableError
from .tensors import LayerTensors, layer_tensors


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
    restore_seconds = resume_live(binding, live, request)
    capture_seconds = 0.0
    if not request.segments:  # the same prompt was read to its end before
        assert request.checkpoint is not None
        settle(live.layers)
        check()
        logits = states.logits_of(layer_tensors(request.checkpoint.state))
        if row.reader is not None:
            row.reader.read(len(row) - 1, len(row), logits)
        return binding.output(logits, live), Timing(0.0, restore_seconds)
    # The last row of many may differ in its last bits from the row alone, which the identical prompt is to find.
    tail = Tail(row) if row.tail > 1 else None
    for end in request.steps():
        ask()
        output = _read_segment(binding, live, row, end) if tail is None else tail.segment(binding, live, end)
        alone = tail is None and (row.reader is None or output.logits.shape[1] == 1)
        kept = end in request.planned and (alone or end < len(row))
        if kept or end in request.junctions or end == len(row):
            check()
        clock = time.perf_counter()
        rounded = round_off_live(binding, live, end) if request.rounds_at(end) else None
        if kept or end in request.junctions:
            try:
                state = states.capture_state(live, binding.rounding) if rounded is None else rounded
                kv = _kv_of(binding, live)
                if end in request.junctions:
                    request.hand_over(end, state, kv)
                if kept:  # for others it is not the end of the prompt
                    state = states.with_logits(state, output.logits) if end == len(row) else state
                    request.add(end, state, kv)
            except Exception as error:
                if not (out_of_memory(error) or isinstance(error, NotRoundableError)):
                    raise
                lacking = "scale" if isinstance(error, NotRoundableError) else "memory"
                logger.warning_once(f"No {lacking} to capture a checkpoint; the request goes on without it: {error}")
        capture_seconds += time.perf_counter() - clock
    return output, Timing(capture_seconds, restore_seconds)


def _kv_of(binding: Binding, live: LiveCache) -> Callable[[int, int], LayerTensors] | None:
    """Keys and values of a span of a live cache, as they are to be kept; each span is captured once."""
    if not live.full_attention_layers:
        return None
    return cache(partial(states.capture_kv, live, rounding=binding.rounding))


def round_off_live(binding: Binding, live: LiveCache, end: int) -> LayerTensors:
    """Go on from rounded values at the end of a segment; returns the state as it is kept.

    Raises:
        ChangedPrefillError: The state cannot be rounded, so that nothing of the prompt may be kept.
    """
    try:
        kept = states.round_off(live, binding.rounding, live.rounded, end)
    except NotRoundableError as error:
        raise watch.ChangedPrefillError(f"{error} (storage={binding.rounding.name!r})") from error
    live.rounded = end
    return kept


def resume_live(binding: Binding, live: LiveCache, request: Request) -> float:
    """Bring a fresh live cache to where a request resumes; returns the seconds that it took."""
    clock = time.perf_counter()
    if request.checkpoint is not None:
        spans = [layer_tensors(payload) for payload in request.kv_payloads()]
        states.restore(live, layer_tensors(request.checkpoint.state), spans, binding.rounding)
        live.rounded = request.resumed_tokens if binding.rounding.rounds else 0
    live.length = request.resumed_tokens
    return time.perf_counter() - clock


def replay(binding: Binding, live: LiveCache, row: Row, lineage: Lineage) -> Any:
    """Bring a fresh live cache to the end of a text by the segments of a lineage, from nothing.

    Tokens that were decoded run one by one, as they did then, and it is rounded where it was rounded then. Returns the
    model's output for the last segment.
    """
    output = None
    for step in lineage.steps():
        if step.rounds:
            round_off_live(binding, live, step.end)
            continue
        for end in range(step.start + 1, step.end + 1) if step.decoded else (step.end,):
            output = segment(binding, live, row, end)
    return output


def _read_segment(binding: Binding, live: LiveCache, row: Row, end: int) -> Any:
    """A segment whose logits the row's reader reads, if it has one."""
    if row.reader is None:
        return segment(binding, live, row, end)
    start = live.length
    kwargs = {**row.kwargs, **binding.logits_to_keep(row.reader.wanted(start, end))}
    output = segment(binding, live, replace(row, kwargs=kwargs), end)
    row.reader.read(start, end, output.logits)
    return output


def segment(binding: Binding, live: LiveCache, row: Row, end: int) -> Any:
    """Run the tokens of a row up to `end` that a live cache has not consumed yet, in one forward.

    Raises:
        ChangedPrefillError: What reached the layers is not these tokens, or not these alone.
    """
    return _forward(binding, live, replace(row, ids=row.batch[:, :end]))


def _forward(binding: Binding, live: LiveCache, rows: Row, mask: torch.Tensor | None = None) -> Any:
    """Run what a live cache has not consumed yet of ids `(batch, end)`, padded on the left where the mask is 0."""
    model, start, ids = binding.model, live.length, rows.ids
    end = ids.shape[1]
    asked = {"input_ids": ids[:, start:]}
    if _takes_positions(model):
        positions = torch.arange(end, device=ids.device)[None] if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        asked["position_ids"] = positions[:, start:].expand(*rows.position_dims, len(ids), end - start)
    inputs = model.prepare_inputs_for_generation(
        ids,
        next_sequence_length=end - start,
        is_first_iteration=True,
        attention_mask=mask,
        **{binding.cache_name: live},
        **rows.kwargs,
        **{name: value for name, value in asked.items() if name != "input_ids"},
    )
    watch.check_inputs(model, inputs, asked, live)
    if "logits_to_keep" in inputs and "logits_to_keep" in rows.kwargs:  # some models put their configuration's there
        inputs["logits_to_keep"] = rows.kwargs["logits_to_keep"]
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


def gathered(binding: Binding, rows: Sequence[Row], lives: Sequence[LiveCache]) -> tuple[LiveCache, Any]:
    """Run what is left of several prompts in one forward.

    Args:
        binding: the model.
        rows: the prompts, of one length unless nothing of any has been computed.
        lives: how far each of them is, all of them equally far.

    Returns:
        A live cache of all of them, laid out as a left-padded batch, and the model's output.
    """
    done, width = lives[0].length, max(map(len, rows))
    live = binding.live_cache()
    if done:
        for one in lives:
            settle(one.layers)
        states.stack(live, lives, done)
        live.length = done
    missing = [width - len(row) for row in rows]
    pad = torch.nn.functional.pad
    ids = torch.stack([pad(row.ids, (left, 0)) for row, left in zip(rows, missing, strict=True)])
    mask = None
    if any(missing):
        ones = (pad(torch.ones_like(row.ids), (left, 0)) for row, left in zip(rows, missing, strict=True))
        mask = torch.stack([*ones]).long()
    return live, _forward(binding, live, replace(rows[0], ids=ids), mask)


def join_rows(
    binding: Binding, live: LiveCache, filled: Sequence[tuple[LiveCache, Any]], order: list[int], width: int
) -> Any:
    """One output and one live cache for a whole batch from those of its distinct rows.

    Args:
        binding: the model.
        live: a fresh cache, filled in place.
        filled: live caches and outputs, each of one distinct row or of several.
        order: for each row of the batch, which distinct row it is, counted through all of them.
        width: columns of the left-padded batch.
    """
    logits = torch.cat([output.logits[:, -1:] for _, output in filled])
    if len(filled) == len(logits):
        states.stack(live, [filled[index][0] for index in order], width)
    else:
        states.stack(live, [cache for cache, _ in filled], width)
        live.reorder_cache(_queued(order, logits.device))  # type: ignore[arg-type]
    live.length = width
    if order != [*range(len(logits))]:
        logits = logits.index_select(0, _queued(order, logits.device))
    return binding.output(logits, live)


def _queued(values: list[int], device: torch.device) -> torch.Tensor:
    """Integers on a device, for whose copy nobody waits."""
    return torch.tensor(values).to(device, non_blocking=True)


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
