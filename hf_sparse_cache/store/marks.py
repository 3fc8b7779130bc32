"""Prefixes that the caller has announced: a checkpoint is kept at the end of each, come what may."""

from __future__ import annotations

import numpy as np

from ..planning.cuts import Tokens
from .tree import Checkpoint


class Marks:
    """Announced prefixes by space, and the checkpoints kept for them. Used under the store's lock."""

    def __init__(self) -> None:
        # By space and length; bytes are compared in full, and found without looking at every other prefix.
        self._prefixes: dict[str, dict[int, set[bytes]]] = {}
        self.tokens = 0  # of all announced prefixes
        self.kept: list[tuple[str, Checkpoint]] = []

    def announced(self) -> Marks:
        """The same announcements, counted anew, with nothing kept for them yet."""
        found = Marks()
        for space in list(self._prefixes):
            for prefix in self.prefixes(space):
                found.add(prefix, space)
        return found

    def knows(self, prefix: Tokens, space: str) -> bool:
        """Whether a prefix was announced."""
        return prefix.tobytes() in self._prefixes.get(space, {}).get(len(prefix), ())

    def add(self, prefix: Tokens, space: str) -> None:
        """Announce a prefix, int32 `(length,)`. Announcing it again changes nothing."""
        if not self.knows(prefix, space):
            self._prefixes.setdefault(space, {}).setdefault(len(prefix), set()).add(prefix.tobytes())
            self.tokens += len(prefix)

    def prefixes(self, space: str) -> list[Tokens]:
        """The announced prefixes of a space, the shortest first."""
        known = self._prefixes.get(space, {})
        return [np.frombuffer(prefix, np.int32) for length in sorted(known) for prefix in sorted(known[length])]

    def lengths(self, ids: Tokens, space: str) -> list[int]:
        """Lengths of the announced prefixes that this prompt begins with, ascending."""
        known = self._prefixes.get(space)
        if not known:
            return []
        return sorted(length for length in known if length <= len(ids) and ids[:length].tobytes() in known[length])

    def forget(self, space: str | None = None) -> list[Checkpoint]:
        """Drop the announcements of one space, or all; returns the checkpoints that were kept for them."""
        released = [checkpoint for owner, checkpoint in self.kept if space in (None, owner)]
        self.kept = [(owner, checkpoint) for owner, checkpoint in self.kept if space not in (None, owner)]
        for name in list(self._prefixes) if space is None else [space]:
            self.tokens -= sum(length * len(found) for length, found in self._prefixes.pop(name, {}).items())
        return released
