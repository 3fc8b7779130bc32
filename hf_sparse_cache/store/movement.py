"""How units leave a store for the tier below it and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ..planning.cuts import MIN_SUFFIX_TOKENS, Tokens
from .ledger import Ledger
from .tree import Checkpoint
from .unit import MovablePayload, Unit, unit_of


if TYPE_CHECKING:
    from .store import CheckpointStore
    from .tier import Tier


class Tiered(Ledger):
    """A ledger with a tier below it, or none."""

    reader: Callable[[bytes], MovablePayload] | None = None  # makes a payload of a file; for the tiers that need it
    durable = False  # whether this very tier outlives the process
    below: Tier | None = None

    @property
    def tiers(self) -> list[CheckpointStore]:
        """This tier and those below it, fastest first."""
        return [cast("CheckpointStore", self), *(self.below.tiers if self.below is not None else ())]

    @property
    def outlives_process(self) -> bool:
        """Whether any tier does, so that a space must name its weights by their content."""
        return any(tier.durable for tier in self.tiers)

    def lift(self, ids: Tokens, space: str = "") -> None:
        """Brings a deeper checkpoint of this prompt up from the tiers below, where there is one."""
        if self.below is not None:
            self.below.promote_to(cast("CheckpointStore", self), ids, space)

    def reach(self, ids: Tokens, space: str = "") -> tuple[int, int]:
        """How far the tiers below would resume a prompt, and how much of it they know; reads no file."""
        found = [tier.match(ids, space) for tier in self.tiers[1:]]
        limit = len(ids) - MIN_SUFFIX_TOKENS
        deepest = [item.position for match in found for item in match.checkpoints(limit)[-1:]]
        return max(deepest, default=0), max((match.overlap for match in found), default=0)

    def flush(self) -> None:
        """Copies what only memory holds to the disk tier, if there is one, the least recently used first."""
        *faster, last = self.tiers
        for tier in faster if last.durable else ():
            for checkpoint in sorted(tier.stored(), key=lambda item: item.last_used):
                with tier.lock:
                    if checkpoint.node.checkpoints.get(checkpoint.position) is not checkpoint:
                        continue  # demoted meanwhile
                    tier.pin(checkpoint)
                    unit = unit_of(checkpoint)
                try:
                    cast("Tier", last).accept(unit)
                finally:
                    tier.unpin(checkpoint)

    def close(self, flush: bool = True) -> None:
        """Ends the use of the disk tier, so that another process can take its folder; memory stays as it is.

        Args:
            flush: whether to write what only memory holds first (see `flush`); else it is gone with the process.
        """
        if flush:
            self.flush()
        for tier in self.tiers:
            if tier.below is not None and tier.below.durable:
                tier.below.release()
                tier.below, tier.demotes = None, False

    def _carry(self, stored: Checkpoint | None, unit: Unit) -> None:
        if stored is not None:
            stored.hits = max(stored.hits, unit.hits)

    def _demote(self, victim: Checkpoint) -> None:
        """Copies a pinned checkpoint to the tier below and evicts it here, unless a request uses it by now."""
        kept = False
        try:
            if self.below is not None:
                with self.lock:
                    unit, clears = unit_of(victim), self.clears
                kept = self.below.accept(unit)
                if clears != self.clears:
                    self.below.clear()  # what was to be forgotten must not come back
        finally:
            with self.lock:
                self.unpin(victim)
                if not victim.pins and victim.node.checkpoints.get(victim.position) is victim:
                    self.evict(victim, demoted=kept)
