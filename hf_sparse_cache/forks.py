"""After a fork the child starts clean: locks that another thread held are new, and nothing that was shared is kept."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """Anything that holds a lock or shares a file with its parent process."""

    def after_fork(self) -> None:
        """Called in the child, before any code of the program runs there."""


_known: weakref.WeakSet[Forkable] = weakref.WeakSet()


def starts_clean(thing: Forkable) -> None:
    """Calls `thing.after_fork()` in every child process from now on, as long as `thing` lives."""
    _known.add(thing)


def _clean() -> None:
    for thing in list(_known):
        thing.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_clean)
