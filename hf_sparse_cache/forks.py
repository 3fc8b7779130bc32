"""After a fork the child starts clean: locks that another thread held are new, and nothing that was shared is kept."""

from __future__ import annotations

import os
import threading
import weakref
from operator import attrgetter
from typing import Protocol


class Forkable(Protocol):
    """Anything that holds a lock or shares a file with its parent process."""

    def after_fork(self) -> None:
        """Called in the child, before any code of the program runs there."""


class ForkSafeLock:
    """A reentrant lock that is free in a child process, whoever held it in the parent."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        starts_clean(self)

    def after_fork(self) -> None:
        """Replaces the lock: its owner may be a thread that the child does not have."""
        self._lock = threading.RLock()

    # The native lock's own: an interrupt may strike inside a method of Python, and would keep what it has just taken.
    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))


_known: weakref.WeakSet[Forkable] = weakref.WeakSet()


def starts_clean(thing: Forkable) -> None:
    """Calls `thing.after_fork()` in every child process from now on, as long as `thing` lives."""
    _known.add(thing)


def _clean() -> None:
    for thing in list(_known):
        thing.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_clean)
