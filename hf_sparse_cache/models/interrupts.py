"""Ways out of a prefill: what a server sets, and the prefill asks between two segments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


_check: ContextVar[Callable[[], None] | None] = ContextVar("hf_sparse_cache_interrupt", default=None)


@contextmanager
def interruptible(check: Callable[[], None]) -> Iterator[None]:
    """Have `check` called between the segments of every prefill inside, in this thread or task alone.

    An exception that it raises ends the prefill, and `generate()` with it. What was captured before stays. A prompt is
    run in pieces of at most `SparseCacheConfig.pieces` tokens, which bounds how long it takes until it is asked.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def ask() -> None:
    """Call what was set, if anything was."""
    check = _check.get()
    if check is not None:
        check()
