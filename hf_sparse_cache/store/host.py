"""The tier in host memory, for models on an accelerator."""

from __future__ import annotations

from dataclasses import replace

from ..errors import out_of_memory
from ..planning.lineage import Span
from .eviction import LRU
from .ledger import Ledger
from .tier import Demote, Tier
from .tree import Checkpoint
from .unit import Unit, movable


class HostTier(Tier):
    """Units in pinned host memory, or in another memory that payloads can be moved to.

    Args:
        max_memory: its own budget in bytes, None for no limit.

    Attributes:
        place: where its units live, for `MovablePayload.moved_to`.
    """

    name = "host"
    place = "host"

    def __init__(self, max_memory: int | None) -> None:
        super().__init__(Ledger(max_memory, LRU()))

    def accept(self, unit: Unit, demote: Demote | None = None) -> bool:
        """Copies a unit; False for one that lives here already: a model on the CPU has no use for a host tier."""
        with self.ledger.footing(unit.tokens, unit.space) as footing:
            try:
                state = movable(unit.state).moved_to(self.place)
                if state is unit.state and unit.state.nbytes:
                    return False
                missing = self.ledger.missing_spans(footing, unit.spans)
                kv = {span: movable(unit.kv[span]).moved_to(self.place) for span in missing}
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self.warn("move", f"A state could not be moved to the {self.name} tier: {error}")
                return False
            if state is unit.state and any(kv[span] is unit.kv[span] for span in kv):
                return False  # where nothing but keys and values is kept, they say where it lives
            moved = replace(unit, state=state, kv=kv)
            stored = self.put(moved, demote, footing, urgent=True)
        self.tidy()
        return stored is not None

    def brought_up(self, checkpoint: Checkpoint) -> None:
        """Moved, not copied: host memory is for what the device does not hold."""
        with self.lock:
            if checkpoint.stored and not checkpoint.pins:
                self.ledger.evict(checkpoint, demoted=True)

    def fetch(self, unit: Unit, spans: list[Span]) -> Unit | None:
        """A pinned checkpoint's unit on the model's device, with the KV of `spans`."""
        state = movable(unit.state).moved_to("device")
        kv = {span: movable(unit.kv[span]).moved_to("device") for span in spans}
        return replace(unit, state=state, kv=kv)
