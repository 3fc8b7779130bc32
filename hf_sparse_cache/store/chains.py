"""The KV segments of one tier: chains that grow, are held while somebody builds on them, and are freed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..planning.lineage import Span
from .forest import Forest, Trail
from .tree import KVSegment, Payload
from .unit import chain_of


class Footing:
    """Where somebody stands on one text: its way through the tree, and the stored KV chain he builds on.

    Nothing of the chain is freed before the footing ends.

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
            if segment.span != span:
                break
            count += 1
        return self.chain[:count]


class Chains:
    """Every KV segment of a tier, counted; used under its ledger's lock.

    Attributes:
        nbytes, tokens: of all segments.
        held: the ends of the chains that footings hold, each with how many do.
        freed: payloads that are stored no longer, for a tier that has to delete them; None where none has to.
    """

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        self.nbytes = self.tokens = 0
        self.held: Counter[KVSegment] = Counter()
        self.footings: set[Footing] = set()
        self.freed: list[Payload] | None = None

    def begin(self, trail: Trail) -> Footing:
        """A footing on one text, until `end`."""
        footing = Footing(trail)
        self.footings.add(footing)
        return footing

    def end(self, footing: Footing) -> None:
        """Ends a footing: what only its chain needed is freed."""
        self.footings.discard(footing)
        chain, footing.chain = footing.chain, []
        if chain:
            self._unhold(chain[-1])

    def advance(self, footing: Footing, spans: Sequence[Span]) -> Sequence[Span]:
        """Follows the stored chain as far as `spans` go, from 0 and gapless; returns those that are left."""
        chain = footing.shared(spans)
        if len(chain) < len(spans):
            path, depth = footing.trail.known()
            found = chain_of(path, [span for span in spans[len(chain) :] if span.end <= depth], chain)
            if found:
                chain += found
                self.stand(footing, chain)
        return spans[len(chain) :]

    def stand(self, footing: Footing, chain: list[KVSegment]) -> None:
        """Holds the end of a chain, and with it all of it, in place of the one before."""
        self.held[chain[-1]] += 1  # the only one that takes memory
        chain[-1].holds += 1
        before, footing.chain = footing.chain, chain
        if before:
            self._unhold(before[-1])

    def attach(self, segment: KVSegment) -> KVSegment:
        """Stores a segment behind the one it continues."""
        segment.node.segments[segment.parent, segment.span] = segment
        if segment.parent is not None:
            segment.parent.refs += 1
        self._count(segment, 1)
        return segment

    def release(self, segment: KVSegment | None) -> None:
        """Takes back a checkpoint's reference."""
        if segment is not None:
            segment.refs -= 1
            self._free(segment)

    def below(self, ends: Iterable[KVSegment | None]) -> set[KVSegment]:
        """Every segment of the chains that end there."""
        found: set[KVSegment] = set()
        for segment in ends:
            while segment is not None and segment not in found:
                found.add(segment)
                segment = segment.parent
        return found

    def gone(self, payload: Payload) -> None:
        """A payload is stored no longer."""
        if self.freed is not None:
            self.freed.append(payload)

    def _unhold(self, segment: KVSegment) -> None:
        if segment in self.held:  # not after a fork
            segment.holds -= 1
            self.held[segment] -= 1
            if not self.held[segment]:
                del self.held[segment]
            self._free(segment)

    def _free(self, segment: KVSegment | None) -> None:
        """Frees every segment down the chain that nothing needs any more."""
        while segment is not None and not segment.refs and not segment.holds:
            del segment.node.segments[segment.parent, segment.span]
            self._count(segment, -1)
            self.gone(segment.payload)
            self.forest.released(segment.node)
            segment = segment.parent
            if segment is not None:
                segment.refs -= 1

    def _count(self, segment: KVSegment, sign: int) -> None:
        self.nbytes += sign * segment.nbytes
        self.tokens += sign * (segment.end - segment.start)
        segment.owner.kv_bytes += sign * segment.nbytes
