"""Views of an overlap depth: each one a guess at where later prompts leave this prompt, learned from where earlier
ones did.

A view answers with a distribution function over depths. It is one small class; a new one is one class and one row in
`VIEWS`, and the mixture in `overlap.py` finds out what it is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import compiled
from .compiled import Histogram as Histogram
from .compiled import counted, viewed


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
    """Base: `below` is the verb; `learn` gets each observed depth with the view's share of the credit.

    Attributes:
        looks: how a compiled view looks at a depth (`_planner.pyx`, where all views of a prompt are one call); 0 for
            one in Python.
        seen: what a compiled view counts; None for nothing.
    """

    looks: int = 0
    seen: Histogram | None = None

    def below(self, depths: Floats, shape: Shape) -> Floats:
        """P(next overlap < depth) for ascending `depths` in `0 .. length + 1`."""
        if not self.looks:
            raise NotImplementedError
        found: Floats = viewed([self], depths, shape)[0]
        return found

    def learn(self, depth: int, shape: Shape, credit: float, decay: float) -> None:
        """Learns from a prompt that left one of this shape at `depth`, of which it foresaw its `credit`, 0 to 1."""
        if self.looks:
            counted(self, depth, shape, credit, decay)


class Uniform(View):
    """Anywhere: edited text. Even over the prompt."""

    looks = compiled.UNIFORM


class Absolute(View):
    """Depth from the start: a prefix that all prompts share. The paper's histogram, cut off at the prompt's end."""

    looks = compiled.ABSOLUTE

    def __init__(self) -> None:
        self.seen: Histogram = Histogram(
            np.concatenate([np.arange(0.0, 2**14, 32), np.exp2(np.arange(14, 22.01, 0.125))]), 4.0
        )


class Ratio(View):
    """Depth ÷ length: documents of one kind with a question at the end. The histogram, stretched to the prompt."""

    looks = compiled.RATIO

    def __init__(self) -> None:
        self.seen: Histogram = Histogram(np.linspace(0.0, 1.0, 129), 4.0)


class FromEnd(View):
    """Distance from the end: a turn that follows, a question that is replaced, reasoning that is stripped.

    Even inside each power of two of the distance.
    """

    looks = compiled.FROM_END

    def __init__(self) -> None:
        self.seen: Histogram = Histogram(LOG_EDGES, 2.0)


class CutsFromEnd(View):
    """Cuts between the overlap and the end: prompts that are shared in whole blocks.

    Even over the cuts inside each power of two of their number; nothing at the start.
    """

    looks = compiled.CUTS_FROM_END

    def __init__(self) -> None:
        self.seen: Histogram = Histogram(LOG_EDGES, 2.0)


class Beyond(View):
    """Distance behind the prompt's own overlap: how much of what was new is shared again.

    Even inside each power of two of the distance; nothing before the overlap.
    """

    looks = compiled.BEYOND

    def __init__(self) -> None:
        self.seen: Histogram = Histogram(LOG_EDGES, 2.0)


class Again(View):
    """Exactly where this prompt left the path: a junction that stays one. One step at the overlap."""

    looks = compiled.AGAIN


class Junctions(View):
    """Where earlier prompts left this path or ended on it, by how often they did.

    A step at each junction; even over the prompt when there is none.
    """

    looks = compiled.JUNCTIONS


VIEWS: tuple[type[View], ...] = (Uniform, Absolute, Ratio, FromEnd, CutsFromEnd, Beyond, Again, Junctions)
