"""What one call of many prompts keeps in the store for those of its prompts that are to come."""

from __future__ import annotations

from dataclasses import dataclass

from ..planning.foresight import Foresight
from .mending import mended
from .store import CheckpointStore
from .tree import Checkpoint


@dataclass(eq=False)
class _Held:
    """A checkpoint that the call has pinned.

    Attributes:
        until: place of the last prompt that needs it.
        leaves: whether it goes then: the call brought it, and nobody else wants it.
    """

    checkpoint: Checkpoint
    until: int
    leaves: bool


class Holding:
    """Checkpoints of one call, pinned until the last of its prompts that needs them has come by.

    They take room as any other checkpoint does, and none where there is none: then the next prompt computes more.

    Args:
        store: where they are.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._held: list[_Held] = []
        self._foresight: Foresight | None = None

    @mended
    def begin(self, foresight: Foresight, place: int) -> None:
        """The prompt at a place of the call's order begins; what only earlier ones needed goes."""
        self._note_wishes()
        self._foresight = foresight
        self._release([held for held in self._held if held.until < place])

    def staying(self, position: int) -> int:
        """Where a prompt that resumes at a position would resume if nothing were kept for the call alone."""
        at = [held for held in self._held if held.checkpoint.position == position]
        if not at or not at[0].leaves:
            return position
        above = (held.checkpoint.position for held in self._held if not held.leaves)
        return max((other for other in above if other < position), default=0)

    def needs(self, position: int) -> bool:
        """Whether a later prompt of the call will resume at a position of this one."""
        return self._foresight is not None and position in self._foresight.needed

    @mended
    def hold(self, checkpoint: Checkpoint, *, new: bool) -> None:
        """Pins a checkpoint that was stored for later prompts of the call.

        Args:
            checkpoint: at a position that `needs` told.
            new: whether the call brought it; it was there already otherwise.
        """
        assert self._foresight is not None
        position = checkpoint.position
        ledger = self._store.ledger
        with ledger.lock:
            if checkpoint.stored and not any(held.checkpoint is checkpoint for held in self._held):
                ledger.take(checkpoint)
                leaves = new and position not in self._foresight.wanted
                self._held.append(_Held(checkpoint, self._foresight.needed[position], leaves))

    def __del__(self) -> None:
        if self._held:  # an interrupt came before any line of `close`
            self._store.ledger.orphans.append((None, [held.checkpoint for held in self._held]))

    @mended
    def close(self) -> None:
        """The call is over: nothing is pinned for it, and only what the handle's policy wants stays."""
        self._note_wishes()
        self._foresight = None
        self._release(self._held)

    def _note_wishes(self) -> None:
        """What lies on the path of the latest prompt stays, where the handle's policy would have put it there."""
        wanted = set() if self._foresight is None else self._foresight.wanted
        for held in self._held:
            held.leaves = held.leaves and held.checkpoint.position not in wanted

    def _release(self, gone: list[_Held]) -> None:
        self._held = [held for held in self._held if held not in gone]
        ledger = self._store.ledger
        for held in gone:
            with ledger.lock:
                ledger.done_with(held.checkpoint)
                if held.leaves and held.checkpoint.stored and not held.checkpoint.pins:
                    ledger.evict(held.checkpoint)
        if gone:
            self._store.settle()
