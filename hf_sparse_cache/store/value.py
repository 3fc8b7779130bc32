"""Eviction by value: what a checkpoint is expected to save for each byte that goes with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..planning.compiled import Leaving, gained, levels, returned
from ..planning.policy import Terms
from ..planning.views import Floats
from .eviction import Eviction
from .survival import SurvivalTables, cell_of


if TYPE_CHECKING:
    from ..planning.overlap import Forecast
    from .tree import Checkpoint, Node


FORK_CHILDREN = 3  # more make a hub, such as a shared system prompt, where one path says nothing about the others
MIN_STEM_TOKENS = 64  # two texts that part before were never one
NEARLY_TIED = 0.7  # values this close are noise, and then the newcomer is the better guess, as in plain recency
LEAST_STOPPING = 1e-6  # of the prompts that enter its edge: none at all would make all such checkpoints alike
MIN_EDGE_TOKENS = 16  # shorter edges, such as the last tokens of a template, say nothing about what comes back


class Scored(Eviction, ABC):
    """Keeps a few numbers for each checkpoint in arrays, so that all can be ranked in one step.

    Attributes:
        items: the checkpoint of each slot, None in a free one.
        ticks: number of the request that passed it last.
        gains: tokens it saves a pass, times its share, over `held`; infinite in a free slot.
        held: bytes that go with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Checkpoint] = []
        self.ticks: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.cells: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.gains: Floats = np.zeros(0)
        self.held: Floats = np.zeros(0)
        self.now = 0
        self._free: list[int] = []

    @abstractmethod
    def values(self) -> Floats:
        """What a byte of each slot earns; the verb to override."""

    def touched(self, slot: int, resumed: bool) -> bool:
        """Whether a pass over this checkpoint counts as a use of it."""
        return True

    def passed(self, path: Sequence[Node], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        """Marks every checkpoint that the prompt shares as passed now."""
        self.now = now
        for level, node in zip(levels(path, MIN_EDGE_TOKENS), path, strict=True):
            for checkpoint in node.checkpoints:
                if checkpoint.position <= overlap and self.touched(checkpoint.slot, checkpoint is resumed):
                    self.ticks[checkpoint.slot] = now
                    self.cells[checkpoint.slot] = cell_of(node.passes + 1, level)

    def stored(self, checkpoint: Checkpoint) -> None:
        """Takes a slot; the neighbours now save and hold less."""
        if not self._free:
            self._grow()
        slot = checkpoint.slot = self._free.pop()
        self.items[slot] = checkpoint
        self.ticks[slot] = self.now
        self.cells[slot] = _cell(checkpoint)
        self.weigh(checkpoint)
        self._weigh_neighbours(checkpoint)

    def dropped(self, checkpoint: Checkpoint) -> None:
        """Gives the slot back; the neighbours now save or hold more."""
        self.items[checkpoint.slot] = None  # type: ignore[call-overload]  # or it lives on, state and all
        self.gains[checkpoint.slot] = np.inf
        self.held[checkpoint.slot] = 0.0
        self._free.append(checkpoint.slot)
        self._weigh_neighbours(checkpoint)

    def known(self) -> list[Checkpoint] | None:
        """The checkpoints of the slots in use."""
        if type(self).stored is not Scored.stored:
            return None
        return [checkpoint for checkpoint in self.items if checkpoint is not None]

    def weigh(self, checkpoint: Checkpoint) -> None:
        """Counts a checkpoint's bytes and gain anew."""
        checkpoint.held = checkpoint.held_bytes()
        self.held[checkpoint.slot] = checkpoint.held
        self.gains[checkpoint.slot] = self.gain(checkpoint)

    def gain(self, checkpoint: Checkpoint) -> float:
        """Tokens saved a pass for each byte."""
        return gained(checkpoint, LEAST_STOPPING)

    def ranked(self) -> tuple[NDArray[np.int64], Floats]:
        """Slots in use, least value first, and the values by slot."""
        values = self.values()
        return np.argsort(values, kind="stable")[: len(self.items) - len(self._free)], values

    def victim(self, incoming: Checkpoint | None, need: int) -> Checkpoint | None:
        """The checkpoint of least value."""
        order, _ = self.ranked()
        return next((self.items[slot] for slot in order.tolist() if not self.items[slot].pins), None)

    def _weigh_neighbours(self, checkpoint: Checkpoint) -> None:
        above = checkpoint.above()
        for other in [*([above] if above else []), *checkpoint.below()]:
            self.weigh(other)

    def _grow(self) -> None:
        old = len(self.items)
        added = max(64, old)
        self._free += range(old + added - 1, old - 1, -1)
        self.items += [None] * added  # type: ignore[list-item]
        self.ticks = np.append(self.ticks, np.zeros(added, dtype=np.int64))
        self.cells = np.append(self.cells, np.zeros(added, dtype=np.int64))
        self.gains = np.append(self.gains, np.full(added, np.inf))
        self.held = np.append(self.held, np.zeros(added))


class LeastValue(Scored):
    """Least expected saving per byte first.

    A checkpoint's value is the tokens it saves over the checkpoint before it, times the share of passing prompts that
    leave before the next one, times the best rate of passes over any future horizon, over the bytes that go with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables = SurvivalTables()

    def dropped(self, checkpoint: Checkpoint) -> None:
        """Gives the slot back, and those that stopped there to the checkpoint above."""
        above = checkpoint.above()
        if above is not None:
            moved = returned(checkpoint, above)
            above.share += moved
            above.onward -= moved
        super().dropped(checkpoint)

    def values(self) -> Floats:
        """Expected tokens saved a request for each byte."""
        return self.tables.rates(self.cells, self.ticks, self.now) * self.gains

    def passed(self, path: Sequence[Node], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        """Counts the passes in the tables as well."""
        super().passed(path, overlap, resumed, now)
        self.tables.advance(now)
        for node in path:
            if overlap - node.start < MIN_EDGE_TOKENS:
                continue  # a few first words that two prompts have in common by accident
            if node.waiting is not None:
                cell, since = node.waiting
                whole = node.end - overlap < MIN_EDGE_TOKENS
                self.tables.waits.hit(cell, since, split=not whole)
                if whole:
                    self.tables.waits.leave(cell, since)
                    node.waiting = None

    def settled(self, path: Sequence[Node], forecast: Forecast | None, now: int) -> None:
        """Lets the prompt's edges wait for their next pass; asks the forecast who stops at its checkpoints."""
        stored: list[Checkpoint] = []
        following: list[float] = []  # rate of passes at the next one over that here, where other prompts leave between
        rate, parts = 0.0, False
        last = len(path) - 1
        for place, (level, node) in enumerate(zip(levels(path, MIN_EDGE_TOKENS), path, strict=True)):
            child = path[place + 1] if place < last else None
            if node.waiting is None and len(node.tokens) >= MIN_EDGE_TOKENS:
                cell = cell_of(node.passes, level)
                node.waiting = cell, self.now
                self.tables.waits.enter(cell)
            if child is not None and node.recent is not child:
                if len(node.children) <= FORK_CHILDREN and node.end >= MIN_STEM_TOKENS:
                    self._bypass(node.recent)
                node.recent = child
            if node.checkpoints:
                here = self.tables.rate(cell_of(node.passes, level))
                if stored:
                    following.append(here / rate if parts else 1.0)
                following += [1.0] * (len(node.checkpoints) - 1)
                stored += node.checkpoints
                rate, parts = here, False
            parts = parts or _branches(node, child)
        if forecast is None or not stored:
            return
        positions = [checkpoint.position for checkpoint in stored]
        starts = [checkpoint.node.start for checkpoint in stored]
        for checkpoint, share, passing in zip(
            stored, *forecast.shares(positions, starts, [*following, 0.0]), strict=True
        ):
            checkpoint.share, checkpoint.onward = share, passing
            self.weigh(checkpoint)

    def _bypass(self, node: Node | None) -> None:
        """Notes that prompts left the path of `node` for another, from there to its latest end."""
        while node is not None:
            if node.waiting is not None:
                cell, since = node.waiting
                node.waiting = self.tables.bypass(cell, since), since
            for checkpoint in node.checkpoints:
                self.cells[checkpoint.slot] |= 1
            node = node.recent

    def terms(self, path: Sequence[Node], overlap: int, need: float, resumed: Checkpoint | None) -> Terms:
        """Rates of a path passed just now, and the value of what would have to go, by the byte."""
        level = levels(path, MIN_EDGE_TOKENS)[-1] if path else 0
        known = self.tables.rate(cell_of(path[-1].passes + 1, level)) if path else 0.0
        price = 0.0
        if need > 0.0:
            leaving = self._leaving(need)
            price = leaving.lost / leaving.freed if leaving.freed else 0.0
        resumed_rate = known
        if resumed is not None and resumed.node is not path[-1]:
            between = path[path.index(resumed.node) :]
            if any(_branches(node, child) for node, child in pairwise(between)):
                resumed_rate = self._rate(resumed)
        return Terms(known, self.tables.rate(cell_of(1, level + 1)), price, resumed_rate)

    def victim(self, incoming: Checkpoint | None, need: int) -> Checkpoint | None:
        """The checkpoint of least value a byte, or None if all that must go is worth more than the newcomer."""
        leaving = self._leaving(need)
        if incoming is not None:
            lost = leaving.lost * max(0.0, need - incoming.refund) / max(need, 1)
            offer = self._rate(incoming) * self.gain(incoming) * incoming.held
            if leaving.freed < need or offer <= NEARLY_TIED * lost:
                return None
        return next(iter(leaving.gone), None)

    def _leaving(self, need: float) -> Leaving:
        """What goes so that `need` bytes come free, or all that can: the least value a byte first."""
        leaving = Leaving(LEAST_STOPPING)
        leaving.until(need, self.items, self.gains, self.tables.rates(self.cells, self.ticks, self.now))
        return leaving

    def _rate(self, checkpoint: Checkpoint) -> float:
        return self.tables.rate(_cell(checkpoint))


def _branches(node: Node, child: Node | None) -> bool:
    """Whether other prompts run on from the end of this edge, apart from those along `child`."""
    for other in node.children.values():  # no generator: it is asked for every edge of every path
        if other is not child and (other.children or len(other.tokens) >= MIN_EDGE_TOKENS):
            return True
    return False


def _cell(checkpoint: Checkpoint) -> int:
    """The row of the survival tables for a checkpoint on a path that is passed just now."""
    path, node = [], checkpoint.node
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return cell_of(checkpoint.node.passes + 1, levels(path[::-1], MIN_EDGE_TOKENS)[-1])
