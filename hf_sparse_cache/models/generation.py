"""How `generate()` is taught to use a handle: three methods overridden on one model object, and given back.

`_validate_model_kwargs` lets the handle pass where the model's forward has another name for its cache,
`_prepare_cache_for_generation` is where every decoding mode begins a request and is given a live cache of its own, and
`_prefill` is where the prompt is run. Calls without a handle reach the model's own methods untouched.
"""

from collections.abc import Callable
from typing import Any

from transformers.generation.utils import GenerationMode

from . import mamba1, rope
from .attachment import Attachment, Replacement
from .binding import Binding
from .handle import Handle
from .inputs import why_uncached
from .live import LiveCache
from .watch import ChangedPrefillError


_CACHE_NAMES = ("past_key_values", "cache_params")


def attachment(binding: Binding) -> Attachment:
    """What attaches a handle to its model's `generate()`, not yet made."""
    return Attachment(binding.model, _REPLACEMENTS)


def _handle_in(model_kwargs: dict[str, Any]) -> Handle | None:
    given = (model_kwargs.get(name) for name in _CACHE_NAMES)
    return next((value for value in given if isinstance(value, Handle)), None)


def _validate_model_kwargs(model: Any, own: Callable[..., Any], model_kwargs: dict[str, Any]) -> None:
    handle = _handle_in(model_kwargs)
    if handle is not None:
        handle.check_call(model)
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
    server = handle.server
    if generation_config.use_cache is False:
        server.uncached(None, "use_cache=False keeps no state to resume from")
        return own(generation_config, model_kwargs, generation_mode, *args, **kwargs)
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        server.uncached(None, "assisted decoding runs the prompt and the first candidates in one pass")
        return own(generation_config, model_kwargs, generation_mode, *args, **kwargs)
    live = model_kwargs[server.binding.family.cache_name] = server.live_cache()
    live.handle = handle
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
    if live is None or not isinstance(live.handle, Handle):
        return own(input_ids, generation_config, model_kwargs, *args, **kwargs)
    server, live.handle = live.handle.server, None
    why_not = why_uncached(model, input_ids, generation_config, model_kwargs) or server.why_not(input_ids.shape[1])
    if not why_not:
        try:
            with mamba1.held(model):
                return server.serve(live, input_ids, model_kwargs)
        except ChangedPrefillError as error:
            why_not = str(error)
            model_kwargs = {
                name: server.live_cache() if value is live else value for name, value in model_kwargs.items()
            }
    server.uncached(input_ids, why_not)
    rope.as_loaded(model)
    return own(input_ids, generation_config, model_kwargs, *args, **kwargs)


_REPLACEMENTS: dict[str, Replacement] = {
    "_validate_model_kwargs": _validate_model_kwargs,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "_prefill": _prefill,
}
