"""The books of one tier: what is stored, in bytes and by namespace, what is pinned, who goes when room is short."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from ..planning.cuts import Positions, Tokens
from .eviction import LRU, Eviction
from .marks import Marks
from .tree import Account, Checkpoint, Forest, KVSegment, Match, Node, Payload
from .unit import Bound, Span, Unit, chain_of, holder, namespace_of, shared_chain, unit_of


class Room(NamedTuple):
    """Whether bytes fit now. If not, they may once `victim`, pinned meanwhile, has left for the tier below."""

    granted: bool
    victim: Checkpoint | None = None


class Entry(NamedTuple):
    """What became of a unit: the stored checkpoint, or None, perhaps until `victim` has left (see `Room`)."""

    checkpoint: Checkpoint | None
    victim: Checkpoint | None = None


class Ledger:
    """Checkpoints and KV segments of one tier under one budget.

    Args:
        max_memory: bytes, or None for no limit.
        eviction: who goes first.
        limits: budgets of single namespaces.
        max_remembered_tokens: bound on the tokens remembered after their states are gone; None for no bound.
    """

    def __init__(
        self,
        max_memory: int | None,
        eviction: Eviction,
        limits: Mapping[str, int | None] | None = None,
        max_remembered_tokens: int | None = 0,
    ) -> None:
        self.max_memory = max_memory
        self.max_remembered_tokens = max_remembered_tokens
        self.freed: list[Payload] | None = None  # what is stored no longer, for a tier that has to delete it
        self._limits = limits or {}
        self._fresh_eviction = copy.deepcopy(eviction)
        self._start(eviction)

    def _start(self, eviction: Eviction) -> None:
        self.lock = threading.RLock()
        self.eviction = eviction
        self.clock = 0  # requests opened so far: the unit of every age
        self.evictions = 0
        self.demotions = 0
        self.checkpoint_count = 0
        self.checkpoint_bytes = 0
        self.kv_bytes = 0
        self.kv_tokens = 0
        self.reserved_bytes = 0  # room kept for what is on its way
        self.peak_bytes = 0
        self.forest = Forest()
        self.accounts: dict[str, Account] = {}
        self._account_orders: dict[Account, Eviction] = {}  # of those with a limit
        self._held: list[KVSegment] = []  # chains that open requests build on
        self._pinned: dict[int, Checkpoint] = {}
        self.marks = Marks()

    def after_fork(self) -> None:
        """In a child process: empty, with a new lock."""
        self._start(copy.deepcopy(self._fresh_eviction))

    # -- what is stored -----------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes of all stored states and KV segments."""
        return self.checkpoint_bytes + self.kv_bytes

    def match(self, ids: Tokens, space: str = "") -> Match:
        """Finds the longest prefix of `ids` that the space remembers, token by token."""
        with self.lock:
            return Match(*self.forest.walk(ids, space), space in self.forest.roots)

    def stored(self, space: str | None = None) -> list[Checkpoint]:
        """Every stored checkpoint of one space, or of all."""
        with self.lock:
            spaces = list(self.forest.roots) if space is None else [space]
            nodes = [node for name in spaces for node in self.forest.nodes(name) if node.checkpoints]
            return [node.checkpoints[position] for node in nodes for position in sorted(node.checkpoints)]

    def checkpoints(self, space: str | None = None) -> list[tuple[str, Tokens, Checkpoint]]:
        """Every stored checkpoint with its space and the tokens of its path up to its position."""
        with self.lock:
            found = []
            for checkpoint in self.stored(space):
                node = checkpoint.node
                found.append((node.root.space, node.path_tokens()[: checkpoint.position], checkpoint))
            return found

    def payloads(self) -> list[Payload]:
        """Everything stored: states, and keys and values."""
        with self.lock:
            nodes = [node for space in self.forest.roots for node in self.forest.nodes(space)]
            states: list[Payload] = [item.state for node in nodes for item in node.checkpoints.values()]
            return states + [segment.payload for node in nodes for segment in node.segments.values()]

    def account(self, namespace: str) -> Account:
        """What one namespace holds here."""
        with self.lock:
            if namespace not in self.accounts:
                limit = self._limits.get(namespace)
                account = self.accounts[namespace] = Account(limit)
                if limit is not None:
                    self._account_orders[account] = LRU()
            return self.accounts[namespace]

    # -- in and out ---------------------------------------------------------------------------------------------------

    def insert(self, unit: Unit, hold: ExitStack, *, urgent: bool = False, demotes: bool = False) -> Entry:
        """Stores a unit, evicting others first when memory is short. Called under the lock.

        Args:
            unit: with the payloads of the spans that are not stored yet.
            hold: keeps what the unit builds on until this stack is closed: it must survive the victims.
            urgent: the eviction is not asked whether something else is worth more.
            demotes: whether a victim is copied to a tier below before it goes.
        """
        path = self.forest.insert(unit.tokens, unit.space, self.clock)
        home = holder(path, unit.position)
        if unit.position in home.checkpoints:
            known = home.checkpoints[unit.position]
            known.hits = max(known.hits, unit.hits)
            return Entry(known)
        chain = chain_of(path, unit.spans)
        hold.enter_context(self.holding(chain[-1] if chain else None))
        wanted = unit.spans[len(chain) :]
        if any(span not in unit.kv for span in wanted):
            return Entry(None)  # a shared segment was freed while the caller computed: nothing to chain to
        need = int(unit.state.nbytes) + sum(int(unit.kv[span].nbytes) for span in wanted)
        account = self.account(namespace_of(unit.space))
        checkpoint = Checkpoint(unit.position, unit.state, home, account, self.clock)
        checkpoint.held, checkpoint.share, checkpoint.refund = need, unit.share, unit.refund
        checkpoint.hits = unit.hits
        room = self.make_room(need, checkpoint, urgent=urgent, demotes=demotes)
        if not room.granted:
            if room.victim is None:
                home.refused = min(home.refused or unit.position, unit.position)
            return Entry(None, room.victim)
        below = chain[-1] if chain else None
        for span in wanted:
            below = self._attach(KVSegment(span[1], unit.kv[span], below, holder(path, span[1]), account))
        self._store(checkpoint, below)
        return Entry(checkpoint)

    def missing_spans(self, ids: Tokens, spans: Sequence[Span], space: str, hold: ExitStack) -> Sequence[Span]:
        """The part of a gapless list of KV spans, from 0 upwards, that is not stored on the path of `ids`.

        The rest stays stored until the stack `hold` is closed.
        """
        if not spans:  # without full attention there is nothing to walk for
            return spans
        with self.lock:
            chain = shared_chain(self.match(ids, space), spans)
            hold.enter_context(self.holding(chain[-1] if chain else None))
            return spans[len(chain) :]

    def _store(self, checkpoint: Checkpoint, kv: KVSegment | None) -> None:
        if kv is not None:
            checkpoint.kv = kv
            kv.refs += 1
        checkpoint.node.checkpoints[checkpoint.position] = checkpoint
        self._count(checkpoint, 1)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        for order in self._orders(checkpoint.owner):
            order.stored(checkpoint)

    def make_room(
        self, need: int, incoming: Checkpoint | None = None, *, urgent: bool = False, demotes: bool = False
    ) -> Room:
        """Evicts one checkpoint at a time until `need` bytes fit; evicts nothing if they never can.

        With `demotes` nothing is evicted: the first that would have to go is named instead.
        """
        if incoming is not None and incoming.owner.limit is not None:
            account = incoming.owner
            limit, order = incoming.owner.limit, self._account_orders[account]
            if need > limit:
                return Room(False)
            while account.used_bytes + need > limit:
                victim = order.victim(incoming, account.used_bytes + need - limit)
                if victim is None or demotes:
                    return Room(False, self._leaving(victim))
                self.evict(victim)
        if self.max_memory is None or self._missing(need) <= 0:
            return Room(True)
        if incoming is not None and self._locked_bytes() + self.reserved_bytes + need > self.max_memory:
            return Room(False)
        while (missing := self._missing(need)) > 0:
            victim = self.eviction.victim(None if urgent else incoming, missing)
            if victim is None or demotes:
                return Room(False, self._leaving(victim))
            self.evict(victim)
        return Room(True)

    def _missing(self, need: int) -> int:
        """Bytes that must come free before `need` fit."""
        return 0 if self.max_memory is None else self.used_bytes + self.reserved_bytes + need - self.max_memory

    def _leaving(self, victim: Checkpoint | None) -> Checkpoint | None:
        if victim is not None:
            self.pin(victim)
        return victim

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
            self._free(checkpoint.state)
            node.lost = min(node.lost or checkpoint.position, checkpoint.position)
            self._release(checkpoint.kv)
            checkpoint.kv = None
            for order in self._orders(checkpoint.owner):
                order.dropped(checkpoint)
            self.forest.offer(node)

    def lose(self, payload: Payload) -> None:
        """Drops every checkpoint that needs a payload; also pinned ones, whose users find the same damage."""
        with self.lock:
            for checkpoint in self.stored():
                needed = [checkpoint.state, *(segment.payload for segment in checkpoint.chain())]
                if any(item is payload for item in needed):
                    pins, checkpoint.pins = checkpoint.pins, 0
                    self._pinned.pop(id(checkpoint), None)
                    self.evict(checkpoint)
                    checkpoint.pins = pins

    def drop(self, space: str | None = None) -> None:
        """Evicts every checkpoint of one space, or of all, that no open request uses, and takes back their marks."""
        with self.lock:
            for checkpoint in self.marks.forget(space):
                self.unpin(checkpoint)
            for checkpoint in self.stored(space):
                if not checkpoint.pins:
                    self.evict(checkpoint)

    def clear(self, space: str | None = None) -> None:
        """Forgets one space or all: prompts, marks and checkpoints that no open request uses."""
        with self.lock:
            self.drop(space)
            if space is None:
                self.forest.forget(0)
            else:
                self.forest.forget_space(space)

    # -- who came by --------------------------------------------------------------------------------------------------

    def passed(self, match: Match, resumed: Checkpoint | None, space: str) -> None:
        """A request walked the path of `match` and resumed at `resumed`."""
        for order in self._orders(self.account(namespace_of(space))):
            order.passed(match.path, match.overlap, resumed, self.clock)

    def resumed(self, checkpoint: Checkpoint, unit: Unit) -> None:
        """A unit of this tier is brought up for a request."""
        with self.lock:
            self.clock += 1
            checkpoint.hits += 1
            self.passed(self.match(unit.tokens, unit.space), checkpoint, unit.space)

    def remember(self, ids: Tokens, space: str = "") -> list[Node]:
        """Counts one prompt along its path, creating the path as needed, and forgets old tokens beyond the bound."""
        with self.lock:
            path = self.forest.insert(ids, space, self.clock)
            for node in path:
                node.passes += 1
                node.last_used = self.clock
            self.trim()
            return path

    def trim(self) -> None:
        """Forgets the least recently used tokens beyond the bound, as far as no checkpoint needs them."""
        with self.lock:
            if self.max_remembered_tokens is not None:
                self.forest.forget(self.max_remembered_tokens)

    def _orders(self, account: Account) -> list[Eviction]:
        own = self._account_orders.get(account)
        return [self.eviction] if own is None else [self.eviction, own]

    # -- what must stay -----------------------------------------------------------------------------------------------

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

    @contextmanager
    def taken(self, checkpoint: Checkpoint) -> Iterator[Unit | None]:
        """A stored checkpoint as a unit, pinned meanwhile; None when it is stored no longer."""
        with self.lock:
            unit = unit_of(checkpoint) if checkpoint.stored else None
            if unit is not None:
                self.pin(checkpoint)
        try:
            yield unit
        finally:
            if unit is not None:
                self.unpin(checkpoint)

    def mark(self, prefix: Tokens, cuts: Positions, space: str = "") -> None:
        """Announces a prefix: the checkpoint at the last of `cuts` is kept from now on, or once it is stored."""
        with self.lock:
            self.marks.add(prefix, space)
            wanted = self.marks.positions(prefix, cuts, space)
            for checkpoint in self.match(prefix, space).checkpoints(len(prefix)):
                if checkpoint.position in wanted:
                    self.keep(checkpoint, space)

    def keep(self, checkpoint: Checkpoint, space: str = "") -> None:
        """Pins the checkpoint of a mark until its space is cleared or dropped."""
        with self.lock:
            if not any(checkpoint is kept for _, kept in self.marks.kept):
                self.pin(checkpoint)
                self.marks.kept.append((space, checkpoint))

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
            segments.update(checkpoint.chain())
        shared = min(path.overlap, position)
        return held + sum(segment.nbytes for segment in segments if segment.node not in nodes or segment.end > shared)

    def _locked_bytes(self) -> int:
        """Bytes that no eviction can free now: pinned checkpoints and the chains that open requests need."""
        segments: set[KVSegment] = set()
        for segment in [*self._held, *(checkpoint.kv for checkpoint in self._pinned.values())]:
            while segment is not None and segment not in segments:
                segments.add(segment)
                segment = segment.parent
        return sum(c.nbytes for c in self._pinned.values()) + sum(segment.nbytes for segment in segments)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def _count(self, checkpoint: Checkpoint, sign: int) -> None:
        self.checkpoint_count += sign
        self.checkpoint_bytes += sign * checkpoint.nbytes
        checkpoint.owner.checkpoints += sign
        checkpoint.owner.checkpoint_bytes += sign * checkpoint.nbytes

    def _attach(self, segment: KVSegment) -> KVSegment:
        segment.node.segments[segment.parent, segment.end] = segment
        if segment.parent is not None:
            segment.parent.refs += 1
        self._count_kv(segment, 1)
        return segment

    def _count_kv(self, segment: KVSegment, sign: int) -> None:
        self.kv_bytes += sign * segment.nbytes
        self.kv_tokens += sign * (segment.end - segment.start)
        segment.owner.kv_bytes += sign * segment.nbytes

    def _release(self, segment: KVSegment | None) -> None:
        """Takes back one reference."""
        if segment is not None:
            segment.refs -= 1
            self._free_chain(segment)

    def _free_chain(self, segment: KVSegment | None) -> None:
        """Frees every segment up the chain that nothing needs any more."""
        while segment is not None and not segment.refs and not segment.holds:
            del segment.node.segments[segment.parent, segment.end]
            self._count_kv(segment, -1)
            self._free(segment.payload)
            self.forest.offer(segment.node)
            segment = segment.parent
            if segment is not None:
                segment.refs -= 1

    def _free(self, payload: Payload) -> None:
        if self.freed is not None:
            self.freed.append(payload)
