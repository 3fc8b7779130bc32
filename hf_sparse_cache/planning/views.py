"""Views of an overlap depth: each one a guess at where later prompts leave this prompt, learned from where earlier
ones did.

A view answers with a distribution function over depths. It is one small class; a new one is one class and one row in
`VIEWS`, and the mixture in `overlap.py` finds out what it is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .compiled import Histogram as Histogram
from .compiled import left, missed


Floats = NDArray[np.float64]
LOG_EDGES: Floats = np.concatenate([[0.0], np.exp2(np.arange(0, 22))])  # distances 0, 1, 2-3, 4-7, ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What the views may know of a prompt.

    Attributes:
        length: tokens of the prompt.
        overlap: tokens it shared with earlier prompts.
        ends: ends of the tree's edges below the overlap, ascending: junctions and ends of earlier prompts.
        stops: how many prompts left the path or ended at each of them.
        cuts: its cuts.
        kind: how it met the tree, the context of the mixture's weights (see `planning/overlap.py`).
    """

    length: int
    overlap: int
    ends: NDArray[np.int64]
    stops: NDArray[np.int64]
    cuts: NDArray[np.int64]
    kind: int


class View:
    """Base: `below` is the verb; `learn` gets each observed depth with the view's share of the credit."""

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """P(next overlap < depth) for ascending `depths` in `0 .. length + 1`."""
        raise NotImplementedError

    def learn(self, depth: int, shape: Shape, credit: float, decay: float) -> None:
        """Learns from a prompt that left one of this shape at `depth`."""


class Uniform(View):
    """Anywhere: edited text."""

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """Even over the prompt."""
        return depths / (shape.length + 1)


class Absolute(View):
    """Depth from the start: a prefix that all prompts share. The paper's histogram."""

    def __init__(self) -> None:
        self._seen = Histogram(np.concatenate([np.arange(0.0, 2**14, 32), np.exp2(np.arange(14, 22.01, 0.125))]), 4.0)

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """The histogram, cut off at the prompt's end."""
        below: Floats = self._seen.below(depths, max(self._seen.mass(shape.length + 1.0), 1e-9))
        return below

    def learn(self, depth: int, shape: Shape, credit: float, decay: float) -> None:
        """Counts the depth."""
        self._seen.add(depth, credit, decay)


class Ratio(View):
    """Depth ÷ length: documents of one kind with a question at the end."""

    def __init__(self) -> None:
        self._seen = Histogram(np.linspace(0.0, 1.0, 129), 4.0)

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """The histogram, stretched to the prompt."""
        below: Floats = self._seen.below(depths / (shape.length + 1), self._seen.mass(1.0))
        return below

    def learn(self, depth: int, shape: Shape, credit: float, decay: float) -> None:
        """Counts the ratio."""
        self._seen.add(depth / (shape.length + 1), credit, decay)


class FromEnd(View):
    """Distance from the end: a turn that follows, a question that is replaced, reasoning that is stripped."""

    def __init__(self) -> None:
        self._seen = Histogram(LOG_EDGES, 2.0)

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """Even inside each power of two of the distance."""
        whole = self._seen.mass(shape.length + 1.0)
        below: Floats = self._seen.above(shape.length + 1 - depths, whole)
        return below

    def learn(self, depth: int, shape: Shape, credit: float, decay: float) -> None:
        """Counts the distance."""
        self._seen.add(shape.length - depth, credit, decay)


class CutsFromEnd(View):
    """Cuts between the overlap and the end: prompts that are shared in whole blocks."""

    def __init__(self) -> None:
        self._seen = Histogram(LOG_EDGES, 2.0)

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """Even over the cuts inside each power of two of their number."""
        whole = self._seen.mass(len(shape.cuts) + 1.0)
        below: Floats = self._seen.above(missed(depths, shape.cuts), whole)
        return np.where(depths > 0.0, below, 0.0)

    def learn(self, depth: int, shape: Shape, credit: float, decay: float) -> None:
        """Counts the cuts."""
        self._seen.add(len(shape.cuts) - int(shape.cuts.searchsorted(depth, side="right")), credit, decay)


class Beyond(View):
    """Distance behind the prompt's own overlap: how much of what was new is shared again."""

    def __init__(self) -> None:
        self._seen = Histogram(LOG_EDGES, 2.0)

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """Even inside each power of two of the distance; nothing before the overlap."""
        whole = self._seen.mass(shape.length + 1.0 - shape.overlap)
        below: Floats = self._seen.below(np.maximum(depths - shape.overlap, 0.0), max(whole, 1e-9))
        return below

    def learn(self, depth: int, shape: Shape, credit: float, decay: float) -> None:
        """Counts the distance."""
        if depth >= shape.overlap:
            self._seen.add(depth - shape.overlap, credit, decay)


class Again(View):
    """Exactly where this prompt left the path: a junction that stays one."""

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """One step at the overlap."""
        return (depths > shape.overlap).astype(np.float64)


class Junctions(View):
    """Where earlier prompts left this path or ended on it, by how often they did."""

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """A step at each junction; even over the prompt when there is none."""
        below: Floats | None = left(depths, shape.ends, shape.stops)
        return depths / (shape.length + 1) if below is None else below


VIEWS: tuple[type[View], ...] = (Uniform, Absolute, Ratio, FromEnd, CutsFromEnd, Beyond, Again, Junctions)
