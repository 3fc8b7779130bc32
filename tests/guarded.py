"""Locks that say whether they are held, and dictionaries that change only under one: what threads share is guarded."""

from __future__ import annotations

import threading
import weakref
from typing import Any


class Held:
    """A reentrant lock that knows whether it is held, and how often it was taken."""

    def __init__(self) -> None:
        self._lock, self.depth, self.taken = threading.RLock(), 0, 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self.depth += 1
        self.taken += 1

    def __exit__(self, *exception: object) -> None:
        self.depth -= 1
        self._lock.release()


class Guarded(dict[Any, Any]):
    """Every look at it and every change of it wants the lock to be held."""

    def __init__(self, lock: Held, *items: Any) -> None:
        super().__init__(*items)
        self.lock = lock

    def _check(self) -> None:
        assert self.lock.depth > 0, "nobody holds the lock"

    def get(self, *given: Any) -> Any:
        self._check()
        return super().get(*given)

    def setdefault(self, *given: Any) -> Any:
        self._check()
        return super().setdefault(*given)

    def pop(self, *given: Any) -> Any:
        self._check()
        return super().pop(*given)

    def clear(self) -> None:
        self._check()
        super().clear()

    def __getitem__(self, key: Any) -> Any:
        self._check()
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._check()
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self._check()
        super().__delitem__(key)


class _Unwatched(Guarded):
    """A key may go whenever nobody else has it any more."""

    def __delitem__(self, key: Any) -> None:
        dict.__delitem__(self, key)


class GuardedWeakly(weakref.WeakKeyDictionary[Any, Any]):
    """The same by weak keys."""

    def __init__(self, lock: Held) -> None:
        super().__init__()
        self.data = _Unwatched(lock)  # type: ignore[assignment]
