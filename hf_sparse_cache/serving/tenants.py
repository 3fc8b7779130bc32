"""One handle for each namespace, over one model and one store."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from ..cache import SparsePrefixCache


class Tenants:
    """The handles of the namespaces that came last. What the others stored stays in the store, under their names.

    The inference thread makes a handle when a namespace comes for the first time; others may look.

    Args:
        make: makes the handle of a namespace.
        most: how many are kept at hand.
    """

    def __init__(self, make: Callable[[str], SparsePrefixCache], most: int) -> None:
        self._make, self._most = make, most
        self._handles: OrderedDict[str, SparsePrefixCache] = OrderedDict()
        self._lock = threading.Lock()

    def handle(self, namespace: str) -> SparsePrefixCache:
        """The handle of a namespace."""
        handle = self._handles.get(namespace)
        made = self._make(namespace) if handle is None else handle
        with self._lock:
            self._handles[namespace] = made
            self._handles.move_to_end(namespace)
            most = len(self._handles) - self._most
            gone = [self._handles.popitem(last=False)[1] for _ in range(most)]
        for old in gone:
            old.detach()
        return made

    def all(self) -> list[tuple[str, SparsePrefixCache]]:
        """Those at hand, the last used one first."""
        with self._lock:
            return list(self._handles.items())[::-1]

    def close(self) -> None:
        """Give the model its own methods back."""
        with self._lock:
            gone = list(self._handles.values())
            self._handles.clear()
        for handle in gone:
            handle.detach()
