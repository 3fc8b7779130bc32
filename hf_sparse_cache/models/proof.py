"""The proof, on the user's own model object, that its states can be captured, restored and continued.

One short prompt of two kernel chunks runs in one piece, in two pieces, from the state captured between them, and from
that state wiped. What was restored must continue as what never stopped, bit for bit, and two pieces must differ from
one by far less than a wiped state does, on the state of every layer: a layer that ignores, loses or hides what it
carries does not pass, whatever release or copy of transformers it comes from. The logits of the last few tokens count
as one more state, because the last layer's own does not depend on what that layer read.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..errors import UnsupportedModelError, out_of_memory
from ..forks import ForkSafeLock
from . import mamba1, prefill, states
from . import survey as surveys
from .binding import Binding
from .deviation import INT8, UNKNOWN
from .inputs import Row, input_device
from .live import LiveCache
from .rounding import EXACT, Rounding
from .tensors import LayerTensors
from .watch import ChangedPrefillError
from .weights import Identity, forget, identity


logger = logging.get_logger(__name__)

# Tokens of the first piece where kernels have no chunk, and of the second; all tokens together.
_FIRST, SECOND_TOKENS, _MOST = 48, 16, 512
# Two pieces may differ from one by this share of what a wiped state differs by. Honest models stay below 1e-5 in
# float32 and 2e-2 in 16 bits; code that is attached to the model has to stay below the second number. With weights
# packed for dynamic quantisation every piece is rounded by a scale of its own, which moves as much as a wiped state.
_SHARE, _SHARE_ATTACHED, _SHARE_PACKED = 0.1, 0.02, float("inf")
# Rounding, in units of the last place of the largest values: differences below it say nothing.
_ULPS = 4
# In 16 bits a token may go to another expert now and then; what is wrong is wrong on every prompt.
PROMPTS = 3

# What a configuration calls layers that keep no state.
_EMPTY = ("mlp", "moe")
# What a layer notes of whichever of its tensors came first; every tensor has a dtype and a device of its own.
_NOTES = {"dtype", "device"}
_lock = ForkSafeLock()
# For each model object and way of keeping its states: by code and settings that the binding holds (""), by its whole
# name why it does not, and by the code that is attached to it that this never stays the same.
_found: weakref.WeakKeyDictionary[Any, dict[str, dict[str, str]]] = weakref.WeakKeyDictionary()
_MOST_FOUND = 256  # for one model


class Proof:
    """What is proved of one binding, for the code that its model is made of at the moment.

    Args:
        binding: the binding.
        wanted: whether anything is to be proved.
    """

    def __init__(self, binding: Binding, wanted: bool = True) -> None:
        self._binding, self.wanted = binding, wanted

    @property
    def holds(self) -> bool:
        """Whether it was proved for the model as it is; False as long as nobody has tried, as in training mode."""
        return self.wanted and self._known().get(identity(self._binding.model).proved_by) == ""

    def require(self) -> None:
        """Prove it when a handle is made, unless the model is in training mode, where nothing is served.

        Raises:
            UnsupportedModelError: It does not hold, and nothing that is attached to the model can be the reason; or
                its states cannot be kept in as few bits as are asked for.
        """
        binding = self._binding
        storage = binding.config.storage
        measured = INT8.get(binding.text_config.model_type, UNKNOWN)
        if self.wanted and (why := measured.shortcoming(binding.family.name, storage)):
            bits = 8 if storage == "int8" else 16
            raise UnsupportedModelError(f"{type(binding.model).__name__} cannot be kept in {bits} bits: {why}.")
        if not self.wanted or self._binding.model.training:
            return
        why = self.shortcoming()
        attached = identity(self._binding.model).foreign
        if why and not attached:
            raise UnsupportedModelError(
                f"{type(self._binding.model).__name__} cannot be resumed exactly: {why}. Use this model without "
                "SparsePrefixCache, or with prove=False if you know better."
            )
        if why:
            logger.warning(f"Calls with this SparsePrefixCache run uncached while {attached} stays as it is: {why}.")

    def known(self, found: Identity) -> str | None:
        """What `shortcoming` has found of a model as it is; None where it has not looked yet."""
        if not self.wanted:
            return ""
        known = self._known()
        names = (found.attached, found.proved_by, str(found))
        return next((known[name] for name in names if name in known), None)

    def shortcoming(self) -> str:
        """Why a prompt cannot be served in segments, "" when it can; looked for once for each model and its code."""
        model = self._binding.model
        for _ in range(2):  # what is attached may change once, by chance, while it is looked at
            found = identity(model)
            said = self.known(found)
            if said is not None:
                return said
            known = self._known()
            why = self._attempt(found)
            if not found.foreign or identity(model).code == found.code:
                return _remember(known, str(found) if why else identity(model).proved_by, why)
        why = f"{found.foreign} is another after every forward, so that nothing fits twice"
        return _remember(known, found.attached, why)

    def _known(self) -> dict[str, str]:
        with _lock:
            return _found.setdefault(self._binding.model, {}).setdefault(self._binding.rounding.scheme, {})

    def _attempt(self, found: Identity) -> str:
        """One proof of a model as it is; what its forwards write down themselves is no setting from then on."""
        binding, model = self._binding, self._binding.model
        before = surveys.noted(model)
        share = _SHARE_PACKED if found.packed else _SHARE_ATTACHED if found.foreign else _SHARE
        why = _shortcoming(binding, share)
        between = surveys.noted(model)
        if not why and surveys.differ(before, between):
            states.probe(model, binding.live_cache(), binding.cache_name)
            if surveys.note_written((before, between, surveys.noted(model))):
                forget(model)
        return why


def _remember(known: dict[str, str], name: str, why: str) -> str:
    with _lock:
        if len(known) >= _MOST_FOUND:
            known.clear()
        known[name] = why
    return why


# -- the runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A live cache at the end of the prompt, and the logits `(1, tokens, vocabulary)` of the second piece."""

    live: LiveCache
    logits: torch.Tensor


def _shortcoming(binding: Binding, share: float) -> str:
    """Runs the proof: why it does not hold, "" when it does."""
    devices = {tensor.device for tensor in binding.model.parameters() if tensor.is_cuda}
    why = ""
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), mamba1.held(binding.model):
        for seed in range(PROMPTS):
            try:
                why = _disproof(binding, sample_prompt(binding, seed), share)
            except (ChangedPrefillError, UnsupportedModelError) as error:
                return str(error).rstrip(".")
            except Exception as error:
                if out_of_memory(error):
                    raise
                return f"a prompt in two pieces ends in {type(error).__name__}: {error}"
            if not why:
                break
    return why


def sample_prompt(binding: Binding, seed: int) -> torch.Tensor:
    """Ids `(1, length)` of ordinary tokens: none that stands for an image, begins or ends a text, or is special."""
    first = min(max(binding.chunk, _FIRST), _MOST - SECOND_TOKENS)
    vocabulary = binding.model.get_input_embeddings().num_embeddings
    ordinary = torch.ones(min(vocabulary, getattr(binding.text_config, "vocab_size", None) or vocabulary))
    special = [*binding.cut_ids, *_token_ids(binding.model.config.to_dict())]
    ordinary[[token for token in special if 0 <= token < len(ordinary)]] = 0
    weights, generator = ordinary if ordinary.any() else ordinary + 1, torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(weights, first + SECOND_TOKENS, replacement=True, generator=generator)
    return drawn[None].to(input_device(binding.model))


def _token_ids(values: Mapping[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif str(name).endswith(("_token_id", "_token_ids", "_token_index")):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


def _run(
    binding: Binding,
    ids: torch.Tensor,
    checkpoint: tuple[LayerTensors, LayerTensors] | None = None,
    rounding: Rounding = EXACT,
) -> _Run:
    """Ids `(1, length)` in one piece, or what is left of them behind a state with its keys and values, as kept."""
    live = binding.live_cache()
    if checkpoint is not None:
        state, kv = checkpoint
        states.restore(live, state, [kv] if live.full_attention_layers else [], rounding)
        live.length = ids.shape[1] - SECOND_TOKENS
    return _continued(binding, live, ids)


def _continued(binding: Binding, live: LiveCache, ids: torch.Tensor) -> _Run:
    kept = {"use_cache": True, "logits_to_keep": SECOND_TOKENS}
    return _Run(live, prefill.segment(binding, live, Row(ids[0], kept), ids.shape[1]).logits)


def _disproof(binding: Binding, ids: torch.Tensor, share: float) -> str:
    cut = ids.shape[1] - SECOND_TOKENS
    first = _run(binding, ids[:, :cut])
    why = states.unruled(first.live) or _unfilled(binding, first.live)
    if why:
        return why
    state, kv = states.capture_state(first.live), states.capture_kv(first.live, 0, cut)
    kept = _mapped(state, torch.clone), _mapped(kv, torch.clone)
    two = _continued(binding, first.live, ids)
    restored = _run(binding, ids, (state, kv))
    why = _different(two, restored) or states.unruled(two.live)
    both = [[*payload.layers] for payload in (*kept, state, kv)]
    if not why and not _same(both[:2], both[2:]):
        why = "what was captured changes when the model goes on"
    why = why or _rounds_otherwise(binding, ids[:, :cut], ids)
    if why:
        return why
    return _apart(_run(binding, ids), two, _run(binding, ids, (_wiped(state), _wiped(kv))), share)


def _rounds_otherwise(binding: Binding, first: torch.Tensor, ids: torch.Tensor) -> str:
    """Where what was kept of a rounded state does not continue as that state itself; "" nowhere."""
    rounding = binding.rounding
    if not rounding.rounds:
        return ""
    live, end = _run(binding, first).live, first.shape[1]
    state = states.round_off(live, rounding, 0, end)
    kv = states.capture_kv(live, 0, end, rounding)
    why = _different(_continued(binding, live, ids), _run(binding, ids, (state, kv), rounding))
    return f"with storage={rounding.name!r}, {why}" if why else ""


def _unfilled(binding: Binding, live: LiveCache) -> str:
    # Layers without mixing of tokens; older releases gave those of NemotronH a cache layer that stays empty.
    kinds = dict(enumerate(getattr(binding.text_config, "layer_types", None) or ()))
    held = zip(states.capture_state(live).layers, states.capture_kv(live, 0, live.length).layers, strict=True)
    for index, (fixed, grown) in enumerate(held):
        if not (fixed or grown or type(live.layers[index]).__name__ == "DummyLayer" or kinds.get(index) in _EMPTY):
            return f"layer {index} ({type(live.layers[index]).__name__}) keeps nothing in the cache that it was given"
    return ""


def _wiped(payload: LayerTensors) -> LayerTensors:
    return _mapped(payload, lambda value: torch.zeros_like(value) if value.is_floating_point() else value)


def _mapped(payload: LayerTensors, change: Any) -> LayerTensors:
    layers = ({name: change(v) if torch.is_tensor(v) else v for name, v in layer.items()} for layer in payload.layers)
    return LayerTensors(tuple(layers))


# -- the comparisons --------------------------------------------------------------------------------------------------


def _different(two: _Run, restored: _Run) -> str:
    """Where a restored state does not continue as the one that never stopped, to the bit; "" nowhere."""
    for index, (one, other) in enumerate(zip(two.live.layers, restored.live.layers, strict=True)):
        for name in sorted({*vars(one), *vars(other)} - _NOTES):
            if not _same(vars(one).get(name), vars(other).get(name)):
                return f"a restored state does not continue as before: {name} of layer {index} is another"
    if not _same(two.logits, restored.logits):
        return "a restored state does not continue as before: the logits are others"
    return ""


def _same(one: Any, other: Any) -> bool:
    """Equal to the bit, whatever holds it, NaN and all."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return alike and torch.equal(_bits(one), _bits(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and (not isinstance(one, (bool, int, float, str)) or one == other)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _apart(one: _Run, two: _Run, wiped: _Run, share: float) -> str:
    """Where two pieces do not compute what one does, "" nowhere; measured by what a wiped state changes."""
    for name, whole, pieces, without in _triples(one, two, wiped):
        if not whole.is_floating_point():
            if not torch.equal(whole, pieces):
                return f"{name} is another after two pieces than after one"
            continue
        values = [tensor.double() for tensor in (whole, pieces, without)]
        kept = torch.stack([value.isfinite() for value in values]).all(0)
        if not bool(kept.all()) and not (name == "the logits" and bool(kept.any())):
            return f"{name} holds values that are not finite, on every prompt that was tried, so nothing can be proved"
        whole_, pieces_, without_ = (value[kept] for value in values)
        off, gap, size = (_rms(value) for value in (pieces_ - whole_, without_ - whole_, whole_))
        if share < float("inf") and off > max(share * gap, _ULPS * torch.finfo(whole.dtype).eps * size):
            return f"{name} is off by {off:.1e} after two pieces, and by {gap:.1e} if the state between them is wiped"
    return ""


def _triples(one: _Run, two: _Run, wiped: _Run) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each tensor at the end of the prompt, of three runs: states, keys and values of the second piece, and of the
    last token of the first, where it shows if something depends on where a piece ends."""
    end = one.live.length
    cut, runs = end - SECOND_TOKENS, (one, two, wiped)
    captures: dict[str, Any] = {
        "": states.capture_state,
        " behind the cut": lambda live: states.capture_kv(live, cut, end),
        " before the cut": lambda live: states.capture_kv(live, cut - 1, cut),
    }
    for where, capture in captures.items():
        for index, layers in enumerate(zip(*(capture(run.live).layers for run in runs), strict=True)):
            for name, value in layers[0].items():
                if torch.is_tensor(value) and value.numel():
                    yield f"{name} of layer {index}{where}", value, layers[1][name], layers[2][name]
    yield "the logits", one.logits, two.logits, wiped.logits


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
