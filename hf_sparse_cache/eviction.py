"""Which checkpoint goes when memory is short. One small class each; the store calls four verbs under its lock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .survival import SurvivalTables, cell_of

if TYPE_CHECKING:
    from .overlap import Forecast
    from .tree import Checkpoint, Node


@dataclass(frozen=True, slots=True)
class Terms:
    """Where the memory stands, for the policy that places new checkpoints.

    Attributes:
        known_rate: expected prompts a request that come back along the part of the path that was shared.
        new_rate: the same for the part that is new.
        price: what a byte earns at the margin, in saved tokens a request; 0 while there is room.
    """

    known_rate: float = 1.0
    new_rate: float = 1.0
    price: float = 0.0


class Eviction:
    """The order in which checkpoints go; this base class is first in, first out.

    `victim` is the verb to override; the other three keep the books.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[Checkpoint, None] = OrderedDict()

    def stored(self, checkpoint: Checkpoint) -> None:
        """A checkpoint was inserted."""
        self._order[checkpoint] = None

    def dropped(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is gone."""
        del self._order[checkpoint]

    def passed(self, path: Sequence[Node], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        """Request number `now` walked `path`, shared `overlap` tokens with it and resumed at `resumed`."""

    def settled(self, path: Sequence[Node], forecast: Forecast | None, now: int) -> None:
        """A request closed; `path` covers its whole prompt, `forecast` says where the next one will leave it."""

    def terms(self, path: Sequence[Node], overlap: int) -> Terms:
        """What new checkpoints on this path would earn and cost."""
        return Terms()

    def victim(self, incoming: Checkpoint | None) -> Checkpoint | None:
        """The next checkpoint to go in favour of `incoming`; None to refuse the newcomer instead."""
        return next((checkpoint for checkpoint in self._order if not checkpoint.pins), None)


class FIFO(Eviction):
    """First in, first out: the paper's."""


class LRU(Eviction):
    """Least recently resumed (or stored) first."""

    def passed(self, path: Sequence[Node], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        """Moves the resumed checkpoint to the safe end."""
        if resumed is not None:
            self._order.move_to_end(resumed)


class Learned(Eviction):
    """Least expected saving per byte first.

    A checkpoint's value is the tokens it saves over the checkpoint before it, times the share of passing prompts that leave
    before the next one, times the best rate of passes over any future horizon, over the bytes that go with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables = SurvivalTables()
        self.price = 0.0
        self._items: list[Checkpoint | None] = []
        self._free: list[int] = []
        self._cells = np.zeros(64, dtype=np.int64)
        self._ticks = np.zeros(64, dtype=np.int64)
        self._gains = np.full(64, np.inf)
        self._now = 0

    def passed(self, path: Sequence[Node], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        """Counts the passes in the tables, and on every checkpoint that the prompt shares."""
        self._now = now
        self.tables.advance(now)
        for level, node in enumerate(path, 1):
            whole = node.end <= overlap
            if node.note is not None:
                cell, since = node.note
                self.tables.hit(cell, since, split=not whole)
                if whole:
                    self.tables.leave(cell, since)
                    node.note = None
            for position, checkpoint in node.checkpoints.items():
                if position <= overlap:
                    self._ticks[checkpoint.slot] = now
                    self._cells[checkpoint.slot] = cell_of(node.passes + 1, level)

    def settled(self, path: Sequence[Node], forecast: Forecast | None, now: int) -> None:
        """Lets the prompt's edges wait for their next pass; asks the forecast who stops at its checkpoints."""
        stored: list[Checkpoint] = []
        for level, node in enumerate(path, 1):
            if node.note is None:
                cell = cell_of(node.passes, level)
                node.note = cell, self._now
                self.tables.enter(cell)
            stored += [node.checkpoints[position] for position in sorted(node.checkpoints)]
        if forecast is None:
            return
        for checkpoint, after in zip(stored, [*stored[1:], None], strict=True):
            passing = forecast.mass(checkpoint.position)
            stopping = forecast.mass(checkpoint.position, after.position if after else None)
            checkpoint.share = stopping / passing if passing > 1e-9 else 0.0
            self._gains[checkpoint.slot] = self._gain(checkpoint)

    def terms(self, path: Sequence[Node], overlap: int) -> Terms:
        """Rates of a path passed just now, and the price of the latest evictions."""
        level = len(path)
        known = self.tables.rate(cell_of(path[-1].passes + 1, level)) if path else 0.0
        return Terms(known, self.tables.rate(cell_of(1, level + 1)), self.price)

    def stored(self, checkpoint: Checkpoint) -> None:
        """Takes a slot; its neighbours now save and hold less."""
        if not self._free:
            self._grow()
        slot = checkpoint.slot = self._free.pop()
        self._items[slot] = checkpoint
        self._ticks[slot] = self._now
        self._cells[slot] = self._cell(checkpoint)
        self._gains[slot] = self._gain(checkpoint)
        self._refresh(checkpoint)

    def dropped(self, checkpoint: Checkpoint) -> None:
        """Gives the slot back; its neighbours now save or hold more."""
        self._items[checkpoint.slot] = None
        self._gains[checkpoint.slot] = np.inf
        self._free.append(checkpoint.slot)
        self._refresh(checkpoint)

    def victim(self, incoming: Checkpoint | None) -> Checkpoint | None:
        """The checkpoint of least value, or None if the newcomer is worth less."""
        ages = self._now - self._ticks
        values = self.tables.rates(self._cells, ages) * self._gains
        for _ in range(len(values)):
            slot = int(values.argmin())
            checkpoint = self._items[slot]
            if checkpoint is None:
                return None
            gain = np.inf if checkpoint.pins else self._gain(checkpoint)
            if gain > 1.001 * self._gains[slot]:  # its neighbours went since it was last looked at
                values[slot] *= gain / self._gains[slot]
                if not checkpoint.pins:
                    self._gains[slot] = gain
                continue
            if incoming is not None:
                offer = self.tables.rate(self._cell(incoming)) * self._gain(incoming)
                if offer <= values[slot]:
                    return None
            self.price += 0.05 * (float(values[slot]) - self.price)
            return checkpoint
        return None

    def _cell(self, checkpoint: Checkpoint) -> int:
        level, node = 1, checkpoint.node.parent
        while node is not None and node.parent is not None:
            level, node = level + 1, node.parent
        return cell_of(checkpoint.node.passes + 1, level)

    def _gain(self, checkpoint: Checkpoint) -> float:
        above = checkpoint.above()
        saved = checkpoint.position - (above.position if above else 0)
        if checkpoint.slot >= 0:
            checkpoint.held = checkpoint.held_bytes()
        return saved * max(checkpoint.share, 1e-6) / checkpoint.held

    def _refresh(self, checkpoint: Checkpoint) -> None:
        above = checkpoint.above()
        for other in [*([above] if above else []), *checkpoint.below()]:
            self._gains[other.slot] = self._gain(other)

    def _grow(self) -> None:
        old = len(self._items)
        size = max(64, 2 * old)
        self._items += [None] * (size - old)
        self._free += range(size - 1, old - 1, -1)
        for name, fill in (("_cells", 0), ("_ticks", 0), ("_gains", np.inf)):
            array = getattr(self, name)
            grown = np.full(size, fill, dtype=array.dtype)
            grown[:old] = array[:old]
            setattr(self, name, grown)


EVICTIONS: dict[str, type[Eviction]] = {"learned": Learned, "lru": LRU, "fifo": FIFO}


def make_eviction(name: str) -> Eviction:
    """Builds an eviction by name.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in EVICTIONS:
        raise ValueError(f"eviction={name!r} is unknown; choose one of {', '.join(sorted(EVICTIONS))}")
    return EVICTIONS[name]()
