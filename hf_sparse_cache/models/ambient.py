"""A handle that calls of `generate()` use unasked: for pipelines, agents and whatever makes the call itself.

A model has one such handle at most. Runs that are there to be compared with, those of `check_exactness`, of benchmarks
and of the command line's baselines, are made inside of `off()`, where only a handle that is given is used.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..forks import ForkSafeLock
from .families import CACHE_NAMES
from .handle import Handle


_lock = ForkSafeLock()
_handles: weakref.WeakKeyDictionary[Any, weakref.ref[Handle]] = weakref.WeakKeyDictionary()
_off: ContextVar[bool] = ContextVar("hf_sparse_cache.off", default=False)


@contextmanager
def off() -> Iterator[None]:
    """Calls of this thread or task use no handle that they are not given."""
    before = _off.get()
    _off.set(True)
    try:
        yield
    finally:
        _off.set(before)


def claim(model: Any, handle: Handle) -> None:
    """Let calls of a model use a handle unasked, until it is detached or collected.

    Raises:
        ValueError: They use another one.
    """
    with _lock:
        if _alive(model) not in (None, handle):
            raise ValueError(
                f"ambient=True: calls of this {type(model).__name__} already use another SparsePrefixCache unasked. "
                "Detach that one first, or give this one to the calls that are to use it."
            )
        _handles[model] = weakref.ref(handle)


def handle_for(model: Any, kwargs: dict[str, Any]) -> Handle | None:
    """The handle that a call of `model.generate(**kwargs)` uses unasked; None where it brings a cache, or for none.

    The model may be called as another one's assistant, which rolls its cache back: that is left alone as well.
    """
    if not _handles or _off.get() or any(kwargs.get(name) is not None for name in CACHE_NAMES):
        return None
    if getattr(kwargs.get("generation_config"), "is_assistant", False):
        return None
    return _alive(model)


def implementation(model: Any, kwargs: dict[str, Any]) -> str | None:
    """The kind of cache that a call asks transformers for, by argument or configuration."""
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)


def _alive(model: Any) -> Handle | None:
    reference = _handles.get(model)
    handle = None if reference is None else reference()
    return handle if handle is not None and handle.serves(model) else None
