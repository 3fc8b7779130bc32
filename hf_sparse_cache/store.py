"""The store: checkpoints and KV segments of all prompts under one byte budget, shared by any number of threads.

It knows tokens, positions and payload sizes; it knows no model and no torch. Use it through `open_request`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from .eviction import Eviction, make_eviction
from .segmentation import Tokens
from .sizes import parse_bytes
from .tree import Checkpoint, Forest, KVSegment, Match, Node, Payload

Span = tuple[int, int]


class CheckpointStore:
    """Checkpoints of all prompts under one memory budget.

    Args:
        max_memory: bytes, or a string such as "2GiB"; None for no limit. Never exceeded, also not during an insert.
        eviction: "learned", "lru", "fifo", or an `Eviction` object of your own.
        max_remembered_tokens: bound on the tokens remembered after their states are gone; the least recently used that
            no checkpoint needs are forgotten first. None for no bound.

    Raises:
        ValueError: if a size cannot be read or the eviction's name is unknown.
    """

    def __init__(
        self,
        max_memory: int | str | None = "2GiB",
        eviction: str | Eviction = "learned",
        max_remembered_tokens: int | None = 2**24,
    ) -> None:
        if max_remembered_tokens is not None and max_remembered_tokens < 1:
            raise ValueError(f"max_remembered_tokens must be at least 1 or None, got {max_remembered_tokens}")
        self.max_memory = parse_bytes(max_memory)
        self.max_remembered_tokens = max_remembered_tokens
        self.eviction = make_eviction(eviction) if isinstance(eviction, str) else eviction
        self.lock = threading.RLock()
        self.clock = 0  # requests opened so far: the unit of every age
        self.evictions = 0
        self.checkpoint_count = 0
        self.checkpoint_bytes = 0
        self.kv_bytes = 0
        self.kv_tokens = 0
        self.peak_bytes = 0
        self.forest = Forest()
        self._held: list[KVSegment] = []  # chains that open requests build on
        self._pinned: dict[int, Checkpoint] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of all stored states and KV segments."""
        return self.checkpoint_bytes + self.kv_bytes

    @property
    def remembered_tokens(self) -> int:
        """Tokens the trees hold, with or without checkpoints."""
        with self.lock:
            return self.forest.tokens

    def __len__(self) -> int:
        return self.checkpoint_count

    def __repr__(self) -> str:
        limit = "no limit" if self.max_memory is None else f"{self.max_memory:,}"
        return f"CheckpointStore({self.checkpoint_count} checkpoints, {self.used_bytes:,} of {limit} bytes)"

    def match(self, ids: Tokens, space: str = "") -> Match:
        """Finds the longest prefix of `ids` that the space remembers, token by token."""
        with self.lock:
            return Match(*self.forest.walk(ids, space), space in self.forest.roots)

    def checkpoints(self, space: str | None = None) -> list[tuple[str, Tokens, Checkpoint]]:
        """Every stored checkpoint with its space and the tokens of its path up to its position."""
        with self.lock:
            found = []
            for name in list(self.forest.roots) if space is None else [space]:
                for node in self.forest.nodes(name):
                    if node.checkpoints:
                        path = node.path_tokens()
                        found += [(name, path[:position], item) for position, item in sorted(node.checkpoints.items())]
            return found

    def remember(self, ids: Tokens, space: str = "") -> list[Node]:
        """Counts one prompt along its path, creating the path as needed, and forgets old tokens beyond the bound."""
        with self.lock:
            path = self.forest.insert(ids, space, self.clock)
            for node in path:
                node.passes += 1
                node.last_used = self.clock
            if self.max_remembered_tokens is not None:
                self.forest.forget(self.max_remembered_tokens)
            return path

    def missing_spans(self, ids: Tokens, spans: Sequence[Span], space: str = "") -> Sequence[Span]:
        """The part of a gapless list of KV spans, from 0 upwards, that is not stored on the path of `ids`."""
        with self.lock:
            match = self.match(ids, space)
            return spans[len(_chain(match.path, [span for span in spans if span[1] <= match.overlap])) :]

    def put(
        self,
        ids: Tokens,
        position: int,
        state: Payload,
        spans: Sequence[Span] = (),
        new: Mapping[Span, Payload] | None = None,
        space: str = "",
        share: float = 1.0,
        refund: float = 0.0,
    ) -> Checkpoint | None:
        """Stores a checkpoint after `position` tokens of `ids`, evicting others first when memory is short.

        Args:
            state: the fixed-size payload.
            spans: the KV spans `(start, end)` from 0 to `position`, gapless, cut to cut; empty without full attention.
            new: KV payloads of the spans that are not stored yet.
            share: of the prompts that will pass it, those expected to leave before the next checkpoint.
            refund: bytes of checkpoints that it makes superfluous.

        Returns:
            The checkpoint (the stored one if it was there already), or None when there was no room for it.

        Raises:
            ValueError: if `position` lies outside the prompt.
        """
        if not 1 <= position <= len(ids):
            raise ValueError(f"position must be between 1 and the prompt's {len(ids)} tokens, got {position}")
        new = new or {}
        with self.lock:
            path = self.forest.insert(ids, space, self.clock)
            home = _holder(path, position)
            if position in home.checkpoints:
                return home.checkpoints[position]
            chain = _chain(path, spans)
            wanted = spans[len(chain) :]
            if any(span not in new for span in wanted):
                return None  # a shared segment was freed while the caller computed: nothing to chain to
            need = int(state.nbytes) + sum(int(new[span].nbytes) for span in wanted)
            checkpoint = Checkpoint(position, state, None, home, self.clock)
            checkpoint.held, checkpoint.share, checkpoint.refund = need, share, refund
            with self.holding(chain[-1] if chain else None) as below:
                if not self._make_room(need, checkpoint):
                    return None
                for start, end in wanted:
                    below = self._attach(KVSegment(start, end, new[start, end], below, _holder(path, end)))
                if below is not None:
                    checkpoint.kv = below
                    below.refs += 1
            checkpoint.node.checkpoints[position] = checkpoint
            self.checkpoint_count += 1
            self.checkpoint_bytes += checkpoint.nbytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            self.eviction.stored(checkpoint)
            return checkpoint

    def evict(self, checkpoint: Checkpoint) -> None:
        """Removes one checkpoint and the KV that only it needs.

        Raises:
            ValueError: if the checkpoint is pinned.
        """
        with self.lock:
            if checkpoint.pins:
                raise ValueError(
                    f"checkpoint at {checkpoint.position} is pinned ({checkpoint.pins}); close its requests first"
                )
            node = checkpoint.node
            del node.checkpoints[checkpoint.position]
            self.checkpoint_count -= 1
            self.checkpoint_bytes -= checkpoint.nbytes
            self.evictions += 1
            node.lost = min(node.lost or checkpoint.position, checkpoint.position)
            self._release(checkpoint.kv)
            checkpoint.kv = None
            self.eviction.dropped(checkpoint)
            self.forest.offer(node)

    def pin(self, checkpoint: Checkpoint) -> None:
        """Keeps a checkpoint from being evicted until `unpin`."""
        with self.lock:
            checkpoint.pins += 1
            self._pinned[id(checkpoint)] = checkpoint

    def unpin(self, checkpoint: Checkpoint) -> None:
        """Takes back one `pin`."""
        with self.lock:
            checkpoint.pins -= 1
            if not checkpoint.pins:
                del self._pinned[id(checkpoint)]

    def resize(self, max_memory: int | str | None) -> None:
        """Changes the budget; evicts down to it, as far as nothing is pinned."""
        with self.lock:
            self.max_memory = parse_bytes(max_memory)
            self._make_room(0, None)

    def clear(self) -> None:
        """Forgets all prompts and every checkpoint that no open request uses."""
        with self.lock:
            for _, _, checkpoint in self.checkpoints():
                if not checkpoint.pins:
                    self.evict(checkpoint)
            self.forest.forget(0)

    def drop(self, space: str) -> None:
        """Evicts every checkpoint of one space that no open request uses."""
        with self.lock:
            for _, _, checkpoint in self.checkpoints(space):
                if not checkpoint.pins:
                    self.evict(checkpoint)

    @contextmanager
    def holding(self, segment: KVSegment | None) -> Iterator[KVSegment | None]:
        """Keeps a KV chain from being freed while a caller builds on it."""
        if segment is None:
            yield None
            return
        with self.lock:
            segment.holds += 1
            self._held.append(segment)
        try:
            yield segment
        finally:
            with self.lock:
                self._held.remove(segment)
                segment.holds -= 1
                self._free_chain(segment)

    def _make_room(self, need: int, incoming: Checkpoint | None) -> bool:
        """Evicts one checkpoint at a time until `need` bytes fit; evicts nothing if they never can."""
        if self.max_memory is None:
            return True
        if self.used_bytes + need <= self.max_memory:
            return True
        if incoming is not None and self._locked_bytes() + need > self.max_memory:
            return False
        while self.used_bytes + need > self.max_memory:
            victim = self.eviction.victim(incoming, self.used_bytes + need - self.max_memory)
            if victim is None:
                return False
            self.evict(victim)
        return True

    def _locked_bytes(self) -> int:
        """Bytes that no eviction can free now: pinned checkpoints and the chains that open requests need."""
        segments: set[KVSegment] = set()
        for segment in [*self._held, *(checkpoint.kv for checkpoint in self._pinned.values())]:
            while segment is not None and segment not in segments:
                segments.add(segment)
                segment = segment.parent
        return sum(c.nbytes for c in self._pinned.values()) + sum(segment.nbytes for segment in segments)

    def _attach(self, segment: KVSegment) -> KVSegment:
        segment.node.segments[segment.start, segment.end] = segment
        if segment.parent is not None:
            segment.parent.refs += 1
        self.kv_bytes += segment.nbytes
        self.kv_tokens += segment.end - segment.start
        return segment

    def _release(self, segment: KVSegment | None) -> None:
        """Takes back one reference."""
        if segment is not None:
            segment.refs -= 1
            self._free_chain(segment)

    def _free_chain(self, segment: KVSegment | None) -> None:
        """Frees every segment up the chain that nothing needs any more."""
        while segment is not None and not segment.refs and not segment.holds:
            del segment.node.segments[segment.start, segment.end]
            self.kv_bytes -= segment.nbytes
            self.kv_tokens -= segment.end - segment.start
            self.forest.offer(segment.node)
            segment = segment.parent
            if segment is not None:
                segment.refs -= 1


def _holder(path: list[Node], position: int) -> Node:
    """The node of a path whose edge covers `position`."""
    return path[bisect_left(path, position, key=lambda node: node.end)]


def _chain(path: list[Node], spans: Sequence[Span]) -> list[KVSegment]:
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
