"""What the store hands to those who build on what it holds: a footing on one text, and a request's whole visit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..planning.policy import Prompt
from .forest import Trail
from .tree import Checkpoint, KVSegment, Match
from .unit import Span


class Footing:
    """Where somebody stands on one text: its way through the tree, and the stored KV chain he builds on.

    Nothing of the chain is freed before the ledger is told to let go of the footing.

    Attributes:
        chain: the stored segments of his spans, from 0 upwards, as far as he has asked for them.
        ended: its space was cleared: nothing is stored on it any more.
    """

    __slots__ = ("chain", "ended", "trail")

    def __init__(self, trail: Trail) -> None:
        self.trail = trail
        self.chain: list[KVSegment] = []
        self.ended = False

    def shared(self, spans: Sequence[Span]) -> list[KVSegment]:
        """The part of the chain that covers the first of `spans`, cut for cut."""
        count = 0
        for segment, span in zip(self.chain, spans, strict=False):
            if (segment.start, segment.end) != span:
                break
            count += 1
        return self.chain[:count]


@dataclass(eq=False)
class Visit:
    """One prompt's stay in the store, from `CheckpointStore.open` to `CheckpointStore.leave`.

    Attributes:
        footing: its text and the chain that its checkpoints build on; walked once, reused by every `put`.
        match: what the tree knew of the prompt.
        usable: the deepest position at which it may resume.
        checkpoint: where it resumes, pinned meanwhile; None when cold.
        marked: cuts at which a checkpoint is to be kept.
        prompt: what a policy may look at.
    """

    space: str
    footing: Footing
    match: Match
    usable: int
    checkpoint: Checkpoint | None
    marked: set[int]
    prompt: Prompt
