"""How `generate()` is taught to use a handle: four methods overridden on one model object, and given back.

`generate` takes the handle under any of its names and sees to it that the call is counted, whatever becomes of it.
`_validate_model_kwargs` lets the handle pass where the model's forward has another name for its cache,
`_prepare_cache_for_generation` is where every decoding mode begins a request and is given a live cache of its own, and
`_prefill` is where the prompt is run. Calls without a handle reach the model's own methods untouched.
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import transformers
from transformers.generation.utils import GenerationMode

from . import ambient, answers, handed, mamba1, rope
from .attachment import Attachment, Hooks, Replacement
from .binding import Binding
from .calls import Call, innermost, opened, prompts_of
from .families import CACHE_NAMES
from .handle import Handle, refuse_class
from .inputs import Prompts, why_uncached
from .live import LiveCache
from .sitting import with_room
from .watch import ChangedPrefillError


def attachment(binding: Binding) -> Attachment:
    """What attaches a handle to its model, not yet made."""
    hooks = Hooks(_before_forward, handed.before_body, handed.after_body)
    return Attachment(binding.model, _REPLACEMENTS, hooks)


def _generate(model: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kwargs = _handed_back(model, kwargs)
    name, handle = _handle_in(kwargs)
    if handle is None:
        handle = ambient.handle_for(model, kwargs)
        asked = None if handle is None else ambient.implementation(model, kwargs)
        if handle is not None and asked is not None:
            why = f"cache_implementation={asked!r} asks for a cache of its own"
            handle.server.uncached(Call(handle, *prompts_of(args, kwargs)).prompt_tokens, why)
            handle = None
    if handle is None:
        return own(*args, **kwargs)
    handle.check_call(model, name)
    _refuse_implementation(kwargs.get("cache_implementation"))
    call = Call(handle, *prompts_of(args, kwargs), own_loop=kwargs.get("custom_generate") is not None)
    # Under the name that this release has for it, which no other name's deprecation concerns.
    given = {key: value for key, value in kwargs.items() if key not in CACHE_NAMES}
    given[handle.server.binding.cache_name] = handle
    with opened(call):
        result = own(*args, **given)
    if inspect.isgenerator(result) or inspect.isasyncgen(result) or inspect.iscoroutine(result):
        weakref.finalize(result, _close, call).atexit = False  # such a loop has yet to begin
    else:
        _close(call)
        if call.turn is not None and not call.own_loop:
            handle.server.answered(call.turn, result)
    return result


def _handed_back(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords in which the live cache of an earlier call is one that can go on.

    One that `prefill` gave goes on as it is, under the name that this release has for it (see `handed`). Of others,
    without keys and values nothing tells which tokens a cache holds, and transformers would run the whole text on top
    of them. Its handle stands in for it, which resumes what it has stored of the text; or nothing, where that is gone.
    """
    for name in CACHE_NAMES:
        live = kwargs.get(name)
        if not isinstance(live, LiveCache):
            continue
        handle = live.origin() if live.origin is not None else None
        usable = isinstance(handle, Handle) and handle.serves(model)
        if live.text is not None:
            if not usable:
                raise ValueError(f"{name} was prefilled by a SparsePrefixCache of another model, or one that is gone.")
            given = {key: kwargs[key] for key in kwargs if key not in CACHE_NAMES}
            return {**given, _handle(handle).server.binding.cache_name: live}
        if live.recurrent_only and live.length:
            kwargs = {**kwargs, name: handle} if usable else {key: kwargs[key] for key in kwargs if key != name}
    return kwargs


def _close(call: Call) -> None:
    """Count a call that came to its end without having been served, and say why."""
    if call.counted:
        return
    if call.own_loop:
        _uncached(call, "custom_generate runs the prompt in a loop of its own")
    else:
        _uncached(call, f"transformers {transformers.__version__} ran the prompt without announcing it")


def _uncached(call: Call, why: str) -> None:
    call.count()
    _handle_of(call).server.uncached(call.prompt_tokens, why)


def _handle_of(call: Call) -> Handle:
    return _handle(call.handle)


def _handle(handle: Any) -> Handle:
    assert isinstance(handle, Handle)
    return handle


def _handle_in(kwargs: dict[str, Any]) -> tuple[str, Handle | None]:
    """The handle among keywords, and its name there.

    Raises:
        ValueError: There is another cache beside it, or the class stands in its place.
    """
    given = {name: kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, type) and issubclass(value, Handle):
            refuse_class(name)
        if isinstance(value, Handle):
            if any(other is not value for other in given.values()):
                raise ValueError(f"{' and '.join(given)} are two caches, of which a call can use one: leave one out.")
            return name, value
    return "", None


def _refuse_implementation(name: str | None) -> None:
    if name is not None:
        raise ValueError(
            f"cache_implementation={name!r} cannot be combined with a SparsePrefixCache, which brings a dynamic cache "
            "of its own. Leave cache_implementation unset."
        )


def _before_forward(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a handle in a direct call of the model, which some models would ignore in silence."""
    for name in CACHE_NAMES:
        if isinstance(kwargs.get(name), Handle):
            raise ValueError(
                f"{name} is a SparsePrefixCache in a direct call of the model, and only generate() can use it: "
                f"model.generate(input_ids, {name}=cache). For a forward of your own give a cache of transformers, "
                "such as DynamicCache(config=model.config)."
            )
        if isinstance(kwargs.get(name), type) and issubclass(kwargs[name], Handle):
            refuse_class(name)


def _validate_model_kwargs(model: Any, own: Callable[..., Any], model_kwargs: dict[str, Any]) -> None:
    name, handle = _handle_in(model_kwargs)
    if handle is not None:
        handle.check_call(model, name)
        # generate() passes a copy: what is dropped here is dropped from the validation only.
        model_kwargs = {key: value for key, value in model_kwargs.items() if value is not handle}
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
    _, handle = _handle_in(model_kwargs)
    if handle is None:
        return own(generation_config, model_kwargs, generation_mode, *args, **kwargs)
    _refuse_implementation(generation_config.cache_implementation)
    # All names: beam search reorders the first one that it finds.
    for name in CACHE_NAMES:
        model_kwargs.pop(name, None)
    # None when the class's generate() was called, and not the model's.
    call = innermost(handle) or Call(handle)
    if generation_config.use_cache is False:
        _uncached(call, "use_cache=False keeps no state to resume from")
        return own(generation_config, model_kwargs, generation_mode, *args, **kwargs)
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        _uncached(call, "assisted decoding runs the prompt and the first candidates in one pass")
        return own(generation_config, model_kwargs, generation_mode, *args, **kwargs)
    live = model_kwargs[handle.server.binding.cache_name] = handle.server.live_cache()
    live.call, live.origin = call, weakref.ref(handle)
    call.decodes = answers.may_be_kept(generation_mode)
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
    live = next((model_kwargs[name] for name in CACHE_NAMES if isinstance(model_kwargs.get(name), LiveCache)), None)
    if live is not None and live.text is not None:
        return _continued(live, input_ids, generation_config, model_kwargs)
    if live is None or live.call is None:
        return own(input_ids, generation_config, model_kwargs, *args, **kwargs)
    call, live.call = live.call, None
    server = _handle_of(call).server

    def looked(_: bool) -> tuple[Prompts, str]:
        asked = Prompts.of(input_ids, model_kwargs)
        why_not = why_uncached(model, asked, generation_config, model_kwargs)
        if not why_not:
            why_not, live.found = server.look(input_ids.shape[1])
        return asked, why_not

    asked, why_not = with_room(server.means, live, looked)
    if not why_not:
        try:
            with mamba1.held(model):
                output = server.serve(live, asked, model_kwargs, call.given)
            call.count()
            call.turn, live.turn = live.turn if call.decodes else None, None
            return output
        except ChangedPrefillError as error:
            why_not = str(error)
            model_kwargs = {
                name: server.live_cache() if value is live else value for name, value in model_kwargs.items()
            }
    if call.ids is None:
        call.ids, call.mask = input_ids, model_kwargs.get("attention_mask")
    _uncached(call, why_not)
    rope.as_loaded(model)
    for value in model_kwargs.values():
        if isinstance(value, LiveCache):
            value.as_stock()
    return own(input_ids, generation_config, model_kwargs, *args, **kwargs)


def _continued(live: LiveCache, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> Any:
    """The prefill of a call that was given a live cache of `cache.prefill()`."""
    assert live.origin is not None
    server = _handle(live.origin()).server
    mask = model_kwargs.get("attention_mask")
    length = getattr(generation_config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
    kwargs: dict[str, Any] = {
        name: model_kwargs[name] for name in ("use_cache", "logits_to_keep") if name in model_kwargs
    }
    return handed.continued(server.binding, live, input_ids, length, kwargs)


_REPLACEMENTS: dict[str, Replacement] = {
    "generate": _generate,
    "_validate_model_kwargs": _validate_model_kwargs,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "_prefill": _prefill,
}
