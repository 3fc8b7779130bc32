"""Lineage: how the text up to a position was cut while its state was computed.

A state depends, in its last bits, on the segments that made it. Every checkpoint therefore carries the ends of all of
them, from 0, and whoever resumes from it can say what a run from nothing would have to execute to arrive at the very
same bits. Tokens that were decoded ran one by one; a run of them is kept as a range.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..checks import shown
from .compiled import appended
from .cuts import Positions


class Step(NamedTuple):
    """One segment, or one run of decoded tokens: `start .. end`, in one forward or in a forward for each token.

    A step of no tokens is a rounding: the state at `end`, and the keys and values up to there, were replaced by their
    rounded values.
    """

    start: int
    end: int
    decoded: bool

    @property
    def rounds(self) -> bool:
        """Whether it is a rounding, and computes nothing."""
        return self.start == self.end


class Span(tuple[int, ...]):
    """Tokens whose keys and values are kept together: where they start, and where each forward over them ended.

    Runs of decoded tokens end in negative numbers, as in `Lineage`, and a rounding repeats the end before it. One at
    the start is part of the span, one at the end is not: it changes what comes behind it, and nothing of these tokens.
    """

    __slots__ = ()

    @property
    def start(self) -> int:
        return self[0]

    @property
    def end(self) -> int:
        return abs(self[-1])


class Lineage:
    """The segments behind a state, in order. Immutable; equal when every segment is."""

    __slots__ = ("_ends",)

    def __init__(self, ends: Sequence[int] | Positions = ()) -> None:
        """Lineage of a prefill.

        Args:
            ends: ends of its segments, ascending, the first segment starting at 0; a position that follows itself is
                one at which the state was rounded.
        """
        # Negative: the end of a run of decoded tokens. The same position once more: it was rounded there.
        self._ends = np.array(ends, dtype=np.int64)
        self._ends.setflags(write=False)

    @property
    def end(self) -> int:
        """The position it leads to."""
        return abs(int(self._ends[-1])) if len(self._ends) else 0

    @classmethod
    def _of(cls, ends: Positions) -> Lineage:
        """The one that these ends become, which nobody else may change."""
        found = cls.__new__(cls)
        found._ends = ends
        ends.setflags(write=False)
        return found

    def then(self, ends: Sequence[int] | Positions) -> Lineage:
        """With further segments of a prefill behind it, which end at `ends`."""
        return self._of(appended(self._ends, np.asarray(ends, dtype=np.int64)))

    def decoded(self, end: int) -> Lineage:
        """With tokens decoded one by one behind it, up to `end`; a run that goes on stays one run."""
        if end <= self.end:
            return self
        kept = self._ends[:-1] if len(self._ends) and self._ends[-1] < 0 else self._ends
        return Lineage(np.append(kept, -end))

    def rounded(self) -> Lineage:
        """With a rounding at its end; itself where it has one, or nothing to round."""
        if not len(self._ends) or self.ends_rounded:
            return self
        return Lineage(np.append(self._ends, self.end))

    @property
    def ends_rounded(self) -> bool:
        """Whether the last that was done is a rounding."""
        return len(self._ends) > 1 and abs(int(self._ends[-2])) == self._ends[-1]

    @property
    def unrounded(self) -> Lineage:
        """Without a rounding at its end."""
        return Lineage(self._ends[:-1]) if self.ends_rounded else self

    def begins_with(self, other: Lineage) -> bool:
        """Whether its first segments are those of another lineage."""
        return self._ends[: len(other._ends)].tobytes() == other._ends.tobytes()

    def upto(self, position: int) -> Lineage:
        """Its first segments, up to the one that ends at `position`, without a rounding there.

        Raises:
            ValueError: none of them ends there.
        """
        count = int(np.searchsorted(np.abs(self._ends), position))
        if count == len(self._ends) or abs(int(self._ends[count])) != position:
            raise ValueError(f"position={position} is not the end of a segment; those end at {self}")
        return self._of(self._ends[: count + 1])

    def through(self, position: int) -> Lineage:
        """The same, and with a rounding there if there is one."""
        found = self.upto(position)
        return found.rounded() if self.begins_with(found.rounded()) else found

    def span(self, start: int, end: int) -> Span:
        """The forwards behind `start` up to `end`, both of them ends of segments."""
        return self.spans(start, [end])[0]

    def spans(self, start: int, ends: Sequence[int]) -> list[Span]:
        """The forwards behind `start` up to each of `ends`, ascending; all of these are ends of segments."""
        asked = np.asarray([start, *ends], dtype=np.int64)
        borders = (
            np.searchsorted(np.abs(self._ends), asked) + (asked > 0)
        ).tolist()  # behind the end, not its rounding
        behind, steps = self._ends.tolist(), zip([start, *ends], pairwise(borders), strict=False)
        return [Span((first, *behind[low:high])) for first, (low, high) in steps]

    @classmethod
    def of(cls, spans: Iterable[Sequence[int]]) -> Lineage:
        """That of spans which follow each other from 0 on; a rounding at its very end is in none of them."""
        return cls([end for span in spans for end in span[1:]])

    def steps(self) -> Iterator[Step]:
        """What a run from nothing would have to execute."""
        start = 0
        for end in self._ends.tolist():
            yield Step(start, abs(end), end < 0)
            start = abs(end)

    @property
    def positions(self) -> list[int]:
        """Where its segments and runs of decoded tokens end."""
        return list(dict.fromkeys(np.abs(self._ends).tolist()))

    @property
    def ends(self) -> tuple[int | tuple[int, int], ...]:
        """Ends as numbers, runs of decoded tokens as `(start, end)`, roundings as such a run of no tokens."""
        if len(self._ends) and self._ends[0] > 0 and (self._ends[1:] > self._ends[:-1]).all():
            return tuple(self._ends.tolist())  # neither the one nor the other
        return tuple((step.start, step.end) if step.decoded or step.rounds else step.end for step in self.steps())

    def to_json(self) -> list[int | list[int]]:
        """The same, as JSON has it."""
        return [list(entry) if isinstance(entry, tuple) else entry for entry in self.ends]

    @classmethod
    def from_ends(cls, ends: Sequence[int | tuple[int, ...]]) -> Lineage:
        """Reads `ends` back, or the `segments` of a request; what ran batched there is one segment here."""
        runs = (
            (entry, False) if isinstance(entry, int) else (entry[1], len(entry) == 2 and entry[0] < entry[1])
            for entry in ends
        )
        return cls([-end if decoded else end for end, decoded in runs])

    @classmethod
    def from_json(cls, content: object) -> Lineage:
        """Reads `to_json` back.

        Raises:
            ValueError: it is no list of ascending positions, ranges that join them, and roundings, no two in a row.
        """
        found, position, rounded = cls(), 0, True
        if not isinstance(content, list):
            raise ValueError(f"a lineage is a list of positions, not {type(content).__name__}")
        ends: list[int] = []
        for entry in content:
            run = isinstance(entry, list)
            start, end = entry if run and len(entry) == 2 else (position, entry)
            numbers = type(start) is int and type(end) is int and start == position
            rounds = numbers and run and end == position and not rounded
            if not numbers or not (rounds or position < end < 2**31):
                raise ValueError(f"{shown(entry)} does not continue a lineage at position {position}")
            ends.append(-end if run and not rounds else end)
            position, rounded = end, rounds
        found._ends = np.array(ends, dtype=np.int64)
        found._ends.setflags(write=False)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        return int(self._ends.nbytes)

    def __len__(self) -> int:
        return len(self._ends)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lineage) and self._ends.tobytes() == other._ends.tobytes()

    def __hash__(self) -> int:
        return hash(self._ends.tobytes())

    def __repr__(self) -> str:
        return f"Lineage({self})"

    def __str__(self) -> str:
        words = {True: "rounded", False: ""}
        shown = [words[step.rounds] or (f"{step.start}…" * step.decoded + str(step.end)) for step in self.steps()]
        return ", ".join(shown)
