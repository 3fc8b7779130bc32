"""Which checkpoint goes when memory is short. One small class each; the store calls four verbs under its lock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tree import Checkpoint, Node


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
        """A request walked `path`, shared `overlap` tokens with it and resumed at `resumed`."""

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


EVICTIONS: dict[str, type[Eviction]] = {"learned": LRU, "lru": LRU, "fifo": FIFO}


def make_eviction(name: str) -> Eviction:
    """Builds an eviction by name.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in EVICTIONS:
        raise ValueError(f"eviction={name!r} is unknown; choose one of {', '.join(sorted(EVICTIONS))}")
    return EVICTIONS[name]()
