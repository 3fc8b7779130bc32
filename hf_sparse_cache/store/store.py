"""The store: checkpoints and KV segments of all prompts, in tiers, shared by any number of threads.

It knows tokens, positions and payload sizes; it knows no model and no torch. Use it through `open_request`. What is
stored comes into the fastest tier. Where memory is short there, a unit moves to the tier below; a prompt that matches
deeper there brings it up again. A unit is copied before it leaves a tier, with no lock held, and pinned meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING

from .. import forks
from ..checks import path_of, shown, text
from ..errors import out_of_memory
from ..planning.batch import Member
from ..planning.cuts import MIN_SUFFIX_TOKENS, Tokens
from ..planning.lineage import Lineage
from ..planning.policy import Prompt
from ..planning.segments import Segmenting
from ..stats import counted, parse_bytes
from .bounds import Bound, tightest
from .chains import Footing
from .eviction import Eviction
from .evictions import make_eviction
from .forest import Trail
from .headers import Plain
from .host import HostTier
from .ledger import Ledger
from .marks import Marks
from .mending import interrupt_behind, mended, tears
from .promises import Promises
from .seal import Seal
from .tier import Demote, Shown, Tier
from .tree import Account, Checkpoint, Node
from .unit import Expected, MovablePayload, Unit, keeps_pledge, unit_of
from .visit import Before, Visit


if TYPE_CHECKING:
    from .behind import SharedStore
    from .shared import Resumable

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Journey:
    """A unit between two tiers, where nobody finds it.

    Attributes:
        undo: what was done to its space meanwhile, and has to be done again where it arrived.
        thread: who moves it.
    """

    space: str
    undo: list[Callable[[Tier, str | None], None]] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)


class CheckpointStore(Shown):
    """Checkpoints of all prompts under one memory budget.

    Args:
        max_memory: bytes, or a string such as "2GiB"; None for no limit. Never exceeded, also not during an insert.
        eviction: "learned", "lru", "fifo", or an `Eviction` object of your own.
        max_remembered: bytes, or a string, of what is remembered of prompts beside their states: tokens at 4 bytes
            each, the nodes of the tree over them and what placement notes of each. The least recently used that no
            checkpoint needs is forgotten first. Tokens of marks are bounded by the same. None for no bound.
        namespace_memory: budgets of single namespaces, by name, within `max_memory`: they bound a tenant's share.
            Namespaces that continue a name with a "#" share its budget, and are counted together with it.
        host_memory: bytes of a second tier in host memory, for models on an accelerator; None for no such tier.
        disk_memory: bytes of a tier on disk, found again by the next process; None for no such tier.
        disk_dir: its folder; default `sparse_cache` under HF_HOME. One process uses it at a time.
        shared: a folder, or a URL that fsspec knows, such as "s3://bucket/prefix": what is stored is written there
            too, behind the requests, and what any process stored there is resumed from. Any number use it at a time.
        shared_memory: bytes of all that lies there; None for no limit.
        key: a secret of at least 16 bytes that authenticates every file, those of `save_pretrained` too; default the
            environment variable HF_SPARSE_CACHE_KEY, or none. Whoever can write the folder and has no key can then no
            longer put states there.
        encrypt: whether files are encrypted with the key too; needs the package `cryptography`.

    Raises:
        ValueError: if a size cannot be read, the eviction's name is unknown, or the key is too short.
        ImportError: if `cryptography` is needed and not installed.
    """

    def __init__(
        self,
        max_memory: int | str | None = "2GiB",
        eviction: str | Eviction = "learned",
        max_remembered: int | str | None = "128MiB",
        *,
        namespace_memory: Mapping[str, int | str] | None = None,
        host_memory: int | str | None = None,
        disk_memory: int | str | None = None,
        disk_dir: str | Path | None = None,
        shared: str | Path | None = None,
        shared_memory: int | str | None = "100GiB",
        key: str | bytes | None = None,
        encrypt: bool = False,
    ) -> None:
        remembered = parse_bytes(max_remembered, "max_remembered")
        if remembered == 0:
            raise ValueError("max_remembered must be at least 1 byte or None, got 0; placement learns from it")
        limits = _limits({} if namespace_memory is None else namespace_memory)
        order = make_eviction(eviction) if isinstance(eviction, str) else eviction
        if not isinstance(order, Eviction):
            raise ValueError(f"eviction is {shown(eviction)}: give a name such as 'learned', or an Eviction object")
        memory = Tier(Ledger(parse_bytes(max_memory), order, limits, remembered))
        super().__init__(memory.ledger)
        self.seal = Seal.of(key, encrypt)
        self.tiers: list[Tier] = [memory, *_lower_tiers(host_memory, disk_memory, disk_dir, self.seal)]
        self.shared = None if shared is None else _shared_store(shared, shared_memory, self.seal, memory.ledger)
        self._journeys: list[_Journey] = []
        self.promises = Promises()
        forks.starts_clean(self)

    def after_fork(self) -> None:
        """In a child process: empty, with new locks, and without the disk tier, which stays the parent's."""
        for tier in self.tiers:
            tier.after_fork()
        self.tiers = [tier for tier in self.tiers if not tier.durable]
        if self.shared is not None:
            self.shared.after_fork()
        self._journeys = []
        self.promises.after_fork()

    # -- what people read ---------------------------------------------------------------------------------------------

    @property
    def below(self) -> Tier | None:
        """The tier below the fastest one."""
        return self.tiers[1] if len(self.tiers) > 1 else None

    @property
    def outlives_process(self) -> bool:
        """Whether any tier does, so that a space must name its weights by their content."""
        return self.shared is not None or any(tier.durable for tier in self.tiers)

    @property
    def clock(self) -> int:
        """Requests opened so far."""
        return self.ledger.clock

    @property
    def peak_bytes(self) -> int:
        """Most bytes stored at any time."""
        return self.ledger.peak_bytes

    @property
    def checkpoint_bytes(self) -> int:
        return self.ledger.checkpoint_bytes

    @property
    def kv_bytes(self) -> int:
        return self.ledger.kv_bytes

    @property
    def accounts(self) -> dict[str, Account]:
        return self.ledger.accounts

    @property
    def marks(self) -> Marks:
        return self.ledger.marks

    def account(self, namespace: str) -> Account:
        """What one namespace holds."""
        return self.ledger.account(namespace)

    def bound(self, ids: Tokens, position: int, space: str = "") -> Bound | None:
        """The tightest budget for a checkpoint at `position` of `ids`; None without any."""
        return tightest(self.ledger, ids, position, space)

    def cut_otherwise(self, ids: Tokens, expected: Lineage | None, space: str = "") -> int:
        """The deepest position up to which the tiers hold states of a prompt that were all made by other cuts; 0 where
        they hold none, or one that fits; reads no file.
        """
        found = [tier.match(ids, space) for tier in self.tiers]
        if any(next(match.fitting(len(ids), expected), None) is not None for match in found):
            return 0
        stored = [item.position for match in found for item in match.checkpoints(len(ids) - MIN_SUFFIX_TOKENS)]
        return max(stored, default=0)

    def reach(self, ids: Tokens, expected: Lineage | None, space: str = "") -> tuple[int, int]:
        """How far the tiers below would resume a prompt, and how much of it they know; reads no file.

        The shared store is not asked: a look there may take seconds, and it would be one for each row of a batch and
        each thread that waits. What plans with this number decides who computes what first; a prompt that the shared
        store knows deeper resumes from there when it is opened, and those behind it find that in memory: read once.
        """
        found = [tier.match(ids, space) for tier in self.tiers[1:]]
        deepest = [next(match.fitting(len(ids), expected), None) for match in found]
        positions = [checkpoint.position for checkpoint in deepest if checkpoint is not None]
        return max(positions, default=0), max((match.overlap for match in found), default=0)

    def foretell(self, ids: Tokens, segmenting: Segmenting, space: str = "") -> Member:
        """What is known of a prompt before it is opened, for those that are planned together; reads no file."""
        with self.lock:
            marked = self.marks.lengths(ids, space)
            cuts = segmenting.cuts(ids, marked)
            expected = segmenting.expected(cuts, len(ids))
            best = next(self.match(ids, space).fitting(len(ids), expected), None)
        stored = 0 if best is None else best.position
        return Member(ids, cuts, max(stored, self.reach(ids, expected, space)[0]), marked)

    def __repr__(self) -> str:
        limit = "no limit" if self.max_memory is None else f"{self.max_memory:,}"
        return f"CheckpointStore({counted(len(self), 'checkpoint')}, {self.used_bytes:,} of {limit} bytes)"

    # -- in and out ---------------------------------------------------------------------------------------------------

    @mended
    def open(self, ids: Tokens, segmenting: Segmenting, space: str = "") -> Visit:
        """Begins a request: brings up what the tiers below have, matches the prompt, pins what it may resume from.

        Args:
            ids: the prompt's tokens, int32 of shape `(N,)`.
            segmenting: where it may be cut, and what it may resume from.
            space: nothing of one space is ever matched from another.

        Returns:
            What was found, and what `put` needs of it; to be given back to `leave`.
        """
        if not segmenting.afresh and (len(self.tiers) > 1 or self.shared is not None):
            cuts = segmenting.cuts(ids, self.marks.lengths(ids, space))
            expected = segmenting.expected(cuts, len(ids))
            self.lift(ids, expected, space, segmenting.tail)
            if self.shared is not None:
                self._resume_shared(self.shared, ids, expected, space, segmenting.tail)
        return Visit.begin(self.ledger, ids, segmenting, space)

    @mended
    def reopen(self, prompt: Prompt, space: str, before: Before) -> Visit | None:
        """Begins the visit of a text that begins with the prompt of an earlier visit.

        Args:
            prompt: the whole text, as a policy may look at it.
            space: where it is.
            before: that visit.

        Returns:
            What `put` needs of it, to be given back to `leave`; None where the prompt was cleared meanwhile.
        """
        return Visit.again(self.ledger, prompt, space, before)

    @mended
    def leave(self, visit: Visit, error: BaseException | None = None) -> None:
        """Ends a request: what only it pinned or held may go, and goes where the budget is smaller by now.

        Args:
            visit: what `open` gave.
            error: what ended the request before its time.
        """
        if error is not None:
            self.mend(error)
        visit.end()
        self.settle()

    def mend(self, error: BaseException) -> BaseException | None:
        """After an error: where it is an interrupt that may have left the books half written, they start over.

        Returns:
            The interrupt, or None where the error is none.
        """
        interrupt = interrupt_behind(error)
        if interrupt is None:
            return None
        seen = vars(interrupt).setdefault("_looked_at", False)
        if interrupt is not error and (seen or not tears(interrupt)):
            return None  # one that the caller was dealing with already when he asked for something else
        if seen:
            return interrupt
        vars(interrupt)["_looked_at"] = True
        if tears(interrupt) and not (isinstance(interrupt, MemoryError) and self._right()):
            self._start_over(interrupt)
        for tier in self.tiers:
            with tier.lock:
                if tier.ledger.over_budget:  # a smaller budget, and nobody who goes on to send off what is above it
                    tier.ledger.make_room(0)
        return interrupt

    def _right(self) -> bool:
        try:
            self.verify()
        except Exception:  # half written books may fail in any way
            return False
        return True

    def _start_over(self, interrupt: BaseException) -> None:
        for tier in self.tiers:
            tier.start_over()
        mine = [journey for journey in self._journeys if journey.thread == threading.get_ident()]
        for journey in mine:
            self._journeys.remove(journey)
            for how in journey.undo:
                for tier in self.tiers:
                    how(tier, journey.space)
        logger.warning(
            "%s came while what is stored was being written down, so the store starts over: what it held in memory is "
            "computed again when it is needed, and nothing is wrong with it.",
            type(interrupt).__name__,
        )

    @mended
    def settle(self) -> None:
        """Sends off what does not fit a budget that was lowered while it was in use."""
        memory = self.tiers[0]
        if memory.ledger.over_budget:
            memory.shrink(self._demotion(memory))

    @mended
    def put(
        self, unit: Unit, footing: Footing | None = None, *, urgent: bool = False, keep: bool = False
    ) -> Checkpoint | None:
        """Stores a checkpoint in the fastest tier, sending others off first when memory is short.

        Args:
            unit: with the payloads of the spans that are not stored yet.
            footing: on its text, of a caller who goes on from there.
            urgent: a request waits for it, so the eviction is not asked whether something else is worth more.
            keep: it belongs to a mark: just as urgent, and never evicted from then on.

        Returns:
            The checkpoint (the stored one if it was there already), or None when there was no room for it.
        """
        memory = self.tiers[0]
        stored = memory.put(unit, self._demotion(memory), footing, urgent=urgent, keep=keep)
        if stored is not None and self.shared is not None:
            self.shared.offer(stored, unit.tokens)
        return stored

    @mended
    def remember(self, ids: Tokens, space: str = "") -> list[Node]:
        """Counts one prompt along its path, creating the path as needed, and forgets old tokens beyond the bound."""
        return self.ledger.remember(Trail(self.forest, ids, space))

    @mended
    def mark(self, prefix: Tokens, space: str = "") -> None:
        """Announces a prefix: the checkpoint at its end is kept from now on, or as soon as a prompt brings it.

        Args:
            prefix: int32 `(length,)`.

        Raises:
            ValueError: marks would take more tokens than may be remembered.
        """
        self.ledger.mark(prefix, space)

    @mended
    def resize(self, max_memory: int | str | None) -> None:
        """Changes the budget; demotes or evicts down to it, and warns where marks and open requests keep more.

        What open requests keep goes when they close. Nothing else is stored until all fits.
        """
        memory = self.tiers[0]
        memory.resize(parse_bytes(max_memory), self._demotion(memory))
        if memory.ledger.over_budget:
            logger.warning(
                "max_memory=%r is less than the %d bytes that marks and open requests keep, so nothing else is "
                "stored; give at least that, or take the marks back with clear().",
                max_memory,
                self.used_bytes,
            )

    @mended
    def give_back(self) -> int:
        """Sends off all that no open request uses and no mark keeps, as the model is short of memory.

        Returns:
            Bytes that came free.
        """
        memory, before = self.tiers[0], self.used_bytes
        demote = self._demotion(memory)
        for checkpoint in memory.stored():
            with memory.lock:
                if not checkpoint.stored or checkpoint.pins:
                    continue
                if demote is None:
                    memory.evict(checkpoint)
                    continue
                memory.ledger.take(checkpoint)
            demote(checkpoint)
        return before - self.used_bytes

    @mended
    def clear(self, space: str | None = None) -> None:
        """Forgets one space or all: prompts, marks and checkpoints in every tier; what is in use goes when it is not.

        A request that is open meanwhile goes on, and nothing of it is stored or remembered.
        """
        self._forget(space, lambda tier, space: tier.clear(space))

    @mended
    def drop(self, space: str) -> None:
        """Evicts every checkpoint of one space from memory; disk keeps them, as weights may come back."""
        self._forget(space, lambda tier, space: tier.drop(space))

    def verify(self) -> None:
        """Counts everything anew, in every tier: what is stored, remembered, pinned and held.

        Raises:
            WrongBooksError: the books do not agree with what is there; it names the tier and what differs.
        """
        for tier in self.tiers:
            tier.verify()

    @mended
    def flush(self) -> None:
        """Copies what only memory holds to the disk tier, if there is one, the least recently used first, and to the
        shared store, waiting for it as long as it gets on.
        """
        *faster, last = self.tiers
        for tier in faster if last.durable else ():
            for unit in tier.units():
                last.accept(unit)
        if self.shared is not None:
            self.shared.flush(self.tiers[0].checkpoints())

    def close(self, flush: bool = True) -> None:
        """Ends the use of the disk tier, so that another process can take its folder, and of the shared store; memory
        stays as it is.

        Args:
            flush: whether to write what only memory holds first (see `flush`); else it is gone with the process.
        """
        if flush:
            self.flush()
        leaving = [tier for tier in self.tiers if tier.durable]
        self.tiers = [tier for tier in self.tiers if not tier.durable]
        for tier in leaving:
            tier.release()
        if self.shared is not None:
            self.shared.close()
            self.shared = None

    def read_with(self, reader: Callable[[Plain], MovablePayload]) -> None:
        """Says how a payload is made of a file."""
        for tier in self.tiers:
            tier.reader = reader
        if self.shared is not None:
            self.shared.reader = reader

    def expect(self, space: str, like: Expected) -> None:
        """Learns what the states of a space must be."""
        for tier in self.tiers:
            tier.expect(space, like)
        if self.shared is not None:
            self.shared.expect(space, like)

    # -- between the tiers --------------------------------------------------------------------------------------------

    @mended
    def lift(self, ids: Tokens, expected: Lineage | None, space: str = "", tail: int = 1) -> None:
        """Brings the deepest checkpoint of this prompt up, where a tier below has a deeper one than memory.

        Args:
            ids: the prompt.
            expected: how the prompt itself would be cut; None where any lineage will do.
            space: where to look.
            tail: how many of the last tokens are to be computed whatever is stored.
        """
        lost: set[Checkpoint] = set()
        while (best := self._deeper_below(ids, expected, space, lost, tail)) is not None:
            tier, checkpoint, overlap = best
            if self.bring_up(tier, checkpoint, ids[:overlap]):
                return
            lost.add(checkpoint)

    def _deeper_below(
        self, ids: Tokens, expected: Lineage | None, space: str, lost: set[Checkpoint], tail: int
    ) -> tuple[Tier, Checkpoint, int] | None:
        """The deepest checkpoint that lies deeper than those in memory, its tier, and the tokens any tier shares."""
        found: tuple[Tier, Checkpoint] | None = None
        depth, overlap = 0, 0
        for tier in self.tiers:
            with tier.lock:
                match = tier.match(ids, space)
                best = next(match.fitting(len(ids), expected, lost, tail), None)
            overlap = max(overlap, match.overlap)
            if best is not None and best.position > depth:
                depth, found = best.position, (tier, best)
        return None if found is None or found[0] is self.tiers[0] else (*found, overlap)

    @mended
    def bring_up(
        self, tier: Tier, checkpoint: Checkpoint, ids: Tokens | None = None, space: str | None = None
    ) -> bool:
        """Copies a checkpoint of a slower tier into memory; False when it is lost there.

        Args:
            ids: the text to store it on, at least up to its position; None for no more than that.
            space: where to store it; None for its own.
        """
        with tier.lock:
            node = checkpoint.node
            ids = node.path_tokens()[: checkpoint.position] if ids is None else ids
            space = node.tree.space if space is None else space
        try:
            # The footing comes first: once the space is cleared, nothing is stored on it.
            with self.ledger.footing(ids, space) as footing, tier.ledger.taken(checkpoint) as unit:
                if unit is None:
                    return False
                tier.ledger.resumed(checkpoint, unit)
                fetched = tier.fetch(unit, list(self.ledger.missing_spans(footing, unit.spans)))
                if fetched is None:
                    return False
                stored = self.put(replace(fetched, tokens=ids, space=space), footing, urgent=True)
        except Exception as error:
            if not out_of_memory(error):
                raise
            tier.warn("fetch", f"A state could not be brought up from the {tier.name} tier: {error}")
            return True  # it is still there; this request does without
        if stored is not None:
            tier.brought_up(checkpoint)
        tier.tidy()
        return True

    def _resume_shared(
        self, shared: SharedStore, ids: Tokens, expected: Lineage | None, space: str, tail: int
    ) -> None:
        """Brings the deepest unit of the shared store into memory, where it is deeper than what memory has."""
        match = self.match(ids, space)
        known = next(match.fitting(len(ids), expected, tail=tail), None)
        depth = 0 if known is None else known.position
        if len(ids) - depth <= shared.tier.storage.least_tokens:
            return
        try:
            for _ in range(shared.tries):  # what turns out to be of no use is not found again
                found = shared.resume(ids, expected, space, depth, tail)
                if found is None or self._take_in(shared, found, space):
                    return
        except Exception as error:
            if not out_of_memory(error):
                raise
            shared.tier.warn("fetch", f"A state could not be brought up from the shared store: {error}")

    def _take_in(self, shared: SharedStore, found: Resumable, space: str) -> bool:
        """Reads what is missing of a unit, and puts it into memory; False where it is of no use."""
        tokens, spans = found.files.tokens, list(found.files.kv)
        with self.ledger.footing(tokens, space) as footing:
            unit = shared.read(found, self.ledger.missing_spans(footing, spans))
            if unit is not None:
                memory = self.tiers[0]
                memory.put(replace(unit, space=space), self._demotion(memory), footing, urgent=True)
        return unit is not None and shared.stands(unit)

    def _demotion(self, tier: Tier) -> Demote | None:
        """Where the victims of a tier go; None for the last one."""
        if tier is self.tiers[-1]:
            return None
        below = list(dropwhile(lambda other: other is not tier, self.tiers))[1:]
        return partial(self._demote, tier, below) if below else None

    def _demote(self, tier: Tier, below: list[Tier], victim: Checkpoint) -> None:
        """Copies a pinned checkpoint to the tiers below and evicts it, unless a request uses it by now."""
        kept = False
        try:
            with tier.lock:
                unit = unit_of(victim)
            with self._journey(unit.space, below):
                kept = keeps_pledge(unit) and any(other.accept(unit, self._demotion(other)) for other in below)
        finally:
            with tier.lock:
                tier.ledger.done_with(victim)
                if victim.stored and not victim.pins:
                    tier.ledger.evict(victim, demoted=kept)

    @contextmanager
    def _journey(self, space: str, goals: list[Tier]) -> Iterator[None]:
        """A unit is on its way to one of `goals`: what is to be forgotten meanwhile must not come back."""
        journey = _Journey(space)
        with self.lock:
            self._journeys.append(journey)
        try:
            yield
        finally:
            with self.lock:
                if journey in self._journeys:  # not after a fork
                    self._journeys.remove(journey)
            for how in journey.undo:
                for tier in goals:
                    how(tier, space)

    def _forget(self, space: str | None, how: Callable[[Tier, str | None], None]) -> None:
        with self.lock:
            for journey in self._journeys:
                if space in (None, journey.space):
                    journey.undo.append(how)
        for tier in reversed(self.tiers):
            how(tier, space)
        self.promises.forget(space)


def _limits(namespace_memory: Mapping[str, int | str]) -> dict[str, int | None]:
    """The budgets of namespaces in bytes.

    Raises:
        ValueError: a name is none, or a size cannot be read.
    """
    if not isinstance(namespace_memory, Mapping):
        raise ValueError(f"namespace_memory is {shown(namespace_memory)}: give sizes by name, such as {{'a': '1GiB'}}")
    hint = "give the name of a tenant"
    return {
        text("a name in namespace_memory", name, hint): parse_bytes(size, f"namespace_memory[{name!r}]")
        for name, size in namespace_memory.items()
    }


def _lower_tiers(
    host_memory: int | str | None, disk_memory: int | str | None, disk_dir: str | Path | None, seal: Seal
) -> list[Tier]:
    """The tiers that a store asks for, the faster one first, without a disk that cannot be used.

    Raises:
        ValueError: if a size cannot be read, or a folder is given without a size.
    """
    if disk_memory is None and disk_dir is not None:
        raise ValueError(f"disk_dir={str(disk_dir)!r} needs disk_memory, the bytes it may hold; give e.g. '20GiB'")
    tiers: list[Tier] = []
    if host_memory is not None:
        tiers.append(HostTier(parse_bytes(host_memory, "host_memory")))
    if disk_memory is not None:
        from .disk import DiskTier  # which a store in memory never needs

        folder = default_folder() if disk_dir is None else path_of("disk_dir", disk_dir).expanduser()
        disk = DiskTier.open(folder, parse_bytes(disk_memory, "disk_memory"), seal)
        tiers += [disk] if disk is not None else []
    return tiers


def _shared_store(where: str | Path, budget: int | str | None, seal: Seal, ledger: Ledger) -> SharedStore:
    """The shared store that a store asks for; nothing of it is touched yet.

    Raises:
        ValueError: it is neither a folder nor a URL, or the size cannot be read.
        ImportError: the package that serves such a URL is not installed.
    """
    from .behind import SharedStore  # which a store of its own never needs

    return SharedStore.open(where, parse_bytes(budget, "shared_memory"), seal, ledger)


def default_folder() -> Path:
    """`sparse_cache` under HF_HOME."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).expanduser() / "sparse_cache"
