"""The books of one tier: what is stored, in bytes and by namespace, what is pinned, who goes when room is short."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ..planning.cuts import MIN_SUFFIX_TOKENS, Positions, Tokens
from ..planning.policy import Prompt, Terms
from .eviction import LRU, Eviction
from .forest import Forest, Trail
from .marks import Marks
from .tree import Account, Checkpoint, KVSegment, Match, Node, Payload
from .unit import Bound, Span, Unit, chain_of, holder, namespace_of, unit_of
from .visit import Footing, Visit


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
        self.held: Counter[KVSegment] = Counter()  # ends of the chains that somebody builds on
        self.pinned: dict[int, Checkpoint] = {}
        self.moving: list[Checkpoint] = []  # pinned because they are copied to another place just now
        self.footings: set[Footing] = set()
        self.visits: set[Visit] = set()
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
            return Match(*self.forest.walk(ids, space), space in self.forest.trees)

    def stored(self, space: str | None = None) -> list[Checkpoint]:
        """Every stored checkpoint of one space, or of all."""
        with self.lock:
            spaces = list(self.forest.trees) if space is None else [space]
            nodes = [node for name in spaces for node in self.forest.nodes(name) if node.checkpoints]
            return [node.checkpoints[position] for node in nodes for position in sorted(node.checkpoints)]

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
            states: list[Payload] = [item.state for node in nodes for item in node.checkpoints.values()]
            return states + [segment.payload for node in nodes for segment in node.segments.values()]

    def account(self, namespace: str) -> Account:
        """What one namespace holds here."""
        with self.lock:
            if namespace not in self.accounts:
                if len(self.accounts) >= MOST_ACCOUNTS:
                    self._close_accounts()
                limit = self._limits.get(namespace)
                account = self.accounts[namespace] = Account(limit)
                if limit is not None:
                    self._account_orders[account] = LRU()
            return self.accounts[namespace]

    def tree_bytes(self, namespace: str) -> int:
        """Bytes of what is remembered of one namespace: tokens, nodes and descriptions of prompts."""
        with self.lock:
            trees = self.forest.trees.items()
            return sum(tree.nbytes for space, tree in trees if namespace_of(space) == namespace)

    def _close_accounts(self) -> None:
        known = {namespace_of(space) for space in self.forest.trees}
        for namespace, account in list(self.accounts.items()):
            if len(self.accounts) < MOST_ACCOUNTS:
                return
            if not account.checkpoints and not account.kv_bytes and namespace not in known:
                del self.accounts[namespace]
                self._account_orders.pop(account, None)

    # -- a request ----------------------------------------------------------------------------------------------------

    def open(self, ids: Tokens, cuts: Positions, space: str) -> Visit:
        """Matches a prompt, pins the deepest checkpoint it may resume from, and says what a policy may look at."""
        with self.lock:
            self.clock += 1
            trail = Trail(self.forest, ids, space)
            match = Match(*trail.known(), space in self.forest.trees)
            usable = min(match.overlap, len(ids) - MIN_SUFFIX_TOKENS)
            stored = match.checkpoints(usable)
            checkpoint = stored[-1] if stored else None
            if checkpoint is not None:
                self.pin(checkpoint)
                checkpoint.hits += 1
                checkpoint.last_used = self.clock
            marked = self.marks.positions(ids, cuts, space)
            for item in stored:  # a tier below may have brought it after it was announced
                if item.position in marked:
                    self.keep(item, space)
            self.passed(match, checkpoint, space)
            prompt = self._prompt(ids, cuts, match, checkpoint)
            footing = self._footing(trail)
            if checkpoint is not None and checkpoint.kv is not None:
                self._stand(footing, checkpoint.chain())
            visit = Visit(space, footing, match, usable, checkpoint, marked, prompt)
            self.visits.add(visit)
            return visit

    def _prompt(self, ids: Tokens, cuts: Positions, match: Match, checkpoint: Checkpoint | None) -> Prompt:
        """What a policy may look at."""
        state_bytes = self.checkpoint_bytes / max(self.checkpoint_count, 1)
        kv_bytes = self.kv_bytes / max(self.kv_tokens, 1)
        resumed = checkpoint.position if checkpoint is not None else 0
        return Prompt(
            ids,
            cuts,
            match.overlap,
            resumed,
            path_ends=np.asarray([node.end for node in match.path], dtype=np.int64),
            path_passes=np.asarray([node.passes for node in match.path], dtype=np.int64),
            latest=match.path[-1].latest if match.path else None,
            terms=self._terms(match, checkpoint, state_bytes + kv_bytes * (len(ids) - resumed)),
            state_bytes=state_bytes,
            kv_bytes_per_token=kv_bytes,
            resumed_bytes=checkpoint.nbytes if checkpoint is not None else 0,
        )

    def _terms(self, match: Match, checkpoint: Checkpoint | None, wanted: float) -> Terms:
        """What new checkpoints of a prompt would earn and cost; `wanted` bytes are those of one at its end."""
        need = 0.0
        if self.max_memory is not None:
            need = wanted + self.used_bytes - self.max_memory
            need = max(need, 0.05 * self.max_memory) if need > 0 else 0.0
        return self.eviction.terms(match.path, match.overlap, need, checkpoint)

    def remember(self, ids: Tokens, space: str = "") -> list[Node]:
        """Counts one prompt along its path, creating the path as needed, and forgets old tokens beyond the bound."""
        with self.lock:
            return self._remember(Trail(self.forest, ids, space))

    def _remember(self, trail: Trail) -> list[Node]:
        path = trail.grown(self.clock)
        for node in path:
            node.passes += 1
            node.last_used = self.clock
        self.trim()
        return path

    def go_on(self, visit: Visit, prompt: Prompt) -> None:
        """A visit's text becomes a longer one that begins with it."""
        with self.lock:
            visit.prompt = prompt
            visit.footing.trail = Trail(self.forest, prompt.ids, visit.space)

    def settle(self, visit: Visit) -> bool:
        """A request went well: counts its prompt in the tree, and lets the eviction learn from it.

        Returns:
            False if nothing may be remembered of it, as its space was cleared.
        """
        with self.lock:
            if visit.footing.ended or visit not in self.visits:  # not there after a fork
                return False
            path = self._remember(visit.footing.trail)
            self.forest.describe(path, visit.prompt.shape)
            self.eviction.settled(path, visit.prompt.forecast, self.clock)
            return True

    def leave(self, visit: Visit) -> None:
        """Takes back what a visit pins and holds."""
        with self.lock:
            if visit in self.visits:  # not after a fork
                self.visits.remove(visit)
                self.let_go(visit.footing)
                if visit.checkpoint is not None:
                    self.unpin(visit.checkpoint)

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
            if self.max_remembered_tokens is not None:
                self.forest.forget(self.max_remembered_tokens)

    # -- in and out ---------------------------------------------------------------------------------------------------

    def insert(self, unit: Unit, footing: Footing, *, urgent: bool = False, demotes: bool = False) -> Entry:
        """Stores a unit, evicting others first when memory is short. Called under the lock.

        Args:
            unit: with the payloads of the spans that are not stored yet.
            footing: of its text; what the unit builds on survives the victims.
            urgent: the eviction is not asked whether something else is worth more.
            demotes: whether a victim is copied to a tier below before it goes.
        """
        if footing.ended or footing not in self.footings:  # not there after a fork
            return Entry(None)
        path = footing.trail.grown(self.clock)
        home = holder(path, unit.position)
        if unit.position in home.checkpoints:
            known = home.checkpoints[unit.position]
            known.hits = max(known.hits, unit.hits)
            return Entry(known)
        wanted = self._advance(footing, unit.spans)
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
        chain = footing.shared(unit.spans)
        for span in wanted:
            below = chain[-1] if chain else None
            chain.append(self._attach(KVSegment(span[1], unit.kv[span], below, holder(path, span[1]), account)))
        self._store(checkpoint, chain[-1] if chain else None)
        if wanted:
            self._stand(footing, chain)
        return Entry(checkpoint)

    def missing_spans(self, footing: Footing, spans: Sequence[Span]) -> Sequence[Span]:
        """The part of a gapless list of KV spans, from 0 upwards, that is not stored on the footing's text.

        The rest stays stored until `let_go`.
        """
        if not spans:
            return spans
        with self.lock:
            return self._advance(footing, spans) if footing in self.footings else spans

    def _advance(self, footing: Footing, spans: Sequence[Span]) -> Sequence[Span]:
        """Follows the stored chain as far as `spans` go; returns those that are left."""
        chain = footing.shared(spans)
        if len(chain) < len(spans):
            path, depth = footing.trail.known()
            found = chain_of(path, [span for span in spans[len(chain) :] if span[1] <= depth], chain)
            if found:
                chain += found
                self._stand(footing, chain)
        return spans[len(chain) :]

    @contextmanager
    def footing(self, ids: Tokens, space: str) -> Iterator[Footing]:
        """A footing on one text for as long as the block runs."""
        with self.lock:
            footing = self._footing(Trail(self.forest, ids, space))
        try:
            yield footing
        finally:
            self.let_go(footing)

    def _footing(self, trail: Trail) -> Footing:
        footing = Footing(trail)
        self.footings.add(footing)
        return footing

    def let_go(self, footing: Footing) -> None:
        """Ends a footing: what only its chain needed is freed."""
        with self.lock:
            self.footings.discard(footing)
            chain, footing.chain = footing.chain, []
            if chain:
                self._unhold(chain[-1])

    def _stand(self, footing: Footing, chain: list[KVSegment]) -> None:
        """Holds the end of a chain, and with it all of it, in place of the one before."""
        before, footing.chain = footing.chain, chain
        chain[-1].holds += 1
        self.held[chain[-1]] += 1
        if before:
            self._unhold(before[-1])

    def _unhold(self, segment: KVSegment) -> None:
        if segment in self.held:  # not after a fork
            segment.holds -= 1
            self.held[segment] -= 1
            if not self.held[segment]:
                del self.held[segment]
            self._free_chain(segment)

    def _store(self, checkpoint: Checkpoint, kv: KVSegment | None) -> None:
        if kv is not None:
            checkpoint.kv = kv
            kv.refs += 1
        checkpoint.node.checkpoints[checkpoint.position] = checkpoint
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
            self.take(victim)
        return victim

    def take(self, checkpoint: Checkpoint) -> None:
        """Pins a checkpoint that is about to be copied to another place, until `done_with`."""
        with self.lock:
            self.pin(checkpoint)
            self.moving.append(checkpoint)

    def done_with(self, checkpoint: Checkpoint) -> None:
        """A checkpoint that was pinned to be copied is copied."""
        with self.lock:
            if checkpoint in self.moving:  # not after a fork
                self.moving.remove(checkpoint)
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
        self.forest.released(node)

    def lose(self, payload: Payload) -> None:
        """Drops every checkpoint that needs a payload; also pinned ones, whose users find the same damage."""
        with self.lock:
            for checkpoint in self.stored():
                needed = [checkpoint.state, *(segment.payload for segment in checkpoint.chain())]
                if any(item is payload for item in needed):
                    self._evict(checkpoint)

    def drop(self, space: str | None = None) -> None:
        """Evicts every checkpoint of one space, or of all, and takes back their marks. What an open request uses goes
        when it closes, and the request stores nothing more.
        """
        with self.lock:
            for footing in self.footings:
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
        """A stored checkpoint as a unit, pinned meanwhile; None when it is stored no longer."""
        with self.lock:
            unit = unit_of(checkpoint) if checkpoint.stored else None
            if unit is not None:
                self.take(checkpoint)
        try:
            yield unit
        finally:
            if unit is not None:
                self.done_with(checkpoint)

    def mark(self, prefix: Tokens, cuts: Positions, space: str = "") -> None:
        """Announces a prefix: the checkpoint at the last of `cuts` is kept from now on, or once it is stored.

        Raises:
            ValueError: marks would take more tokens than may be remembered.
        """
        with self.lock:
            limit, known = self.max_remembered_tokens, self.marks.tokens
            if limit is not None and known + len(prefix) > limit and not self.marks.knows(prefix, space):
                raise ValueError(
                    f"a mark of {len(prefix):,} tokens, beside {known:,} of other marks, is more than "
                    f"max_remembered_tokens={limit:,}; take marks back with clear(), or give the store a larger one"
                )
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
        pinned = [checkpoint for checkpoint in self.pinned.values() if checkpoint.stored]
        segments: set[KVSegment] = set()
        for segment in [*self.held, *(checkpoint.kv for checkpoint in pinned)]:
            while segment is not None and segment not in segments:
                segments.add(segment)
                segment = segment.parent
        return sum(item.nbytes for item in pinned) + sum(segment.nbytes for segment in segments)

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
            self.forest.released(segment.node)
            segment = segment.parent
            if segment is not None:
                segment.refs -= 1

    def _free(self, payload: Payload) -> None:
        if self.freed is not None:
            self.freed.append(payload)
