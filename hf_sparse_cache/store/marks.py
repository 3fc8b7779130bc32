"""Prefixes that the caller has announced: a checkpoint is kept at the last cut of each, come what may."""

from __future__ import annotations

import numpy as np

from ..planning.cuts import Positions, Tokens
from .tree import Checkpoint


class Marks:
    """Announced prefixes by space, and the checkpoints kept for them. Used under the store's lock."""

    def __init__(self) -> None:
        self._prefixes: dict[str, list[Tokens]] = {}
        self.kept: list[tuple[str, Checkpoint]] = []

    def add(self, prefix: Tokens, space: str) -> None:
        """Announce a prefix. Announcing it again changes nothing."""
        known = self._prefixes.setdefault(space, [])
        if not any(np.array_equal(prefix, other) for other in known):
            known.append(prefix.copy())

    def prefixes(self, space: str) -> list[Tokens]:
        """The announced prefixes of a space."""
        return list(self._prefixes.get(space, ()))

    def lengths(self, ids: Tokens, space: str) -> list[int]:
        """Lengths of the announced prefixes that this prompt begins with, ascending."""
        return sorted(
            len(prefix)
            for prefix in self._prefixes.get(space, ())
            if len(prefix) <= len(ids) and np.array_equal(prefix, ids[: len(prefix)])
        )

    def positions(self, ids: Tokens, cuts: Positions, space: str) -> set[int]:
        """The last cut of each announced prefix that this prompt begins with."""
        last = [int(np.searchsorted(cuts, length, side="right")) for length in self.lengths(ids, space)]
        return {int(cuts[count - 1]) for count in last if count}

    def forget(self, space: str | None = None) -> list[Checkpoint]:
        """Drop the announcements of one space, or all; returns the checkpoints that were kept for them."""
        released = [checkpoint for owner, checkpoint in self.kept if space in (None, owner)]
        self.kept = [(owner, checkpoint) for owner, checkpoint in self.kept if space not in (None, owner)]
        if space is None:
            self._prefixes.clear()
        else:
            self._prefixes.pop(space, None)
        return released
