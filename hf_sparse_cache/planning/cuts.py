"""Cuts: where a prefill may be split, as a pure and causal function of the prompt's own tokens.

A cold run and a resumed run execute the same segments only when both find the same cuts, so nothing but the tokens up
to a cut may decide about it (see docs/exactness.md). Every checkpoint sits on a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Tokens = NDArray[np.int32]
Positions = NDArray[np.int64]

MIN_SUFFIX_TOKENS = 2  # a resumed run always computes at least this many: one-token steps are not a prefill

MESSAGE_TOKENS = 3  # ordinary tokens that make a message; a role and a line break do not


def cut_positions(ids: Tokens, grid: int, cut_ids: Iterable[int] = (), min_distance: int | None = None) -> Positions:
    """Returns the cuts of a prompt, ascending.

    Candidates are the multiples of `grid` and the positions just after a token of `cut_ids`; one is accepted when it
    lies at least `min_distance` tokens behind the previous accepted cut (or the start). The cuts of a prefix are the
    cuts of the whole prompt up to the prefix's own limit.

    Args:
        ids: token ids of shape `(N,)`.
        grid: distance in tokens between the regular cuts, a multiple of the model's kernel chunk.
        cut_ids: token ids after which a prompt may be cut as well (end of message and the like).
        min_distance: least number of tokens in a segment; default `max(2, grid // 4)`, never more than `grid`.

    Returns:
        int64 positions of shape `(C,)`, each `1 <= c <= N - 2`.

    Raises:
        ValueError: if `grid` or `min_distance` is out of range.
    """
    if grid < 1:
        raise ValueError(f"grid must be at least 1 token, got {grid}; use a multiple of the model's kernel chunk")
    if min_distance is None:
        min_distance = min(grid, max(2, grid // 4))
    if not 1 <= min_distance <= grid:
        raise ValueError(f"min_distance must be 1 to grid ({grid}), got {min_distance}; leave it out for a default")
    limit = len(ids) - MIN_SUFFIX_TOKENS
    regular: Positions = np.arange(grid, limit + 1, grid, dtype=np.int64)
    special_ids = [*cut_ids]
    if limit < 1 or not special_ids:
        return regular
    special = np.flatnonzero(np.isin(ids[:limit], np.asarray(special_ids, dtype=np.int64))) + 1
    if special.size == 0:
        return regular
    accepted: list[int] = []
    previous = 0
    for position in np.union1d(regular, special).tolist():
        if position - previous >= min_distance:
            accepted.append(position)
            previous = position
    return np.asarray(accepted, dtype=np.int64)


def message_start(ids: Tokens, cut_ids: Iterable[int]) -> int:
    """Where the last message of a prompt begins, as far as special tokens tell; 0 where none does.

    A message begins behind a special token that `MESSAGE_TOKENS` others follow. What a chat template puts behind the
    last message, to ask for an answer, is shorter.

    Args:
        ids: token ids of shape `(N,)`.
        cut_ids: the special tokens.
    """
    known = [*cut_ids]
    if not known:
        return 0
    special = np.flatnonzero(np.isin(ids, np.asarray(known, dtype=np.int64))) + 1
    followed = np.diff(np.append(special, len(ids) + 1)) > MESSAGE_TOKENS
    return int(special[followed][-1]) if followed.any() else 0


class TextEnds:
    """Finds the tokens with which a text ends in one of some strings.

    Args:
        strings: what to look for, each at least one character.
        decode: turns a list of token ids into text, special tokens and all, without changing any white space.

    Attributes:
        found: whether any was found so far.
    """

    def __init__(self, strings: Iterable[str], decode: Callable[[list[int]], str]) -> None:
        self.strings = tuple(strings)
        self._decode = decode
        self.found = False
        self._may_end: dict[int, bool] = {}
        self._window = max((len(text.encode()) for text in self.strings), default=0) + 1

    def positions(self, ids: Tokens) -> Positions:
        """The positions n at which the text of the first n tokens ends with one of the strings, ascending.

        A string that ends inside a token is not found; where it begins does not matter.
        """
        ends = [n for n, token in enumerate(ids.tolist(), start=1) if self._plausible(token)]
        found = [n for n in ends if self._decode(ids[max(0, n - self._window) : n].tolist()).endswith(self.strings)]
        self.found = self.found or bool(found)
        return np.asarray(found, dtype=np.int64)

    def _plausible(self, token: int) -> bool:
        """Whether a token's own text ends as one of the strings does, or within a character."""
        if token not in self._may_end:
            own = self._decode([token])
            self._may_end[token] = own.endswith(("\ufffd", *(text[-1] for text in self.strings)))
        return self._may_end[token]


@dataclass(frozen=True)
class CutRule:
    """Where the prompts of one handle are cut, whatever is stored: its settings, and what is taken from them.

    Attributes:
        grid: distance in tokens between the regular cuts, a multiple of the model's kernel chunk.
        cut_ids: token ids after which a prompt may be cut as well (end of message and the like).
        cut_after: finds the ends of the strings after which a prompt is always cut; None for no strings.
    """

    grid: int
    cut_ids: tuple[int, ...] = ()
    cut_after: TextEnds | None = None

    @property
    def special_distance(self) -> int:
        """Tokens that the grid and special tokens need to the cut before them."""
        return min(self.grid, max(MIN_SUFFIX_TOKENS, self.grid // 4))

    def cuts(self, ids: Tokens, marked: Iterable[int] = ()) -> Positions:
        """The cuts of a prompt, ascending, each `2 <= c <= N - 2`.

        Announced prefixes are cut at their very end, and outrank any cut closer than `MIN_SUFFIX_TOKENS`. The ends of
        strings need that distance to the cut before them; the grid and special tokens need a quarter of the grid.

        Args:
            ids: token ids of shape `(N,)`.
            marked: lengths of the announced prefixes that the prompt begins with.
        """
        limit = len(ids) - MIN_SUFFIX_TOKENS
        strings = self.cut_after.positions(ids) if self.cut_after is not None else ()
        marks = sorted({length for length in marked if MIN_SUFFIX_TOKENS <= length <= limit})
        if not marks and not len(strings):
            return cut_positions(ids, self.grid, self.cut_ids)
        wanted = dict.fromkeys(cut_positions(ids, self.grid, self.cut_ids, 1).tolist(), self.special_distance)
        wanted |= {n: MIN_SUFFIX_TOKENS for n in map(int, strings) if n <= limit}
        accepted: list[int] = []
        for position in sorted({*wanted, *marks}):
            needed = wanted.get(position, MIN_SUFFIX_TOKENS)
            last = accepted[-1] if accepted else 0
            if position in marks:  # two announced ends that are one token apart: the deeper one holds more
                while accepted and position - accepted[-1] < MIN_SUFFIX_TOKENS:
                    accepted.pop()
                accepted.append(position)
            elif position - last >= needed:
                accepted.append(position)
        return np.asarray(accepted, dtype=np.int64)
