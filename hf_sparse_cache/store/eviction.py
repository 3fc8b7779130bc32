"""Which checkpoint goes when memory is short. One small class each; the store calls four verbs under its lock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..planning.policy import Terms


if TYPE_CHECKING:
    from ..planning.overlap import Forecast
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

    def known(self) -> list[Checkpoint] | None:
        """Every checkpoint in the books, for those who check them; None where a subclass keeps others."""
        return list(self._order) if type(self).stored is Eviction.stored else None

    def passed(self, path: Sequence[Node], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        """Request number `now` walked `path`, shared `overlap` tokens with it and resumed at `resumed`."""

    def settled(self, path: Sequence[Node], forecast: Forecast | None, now: int) -> None:
        """A request closed; `path` covers its whole prompt, `forecast` says where the next one will leave it."""

    def terms(self, path: Sequence[Node], overlap: int, need: float, resumed: Checkpoint | None) -> Terms:
        """What new checkpoints on this path would earn, and what it costs to free `need` bytes for them."""
        return Terms()

    def victim(self, incoming: Checkpoint | None, need: int) -> Checkpoint | None:
        """The next checkpoint to go so that `need` bytes come free; None to refuse `incoming` instead."""
        return next((checkpoint for checkpoint in self._order if not checkpoint.pins), None)


class FIFO(Eviction):
    """First in, first out: the paper's."""


class LRU(Eviction):
    """Least recently resumed (or stored) first."""

    def passed(self, path: Sequence[Node], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        """Moves the resumed checkpoint to the safe end."""
        if resumed is not None:
            self._order.move_to_end(resumed)
