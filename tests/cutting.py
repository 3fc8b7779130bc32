"""Cuts for tests of the store: a grid, or just where a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_sparse_cache.planning.cuts import CutRule, Positions, Tokens
from hf_sparse_cache.planning.segments import Bitwise


def every(grid: int) -> Bitwise:
    """Bitwise mode on a grid, without special tokens."""
    return Bitwise(CutRule(grid))


@dataclass(frozen=True)
class At(Bitwise):
    """Bitwise mode with cuts at given positions."""

    given: Sequence[int] = ()

    def cuts(self, ids: Tokens, marked: Sequence[int] = ()) -> Positions:
        """The given ones, those of a text that may be cut there."""
        return np.asarray([cut for cut in self.given if cut <= len(ids)], dtype=np.int64)


def at(*given: int) -> At:
    """Cuts at these positions."""
    return At(CutRule(1), given)


@dataclass(frozen=True)
class Anywhere(At):
    """Cuts at given positions, resuming from whatever is there."""

    def expected(self, cuts: Positions, length: int) -> None:  # type: ignore[override]
        """Any lineage."""
