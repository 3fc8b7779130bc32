"""p(d | this prefix): where the next prompt that follows this one will leave it, learned online.

A mixture of views. Each observed overlap depth is credited to the views in proportion to how well they foresaw it (one
step of online EM), so the mixture's shares follow the kinds of divergence a workload has, and each view learns only
from what it explains. The shares depend on how the prompt itself met the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .compiled import credited, junctions, leaning, shares, viewed
from .cuts import Positions
from .views import VIEWS, Floats, Shape


# Nothing shared; longer than an earlier prompt; leaves at a new junction; at a known one.
FRESH, EXTENDS, BRANCHES, RETURNS = range(4)
NEAR_END_TOKENS = 16
LEAN = 8.0  # observations with which a context leans on the shares of all contexts


@dataclass(frozen=True)
class Forecast:
    """The mixture on one prompt's cuts.

    Attributes:
        cuts: positions of shape `(C,)`.
        below: P(next overlap < cut) of shape `(C,)`.
    """

    cuts: Positions
    below: Floats

    def passing(self, positions: Positions) -> Floats:
        """P(next overlap >= position), of shape `(P,)`; positions between two cuts count as the deeper one."""
        found: Floats = np.append(1.0 - self.below, 0.0)[self.cuts.searchsorted(positions)]
        return found

    def shares(
        self, positions: Sequence[int], starts: Sequence[int], following: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        """Of the prompts that enter the edge of each position, those that leave between it and the next position, and
        those that go on to that one.

        Args:
            positions: cuts on one path, ascending.
            starts: where the edge of each of them starts.
            following: rate of passes at the next position over that here: at a junction most prompts go elsewhere.
                0 for the last, behind which nothing is stored.
        """
        return shares(self.below, self.cuts, [*positions], [*starts], [*following])


class OverlapModel:
    """The mixture, its shares by context, and its views.

    Args:
        decay: what a view keeps of its counts at each depth it fully explains.
        rate: slowest speed at which the shares follow; they start faster.
    """

    def __init__(self, decay: float = 0.998, rate: float = 0.01) -> None:
        self.decay, self.rate = decay, rate
        self.views = [view() for view in VIEWS]
        self.shares = np.full((5, len(self.views)), 1.0 / len(self.views))  # one row a context, the last for all
        self.seen = [0] * 5  # observations by context

    @property
    def observations(self) -> int:
        """Overlaps that it has learned from."""
        return self.seen[-1]

    def forecast(self, cuts: Positions, shape: Shape) -> Forecast:
        """Predicts the next overlap with a prompt of this shape."""
        mixed = leaning(self.shares, self.seen, shape.kind, LEAN)
        return Forecast(cuts, mixed @ viewed(self.views, cuts.astype(np.float64), shape))

    def learn(self, depth: int, cuts: Positions, previous: Shape) -> None:
        """Learns that a prompt left an earlier one, of shape `previous`, at `depth`; `cuts` are the later prompt's."""
        credited(self, min(depth, previous.length), cuts, previous, LEAN)


def shape_of(
    length: int, overlap: int, ends: Positions, passes: Positions, cuts: Positions, previous: Shape | None
) -> Shape:
    """Describes a prompt for the views.

    Args:
        length: tokens of the prompt.
        overlap: tokens it shares with earlier prompts.
        ends: ends of the edges on its path; the last may lie behind the overlap.
        passes: earlier prompts along the whole of each edge.
        cuts: its cuts.
        previous: shape of the latest prompt along the last of these edges.
    """
    ends, stops = junctions(ends, passes, overlap)
    if not len(cuts) or overlap < cuts[0]:
        kind = FRESH
    elif previous is not None and overlap >= previous.length - NEAR_END_TOKENS:
        kind = EXTENDS
    else:
        kind = RETURNS if len(ends) and ends[-1] == overlap else BRANCHES
    return Shape(length, overlap, ends, stops, cuts, kind)
