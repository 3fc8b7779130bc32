"""What comes into a tier and moves between tiers: one resumable unit, a state with all the KV that it needs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..errors import UnprovedError
from ..planning.cuts import Tokens
from ..planning.lineage import Lineage, Span
from .tree import Checkpoint, KVSegment, Match, Node, Payload


@runtime_checkable
class MovablePayload(Payload, Protocol):
    """What a store with tiers asks of its payloads; it never looks inside them."""

    def moved_to(self, place: str) -> MovablePayload:
        """A copy in "host" memory, on the "device" it was captured on, or wherever else a tier keeps its units, by a
        name that the payload knows; itself where it lives there already."""

    def to_bytes(self, record: str, tokens: Tokens) -> bytes:
        """A safetensors file: its tensors, the tensor `tokens`, and `record` as the metadata `unit`."""


@runtime_checkable
class PledgedPayload(MovablePayload, Protocol):
    """A payload that can be handed on while it is still being proved.

    Attributes:
        pledge: whoever reads its values calls it first; it raises UnprovedError where they are not what was written.
    """

    pledge: Callable[[], None] | None

    def pledged(self, pledge: Callable[[], None]) -> PledgedPayload:
        """The same values, which nobody reads before `pledge` has returned."""


class Expected(Protocol):
    """What is known of a model's states before a file is read (see `models.layout`)."""

    @property
    def has_kv(self) -> bool:
        """Whether any layer keeps keys and values of every token."""

    def state_bytes(self, position: int, final: bool) -> int:
        """Most bytes of the tensors of a state; `final` with those that the end of a prompt has besides."""

    def kv_bytes(self, start: int, end: int) -> int:
        """Most bytes of the tensors of a span of keys and values."""

    def check_state(self, payload: Any, position: int, final: bool) -> None:
        """Raises DamagedFileError unless it can be this model's state after `position` tokens."""

    def check_kv(self, payload: Any, start: int, end: int) -> None:
        """Raises DamagedFileError unless these can be this model's keys and values of a span."""


@dataclass
class Unit:
    """One checkpoint with everything it needs: what is stored, moved to another tier, or saved in a folder.

    Attributes:
        tokens: the text it lies on, int32 `(length,)`, at least up to its position; what lies behind is remembered.
        lineage: the segments that made it, from 0 to its position.
        state: the fixed-size payload.
        spans: its KV spans from 0 to `position`, gapless; empty without full attention.
        kv: payloads of the spans, at least of those that the receiver does not have.
        final: whether it was taken at the end of a prompt, with the logits of the last token.
        hits: how often it was resumed.
        share: of the prompts that will pass it, those expected to leave before the next checkpoint.
        refund: bytes of checkpoints that it makes superfluous.
    """

    space: str
    tokens: Tokens
    lineage: Lineage
    state: Payload
    spans: Sequence[Span] = ()
    kv: Mapping[Span, Payload] = field(default_factory=dict)
    final: bool = False
    hits: int = 0
    share: float = 1.0
    refund: float = 0.0

    @property
    def position(self) -> int:
        return self.lineage.end

    def __post_init__(self) -> None:
        if not 1 <= self.position <= len(self.tokens):
            raise ValueError(
                f"position must be between 1 and the prompt's {len(self.tokens)} tokens, got {self.position}"
            )


def movable(payload: Payload) -> MovablePayload:
    """A payload as what a tier below can take.

    Raises:
        TypeError: it only knows its size.
    """
    if not isinstance(payload, MovablePayload):
        raise TypeError(
            f"a {type(payload).__name__} cannot leave memory, as it has no moved_to and to_bytes; give such payloads "
            "a store without host_memory and disk_memory"
        )
    return payload


def keeps_pledge(unit: Unit) -> bool:
    """Whether a unit is what was written; waits for what of it is still being proved."""
    try:
        for payload in (unit.state, *unit.kv.values()):
            pledge = getattr(payload, "pledge", None)
            if pledge is not None:
                pledge()
    except UnprovedError:
        return False
    return True


def namespace_of(space: str) -> str:
    """The tenant of a space: what follows its first unit separator."""
    return space.partition("\x1f")[2]


def unit_of(checkpoint: Checkpoint) -> Unit:
    """A stored checkpoint as a unit; to be called under its ledger's lock."""
    node = checkpoint.node
    kv = {segment.span: segment.payload for segment in checkpoint.chain()}
    tokens = node.path_tokens()[: checkpoint.position]
    return Unit(
        node.tree.space,
        tokens,
        checkpoint.lineage,
        checkpoint.state,
        list(kv),
        kv,
        final=checkpoint.final,
        hits=checkpoint.hits,
    )


def holder(path: list[Node], position: int) -> Node:
    """The node of a path whose edge covers `position`."""
    return path[bisect_left(path, position, key=lambda node: node.end)]


def chain_of(path: list[Node], spans: Sequence[Span], below: Sequence[KVSegment] = ()) -> list[KVSegment]:
    """The stored segments for the first of `spans`, each chained to the one before, and the first to those `below`."""
    chain: list[KVSegment] = []
    last = below[-1] if below else None
    index = 0
    for span in spans:
        while index < len(path) and path[index].end < span.end:
            index += 1
        segment = path[index].segments.get((last, span)) if index < len(path) else None
        if segment is None:
            break
        chain.append(segment)
        last = segment
    return chain


def shared_chain(match: Match, spans: Sequence[Span]) -> list[KVSegment]:
    """The stored segments of a match. The last edge of its path may go on as another prompt does, hence the bound."""
    return chain_of(match.path, [span for span in spans if span.end <= match.overlap])
