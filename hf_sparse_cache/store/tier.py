"""The tiers below a model's own memory: host memory and disk. Demotion on pressure, promotion on a hit.

Every tier is a store with a budget and an order of its own, and holds whole units: a checkpoint with all the KV below
it, so that each tier can be counted, lost or found again without the others. A unit is copied before it leaves a tier,
with no lock held, and pinned on both sides meanwhile.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from ..planning.cuts import MIN_SUFFIX_TOKENS, Tokens
from ..stats import parse_bytes
from .store import CheckpointStore
from .tree import Checkpoint
from .unit import Span, Unit, unit_of


logger = logging.getLogger(__name__)


class Tier(CheckpointStore):
    """A store below another one.

    Args:
        name: "host" or "disk".
        max_memory: its own budget in bytes, None for no limit.
        below: the next tier down.
    """

    def __init__(self, name: str, max_memory: int | None, below: Tier | None = None) -> None:
        super().__init__(max_memory, "lru", None)
        self.name = name
        self.below = below
        self.demotes = below is not None
        self._warned: set[str] = set()

    def accept(self, unit: Unit) -> bool:
        """Takes a unit from the tier above; True if this tier, or one below it, has it now."""
        with ExitStack() as hold:
            try:
                state = unit.state.moved_to(self.name)
                if state is unit.state:  # it lives here already: a model on the CPU has no use for a host tier
                    return self.below is not None and self.below.accept(unit)
                missing = self.missing_spans(unit.tokens, list(unit.kv), unit.space, hold)
                new = {span: unit.kv[span].moved_to(self.name) for span in missing}
            except (MemoryError, RuntimeError) as error:  # torch reports a lack of pinned memory as a RuntimeError
                self.warn("move", f"A state could not be moved to the {self.name} tier: {error}")
                return False
            stored = self.put(unit.tokens, unit.position, state, list(unit.kv), new, unit.space, urgent=True)
        with self.lock:
            self._carry(stored, unit)
            self.forest.forget(0)  # a lower tier remembers no more than its checkpoints need
        return stored is not None or (self.below is not None and self.below.accept(unit))

    def fetch(self, checkpoint: Checkpoint, unit: Unit, spans: list[Span]) -> Unit | None:
        """A pinned checkpoint's unit as the model's own memory wants it, with the KV of `spans`; None when lost."""
        state = unit.state.moved_to("device")
        kv = {span: unit.kv[span].moved_to("device") for span in spans}
        return Unit(unit.space, unit.tokens, state, kv, unit.hits)

    def promote_to(self, upper: CheckpointStore, ids: Tokens, space: str) -> None:
        """Copies up the deepest checkpoint of a prompt that lies deeper than those `upper` has itself."""
        lost: set[int] = set()
        while True:
            match = upper.match(ids, space)
            limit = len(ids) - MIN_SUFFIX_TOKENS
            depth = max((item.position for item in match.checkpoints(limit)), default=0)
            best: tuple[Tier, Checkpoint] | None = None
            overlap = match.overlap
            for tier in self.tiers:
                assert isinstance(tier, Tier)
                found, shared = tier.deepest(ids, space, limit, lost)
                overlap = max(overlap, shared)
                if found is not None and found.position > depth:
                    depth = found.position
                    if best is not None:
                        best[0].unpin(best[1])
                    best = (tier, found)
                elif found is not None:
                    tier.unpin(found)
            if best is None or best[0].copy_up(best[1], upper, ids[:overlap]):
                return
            lost.add(id(best[1]))

    def deepest(self, ids: Tokens, space: str, limit: int, lost: set[int]) -> tuple[Checkpoint | None, int]:
        """The deepest checkpoint on a prompt's path, pinned, and the tokens shared with this tier's paths."""
        with self.lock:
            match = self.match(ids, space)
            found = [item for item in match.checkpoints(limit) if id(item) not in lost]
            if found:
                self.pin(found[-1])
            return (found[-1] if found else None), match.overlap

    def copy_up(self, checkpoint: Checkpoint, upper: CheckpointStore, ids: Tokens, space: str | None = None) -> bool:
        """Promotes a pinned checkpoint, under another name of its space if given, and unpins it; False when lost."""
        hold = ExitStack()
        try:
            with self.lock:
                unit = unit_of(checkpoint)
                self.clock += 1
                checkpoint.hits += 1
                self.passed(self.match(unit.tokens, unit.space), checkpoint, unit.space)
            spans = list(unit.kv)
            space = unit.space if space is None else space
            try:
                fetched = self.fetch(checkpoint, unit, list(upper.missing_spans(ids, spans, space, hold)))
            except (MemoryError, RuntimeError) as error:
                self.warn("fetch", f"A state could not be brought up from the {self.name} tier: {error}")
                return True  # it is still here; this request does without
            if fetched is None:
                return False
            clears = upper.clears
            stored = upper.put(ids, unit.position, fetched.state, spans, fetched.kv, space, urgent=True)
            upper._carry(stored, unit)
            if clears != upper.clears:
                upper.clear()
        finally:
            hold.close()
            self.unpin(checkpoint)
        if stored is not None and not self.durable:
            with self.lock:  # moved, not copied: host memory is for what the device does not hold
                if not checkpoint.pins and checkpoint.node.checkpoints.get(checkpoint.position) is checkpoint:
                    self.evict(checkpoint, demoted=True)
                    self.forest.forget(0)
        return True

    def release(self) -> None:
        """Gives back what other processes wait for; a tier in memory has nothing of the kind."""

    def warn(self, kind: str, message: str) -> None:
        """Logs one warning of a kind, ever: a full disk fails for every unit."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s. Requests go on without it; further failures of this kind are not reported.", message)


def lower_tiers(
    host_memory: int | str | None, disk_memory: int | str | None, disk_dir: str | Path | None
) -> Tier | None:
    """The tiers that a store asks for, the upper one; None when the only one cannot be used.

    Raises:
        ValueError: if a size cannot be read, or a folder is given without a size.
    """
    if disk_memory is None and disk_dir is not None:
        raise ValueError(f"disk_dir={str(disk_dir)!r} needs disk_memory, the bytes it may hold; give e.g. '20GiB'")
    below: Tier | None = None
    if disk_memory is not None:
        from .disk import DiskTier

        folder = default_folder() if disk_dir is None else Path(disk_dir).expanduser()
        below = DiskTier.open(folder, parse_bytes(disk_memory, "disk_memory"))
    if host_memory is not None:
        below = Tier("host", parse_bytes(host_memory, "host_memory"), below)
    return below


def default_folder() -> Path:
    """`sparse_cache` under HF_HOME."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).expanduser() / "sparse_cache"
