"""The books of one tier: what is stored, in bytes and by namespace, what is pinned, who goes when room is short."""

from __future__ import annotations

import copy
import threading
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ..planning.compiled import chain_bytes
from ..planning.cuts import Tokens
from ..planning.lineage import Span
from .chains import Chains, Footing
from .eviction import LRU, Eviction
from .forest import Forest, Trail
from .marks import Marks
from .tree import TOKEN_BYTES, Account, Checkpoint, Departure, KVSegment, Match, Node, Payload
from .unit import Unit, holder, keeps_pledge, namespace_of, unit_of


# Empty accounts beyond this number are closed, the oldest first.
MOST_ACCOUNTS = 1024


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
        max_remembered: bytes of what is remembered of prompts; None for no bound.
    """

    def __init__(
        self,
        max_memory: int | None,
        eviction: Eviction,
        limits: Mapping[str, int | None] | None = None,
        max_remembered: int | None = 0,
    ) -> None:
        self.max_memory = max_memory
        self.max_remembered = max_remembered
        self.seconds: Callable[[], float] = time.monotonic
        self._limits = limits or {}
        self._fresh_eviction = copy.deepcopy(eviction)
        self.lock = threading.RLock()
        self._start(eviction)

    def _start(self, eviction: Eviction) -> None:
        self.eviction = eviction
        self.clock = 0  # requests opened so far: the unit of every age
        self.evictions = 0
        self.demotions = 0
        self.checkpoint_count = 0
        self.checkpoint_bytes = 0
        self.reserved_bytes = 0  # room kept for what is on its way
        self.peak_bytes = 0
        self.forest = Forest()
        self.chains = Chains(self.forest)
        self.accounts: dict[str, Account] = {}
        self._account_orders: dict[Account, Eviction] = {}  # of those with a limit
        self.pinned: dict[int, Checkpoint] = {}
        self.in_use: list[Checkpoint] = []  # pinned because they are resumed from, or copied to another place
        self.orphans: deque[tuple[Footing | None, list[Checkpoint]]] = deque()  # of whoever died without leaving
        self.marks = Marks()

    def after_fork(self) -> None:
        """In a child process: empty, with a new lock."""
        self.lock = threading.RLock()
        self._start(copy.deepcopy(self._fresh_eviction))

    def start_over(self) -> None:
        """Empties books that may be half written. Who is under way finds nothing of his in them, as after a fork.

        What was announced stays announced, and clocks and counters go on. The lock is the same: others wait for it.
        """
        with self.lock:
            counted = self.clock, self.evictions, self.demotions, self.peak_bytes
            marks, freed = self.marks, self.freed
            nodes = [item.node for item in self.pinned.values()]
            for tree in (*self.forest.trees.values(), *self.forest.leaving):
                nodes += [tree.root, *tree.edges()]
            for node in nodes:  # what others still hold is stored no longer
                node.checkpoints, node.segments = [], {}
            self._start(copy.deepcopy(self._fresh_eviction))
            self.clock, self.evictions, self.demotions, self.peak_bytes = counted
            self.marks = marks.announced()
            self.freed = None if freed is None else []

    # -- what is stored -----------------------------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Bytes of all stored KV segments."""
        return self.chains.nbytes

    @property
    def used_bytes(self) -> int:
        """Bytes of all stored states and KV segments."""
        return self.checkpoint_bytes + self.chains.nbytes

    @property
    def freed(self) -> list[Payload] | None:
        """What is stored no longer, for a tier that has to delete it; None where none has to."""
        return self.chains.freed

    @freed.setter
    def freed(self, payloads: list[Payload] | None) -> None:
        self.chains.freed = payloads

    def match(self, ids: Tokens, space: str = "") -> Match:
        """Finds the longest prefix of `ids` that the space remembers, token by token."""
        with self.lock:
            return Match(*self.forest.walk(ids, space), space in self.forest.trees)

    def departure(self, ids: Tokens, space: str, most: int) -> Departure:
        """Where a prompt leaves what the space remembers (see `Forest.departure`)."""
        with self.lock:
            return self.forest.departure(ids, space, most)

    def stored(self, space: str | None = None) -> list[Checkpoint]:
        """Every stored checkpoint of one space, or of all."""
        with self.lock:
            spaces = list(self.forest.trees) if space is None else [space]
            nodes = [node for name in spaces for node in self.forest.nodes(name) if node.checkpoints]
            return [checkpoint for node in nodes for checkpoint in node.checkpoints]

    def checkpoints(self, space: str | None = None) -> list[tuple[str, Tokens, Checkpoint]]:
        """Every stored checkpoint with its space and the tokens of its path up to its position."""
        with self.lock:
            found = []
            for checkpoint in self.stored(space):
                node = checkpoint.node
                found.append((node.tree.space, node.path_tokens()[: checkpoint.position], checkpoint))
            return found

    def payloads(self) -> list[Payload]:
        """Everything stored: states, and keys and values."""
        with self.lock:
            nodes = [node for space in self.forest.trees for node in self.forest.nodes(space)]
            states: list[Payload] = [item.state for node in nodes for item in node.checkpoints]
            return states + [segment.payload for node in nodes for segment in node.segments.values()]

    def account(self, namespace: str) -> Account:
        """What one namespace holds here."""
        with self.lock:
            if namespace not in self.accounts:
                if len(self.accounts) >= MOST_ACCOUNTS:
                    self._close_accounts()
                payer = self._payer(namespace)
                if payer != namespace:
                    account = self.accounts[namespace] = self.account(payer)
                    return account
                limit = self._limits.get(namespace)
                account = self.accounts[namespace] = Account(limit)
                if limit is not None:
                    self._account_orders[account] = LRU()
            return self.accounts[namespace]

    def _payer(self, namespace: str) -> str:
        """Out of whose budget a namespace takes its share: that of the longest name which it continues with a "#"."""
        end = len(namespace) if self._limits else -1
        while end >= 0 and namespace[:end] not in self._limits:
            end = namespace.rfind("#", 0, end)
        return namespace[:end] if end >= 0 else namespace

    def tree_bytes(self, namespace: str) -> int:
        """Bytes of what is remembered of one namespace: tokens, nodes and descriptions of prompts."""
        with self.lock:
            trees = self.forest.trees.items()
            return sum(tree.nbytes for space, tree in trees if namespace_of(space) == namespace)

    def _close_accounts(self) -> None:
        known = {namespace_of(space) for space in self.forest.trees}
        names = Counter(self.accounts.values())
        for namespace, account in list(self.accounts.items()):
            if len(self.accounts) < MOST_ACCOUNTS:
                return
            pays = self._payer(namespace) == namespace
            if namespace in known or (pays and (names[account] > 1 or account.checkpoints or account.kv_bytes)):
                continue
            del self.accounts[namespace]
            names[account] -= 1
            if pays:
                self._account_orders.pop(account, None)

    # -- who came by --------------------------------------------------------------------------------------------------

    def remember(self, trail: Trail, counted: int = 0) -> list[Node]:
        """Counts one prompt along its path, creating the path as needed, and forgets old tokens beyond the bound.

        Args:
            trail: of the text.
            counted: tokens along which it was counted before.
        """
        with self.lock:
            path = trail.grown(self.clock)
            for node in path:
                new = node.end > counted
                node.generated |= bool(counted) and new and not node.passes
                node.passes += new
                node.last_used = self.clock
            self.trim()
            return path

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

    def trim(self) -> None:
        """Forgets the least recently used tokens beyond the bound, as far as no checkpoint needs them."""
        with self.lock:
            if self.max_remembered is not None:
                self.forest.forget(self.max_remembered)

    # -- in and out ---------------------------------------------------------------------------------------------------

    def insert(self, unit: Unit, footing: Footing, *, urgent: bool = False, demotes: bool = False) -> Entry:
        """Stores a unit, evicting others first when memory is short. Called under the lock.

        Args:
            unit: with the payloads of the spans that are not stored yet.
            footing: of its text; what the unit builds on survives the victims.
            urgent: the eviction is not asked whether something else is worth more.
            demotes: whether a victim is copied to a tier below before it goes.
        """
        if footing.ended or footing not in self.chains.footings:  # not there after a fork
            return Entry(None)
        path = footing.trail.grown(self.clock)
        home = holder(path, unit.position)
        known = home.find(unit.lineage)
        if known is not None:
            known.hits = max(known.hits, unit.hits)
            return Entry(known)
        wanted = self.chains.advance(footing, unit.spans)
        if any(span not in unit.kv for span in wanted):
            return Entry(None)  # a shared segment was freed while the caller computed: nothing to chain to
        need = int(unit.state.nbytes) + sum(int(unit.kv[span].nbytes) for span in wanted)
        account = self.account(namespace_of(unit.space))
        checkpoint = Checkpoint(unit.lineage, unit.state, home, account, self.clock)
        checkpoint.final = unit.final
        checkpoint.held, checkpoint.share, checkpoint.refund = need, unit.share, unit.refund
        checkpoint.hits = unit.hits
        room = self.make_room(need, checkpoint, urgent=urgent, demotes=demotes)
        if not room.granted:
            if room.victim is None:
                home.refused = min(home.refused or unit.position, unit.position)
            return Entry(None, room.victim)
        chain = footing.shared(unit.spans)
        for span in wanted:
            below = chain[-1] if chain else None
            chain.append(self.chains.attach(KVSegment(span, unit.kv[span], below, holder(path, span.end), account)))
        self._store(checkpoint, chain[-1] if chain else None)
        if wanted:
            self.chains.stand(footing, chain)
        return Entry(checkpoint)

    def missing_spans(self, footing: Footing, spans: Sequence[Span]) -> Sequence[Span]:
        """The part of a gapless list of KV spans, from 0 upwards, that is not stored on the footing's text.

        The rest stays stored until the footing ends.
        """
        if not spans:
            return spans
        with self.lock:
            return self.chains.advance(footing, spans) if footing in self.chains.footings else spans

    @contextmanager
    def footing(self, ids: Tokens, space: str) -> Iterator[Footing]:
        """A footing on one text for as long as the block runs."""
        with self.lock:
            footing = self.chains.begin(Trail(self.forest, ids, space))
        try:
            yield footing
        finally:
            with self.lock:
                self.chains.end(footing)

    def _store(self, checkpoint: Checkpoint, kv: KVSegment | None) -> None:
        if kv is not None:
            checkpoint.kv = kv
            kv.refs += 1
        insort(checkpoint.node.checkpoints, checkpoint, key=lambda item: item.position)
        self._count(checkpoint, 1)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        for order in self._orders(checkpoint.owner):
            order.stored(checkpoint)

    @property
    def over_budget(self) -> bool:
        """Whether more is stored than the budget allows: it was lowered, and the rest was in use."""
        return self._missing(0) > 0

    def make_room(
        self, need: int, incoming: Checkpoint | None = None, *, urgent: bool = False, demotes: bool = False
    ) -> Room:
        """Evicts one checkpoint at a time until `need` bytes fit; evicts nothing if they never can.

        With `demotes` nothing is evicted: the first that would have to go is named instead.
        """
        if incoming is not None and self._never_fits(need, incoming.owner):
            return Room(False)
        if incoming is not None and incoming.owner.limit is not None:
            account = incoming.owner
            limit, order = incoming.owner.limit, self._account_orders[account]
            while account.used_bytes + need > limit:
                victim = order.victim(incoming, account.used_bytes + need - limit)
                if victim is None or demotes:
                    return Room(False, self._leaving(victim))
                self.evict(victim)
        while (missing := self._missing(need)) > 0:
            victim = self.eviction.victim(None if urgent else incoming, missing)
            if victim is None or demotes:
                return Room(False, self._leaving(victim))
            self.evict(victim)
        return Room(True)

    def _never_fits(self, need: int, owner: Account) -> bool:
        """Whether `need` bytes of a namespace would not fit, however much of what may go went."""
        crowded = owner.limit is not None and owner.used_bytes + need > owner.limit
        if crowded and owner.limit is not None and self._locked_bytes(owner) + need > owner.limit:
            return True
        if self.max_memory is None or self._missing(need) <= 0:
            return False
        return self._locked_bytes() + self.reserved_bytes + need > self.max_memory

    def _missing(self, need: int) -> int:
        """Bytes that must come free before `need` fit."""
        return 0 if self.max_memory is None else self.used_bytes + self.reserved_bytes + need - self.max_memory

    def _leaving(self, victim: Checkpoint | None) -> Checkpoint | None:
        if victim is not None:
            self.take(victim)
        return victim

    def take(self, checkpoint: Checkpoint) -> None:
        """Pins a checkpoint that is resumed from, or about to be copied to another place, until `done_with`."""
        with self.lock:
            self.pin(checkpoint)
            self.in_use.append(checkpoint)

    def done_with(self, checkpoint: Checkpoint) -> None:
        """Takes back one `take`."""
        with self.lock:
            if checkpoint in self.in_use:  # not after a fork
                self.in_use.remove(checkpoint)
                self.unpin(checkpoint)

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
            self._evict(checkpoint, demoted)

    def _evict(self, checkpoint: Checkpoint, demoted: bool = False) -> None:
        node = checkpoint.node
        node.checkpoints = [item for item in node.checkpoints if item is not checkpoint]
        self._count(checkpoint, -1)
        self.demotions += demoted
        self.evictions += not demoted
        checkpoint.owner.evictions += not demoted
        self.chains.gone(checkpoint.state)
        node.lost = min(node.lost or checkpoint.position, checkpoint.position)
        self.chains.release(checkpoint.kv)
        checkpoint.kv = None
        for order in self._orders(checkpoint.owner):
            order.dropped(checkpoint)
        self.forest.released(node)

    def lose(self, payload: Payload) -> None:
        """Drops every checkpoint that needs a payload; also pinned ones, whose users find the same damage."""
        with self.lock:
            for checkpoint in self.stored():
                needed = [checkpoint.state, *(segment.payload for segment in checkpoint.chain())]
                if any(item is payload for item in needed):
                    kept = [item for item in self.marks.kept if item[1] is not checkpoint]
                    if len(kept) < len(self.marks.kept):
                        self.marks.kept = kept
                        self.unpin(checkpoint)
                    self._evict(checkpoint)

    def drop(self, space: str | None = None) -> None:
        """Evicts every checkpoint of one space, or of all, and takes back their marks. What an open request uses goes
        when it closes, and the request stores nothing more.
        """
        with self.lock:
            for footing in self.chains.footings:
                footing.ended |= space in (None, footing.trail.space)
            for checkpoint in self.marks.forget(space):
                self.unpin(checkpoint)
            for checkpoint in self.stored(space):
                if checkpoint.pins:
                    checkpoint.doomed = True
                else:
                    self.evict(checkpoint)

    def clear(self, space: str | None = None) -> None:
        """Forgets one space or all: prompts, marks and checkpoints, those in use as soon as they are not."""
        with self.lock:
            self.drop(space)
            self.forest.clear(space)

    def _orders(self, account: Account) -> list[Eviction]:
        own = self._account_orders.get(account)
        return [self.eviction] if own is None else [self.eviction, own]

    # -- what must stay -----------------------------------------------------------------------------------------------

    def pin(self, checkpoint: Checkpoint) -> None:
        """Keeps a checkpoint from being evicted until `unpin`."""
        with self.lock:
            checkpoint.pins += 1
            self.pinned[id(checkpoint)] = checkpoint

    def unpin(self, checkpoint: Checkpoint) -> None:
        """Takes back one `pin`."""
        with self.lock:
            checkpoint.pins -= 1
            if checkpoint.pins or id(checkpoint) not in self.pinned:  # not there after a fork
                return
            del self.pinned[id(checkpoint)]
            if checkpoint.doomed and checkpoint.stored:
                self.evict(checkpoint)

    @contextmanager
    def taken(self, checkpoint: Checkpoint) -> Iterator[Unit | None]:
        """A stored checkpoint as a unit, pinned meanwhile and proved; None when it is stored no longer."""
        with self.lock:
            unit = unit_of(checkpoint) if checkpoint.stored else None
            if unit is not None:
                self.take(checkpoint)
        try:
            yield unit if unit is not None and keeps_pledge(unit) else None
        finally:
            if unit is not None:
                self.done_with(checkpoint)

    def mark(self, prefix: Tokens, space: str = "") -> None:
        """Announces a prefix: the checkpoint at its end is kept from now on, or once it is stored.

        Raises:
            ValueError: marks would take more tokens than may be remembered.
        """
        with self.lock:
            limit, known = self.max_remembered, self.marks.tokens
            if (
                limit is not None
                and TOKEN_BYTES * (known + len(prefix)) > limit
                and not self.marks.knows(prefix, space)
            ):
                raise ValueError(
                    f"a mark of {len(prefix):,} tokens, beside {known:,} of other marks, takes at {TOKEN_BYTES} bytes "
                    f"each more than max_remembered={limit:,}; take marks back with clear(), or give the store a "
                    "larger one"
                )
            self.marks.add(prefix, space)
            for checkpoint in self.match(prefix, space).checkpoints(len(prefix)):
                if checkpoint.position == len(prefix):
                    self.keep(checkpoint, space)

    def keep(self, checkpoint: Checkpoint, space: str = "") -> None:
        """Pins the checkpoint of a mark until its space is cleared or dropped."""
        with self.lock:
            if not any(checkpoint is kept for _, kept in self.marks.kept):
                self.pin(checkpoint)
                self.marks.kept.append((space, checkpoint))

    def _locked_bytes(self, owner: Account | None = None) -> int:
        """Bytes, of one account or of all, that no eviction can free now: pinned checkpoints, and the chains that open
        requests need.
        """
        pinned = [checkpoint for checkpoint in self.pinned.values() if checkpoint.stored]
        ends = [*self.chains.held, *(checkpoint.kv for checkpoint in pinned)]
        if owner is None:
            return sum(item.nbytes for item in pinned) + chain_bytes(ends)
        its: list[Checkpoint | KVSegment] = [*pinned, *self.chains.below(ends)]
        return sum(item.nbytes for item in its if item.owner is owner)

    def _count(self, checkpoint: Checkpoint, sign: int) -> None:
        self.checkpoint_count += sign
        self.checkpoint_bytes += sign * checkpoint.nbytes
        checkpoint.owner.checkpoints += sign
        checkpoint.owner.checkpoint_bytes += sign * checkpoint.nbytes
