"""Writing to a shared store behind the requests: one thread, a bounded queue, and nothing kept alive by waiting.

A checkpoint that waits is only pointed at: where it is evicted before its turn, it is not written. When its turn comes
it is pinned while it becomes bytes, and these are written with nothing held.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..checks import printable
from ..errors import DamagedFileError, out_of_memory
from ..planning.cuts import Tokens
from ..planning.lineage import Lineage, Span
from . import files
from .addresses import BLOCK, Text, namespace_folder
from .hands import Trust
from .headers import Plain
from .ledger import Ledger
from .seal import Seal
from .shared import MOST_TRIES, Resumable, SharedTier
from .shelf import MOST_UNITS
from .storage import open_storage
from .tree import Checkpoint
from .unit import Expected, MovablePayload, Unit, namespace_of
from .unit_files import Packing, StoredFile


MOST_WAITING = 64
_IDLE_SECONDS = 5.0
_STALLED_SECONDS = 30.0
_MOST_KNOWN = 2**16
_MOST_CHORES = 256
_CHECKED_SECONDS = 600.0  # for which a file of keys and values that was there is taken to be there


class _Packed(NamedTuple):
    """A unit as files, those that are known to lie there without their bytes.

    Attributes:
        chains: the name of each file of keys and values, by what they are of.
    """

    text: Text
    chains: dict[str, str]
    kv: dict[str, bytes | None]
    state: str
    data: bytes


class Writer:
    """Writes one process's checkpoints.

    Args:
        tier: whose storage it writes to.
        ledger: of the memory that the checkpoints lie in.
    """

    def __init__(self, tier: SharedTier, ledger: Ledger) -> None:
        self._tier, self._ledger = tier, ledger
        self._packing = Packing(tier.seal, files.same_name, steady=True)
        self._start()

    def _start(self) -> None:
        self.trust = Trust()
        self._waiting: deque[tuple[weakref.ref[Checkpoint], Tokens]] = deque()
        self._chores: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()  # taken itself, as an interrupt inside `Condition.__enter__` would keep it
        self._ready = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._busy = self._closed = False
        self._kv: dict[str, tuple[str, float]] = {}  # by what the keys and values are of: their file, and since when
        self._told: set[str] = set()
        self._tier.chores = self.do

    def after_fork(self) -> None:
        """In a child process: with a thread of its own, and nothing waiting."""
        self._start()

    # -- for those who do not wait ------------------------------------------------------------------------------------

    def offer(self, checkpoint: Checkpoint, ids: Tokens) -> None:
        """A checkpoint may be written when its turn comes.

        Args:
            ids: the text it lies on, at least up to its position.
        """
        with self._lock:
            if self._closed:
                return
            if len(self._waiting) >= MOST_WAITING:
                self._tier.count("not written: too many wait")
                return
            self._waiting.append((weakref.ref(checkpoint), ids))
            self._awake()

    def do(self, chore: Callable[[], None]) -> None:
        """Something else to do on the storage."""
        with self._lock:
            if not self._closed and len(self._chores) < _MOST_CHORES:
                self._chores.append(chore)
                self._awake()

    def gets_on(self, most: int) -> bool:
        """Waits until no more than so many things wait; False when none is done for a while, or the storage fails."""
        with self._lock:
            while (left := self._left()) > most:
                self._ready.wait_for(partial(self._fewer, left), _STALLED_SECONDS)
                if self._left() >= left or self._closed:
                    return False
            return True

    def _fewer(self, than: int) -> bool:
        return self._left() < than

    def _left(self) -> int:
        return len(self._waiting) + len(self._chores) + self._busy

    def close(self) -> None:
        """Writes no more; what waits is dropped."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._chores.clear()
            self._ready.notify_all()

    def _awake(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            name = "sparse-cache-writes"
            self._thread = threading.Thread(target=_work, args=(weakref.ref(self),), name=name, daemon=True)
            self._thread.start()
        self._ready.notify_all()

    # -- on the thread ------------------------------------------------------------------------------------------------

    def turn(self, idle_seconds: float) -> bool:
        """Does one thing, or waits a while for one; False when there will be none."""
        with self._lock:
            if not self._waiting and not self._chores:
                self._busy = False
                self._ready.notify_all()
                if not self._closed:
                    self._ready.wait(idle_seconds)
            if self._closed:
                return False
            chore = self._chores.popleft() if self._chores else None
            waiting = self._waiting.popleft() if chore is None and self._waiting else None
            self._busy = chore is not None or waiting is not None
        if chore is not None:
            self._guarded(chore)
        elif waiting is not None:
            checkpoint = waiting[0]()
            if checkpoint is None:
                self._tier.count("not written: evicted before its turn")
            else:
                self._guarded(lambda: self._write(checkpoint, waiting[1]))
        else:
            self._guarded(lambda: self._tier.keeper.beat(time.monotonic()))
        return True

    def _guarded(self, job: Callable[[], None]) -> None:
        """Does what may fail; after a failure the storage is left alone for a while."""
        if not self.trust.holds:
            self._tier.count("not written: the storage failed lately")
            return
        try:
            job()
            self.trust.kept()
        except Exception as error:
            reason = f"writing: {type(error).__name__}: {error}"
            if not (out_of_memory(error) or isinstance(error, DamagedFileError)):  # in one place, not in all
                self.trust.broken(reason)
            self._tier.write_failed(reason)

    def _write(self, checkpoint: Checkpoint, ids: Tokens) -> None:
        with self._ledger.lock:
            if not checkpoint.stored:
                self._tier.count("not written: evicted before its turn")
                return
            space, position = checkpoint.node.tree.space, checkpoint.position
            lineage, final = checkpoint.lineage, checkpoint.final
            spans = [segment.span for segment in checkpoint.chain()]
        text = Text(self._tier.seal, space, ids)
        way = self._tier.shelf.way(text)
        place = next((item for item in way if item.block == position // BLOCK), None)
        place = self._tier.shelf.look(text, position // BLOCK) if place is None else place
        tokens, made_by = text.digest(position)[:16], text.lineage(lineage)
        there = [item for item in place.units if (item.tokens, item.lineage, item.final) == (tokens, made_by, final)]
        if any(not self._tier.is_bad(item.state) for item in there):
            self._tier.count("already there")
            self._tier.shelf.post(text, lineage, [*way, place])
            return
        if len(place.units) >= MOST_UNITS:
            self._tier.count("not written: its place is full")
            return
        self._check_known(text, spans)
        with self._ledger.taken(checkpoint) as unit:
            packed = None if unit is None else self._packed(text, unit)
        if packed is None:
            self._tier.count("not written: evicted before its turn")
            return
        if self._put(packed, text.name(lineage, final, packed.state), space):
            self._tier.shelf.post(text, lineage, [*way, place])
            self._tier.forgive(packed.state)
            self._tier.count("written")

    def _packed(self, text: Text, unit: Unit) -> _Packed:
        """A unit as bytes, less the keys and values that are known to lie there."""
        kv: dict[str, bytes | None] = {}
        chains, names, now = self._chains(text, unit.spans), [], time.monotonic()
        for span, chain in zip(unit.spans, chains, strict=True):
            name, since = self._kv.get(chain, ("", 0.0))
            if name and now - since < _CHECKED_SECONDS:
                kv[name] = None
            else:
                name, kv[name] = self._packing.kv(unit.kv[span], span, unit.space)
            names.append(name)
        state, data = self._packing.state(unit, names)
        return _Packed(text, dict(zip(chains, names, strict=True)), kv, state, data)

    def _check_known(self, text: Text, spans: Sequence[Span]) -> None:
        """Forgets what is known of keys and values unless the deepest is there: it goes before those below it."""
        chains = self._chains(text, spans)
        deepest = next((self._kv[chain][0] for chain in reversed(chains) if chain in self._kv), None)
        if deepest is not None and self._tier.storage.size(text.kv(deepest)) is None:
            for chain in chains:
                self._kv.pop(chain, None)

    def learn(self, text: Text, kv: Mapping[Span, StoredFile]) -> None:
        """Files of keys and values lie there, as a unit was read that needs them."""
        for chain, file in zip(self._chains(text, list(kv)), kv.values(), strict=True):
            self._learn(chain, file.path.name)

    def _learn(self, chain: str, name: str) -> None:
        with self._lock:
            self._kv.pop(chain, None)
            self._kv[chain] = name, time.monotonic()
            while len(self._kv) > _MOST_KNOWN:
                del self._kv[next(iter(self._kv))]

    def _chains(self, text: Text, spans: Sequence[Span]) -> list[str]:
        """What names the keys and values of each span: the text up to its end, and every forward below it."""
        found, made = [], self._tier.seal.hasher(b"chain")
        for span in spans:
            made.update(repr(tuple(span)).encode())
            found.append(text.digest(span.end) + made.hexdigest())
        return found

    def _put(self, packed: _Packed, name: str, space: str) -> bool:
        """Writes a unit's files, its state last; False when there is no room for it."""
        storage = self._tier.storage
        new: dict[str, bytes] = {}
        for part, data in packed.kv.items():
            if data is not None and storage.size(packed.text.kv(part)) != len(data):
                new[part] = data
        need = len(packed.data) + sum(map(len, new.values()))
        if not self._tier.keeper.admits(need, time.monotonic()):
            self._tier.count("not written: no room within the budget")
            return False
        self._tell(space)
        for part, data in new.items():
            storage.put(packed.text.kv(part), data)
        for chain, part in packed.chains.items():
            if packed.kv[part] is not None:
                self._learn(chain, part)
        storage.put(name, packed.data)
        return True

    def _tell(self, space: str) -> None:
        """Says, once, that the namespace has this space, for others who find nothing of their own."""
        if space not in self._told:
            name, data = self._packing.marks([], space)
            try:
                self._tier.storage.put(f"{namespace_folder(self._tier.seal, namespace_of(space))}/{name}", data)
            except DamagedFileError as error:  # something else lies there: others are told less
                self._tier.write_failed(str(error))
            self._told.add(space)


def _work(of: weakref.ref[Writer]) -> None:
    while True:
        writer = of()
        if writer is None or not writer.turn(_IDLE_SECONDS):
            return
        del writer


class SharedStore:
    """What a store has of a shared one: the tier that reads, and the writer. Build it with `open`."""

    def __init__(self, tier: SharedTier, ledger: Ledger) -> None:
        self.tier, self.writer = tier, Writer(tier, ledger)
        tier.lose = ledger.lose

    @classmethod
    def open(cls, where: str | Path, budget: int | None, seal: Seal, ledger: Ledger) -> SharedStore:
        """A shared store; nothing of it is touched yet, however much lies there.

        Raises:
            ValueError: it is neither a folder nor a URL that fsspec knows.
            ImportError: the package that serves such a URL is not installed.
        """
        return cls(SharedTier(open_storage(where), budget, seal), ledger)

    @property
    def tries(self) -> int:
        """Units that one request tries, where one after the other is of no use."""
        return MOST_TRIES

    @property
    def reader(self) -> Callable[[Plain], MovablePayload] | None:
        """Makes a payload of a file."""
        return self.tier.reader

    @reader.setter
    def reader(self, reader: Callable[[Plain], MovablePayload]) -> None:
        self.tier.reader = reader

    @property
    def counts(self) -> dict[str, int]:
        """What happened, in words, and how often."""
        return dict(self.tier.counts)

    def expect(self, space: str, like: Expected) -> None:
        """Learns what the states of a space must be."""
        self.tier.expect(space, like)

    def resume(self, ids: Tokens, expected: Lineage | None, space: str, above: int, tail: int = 1) -> Resumable | None:
        """The deepest unit deeper than `above` that a prompt may resume from, its state proved."""
        return self.tier.resume(ids, expected, space, above, tail)

    def read(self, found: Resumable, spans: Sequence[Span]) -> Unit | None:
        """The whole unit, with the keys and values of `spans`, or their pledge; None where it cannot be had."""
        return self.tier.read(found, spans, partial(self.writer.learn, found.text, found.files.kv))

    def stands(self, unit: Unit) -> bool:
        """Whether a unit that was read is not known to be of no use; where it is, memory loses it."""
        return self.tier.stands(unit)

    def reach(self, ids: Tokens, expected: Lineage | None, space: str, above: int) -> tuple[int, str]:
        """How far beyond `above` a prompt would resume from here, and a sentence that says so, or why not."""
        found, _ = self.tier.look(ids, expected, space, above) or ([], False)
        if found:
            return found[0].position, f"The shared store has its first {found[0].position:,} tokens."
        if self.tier.trust.reason:
            return (
                0,
                f"The shared store failed lately ({printable(self.tier.trust.reason)}), so it is left alone.",
            )
        aside = self.tier.put_aside(ids, space)
        if aside:
            return 0, f"A unit of the shared store was of no use and put aside: {aside}."
        failed = self.writer.trust.reason
        more = f" It could not be written lately ({printable(failed)})." if failed else ""
        return 0, f"The shared store has nothing deeper.{more}"

    def others(self, space: str) -> list[str]:
        """Other spaces of the same namespace of which something was stored."""
        return self.tier.others(space)

    def offer(self, checkpoint: Checkpoint, ids: Tokens) -> None:
        """A checkpoint was stored in memory, and may be written."""
        self.writer.offer(checkpoint, ids)

    def flush(self, stored: Sequence[tuple[str, Tokens, Checkpoint]]) -> None:
        """Writes checkpoints that do not lie there, as far as the storage gets on."""
        for _, ids, checkpoint in sorted(stored, key=lambda item: item[2].last_used):
            if not self.writer.gets_on(MOST_WAITING - 1):
                break
            self.writer.offer(checkpoint, ids)
        if not self.writer.gets_on(0):
            self.tier.warn("flush", f"The shared store {self.tier.storage.where} took not all that was to be written")

    def close(self) -> None:
        """Nothing is read or written any more."""
        self.writer.close()

    def after_fork(self) -> None:
        """In a child process: with threads, locks and connections of its own, and nothing that waits."""
        self.tier.after_fork()
        self.writer.after_fork()
