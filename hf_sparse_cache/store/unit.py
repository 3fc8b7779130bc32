"""What moves between tiers, and who pays for it: one resumable unit, and the account of one namespace."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

from ..planning.cuts import Tokens
from .eviction import Eviction
from .tree import Checkpoint, KVSegment, Match, Node, Payload


Span = tuple[int, int]


class Demotion(Exception):
    """Room can be made once `victim`, pinned meanwhile, is copied to the tier below, without the lock."""

    def __init__(self, victim: Checkpoint) -> None:
        super().__init__()
        self.victim = victim


@dataclass
class Account:
    """What one namespace holds in one tier, and at most may hold.

    Attributes:
        limit: bytes, or None without a budget of its own.
        order: which of its checkpoints goes first; only with a limit.
    """

    checkpoints: int = 0
    checkpoint_bytes: int = 0
    kv_bytes: int = 0
    evictions: int = 0
    limit: int | None = None
    order: Eviction | None = None

    @property
    def used_bytes(self) -> int:
        return self.checkpoint_bytes + self.kv_bytes


class Bound(NamedTuple):
    """A budget that a checkpoint has to fit into.

    Attributes:
        name: the argument that sets it.
        limit: its bytes.
        used: those that are stored.
        kept: those of them that stay while the checkpoint is stored, and that it does not share.
    """

    name: str
    limit: int
    used: int
    kept: int


class MovablePayload(Payload, Protocol):
    """What a store with tiers asks of its payloads; it never looks inside them."""

    def moved_to(self, tier: str) -> MovablePayload:
        """A copy in "host" memory or on the "device" it was captured on; itself where it lives there already."""

    def to_bytes(self, record: str, tokens: Tokens) -> bytes:
        """A safetensors file: its tensors, the tensor `tokens`, and `record` as the metadata `unit`."""


@dataclass
class Unit:
    """One checkpoint with everything it needs: what is moved to another tier, or to a folder.

    Attributes:
        tokens: the path up to the checkpoint, int32 `(position,)`.
        kv: payloads of its KV spans from 0 to the position; only those that are asked for when it is fetched.
    """

    space: str
    tokens: Tokens
    state: MovablePayload
    kv: dict[Span, MovablePayload] = field(default_factory=dict)
    hits: int = 0

    @property
    def position(self) -> int:
        return len(self.tokens)


def namespace_of(space: str) -> str:
    """The tenant of a space: what follows its first unit separator."""
    return space.partition("\x1f")[2]


def unit_of(checkpoint: Checkpoint) -> Unit:
    """A stored checkpoint as a unit; to be called under the store's lock."""
    root, segment = checkpoint.node, checkpoint.kv
    kv: dict[Span, MovablePayload] = {}
    while root.parent is not None:
        root = root.parent
    while segment is not None:
        kv[segment.start, segment.end] = cast(MovablePayload, segment.payload)
        segment = segment.parent
    tokens = checkpoint.node.path_tokens()[: checkpoint.position]
    return Unit(root.note, tokens, cast(MovablePayload, checkpoint.state), dict(reversed(kv.items())), checkpoint.hits)


def holder(path: list[Node], position: int) -> Node:
    """The node of a path whose edge covers `position`."""
    return path[bisect_left(path, position, key=lambda node: node.end)]


def chain_of(path: list[Node], spans: Sequence[Span]) -> list[KVSegment]:
    """The stored segments for the first of `spans`, each chained to the one before."""
    chain: list[KVSegment] = []
    index = 0
    for start, end in spans:
        while index < len(path) and path[index].end < end:
            index += 1
        segment = path[index].segments.get((start, end)) if index < len(path) else None
        if segment is None or segment.parent is not (chain[-1] if chain else None):
            break
        chain.append(segment)
    return chain


def shared_chain(match: Match, spans: Sequence[Span]) -> list[KVSegment]:
    """The stored segments of a match. The last edge of its path may go on as another prompt does, hence the bound."""
    return chain_of(match.path, [span for span in spans if span[1] <= match.overlap])
