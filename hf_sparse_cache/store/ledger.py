"""The books of one tier: what is stored, in bytes and by namespace, what is pinned, who goes when room is short."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..planning.cuts import Tokens
from .eviction import LRU, Eviction
from .marks import Marks
from .tree import Checkpoint, Forest, KVSegment, Match, Payload
from .unit import Account, Bound, Demotion, namespace_of


class Ledger:
    """Checkpoints and KV segments of one tier under one budget; `CheckpointStore` adds the ways in and out.

    Args:
        max_memory: bytes, or None for no limit.
        eviction: who goes first.
        limits: budgets of single namespaces.
    """

    def __init__(self, max_memory: int | None, eviction: Eviction, limits: dict[str, int | None]) -> None:
        self.max_memory = max_memory
        self.eviction = eviction
        self.demotes = False  # whether a victim is copied to a tier below before it goes
        self._limits = limits
        self._start()

    def _start(self) -> None:
        self.lock = threading.RLock()
        self.clock = 0  # requests opened so far: the unit of every age
        self.evictions = 0
        self.demotions = 0
        self.clears = 0
        self.checkpoint_count = 0
        self.checkpoint_bytes = 0
        self.kv_bytes = 0
        self.kv_tokens = 0
        self.reserved_bytes = 0  # room kept for what is on its way
        self.peak_bytes = 0
        self.forest = Forest()
        self.accounts: dict[str, Account] = {}
        self._held: list[KVSegment] = []  # chains that open requests build on
        self._pinned: dict[int, Checkpoint] = {}
        self.marks = Marks()

    @property
    def used_bytes(self) -> int:
        """Bytes of all stored states and KV segments."""
        return self.checkpoint_bytes + self.kv_bytes

    def match(self, ids: Tokens, space: str = "") -> Match:
        """Finds the longest prefix of `ids` that the space remembers, token by token."""
        with self.lock:
            return Match(*self.forest.walk(ids, space), space in self.forest.roots)

    def stored(self) -> list[Checkpoint]:
        """Every stored checkpoint."""
        with self.lock:
            nodes = [node for space in self.forest.roots for node in self.forest.nodes(space)]
            return [checkpoint for node in nodes for checkpoint in node.checkpoints.values()]

    def account(self, namespace: str) -> Account:
        """What one namespace holds here."""
        with self.lock:
            if namespace not in self.accounts:
                limit = self._limits.get(namespace)
                self.accounts[namespace] = Account(limit=limit, order=None if limit is None else LRU())
            return self.accounts[namespace]

    def passed(self, match: Match, resumed: Checkpoint | None, space: str) -> None:
        """A request walked the path of `match` and resumed at `resumed`."""
        for order in self._orders(self.account(namespace_of(space))):
            order.passed(match.path, match.overlap, resumed, self.clock)

    def _orders(self, account: Account) -> list[Eviction]:
        return [self.eviction] if account.order is None else [self.eviction, account.order]

    def _make_room(
        self, need: int, incoming: Checkpoint | None, account: Account | None = None, urgent: bool = False
    ) -> bool:
        """Evicts one checkpoint at a time until `need` bytes fit; evicts nothing if they never can.

        Raises:
            Demotion: the next victim, which the caller first copies to the tier below, without the lock.
        """
        if account is not None and account.limit is not None and account.order is not None:
            if need > account.limit:
                return False
            while account.used_bytes + need > account.limit:
                if not self._send_off(account.order.victim(incoming, account.used_bytes + need - account.limit)):
                    return False
        if self.max_memory is None or self.used_bytes + self.reserved_bytes + need <= self.max_memory:
            return True
        if incoming is not None and self._locked_bytes() + self.reserved_bytes + need > self.max_memory:
            return False
        while self.used_bytes + self.reserved_bytes + need > self.max_memory:
            missing = self.used_bytes + self.reserved_bytes + need - self.max_memory
            if not self._send_off(self.eviction.victim(None if urgent else incoming, missing)):
                return False
        return True

    def _send_off(self, victim: Checkpoint | None) -> bool:
        if victim is not None and self.demotes:
            self.pin(victim)
            raise Demotion(victim)
        if victim is not None:
            self.evict(victim)
        return victim is not None

    def evict(self, checkpoint: Checkpoint, *, demoted: bool = False) -> None:
        """Removes one checkpoint and the KV that only it needs; `demoted` says that the tier below has it now.

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
            self._count(checkpoint, -1)
            self.demotions += demoted
            self.evictions += not demoted
            checkpoint.owner.evictions += not demoted
            self._freed(checkpoint.state)
            node.lost = min(node.lost or checkpoint.position, checkpoint.position)
            self._release(checkpoint.kv)
            checkpoint.kv = None
            for order in self._orders(checkpoint.owner):
                order.dropped(checkpoint)
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
                self._pinned.pop(id(checkpoint), None)  # not there after a fork

    def keep(self, checkpoint: Checkpoint, space: str = "") -> None:
        """Pins the checkpoint of a mark until its space is cleared or dropped."""
        with self.lock:
            if not any(checkpoint is kept for _, kept in self.marks.kept):
                self.pin(checkpoint)
                self.marks.kept.append((space, checkpoint))

    def bound(self, ids: Tokens, position: int, space: str = "") -> Bound | None:
        """The tightest budget for a checkpoint at `position` of `ids`; None without any."""
        with self.lock:
            account, path = self.account(namespace_of(space)), self.match(ids, space)
            bounds = []
            if self.max_memory is not None:
                bounds.append(Bound("max_memory", self.max_memory, self.used_bytes, self._kept_beside(path, position)))
            if account.limit is not None:
                kept = self._kept_beside(path, position, account)
                bounds.append(Bound("namespace_memory", account.limit, account.used_bytes, kept))
            return min(bounds, key=lambda bound: bound.limit - bound.kept, default=None)

    def _kept_beside(self, path: Match, position: int, owner: Account | None = None) -> int:
        """Bytes that stay while a checkpoint at `position` of this path comes, less what it would share: what marks
        keep, and the checkpoint that its request resumes from.
        """
        nodes = set(path.path)
        segments: set[KVSegment] = set()
        held = 0
        staying = {id(checkpoint): checkpoint for _, checkpoint in self.marks.kept}
        staying |= {id(checkpoint): checkpoint for checkpoint in path.checkpoints(position - 1)[-1:]}
        for checkpoint in staying.values():
            same = checkpoint.node in nodes and checkpoint.position == position
            if same or (owner is not None and checkpoint.owner is not owner):
                continue
            held += checkpoint.nbytes
            segment = checkpoint.kv
            while segment is not None and segment not in segments:
                segments.add(segment)
                segment = segment.parent
        shared = min(path.overlap, position)
        return held + sum(segment.nbytes for segment in segments if segment.node not in nodes or segment.end > shared)

    def _release_marks(self, space: str | None = None) -> None:
        for checkpoint in self.marks.forget(space):
            self.unpin(checkpoint)

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
                if segment in self._held:  # not after a fork
                    self._held.remove(segment)
                    segment.holds -= 1
                    self._free_chain(segment)

    def _freed(self, payload: Payload) -> None:
        """A payload is no longer stored here; called under the lock."""

    def _count(self, checkpoint: Checkpoint, sign: int) -> None:
        self.checkpoint_count += sign
        self.checkpoint_bytes += sign * checkpoint.nbytes
        checkpoint.owner.checkpoints += sign
        checkpoint.owner.checkpoint_bytes += sign * checkpoint.nbytes

    def _locked_bytes(self) -> int:
        """Bytes that no eviction can free now: pinned checkpoints and the chains that open requests need."""
        segments: set[KVSegment] = set()
        for segment in [*self._held, *(checkpoint.kv for checkpoint in self._pinned.values())]:
            while segment is not None and segment not in segments:
                segments.add(segment)
                segment = segment.parent
        return sum(c.nbytes for c in self._pinned.values()) + sum(segment.nbytes for segment in segments)

    def _attach(self, segment: KVSegment, account: Account) -> KVSegment:
        segment.owner = account
        account.kv_bytes += segment.nbytes
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
            segment.owner.kv_bytes -= segment.nbytes
            self._freed(segment.payload)
            self.forest.offer(segment.node)
            segment = segment.parent
            if segment is not None:
                segment.refs -= 1
