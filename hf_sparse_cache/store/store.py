"""The store: checkpoints and KV segments of all prompts under one byte budget, shared by any number of threads.

It knows tokens, positions and payload sizes; it knows no model and no torch. Use it through `open_request`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from .. import forks
from ..planning.cuts import Positions, Tokens
from ..stats import counted, parse_bytes
from .eviction import Eviction, make_eviction
from .movement import Tiered
from .tree import Checkpoint, KVSegment, Node, Payload
from .unit import Demotion, Span, chain_of, holder, namespace_of, shared_chain


class CheckpointStore(Tiered):
    """Checkpoints of all prompts under one memory budget.

    Args:
        max_memory: bytes, or a string such as "2GiB"; None for no limit. Never exceeded, also not during an insert.
        eviction: "learned", "lru", "fifo", or an `Eviction` object of your own.
        max_remembered_tokens: bound on the tokens remembered after their states are gone; the least recently used that
            no checkpoint needs are forgotten first. None for no bound.
        namespace_memory: budgets of single namespaces, by name, within `max_memory`: they bound a tenant's share.
        host_memory: bytes of a second tier in host memory, for models on an accelerator; None for no such tier.
        disk_memory: bytes of a tier on disk, found again by the next process; None for no such tier.
        disk_dir: its folder; default `sparse_cache` under HF_HOME. One process uses it at a time.

    Raises:
        ValueError: if a size cannot be read or the eviction's name is unknown.
    """

    def __init__(
        self,
        max_memory: int | str | None = "2GiB",
        eviction: str | Eviction = "learned",
        max_remembered_tokens: int | None = 2**24,
        *,
        namespace_memory: Mapping[str, int | str] | None = None,
        host_memory: int | str | None = None,
        disk_memory: int | str | None = None,
        disk_dir: str | Path | None = None,
    ) -> None:
        if max_remembered_tokens is not None and max_remembered_tokens < 1:
            raise ValueError(f"max_remembered_tokens must be at least 1 or None, got {max_remembered_tokens}")
        limits = {name: parse_bytes(size, "namespace_memory") for name, size in (namespace_memory or {}).items()}
        order = make_eviction(eviction) if isinstance(eviction, str) else eviction
        super().__init__(parse_bytes(max_memory), order, limits)
        self.max_remembered_tokens = max_remembered_tokens
        self._fresh_eviction = copy.deepcopy(order)
        if host_memory is not None or disk_memory is not None or disk_dir is not None:
            from .tier import lower_tiers  # which are stores themselves

            self.below = lower_tiers(host_memory, disk_memory, disk_dir)
            self.demotes = self.below is not None
        forks.starts_clean(self)

    def after_fork(self) -> None:
        """In a child process: empty, with new locks, and without the disk tier, which stays the parent's."""
        self._start()
        self.eviction = copy.deepcopy(self._fresh_eviction)
        if self.below is not None and self.below.durable:
            self.below = None
        self.demotes = self.below is not None

    @property
    def remembered_tokens(self) -> int:
        """Tokens the trees hold, with or without checkpoints."""
        with self.lock:
            return self.forest.tokens

    def __len__(self) -> int:
        return self.checkpoint_count

    def __repr__(self) -> str:
        limit = "no limit" if self.max_memory is None else f"{self.max_memory:,}"
        return f"CheckpointStore({counted(self.checkpoint_count, 'checkpoint')}, {self.used_bytes:,} of {limit} bytes)"

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

    def missing_spans(
        self, ids: Tokens, spans: Sequence[Span], space: str = "", hold: ExitStack | None = None
    ) -> Sequence[Span]:
        """The part of a gapless list of KV spans, from 0 upwards, that is not stored on the path of `ids`.

        The rest stays stored until the stack `hold` is closed.
        """
        if not spans:  # without full attention there is nothing to walk for
            return spans
        with self.lock:
            match = self.match(ids, space)
            chain = shared_chain(match, spans)
            if hold is not None and chain:
                hold.enter_context(self.holding(chain[-1]))
            return spans[len(chain) :]

    def put(
        self,
        ids: Tokens,
        position: int,
        state: Payload,
        spans: Sequence[Span] = (),
        new: Mapping[Span, Payload] | None = None,
        space: str = "",
        *,
        share: float = 1.0,
        refund: float = 0.0,
        hold: ExitStack | None = None,
        urgent: bool = False,
        keep: bool = False,
    ) -> Checkpoint | None:
        """Stores a checkpoint after `position` tokens of `ids`, evicting others first when memory is short.

        Args:
            state: the fixed-size payload.
            spans: the KV spans `(start, end)` from 0 to `position`, gapless, cut to cut; empty without full attention.
            new: KV payloads of the spans that are not stored yet.
            share: of the prompts that will pass it, those expected to leave before the next checkpoint.
            refund: bytes of checkpoints that it makes superfluous.
            hold: keeps the checkpoint's KV chain from being freed until this stack is closed.
            urgent: a request waits for it, so the eviction is not asked whether something else is worth more.
            keep: it belongs to a mark: just as urgent, and never evicted from then on.

        Returns:
            The checkpoint (the stored one if it was there already), or None when there was no room for it.

        Raises:
            ValueError: if `position` lies outside the prompt.
        """
        if not 1 <= position <= len(ids):
            raise ValueError(f"position must be between 1 and the prompt's {len(ids)} tokens, got {position}")
        with ExitStack() as chain:  # what it builds on must survive the victims that make room for it
            while True:
                try:
                    with self.lock:
                        self.missing_spans(ids[:position], spans, space, chain)
                        checkpoint = self._insert(
                            ids, position, state, spans, new or {}, space, urgent or keep, share, refund
                        )
                        if keep and checkpoint is not None:  # under this lock, or another thread takes its room
                            self.keep(checkpoint, space)
                        if hold is not None and checkpoint is not None:
                            hold.enter_context(self.holding(checkpoint.kv))
                        return checkpoint
                except Demotion as wanted:
                    self._demote(wanted.victim)

    def _insert(
        self,
        ids: Tokens,
        position: int,
        state: Payload,
        spans: Sequence[Span],
        new: Mapping[Span, Payload],
        space: str,
        urgent: bool,
        share: float,
        refund: float,
    ) -> Checkpoint | None:
        path = self.forest.insert(ids, space, self.clock)
        home = holder(path, position)
        if position in home.checkpoints:
            return home.checkpoints[position]
        chain = chain_of(path, spans)
        wanted = spans[len(chain) :]
        if any(span not in new for span in wanted):
            return None  # a shared segment was freed while the caller computed: nothing to chain to
        need = int(state.nbytes) + sum(int(new[span].nbytes) for span in wanted)
        account = self.account(namespace_of(space))
        checkpoint = Checkpoint(position, state, None, home, self.clock)
        checkpoint.held, checkpoint.share, checkpoint.refund = need, share, refund
        if not self._make_room(need, checkpoint, account, urgent):
            home.refused = min(home.refused or position, position)
            return None
        below = chain[-1] if chain else None
        for start, end in wanted:
            below = self._attach(KVSegment(start, end, new[start, end], below, holder(path, end)), account)
        if below is not None:
            checkpoint.kv = below
            below.refs += 1
        checkpoint.owner = account
        checkpoint.node.checkpoints[position] = checkpoint
        self._count(checkpoint, 1)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        for order in self._orders(account):
            order.stored(checkpoint)
        return checkpoint

    def resize(self, max_memory: int | str | None) -> None:
        """Changes the budget; demotes or evicts down to it, as far as nothing is pinned."""
        with self.lock:
            self.max_memory = parse_bytes(max_memory)
        while True:
            try:
                with self.lock:
                    self._make_room(0, None)
                return
            except Demotion as wanted:
                self._demote(wanted.victim)

    def clear(self, space: str | None = None) -> None:
        """Forgets one space or all: prompts, marks and checkpoints that no open request uses, in every tier."""
        if self.below is not None:
            self.below.clear(space)
        with self.lock:
            self.clears += 1
            self._release_marks(space)
            for _, _, checkpoint in self.checkpoints(space):
                if not checkpoint.pins:
                    self.evict(checkpoint)
            if space is None:
                self.forest.forget(0)
            else:
                self.forest.forget_space(space)

    def drop(self, space: str) -> None:
        """Evicts every checkpoint of one space that no open request uses, from memory."""
        if self.below is not None:
            self.below.drop(space)
        with self.lock:
            self._release_marks(space)
            for _, _, checkpoint in self.checkpoints(space):
                if not checkpoint.pins:
                    self.evict(checkpoint)

    def mark(self, prefix: Tokens, cuts: Positions, space: str = "") -> None:
        """Announces a prefix: the checkpoint at its last cut is kept from now on, or as soon as a prompt brings it.

        Args:
            prefix: int32 `(length,)`.
            cuts: the cuts of a longer prompt that begins with it, up to `length`.
        """
        with self.lock:
            self.marks.add(prefix, space)
            wanted = self.marks.positions(prefix, cuts, space)
            for checkpoint in self.match(prefix, space).checkpoints(len(prefix)):
                if checkpoint.position in wanted:
                    self.keep(checkpoint, space)
