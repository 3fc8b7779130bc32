"""A tier: one place for states, with a ledger of its own. This one is the model's own memory, the fastest.

Every tier holds whole units: a checkpoint with all the KV below it, so that each tier can be counted, lost or found
again without the others. Tiers do not know each other; the store moves units between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from threading import RLock

from ..planning.cuts import Tokens
from ..planning.lineage import Span
from .audit import WrongBooksError, audit
from .chains import Footing
from .eviction import Eviction
from .forest import Forest
from .headers import Plain
from .ledger import Ledger
from .tree import Checkpoint, Departure, Match
from .unit import Expected, MovablePayload, Unit


logger = logging.getLogger(__name__)
# Copies a pinned checkpoint to the tiers below, without a lock, unpins it, and evicts it here.
Demote = Callable[[Checkpoint], None]


class Shown:
    """What anyone may read of a ledger: every tier shows its own, and a store that of its fastest tier."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @property
    def lock(self) -> RLock:
        return self.ledger.lock

    @property
    def forest(self) -> Forest:
        return self.ledger.forest

    @property
    def eviction(self) -> Eviction:
        return self.ledger.eviction

    @property
    def max_memory(self) -> int | None:
        """The budget in bytes; None for no limit. `resize` changes it."""
        return self.ledger.max_memory

    @property
    def used_bytes(self) -> int:
        """Bytes of all stored states and KV segments."""
        return self.ledger.used_bytes

    @property
    def reserved_bytes(self) -> int:
        """Room kept for what is on its way."""
        return self.ledger.reserved_bytes

    @property
    def evictions(self) -> int:
        """Checkpoints evicted so far, those left out that a tier below took."""
        return self.ledger.evictions

    @property
    def demotions(self) -> int:
        """Checkpoints so far that a tier below took."""
        return self.ledger.demotions

    @property
    def remembered_tokens(self) -> int:
        """Tokens the trees hold, with or without checkpoints."""
        return self.ledger.forest.tokens

    @property
    def tree_bytes(self) -> int:
        """Bytes of what the trees remember: tokens, nodes and descriptions of prompts."""
        return self.ledger.forest.nbytes

    def match(self, ids: Tokens, space: str = "") -> Match:
        """Finds the longest prefix of `ids` that the space remembers, token by token."""
        return self.ledger.match(ids, space)

    def departure(self, ids: Tokens, space: str = "", most: int = 1) -> Departure:
        """Where a prompt has another token than what the space remembers, with `most` of those that stand there."""
        return self.ledger.departure(ids, space, most)

    def stored(self, space: str | None = None) -> list[Checkpoint]:
        """Every stored checkpoint of one space, or of all."""
        return self.ledger.stored(space)

    def checkpoints(self, space: str | None = None) -> list[tuple[str, Tokens, Checkpoint]]:
        """Every stored checkpoint with its space and the tokens of its path up to its position."""
        return self.ledger.checkpoints(space)

    def evict(self, checkpoint: Checkpoint) -> None:
        """Removes one checkpoint and the KV that only it needs.

        Raises:
            ValueError: if the checkpoint is pinned.
        """
        self.ledger.evict(checkpoint)

    def __len__(self) -> int:
        return self.ledger.checkpoint_count


class Tier(Shown):
    """One place for states; this class is the model's own memory, and what the other tiers have in common.

    Attributes:
        name: as people call it.
        durable: whether it outlives the process.
        reader: makes a payload of a file; for the tiers that need it.
    """

    name = "memory"
    durable = False

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self.reader: Callable[[Plain], MovablePayload] | None = None
        self._warned: set[str] = set()

    def put(
        self,
        unit: Unit,
        demote: Demote | None = None,
        footing: Footing | None = None,
        *,
        urgent: bool = False,
        keep: bool = False,
    ) -> Checkpoint | None:
        """Stores a unit, with others sent off first when memory is short.

        Args:
            unit: with the payloads of the spans that are not stored yet.
            demote: where victims go; None evicts them.
            footing: on its text, of a caller who goes on from there.
            urgent: a request waits for it, so the eviction is not asked whether something else is worth more.
            keep: it belongs to a mark: just as urgent, and never evicted from then on.

        Returns:
            The checkpoint (the stored one if it was there already), or None when there was no room for it.
        """
        if footing is None:
            with self.ledger.footing(unit.tokens, unit.space) as own:
                return self.put(unit, demote, own, urgent=urgent, keep=keep)
        while True:
            with self.lock:
                entry = self.ledger.insert(unit, footing, urgent=urgent or keep, demotes=demote is not None)
                if keep and entry.checkpoint is not None:  # under this lock, or another thread takes its room
                    self.ledger.keep(entry.checkpoint, unit.space)
            if entry.victim is None or demote is None:
                return entry.checkpoint
            demote(entry.victim)

    def accept(self, unit: Unit, demote: Demote | None = None) -> bool:
        """Takes a unit from a faster tier; True if this one has it now."""
        raise NotImplementedError

    def fetch(self, unit: Unit, spans: list[Span]) -> Unit | None:
        """A pinned checkpoint's unit as the model's own memory wants it, with the KV of `spans`; None when lost."""
        return unit

    def units(self, space: str | None = None) -> Iterator[Unit]:
        """Everything stored, the least recently used first, each pinned while the caller works on it."""
        for checkpoint in sorted(self.stored(space), key=lambda item: item.last_used):
            with self.ledger.taken(checkpoint) as unit:
                if unit is not None:  # not sent off meanwhile
                    yield unit

    def expect(self, space: str, like: Expected) -> None:
        """Learns what the states of a space must be; a tier in memory knows, as it got them from the model."""

    def brought_up(self, checkpoint: Checkpoint) -> None:
        """A copy of a checkpoint was stored in memory; no longer pinned here."""

    def resize(self, max_memory: int | None, demote: Demote | None = None) -> None:
        """Changes the budget; sends checkpoints off down to it, as far as nothing is pinned."""
        with self.lock:
            self.ledger.max_memory = max_memory
        self.shrink(demote)

    def shrink(self, demote: Demote | None = None) -> None:
        """Sends checkpoints off down to the budget, as far as nothing is pinned."""
        while True:
            with self.lock:
                room = self.ledger.make_room(0, demotes=demote is not None)
            if room.victim is None or demote is None:
                return
            demote(room.victim)

    def clear(self, space: str | None = None) -> None:
        """Forgets one space or all: prompts, marks and checkpoints, those in use as soon as they are not."""
        self.ledger.clear(space)

    def drop(self, space: str | None) -> None:
        """Evicts every checkpoint of one space, as its weights are gone."""
        self.ledger.drop(space)

    def tidy(self) -> None:
        """Does what is due after something was evicted; called without the lock."""
        self.ledger.trim()

    def verify(self) -> None:
        """Counts everything anew.

        Raises:
            WrongBooksError: the books do not agree with what is there; it names what differs.
        """
        try:
            audit(self.ledger)
        except WrongBooksError as error:
            raise WrongBooksError(f"{self.name}: {error}") from None

    def release(self) -> None:
        """Gives back what other processes wait for; a tier in memory has nothing of the kind."""

    def start_over(self) -> None:
        """Empties books that may be half written."""
        self.ledger.start_over()

    def after_fork(self) -> None:
        """In a child process: empty, with a new lock."""
        self.ledger.after_fork()

    def warn(self, kind: str, message: str) -> None:
        """Logs one warning of a kind, ever: a full disk fails for every unit."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s. Requests go on without it; further failures of this kind are not reported.", message)
