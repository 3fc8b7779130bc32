"""Survival tables: how soon a path is passed again, by how often it was, how deep it lies, and how long ago.

Every edge of the store's tree is an individual, with or without a checkpoint on it, so the tables also learn from what
was never stored or is lost; their size is fixed. From the hazards follows the index of a cell: the best rate of hits
over any future horizon, max over T of P(hit within T) / E[time until hit or T], the Gittins form for a hit that is
worth one.

What was seen fades at two speeds, as some traffic changes within an hour and some never does; how much each speed
counts follows how likely it made what came next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..planning.compiled import Waits, looked_up
from ..planning.views import Floats


PASS_EDGES = np.asarray([1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 17, 22, 29, 38, 50, 80, 150])
LEVEL_EDGES = np.asarray([1, 2, 3, 5, 9])
AGE_EDGES: Floats = np.unique(np.round(np.concatenate([[0], np.geomspace(4, 2**14, 22)])))
WINDOW = 2**14
PERIOD = 64
HALF_LIVES = (700.0, 3000.0)  # of the counts, in requests
LEAST_SHARE = 0.02  # of a speed that is wrong just now

MOST_PASSES, MOST_LEVELS = int(PASS_EDGES[-1]), int(LEVEL_EDGES[-1])
# Lists, as these are looked up one by one, many times a request, and an element of an array takes five times as long.
_PASS_ROWS: list[int] = (np.searchsorted(PASS_EDGES, np.arange(MOST_PASSES + 1), side="right") - 1).tolist()
_LEVEL_ROWS: list[int] = (np.searchsorted(LEVEL_EDGES, np.arange(MOST_LEVELS + 1), side="right") - 1).tolist()
_WIDTHS = np.diff(np.append(AGE_EDGES, 2.0 * AGE_EDGES[-1]))
_AGE_BIN = np.searchsorted(AGE_EDGES, np.arange(WINDOW + 1), side="right").astype(np.uint8) - 1
_AGE_BINS: list[int] = _AGE_BIN.tolist()


def cell_of(passes: int, level: int) -> int:
    """The row of an edge that was passed `passes` times and has `level - 1` edges above it; the row behind it is for
    such an edge once prompts were seen to leave its path for another.
    """
    passes, level = min(max(passes, 1), MOST_PASSES), min(max(level, 1), MOST_LEVELS)
    return 2 * (_PASS_ROWS[passes] * len(LEVEL_EDGES) + _LEVEL_ROWS[level])


class SurvivalTables:
    """Hazards by cell and age, and their index.

    Args:
        half_lives: of the counts, in requests; one a speed of forgetting.
        strength: pseudo-events with which a cell leans on the coarser table above it.

    Attributes:
        waits: the edges that wait in each cell, since the tick of their last pass; what is seen is told it.
        shares: how much each speed counts.
        index: best rates of hits, of shape (cells, ages).
    """

    def __init__(self, half_lives: Sequence[float] = HALF_LIVES, strength: float = 1.5) -> None:
        cells = 2 * len(PASS_EDGES) * len(LEVEL_EDGES)
        self.strength = strength
        self._keep = 0.5 ** (1.0 / np.asarray(half_lives))[:, None, None]  # a request
        # Edges that wait, by the tick of their last pass, and by the bin of their age now.
        self._alive = np.zeros((WINDOW, cells), dtype=np.int16)
        self._waiting = np.zeros((len(AGE_EDGES), cells))
        # What happened since the last update, and all before, by speed of forgetting.
        self._new_events, self._new_exposure = np.zeros((2, len(AGE_EDGES), cells))
        self._events, self._exposure = np.zeros((2, len(half_lives), len(AGE_EDGES), cells))
        self.waits = Waits(
            self._alive, self._waiting, self._new_events, self._new_exposure, AGE_EDGES.astype(np.int64)
        )
        self._updated = 0
        self.shares = np.full(len(half_lives), 1.0 / len(half_lives))
        self.index = np.zeros((cells, len(AGE_EDGES)))
        self._solve()

    def bypass(self, cell: int, since: int) -> int:
        """Moves an edge to the row of those that prompts left for another path, and returns that row."""
        if not cell % 2:
            self.waits.move(cell, cell + 1, since)
        return cell | 1

    def advance(self, now: int) -> None:
        """Moves the clock to `now`, one tick a request."""
        while self.waits.clock < now:
            self.waits.tick()
        ticks = now - self._updated
        if ticks >= (PERIOD if now > 4 * PERIOD else PERIOD // 8):
            self.waits.accrue()
            self._judge()
            keep = self._keep**ticks
            for counts, new in ((self._events, self._new_events), (self._exposure, self._new_exposure)):
                counts += new
                counts *= keep
                new[:] = 0.0
            self._updated = now
            self._solve()

    def _judge(self) -> None:
        """Moves the shares of the speeds towards those that foresaw best what happened since the last update."""
        likelihood = np.tensordot(np.log(self._hazards), self._new_events)
        likelihood -= np.tensordot(self._hazards, self._new_exposure)
        shares = self.shares * np.exp(likelihood - likelihood.max())
        self.shares = (1.0 - LEAST_SHARE) * shares / shares.sum() + LEAST_SHARE / len(shares)

    def _solve(self) -> None:
        """Hazards of each speed, their mixture, and its index."""
        self._hazards = np.stack(
            [self._learned(events, exposure) for events, exposure in zip(self._events, self._exposure, strict=True)]
        )
        hazard = np.tensordot(self.shares, self._hazards, 1)
        missed = np.exp(-hazard * _WIDTHS[:, None])
        time = (1.0 - missed) / hazard
        # All ages at which one may start, at once: not passed and time spent, up to each age at which one may stop.
        best, spent, through = np.zeros_like(hazard), np.zeros_like(hazard), np.ones_like(hazard)
        for last in range(len(AGE_EDGES)):
            starts = slice(last + 1)
            spent[starts] += through[starts] * time[last]
            through[starts] *= missed[last]
            np.maximum(best[starts], (1.0 - through[starts]) / spent[starts], out=best[starts])
        self.index = np.ascontiguousarray(best.T)
        self._rates: list[list[float]] = self.index.tolist()

    def _learned(self, events: Floats, exposure: Floats) -> Floats:
        """Hazards by age and cell, each cell leaning on its pass count, that on the one before, the first on a hazard
        that falls with age.
        """
        shape = (len(PASS_EDGES), 2 * len(LEVEL_EDGES), len(AGE_EDGES))
        events, exposure = events.T.reshape(shape), exposure.T.reshape(shape)
        lean = self.strength
        hazards = np.empty(shape)
        before = 0.5 / (AGE_EDGES + 5.0)
        for passes in range(len(PASS_EDGES)):  # each leans on the count before it: a root that all share tells nothing
            seen, waited = events[passes], exposure[passes]
            before = before * (seen.sum() + lean) / ((waited * before).sum() + lean)
            before = (seen.sum(axis=0) + lean) / (waited.sum(axis=0) + lean / before)
            scale = (seen.sum(axis=1, keepdims=True) + lean) / ((waited * before).sum(axis=1, keepdims=True) + lean)
            hazards[passes] = (seen + 2 * lean) / (waited + 2 * lean / (before * scale))
        found: Floats = np.clip(hazards.reshape(self.index.shape), 1e-7, 1.0).T
        return found

    def rate(self, cell: int, age: int = 0) -> float:
        """The index of one individual, in hits a request."""
        return self._rates[cell][_AGE_BINS[min(age, WINDOW)]]

    def rates(self, cells: NDArray[np.int64], ticks: NDArray[np.int64], now: int) -> Floats:
        """The index of many individuals that were passed last at `ticks`, of shape `(n,)`."""
        found: Floats = looked_up(self.index, cells, ticks, now, _AGE_BIN)
        return found
