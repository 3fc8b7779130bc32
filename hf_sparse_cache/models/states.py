"""Capture and restore the state of a model at one position: one rule per cache layer class of transformers.

A position's state has two kinds of parts. Parts of fixed size (conv, recurrent, sliding window) are what a checkpoint
holds. Keys and values of full attention grow with the prompt and are cut into spans, so that checkpoints share them.
Everything captured is cloned or rounded (see `rounding`), because decoding writes into the tensors it reads. What is
restored is copied into a fresh live cache, keys and values by their layer's first update (see `lazy_kv`). A layer
class that is not in `_RULES` is refused, never guessed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache

from ..errors import UnsupportedModelError
from ..store.slabs import PAGE_BYTES
from .inputs import input_device
from .lazy_kv import Waiting, waiting
from .rounding import EXACT, Rounding, chained, plain_name
from .slotted import Slotted
from .tensors import LayerTensors as LayerTensors  # what is captured, under the name it is known by
from .tensors import Tensors, own


@dataclass(frozen=True)
class Part:
    """One kind of state in a layer: what is fixed in size, what grows, and how a batch is made of rows.

    `fixed` and `span` give the layer's own tensors, or views of them. `restore` returns the layer that takes the place
    of the one it is given, which may be the same; it keeps the fixed tensors themselves, and reads those of spans,
    which may be `Packed`. `tensors` names the attributes that the part takes care of.
    """

    fixed: Callable[[Any], Tensors]
    span: Callable[[Any, int, int], Tensors]
    restore: Callable[[Any, Tensors, Sequence[Tensors]], Any]
    stack: Callable[[Any, Sequence[Any], int], None]
    tensors: tuple[str, ...]


def _left_padded(tensors: Sequence[torch.Tensor], dim: int, length: int, batch_dim: int = 0) -> torch.Tensor:
    """Rows of different lengths as one batch, zeros on the left of `dim` up to `length`, as left-padding puts them."""
    rows = []
    for tensor in tensors:
        missing = length - tensor.shape[dim]
        shape = list(tensor.shape)
        shape[dim] = missing
        rows.append(torch.cat([tensor.new_zeros(shape), tensor], dim=dim) if missing else tensor)
    return torch.cat(rows, dim=batch_dim)


# -- conv and recurrent states: LinearAttentionLayer ------------------------------------------------------------------


def _recurrent_fixed(layer: Any) -> Tensors:
    found: Tensors = {}
    for i in range(layer.number_of_states):
        if layer.conv_states[i] is not None:
            found[f"conv.{i}"] = layer.conv_states[i]
        if layer.recurrent_states[i] is not None:
            found[f"recurrent.{i}"] = layer.recurrent_states[i]
    return found


def _recurrent_restore(layer: Any, fixed: Tensors, spans: Sequence[Tensors]) -> Any:
    for name, value in fixed.items():
        kind, _, index = name.partition(".")
        if kind in ("conv", "recurrent"):
            _set_state(layer, kind, int(index), value)
    return layer


def _set_state(layer: Any, kind: str, index: int, value: torch.Tensor) -> None:
    """What `lazy_initialization` does, with the state itself in place of zeros to be written over."""
    if kind == "conv":
        if layer.device is None:
            layer.dtype, layer.device = value.dtype, value.device
        layer.conv_kernel_size[index] = value.shape[-1]
    getattr(layer, f"{kind}_states")[index] = value
    getattr(layer, f"is_{kind}_states_initialized")[index] = True
    torch._dynamo.mark_static_address(value)  # it is updated in place
    # Without the flag the model ignores the state it has just been given.
    layer.has_previous_state[index] = True


def _recurrent_stack(layer: Any, rows: Sequence[Any], width: int) -> None:
    for i in range(layer.number_of_states):
        for kind, states in (("conv", "conv_states"), ("recurrent", "recurrent_states")):
            tensors = [getattr(row, states)[i] for row in rows]
            if tensors[0] is not None:
                _set_state(layer, kind, i, torch.cat(tensors))


# -- keys and values of full attention: DynamicLayer ------------------------------------------------------------------


def _full_span(layer: Any, start: int, end: int) -> Tensors:
    if not layer.is_initialized:
        return {}
    return {"keys": layer.keys[..., start:end, :], "values": layer.values[..., start:end, :]}


def _set_keys_values(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def _full_restore(layer: Any, fixed: Tensors, spans: Sequence[Tensors]) -> Any:
    if not spans or "keys" not in spans[0]:
        return layer
    return waiting(layer, [span["keys"] for span in spans], [span["values"] for span in spans])


def _full_stack(layer: Any, rows: Sequence[Any], width: int) -> None:
    if rows[0].is_initialized:
        _set_keys_values(
            layer,
            _left_padded([row.keys for row in rows], -2, width),
            _left_padded([row.values for row in rows], -2, width),
        )


# -- the window of sliding attention: DynamicSlidingWindowLayer -------------------------------------------------------


def _window_fixed(layer: Any) -> Tensors:
    if not layer.is_initialized:
        return {}
    return {"keys": layer.keys, "values": layer.values, "seen": layer.cumulative_length}


def _window_restore(layer: Any, fixed: Tensors, spans: Sequence[Tensors]) -> Any:
    if "keys" in fixed:
        _set_keys_values(layer, fixed["keys"], fixed["values"])
        layer.cumulative_length = fixed["seen"]
    return layer


def _window_stack(layer: Any, rows: Sequence[Any], width: int) -> None:
    if rows[0].is_initialized:
        held = min(width, layer.sliding_window - 1)
        _set_keys_values(
            layer,
            _left_padded([row.keys for row in rows], -2, held),
            _left_padded([row.values for row in rows], -2, held),
        )
        layer.cumulative_length = width


def place_windows(cache: Cache, model: Any) -> None:
    """Give the layers of a fresh cache their windows' lengths where the model is; each would wait to copy its own."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if getattr(layer, "_sliding_window_tensor", None) is not None:
            layer._sliding_window_tensor = _number(layer.sliding_window, input_device(model))


@lru_cache(maxsize=64)
def _number(value: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.long, device=device)


# -- the indexer of sparse attention: DynamicIndexedLayer -------------------------------------------------------------


def _indexer_span(layer: Any, start: int, end: int) -> Tensors:
    found: Tensors = {}
    if layer.is_indexer_initialized:
        found["indexer_keys"] = layer.indexer_keys[:, start:end]
    if getattr(layer, "indexer_position_ids", None) is not None:
        found["indexer_position_ids"] = layer.indexer_position_ids[..., start:end]
    return found


def _indexer_restore(layer: Any, fixed: Tensors, spans: Sequence[Tensors]) -> Any:
    if spans and "indexer_keys" in spans[0]:
        keys = chained([span["indexer_keys"] for span in spans], 1)
        layer.lazy_initialization_indexer(keys)
        layer.indexer_keys = keys
    if spans and "indexer_position_ids" in spans[0]:
        layer.indexer_position_ids = torch.cat([span["indexer_position_ids"] for span in spans], dim=-1)
    return layer


def _indexer_stack(layer: Any, rows: Sequence[Any], width: int) -> None:
    if rows[0].is_indexer_initialized:
        keys = _left_padded([row.indexer_keys for row in rows], 1, width)
        layer.lazy_initialization_indexer(keys)
        layer.indexer_keys = keys
    if getattr(rows[0], "indexer_position_ids", None) is not None:
        layer.indexer_position_ids = _left_padded([row.indexer_position_ids for row in rows], -1, width, 1)


def _no_fixed(layer: Any) -> Tensors:
    return {}


def _no_span(layer: Any, start: int, end: int) -> Tensors:
    return {}


PROBE_TOKENS = 2  # one would be a decode step
# Of what grows with the tokens, also within a sliding window: the dimension that counts them.
TOKEN_DIMS = {"keys": -2, "values": -2, "indexer_keys": 1, "indexer_position_ids": -1}

_RECURRENT = Part(
    _recurrent_fixed, _no_span, _recurrent_restore, _recurrent_stack, ("conv_states", "recurrent_states")
)
_FULL = Part(_no_fixed, _full_span, _full_restore, _full_stack, ("keys", "values"))
# The length of the window is also kept as a tensor, which never changes.
_WINDOW = Part(_window_fixed, _no_span, _window_restore, _window_stack, ("keys", "values", "_sliding_window_tensor"))
_INDEXER = Part(_no_fixed, _indexer_span, _indexer_restore, _indexer_stack, ("indexer_keys", "indexer_position_ids"))

_BY_NAME: dict[str, tuple[Part, ...]] = {
    "LinearAttentionLayer": (_RECURRENT,),
    "DynamicLayer": (_FULL,),
    "DynamicSlidingWindowLayer": (_WINDOW,),
    "DynamicIndexedLayer": (_FULL, _INDEXER),
    "LinearAttentionAndFullAttentionLayer": (_RECURRENT, _FULL),
    "LinearAttentionAndSlidingWindowAttentionLayer": (_RECURRENT, _WINDOW),
    "DummyLayer": (),
}
# By class, less those that this transformers does not have.
LOGITS = "logits"

_RULES: dict[type, tuple[Part, ...]] = {
    getattr(cache_utils, name): parts for name, parts in _BY_NAME.items() if hasattr(cache_utils, name)
}


def _parts(layer: Any) -> tuple[Part, ...]:
    return next(_RULES[kind] for kind in type(layer).__mro__ if kind in _RULES)


def check_layers(cache: Cache, model_name: str) -> None:
    """Refuse a cache with a layer class for which no rule is known; a class derived from a known one has none.

    Raises:
        UnsupportedModelError: Names the model, the layer class and the classes that have a rule.
    """
    for layer in cache.layers:
        if type(layer) not in _RULES:
            raise UnsupportedModelError(
                f"{model_name} keeps its state in cache layers of class {type(layer).__name__}, for which no capture "
                f"rule is known; known are {', '.join(sorted(kind.__name__ for kind in _RULES))}."
            )


def capture_state(cache: Cache, rounding: Rounding = EXACT) -> LayerTensors:
    """Copy the fixed-size state of every layer of a batch-1 cache at its current position, as it is to be kept.

    Raises:
        NotRoundableError: It is to be rounded, and cannot be.
    """
    return LayerTensors.captured(rounding.kept(fixed) for fixed in _fixed(cache))


def _fixed(cache: Cache) -> Iterator[Tensors]:
    return (_merged(part.fixed(layer) for part in _parts(layer)) for layer in cache.layers)


def _span(cache: Cache, start: int, end: int) -> Iterator[Tensors]:
    return (_merged(part.span(layer, start, end) for part in _parts(layer)) for layer in cache.layers)


def round_off(cache: Cache, rounding: Rounding, start: int, end: int) -> LayerTensors:
    """Put rounded values in the place of what a batch-1 cache holds: its state, and keys and values of start..end-1.

    Returns:
        What `capture_state` gives of it from now on.

    Raises:
        NotRoundableError: It cannot be rounded; nothing has been changed but layers before that one.
    """
    kept = []
    for layer, span in zip(_fixed(cache), _span(cache, start, end), strict=True):
        kept.append(rounding.kept(layer))
        for held, rounded in ((layer, kept[-1]), (span, rounding.kept(span) if start < end else {})):
            rounding.write_back(rounded, held)
    return LayerTensors.captured(kept)


def with_logits(state: LayerTensors, logits: torch.Tensor) -> LayerTensors:
    """A state at the end of a prompt, with what the last token gave: `(1, 1, vocabulary)`, kept behind the layers."""
    return LayerTensors.captured([{LOGITS: logits[:, -1:]}], state.layers)


def logits_of(state: LayerTensors) -> torch.Tensor:
    """The logits `(1, 1, vocabulary)` that `with_logits` put there, to be changed at will."""
    return own(state.reached().layers[-1][LOGITS])


def capture_kv(cache: Cache, start: int, end: int, rounding: Rounding = EXACT) -> LayerTensors:
    """Copy keys and values of the full-attention layers of a batch-1 cache for positions start..end-1, to be kept.

    Raises:
        NotRoundableError: They are to be rounded, and cannot be.
    """
    return LayerTensors.captured(rounding.kept(span) for span in _span(cache, start, end))


def lengths(layer: Any, tokens: int) -> Iterator[tuple[str, int, int]]:
    """What a layer keeps for each token: its name, the tokens it is there for, and for how many it should be.

    Args:
        layer: of a batch-1 cache.
        tokens: how many have been computed.
    """
    parts = _parts(layer)
    window = tokens if _WINDOW not in parts else min(tokens, layer.sliding_window - 1)
    if (_FULL in parts or _WINDOW in parts) and layer.is_initialized:
        yield "keys", layer.keys.shape[-2], window
        yield "values", layer.values.shape[-2], window
    if _WINDOW in parts and layer.is_initialized:
        yield "a window", layer.cumulative_length, tokens
    if _INDEXER in parts and layer.is_indexer_initialized:
        yield "an index", layer.indexer_keys.shape[1], tokens


def unruled(cache: Cache) -> str:
    """Where a cache keeps tensors for which there is no rule, in words; "" where it does not."""
    for index, layer in enumerate(cache.layers):
        known = {name for part in _parts(layer) for name in part.tensors}
        for name, value in vars(layer).items():
            if name not in known and _has_tensor(value):
                return f"layer {index} ({type(layer).__name__}) keeps tensors in {name}, for which there is no rule"
    kept = (name for name, value in vars(cache).items() if name != "layers" and _has_tensor(value))
    return next((f"the cache keeps tensors in {name}, outside its layers" for name in kept), "")


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_tensor(inner) for inner in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_has_tensor(inner) for inner in value)
    return torch.is_tensor(value)


def restore(cache: Cache, state: LayerTensors, spans: Sequence[LayerTensors], rounding: Rounding = EXACT) -> None:
    """Fill a fresh cache from a checkpoint's state and the KV spans from position 0 up to it, in order.

    Keys and values that are still being proved are waited for by the first layer that reads any, in its first update,
    where nothing is to be computed of them before.

    Raises:
        UnprovedError: What was to be read at once is not what was written.
    """
    reads = rounding.rounds or any(_INDEXER in _parts(layer) for layer in cache.layers)
    later = [span for span in spans if span.pledge is not None and not reads]
    for payload in (state, *spans):
        if not any(payload is span for span in later):
            payload.reached()
    held, *kv = (rounding.unread(payload.layers) for payload in (state, *spans))
    for index, layer in enumerate(cache.layers):
        fixed, grown = rounding.restored(held[index]), [rounding.packed(span[index]) for span in kv]
        for part in _parts(layer):
            layer = part.restore(layer, fixed, grown)
        if later and isinstance(layer, Waiting):
            layer.ready = partial(_reach, later)
        cache.layers[index] = layer


def _reach(spans: Sequence[LayerTensors]) -> None:
    for span in spans:
        span.reached()


def stack(cache: Cache, rows: Sequence[Cache], width: int) -> None:
    """Fill a fresh cache with one batch made of batch-1 caches, laid out as a left-padded batch.

    Args:
        cache: the fresh cache.
        rows: one cache per row of the batch; the same cache may stand for several rows.
        width: columns of the padded batch, at least the tokens of the longest row.
    """
    for index, layer in enumerate(cache.layers):
        for part in _parts(layer):
            part.stack(layer, [row.layers[index] for row in rows], width)


def _merged(found: Iterable[Tensors]) -> Tensors:
    return {name: value for tensors in found for name, value in tensors.items()}


@dataclass(frozen=True)
class StateSize:
    """Bytes that a model's states take.

    Attributes:
        state_bytes: the fixed-size state of one checkpoint.
        kv_bytes_per_token: keys and values of the full-attention layers.
        logits_bytes: what the checkpoint at the end of a prompt holds besides.
        page_bytes: of what each of the three is a multiple where it is stored, if it is large; see `slabs.taken`.
    """

    state_bytes: int
    kv_bytes_per_token: int
    logits_bytes: int = 0
    page_bytes: int = 1


@torch.no_grad()
def probe(model: Any, cache: Cache, cache_name: str) -> Any:
    """The output of the model for `PROBE_TOKENS` tokens on a fresh cache, which shows what it keeps of them."""
    ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=input_device(model))
    return model(input_ids=ids, use_cache=True, return_dict=True, **{cache_name: cache})


def measure(cache: Cache, output: Any, rounding: Rounding = EXACT) -> StateSize:
    """Measure what a checkpoint of a model would hold, by what `probe` filled and returned.

    Sliding windows are counted as full, since they are once a prompt is long enough.
    """
    state = 0
    fixed, grown = capture_state(cache, rounding), capture_kv(cache, 0, PROBE_TOKENS, rounding)
    for layer, held in zip(cache.layers, fixed.layers, strict=True):
        for name, value in held.items():
            if torch.is_tensor(value):
                windows = (
                    (getattr(layer, "sliding_window", 1) - 1) / PROBE_TOKENS if plain_name(name) in TOKEN_DIMS else 1
                )
                state += int(value.nbytes * windows)
    kv = sum(value.nbytes for value in grown.tensors()) // PROBE_TOKENS
    paged = any(isinstance(captured.layers, Slotted) for captured in (fixed, grown))
    return StateSize(state, kv, output.logits[:, -1:].nbytes, PAGE_BYTES if paged else 1)
