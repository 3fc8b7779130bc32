"""How `generate()` is taught to use a handle: three methods overridden on one model object, and given back.

`_validate_model_kwargs` lets the handle pass where the model's forward has another name for its cache,
`_prepare_cache_for_generation` is where every decoding mode begins a request and is given a live cache of its own, and
`_prefill` is where the prompt is run. Calls without a handle reach the model's own methods untouched.
"""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers.generation.utils import GenerationMode

from ..forks import ForkSafeLock
from . import mamba1
from .inputs import why_uncached
from .live import LiveCache


if TYPE_CHECKING:
    from ..cache import SparsePrefixCache

_CACHE_NAMES = ("past_key_values", "cache_params")
_lock = ForkSafeLock()
# id(model) -> handles attached to it; the entry goes with the last handle, before the model can.
_attached: dict[int, int] = {}


class _Override:
    """A method of one model object, replaced. Copies of the model get a copy bound to them, not to the original."""

    def __init__(self, model: Any, name: str) -> None:
        self._model = weakref.ref(model)
        self._name = name
        # Another library may have replaced the method on this object before us.
        previous = model.__dict__.get(name)
        # A copy of an attached model carries a copied override, which has no handle to serve.
        self._previous: Callable[..., Any] | None = previous._previous if isinstance(previous, _Override) else previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        own = self._previous or getattr(type(model), self._name).__get__(model)
        return _REPLACEMENTS[self._name](model, own, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Override":
        model = memo.get(id(self._model()), self._model())
        copied = _Override.__new__(_Override)
        copied._model, copied._name, copied._previous = weakref.ref(model), self._name, self._previous
        return copied

    def __reduce__(self) -> Any:
        raise TypeError(
            "This model has a SparsePrefixCache attached; call cache.detach() before pickling it or torch.save."
        )

    def give_back(self) -> None:
        model = self._model()
        if model is None or model.__dict__.get(self._name) is not self:
            return
        if self._previous is None:
            del model.__dict__[self._name]
        else:
            model.__dict__[self._name] = self._previous


def attach(model: Any) -> None:
    """Override the three methods on this model object. Counted: each call needs one `detach`."""
    with _lock:
        if _attached.get(id(model), 0) == 0:
            for name in _REPLACEMENTS:
                model.__dict__[name] = _Override(model, name)
        _attached[id(model)] = _attached.get(id(model), 0) + 1


def detach(model: Any) -> None:
    """Give the model its own methods back once the last handle has gone."""
    with _lock:
        _attached[id(model)] -= 1
        if _attached[id(model)] == 0:
            del _attached[id(model)]
            for name in _REPLACEMENTS:
                override = model.__dict__.get(name)
                if isinstance(override, _Override):
                    override.give_back()


def _handle_in(model_kwargs: dict[str, Any]) -> "SparsePrefixCache | None":
    from ..cache import SparsePrefixCache

    for name in _CACHE_NAMES:
        if isinstance(model_kwargs.get(name), SparsePrefixCache):
            handle: SparsePrefixCache = model_kwargs[name]
            return handle
    return None


def _validate_model_kwargs(model: Any, own: Callable[..., Any], model_kwargs: dict[str, Any]) -> None:
    handle = _handle_in(model_kwargs)
    if handle is not None:
        handle.check_model(model)
        # generate() passes a copy: what is dropped here is dropped from the validation only.
        model_kwargs = {name: value for name, value in model_kwargs.items() if value is not handle}
    own(model_kwargs)


def _prepare_cache_for_generation(
    model: Any,
    own: Callable[..., Any],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    handle = _handle_in(model_kwargs)
    if handle is None:
        return own(generation_config, model_kwargs, generation_mode, *args, **kwargs)
    if generation_config.cache_implementation is not None:
        raise ValueError(
            f"cache_implementation={generation_config.cache_implementation!r} cannot be combined with a "
            "SparsePrefixCache, which brings a dynamic cache of its own. Leave cache_implementation unset."
        )
    # Both names: beam search reorders the first one that it finds.
    for name in _CACHE_NAMES:
        model_kwargs.pop(name, None)
    if generation_config.use_cache is False:
        handle.note_unsupported(None, "use_cache=False keeps no state to resume from")
        return own(generation_config, model_kwargs, generation_mode, *args, **kwargs)
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        handle.note_unsupported(None, "assisted decoding runs the prompt and the first candidates in one pass")
        return own(generation_config, model_kwargs, generation_mode, *args, **kwargs)
    model_kwargs[handle.family.cache_name] = handle.open_live_cache()
    return None


def _prefill(
    model: Any,
    own: Callable[..., Any],
    input_ids: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    live = next((model_kwargs[name] for name in _CACHE_NAMES if isinstance(model_kwargs.get(name), LiveCache)), None)
    if live is None or live.handle is None:
        return own(input_ids, generation_config, model_kwargs, *args, **kwargs)
    handle, live.handle = live.handle, None
    why_not = why_uncached(model, input_ids, generation_config, model_kwargs)
    if why_not:
        handle.note_unsupported(input_ids, why_not)
        return own(input_ids, generation_config, model_kwargs, *args, **kwargs)
    with mamba1.held(model):
        return handle.serve(live, input_ids, model_kwargs)


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "_validate_model_kwargs": _validate_model_kwargs,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "_prefill": _prefill,
}
