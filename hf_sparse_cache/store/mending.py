"""What an interrupt leaves of the books: where one struck while they were written, they start over.

Ctrl-C raises `KeyboardInterrupt` between any two lines. In a forward, in a copy or in a file it does no harm: whoever
was under way gives back what he holds. In the few lines that write the books it leaves them half written, and no order
of lines could help it. What is stored is only worth computing, so those books are emptied, with one warning; the rule
looks at where the interrupt struck, and costs nothing where none did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar


_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S")
_ROOM, _PACKAGE = __name__.rpartition(".")[0], __name__.partition(".")[0]
# They write from one call into the next, also by the hands of a user's own eviction.
_BOOKS = {
    f"{_ROOM}.{name}" for name in ("ledger", "chains", "forest", "tree", "marks", "eviction", "value", "survival")
}
# Between their own lines somebody may hold what nobody knows of yet; what they call is a file, a copy or a cut.
_AROUND = [[f"{_ROOM}.{name}"] for name in ("store", "tier", "host", "disk", "visit", "holding", "mending")]


def mended(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """A method of a store, or of what has one as `_store`, after which its books are right, interrupted or not."""

    @wraps(method)
    def whole(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            store: Any = getattr(self, "_store", self)
            interrupt = store.mend(error)
            try:
                if interrupt is None or interrupt is error:
                    raise
                raise interrupt from None
            finally:
                del interrupt  # or its traceback would keep itself alive, and all that was stored

    return whole


def interrupt_behind(error: BaseException | None) -> BaseException | None:
    """What cut the caller off in the middle of a line, if anything did: no `Exception`, or an allocation that failed.

    Where books are half written, giving back what one holds may fail as well: then it is what came first.
    """
    found = None
    while error is not None:
        if isinstance(error, MemoryError) or not isinstance(error, Exception | GeneratorExit):
            found = error
        error = error.__context__
    return found


def tears(interrupt: BaseException) -> bool:
    """Whether it struck where the books may be half written, or something be held that nobody knows of."""
    names = [name for name in _came_through(interrupt) if name.partition(".")[0] == _PACKAGE]
    return not _BOOKS.isdisjoint(names) or names[-1:] in _AROUND


def _came_through(error: BaseException) -> Iterator[str]:
    """Of the frames that it came through, the innermost last."""
    trace = error.__traceback__
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__"))
        trace = trace.tb_next
