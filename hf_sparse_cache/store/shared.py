"""The shared store: units that any number of processes and machines read and write, each proved by whoever uses it.

Nothing in it is ever changed. A unit is filed where its own tokens lead (see `addresses`), written behind the requests
on a thread of its own, and read by a few threads that nobody waits for longer than a moment: storage that is slow,
full, failing or gone costs a request what it saves, never its answer. What does not hold what its name says is put
aside with the reason, and served to nobody.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..checks import printable
from ..errors import DamagedFileError
from ..planning.cuts import MIN_SUFFIX_TOKENS, Tokens
from ..planning.lineage import Lineage, Span
from . import files, planes
from .addresses import BLOCK, Filed, Text, namespace_folder
from .ahead import Ahead, Pledge, StorageFailedError
from .hands import BusyError, Hands, Trust
from .headers import Plain, RefusedFileError
from .keeper import Keeper
from .seal import Seal
from .shelf import Shelf
from .storage import Storage
from .tree import Payload
from .unit import Expected, MovablePayload, PledgedPayload, Unit, namespace_of
from .unit_files import StoredFile, UnitFiles, UnitReader, state_record


logger = logging.getLogger(__name__)
_T = TypeVar("_T")
LOOK_SECONDS = 2.0  # that a request waits for what there is
READ_SECONDS = 10.0  # and for what it resumes from
FIRST = 5  # times as long, until the storage has answered once: it may have to connect
_READERS = 8
MOST_TRIES = 3  # units that one request tries
_MOST_BAD = 4096
_MOST_ABOUT_BYTES = 2**20
_MOST_ASIDE_BYTES = 2**26  # of a file that is put aside
_MOST_FAILURES = 16  # kinds that are told apart


@dataclass(frozen=True)
class Resumable:
    """A unit whose state was read and fits, and with a key is proved; its keys and values are still to be read.

    Attributes:
        text: of its own tokens.
        data: the bytes of the state's file.
        opened: the same, decrypted.
    """

    files: UnitFiles
    text: Text
    filed: Filed
    data: Plain
    opened: Plain
    reader: UnitReader


class SharedTier:
    """Reads and proves what others wrote, and keeps count of what became of it.

    Args:
        storage: where it lies.
        budget: bytes of everything in it; None for no limit.
        seal: what proves the files, and whether they are encrypted.

    Attributes:
        reader: makes a payload of a file.
        counts: what happened, in words, and how often.
    """

    name = "shared"

    def __init__(self, storage: Storage, budget: int | None, seal: Seal) -> None:
        self.storage, self.budget, self.seal = storage, budget, seal
        self.reader: Callable[[Plain], MovablePayload] | None = None
        self.lose: Callable[[Payload], None] = lambda payload: None  # of the memory that what is read comes into
        self._expected: weakref.WeakValueDictionary[str, Expected] = weakref.WeakValueDictionary()
        self._start()

    def _start(self) -> None:
        self.counts: Counter[str] = Counter()
        self.trust = Trust()
        self.shelf = Shelf(self.storage)
        self.keeper = Keeper(self.storage, self.seal, self.budget)
        self.hands = Hands(_READERS, "sparse-cache-reads")
        self.chores: Callable[[Callable[[], None]], None] = lambda chore: None  # of the writer
        self._bad: OrderedDict[str, None] = OrderedDict()  # states that are not to be looked at
        self._reasons: OrderedDict[str, tuple[str, int, str]] = OrderedDict()  # with the place, why they were so
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._answered = self._broken = False

    def after_fork(self) -> None:
        """In a child process: with threads, locks and connections of its own, and nothing counted."""
        self.storage.after_fork()
        self._start()

    def expect(self, space: str, like: Expected) -> None:
        """Learns what the states of a space must be; as long as `like` lives, none that is not is served."""
        self._expected[space] = like

    # -- what a request asks ------------------------------------------------------------------------------------------

    def find(self, ids: Tokens, expected: Lineage | None, space: str, above: int, tail: int = 1) -> list[Filed]:
        """As `look`, for a request: it is counted, and what the storage was not sure of is looked into."""
        looked = self.look(ids, expected, space, above, tail)
        if looked is None:
            return []
        found, doubtful = looked
        if doubtful:
            self.chores(partial(self.shelf.survey, Text(self.seal, space, ids)))
        if not found:
            self.count("nothing deeper there")
        return found

    def look(
        self, ids: Tokens, expected: Lineage | None, space: str, above: int, tail: int = 1
    ) -> tuple[list[Filed], bool] | None:
        """The units that a prompt may resume from, the deepest first, and whether there may be more.

        Args:
            ids: the prompt.
            expected: how the prompt itself would be cut; None where any lineage will do.
            space: where to look.
            above: a unit must lie deeper than this position.
            tail: how many of the last tokens are to be computed whatever is stored; 1 for none but what must be.

        Returns:
            None where the storage cannot say in time.
        """
        text = Text(self.seal, space, ids)

        def fits(unit: Filed) -> bool:
            end = unit.position
            whole = end == len(ids) and unit.final and tail == 1
            if not whole and end > len(ids) - max(MIN_SUFFIX_TOKENS, tail):
                return False
            if unit.tokens != text.digest(end)[:16]:
                return False
            return expected is None or unit.lineage == _begin(text, expected, end)

        until = time.monotonic() + LOOK_SECONDS
        return self._asked(lambda: self.shelf.find(text, fits, above, self.is_bad), until, "look-up")

    def resume(self, ids: Tokens, expected: Lineage | None, space: str, above: int, tail: int = 1) -> Resumable | None:
        """The deepest unit that a prompt may resume from; None where there is none.

        Without a key its state is proved once its keys and values are begun to be read: see `read`.
        """
        if self.reader is None:
            return None
        reader = UnitReader(self.reader, self.seal, self._expected.get(space))
        gone: set[str] = set()
        for _ in range(MOST_TRIES):
            found = self.find(ids, expected, space, above, tail)
            filed = next((unit for unit in found if unit.name not in gone), None)
            if filed is None:
                return None
            gone.add(filed.name)
            most = reader.most(filed.position, None, filed.final)
            job, until = partial(self._bytes, filed.name, most), time.monotonic() + READ_SECONDS
            data = self._asked(job, until, "reading a state", filed)
            if data is not None:
                path, text = Path(filed.state), Text(self.seal, space, ids[: filed.position])
                try:
                    if self.seal.keyed:
                        files.prove(path, data, self.seal)
                    with self._blaming(path, data):
                        opened = self.seal.opened(data)
                        unit = self._fitting(filed, text, space, expected, opened)
                    return Resumable(unit, text, filed, data, opened, reader)
                except DamagedFileError as error:
                    self.refuse(filed, filed.state, error, _digest(data))
        return None

    @contextmanager
    def _blaming(self, path: Path, data: Plain) -> Iterator[None]:
        """Whatever is wrong with a state that is not proved is that it is not."""
        try:
            yield
        except Exception:
            files.prove(path, data, self.seal)
            raise

    def read(self, found: Resumable, spans: Sequence[Span], kept: Callable[[], None]) -> Unit | None:
        """The rest of a unit: threads read and prove its keys and values, while what has come is made into tensors.

        Where the payloads take a pledge, they are handed on with one as soon as they are made: what is computed up to
        the first use of keys and values hides the rest of the proof. Others leave here when all is proved.

        Args:
            kept: called once all is proved, on whatever thread finds that out.
        """
        until = time.monotonic() + READ_SECONDS
        ahead = Ahead(self.hands, self.seal, until)
        names = [found.files.kv[span].path.name for span in spans]
        handed_on = False
        try:
            for span, name in zip(spans, names, strict=True):
                ahead.begin(name, partial(self.storage.parts, found.text.kv(name), found.reader.most(0, span)))

            def fetch(file: StoredFile, most: int | None) -> Plain:
                if file is found.files.state:
                    return planes.unpacked(found.opened, most)
                return ahead.plain(file.path.name, most)

            files.prove(found.files.state.path, found.data, self.seal)
            unit = self._made(found, spans, replace(found.reader, fetch=fetch), ahead)
            pledged = self._pledged(unit, partial(self._settled, found, names, ahead, kept), until)
            handed_on = pledged is not None
            if pledged is not None:
                return pledged
            return None if self._settled(found, names, ahead, kept) else unit
        except (BusyError, StorageFailedError, DamagedFileError) as error:
            self._of_no_use(found, ahead, error)
            return None
        finally:
            if not handed_on:
                ahead.give_up()

    def _made(self, found: Resumable, spans: Sequence[Span], reader: UnitReader, ahead: Ahead) -> Unit:
        """A unit of files that may not be proved yet. What is wrong with one that never is, is that it is not."""
        try:
            return reader.read(found.files, spans)
        except StorageFailedError:
            raise
        except Exception as error:  # bytes that are not those that were written may fail anyhow
            if not isinstance(error, DamagedFileError) or error.path != found.files.state.path:
                for span in spans:
                    ahead.prove(found.files.kv[span].path.name)
            raise

    def _pledged(self, unit: Unit, settled: Callable[[], str], until: float) -> Unit | None:
        """A unit to be handed on before it is proved; None where it is not to be.

        Once one of them was broken, none is handed on any more: each of those costs the start of a forward.
        """
        payloads = {span: payload for span, payload in unit.kv.items() if isinstance(payload, PledgedPayload)}
        if not payloads or len(payloads) < len(unit.kv) or self.seal.keyed or self._broken:
            return None
        pledge = Pledge(self.hands, until)
        handed = {span: payload.pledged(pledge) for span, payload in payloads.items()}

        def settle() -> str:
            reason = settled()
            if reason:
                self._broken = pledge.broken = True
                for payload in handed.values():
                    self.lose(payload)
            return reason

        pledge.begin(settle)
        return replace(unit, kv=handed)

    def stands(self, unit: Unit) -> bool:
        """Whether a unit that was handed on is not known to be of no use; it may have come into memory since then."""
        gone = [item for item in unit.kv.values() if getattr(getattr(item, "pledge", None), "broken", False)]
        for payload in gone:
            self.lose(payload)
        return not gone

    def _settled(self, found: Resumable, names: Sequence[str], ahead: Ahead, kept: Callable[[], None]) -> str:
        """Waits until a unit is proved; returns why it is of no use, where it is not."""
        try:
            for name in names:
                ahead.prove(name)
        except (StorageFailedError, DamagedFileError) as error:
            return self._of_no_use(found, ahead, error)
        self.trust.kept()
        self.count("resumed from")
        now = time.monotonic()
        if self.keeper.uses(found.filed.state, now):
            self.chores(partial(self.keeper.beat, now))  # a process that only reads has no writer at work yet
        kept()
        return ""

    def _of_no_use(self, found: Resumable, ahead: Ahead, error: Exception) -> str:
        """Does what is due when a unit could not be read; returns why."""
        if isinstance(error, DamagedFileError):
            culprit = found.filed.state if error.path is None else error.path.name
            seen = found.data if culprit == found.filed.state else ahead.seen(culprit)
            most = {found.text.kv(file.path.name): found.reader.most(0, span) for span, file in found.files.kv.items()}
            own = most.pop(found.text.kv(culprit), None)
            self.refuse(found.filed, culprit, error, "" if seen is None else _digest(seen), own)
            self.chores(partial(self._check, most))
        elif isinstance(error, BusyError):
            self._failed(f"reading: {error}")
        else:
            self._failed(_said(error.__cause__ or error, "reading keys and values"))
        return printable(str(error)) or type(error).__name__

    def others(self, space: str) -> list[str]:
        """Other spaces of the same namespace of which something was stored: of other versions, of other weights."""
        folder = namespace_folder(self.seal, namespace_of(space))

        def read() -> list[str]:
            found = []
            for entry in self.storage.list(folder)[:16]:
                own = entry.name.rpartition("/")[2]
                if files.is_name(own, "marks") and files.proves_itself(own):
                    data = self.storage.read(entry.name, 0, _MOST_ABOUT_BYTES)
                    record, _ = files.record_of(files.proved(Path(own), data, self.seal))
                    found.append(str(record.get("space")))
            return [name for name in found if name != space and namespace_of(name) == namespace_of(space)]

        return self._asked(read, time.monotonic() + LOOK_SECONDS, "look-up") or []

    # -- what is known of single files --------------------------------------------------------------------------------

    def is_bad(self, name: str) -> bool:
        """Whether a file was found to be of no use, and may still lie there."""
        return name in self._bad

    def put_aside(self, ids: Tokens, space: str) -> str:
        """Why a unit of this prompt was found to be of no use; empty where none was."""
        text = Text(self.seal, space, ids)
        with self._lock:
            for folder, block, reason in reversed(self._reasons.values()):
                if block <= text.blocks and text.folder(block) == folder:
                    return reason
        return ""

    def forgive(self, state: str) -> None:
        """What lies under this name from now on is another file than the one that was refused."""
        with self._lock:
            self._bad.pop(state, None)

    def refuse(
        self, filed: Filed, culprit: str, error: DamagedFileError, seen: str = "", most: int | None = None
    ) -> None:
        """A unit is of no use: it is not looked at until it is put aside for all, and never where that cannot be.

        Args:
            culprit: the file that is to blame.
            seen: the digest of what was in it; empty where it was gone, or was not read to its end.
            most: bytes that it may have; None where that is not known.
        """
        reason = printable(str(error))
        with self._lock:
            _remember(self._bad, filed.state, None)
            place = filed.name.rpartition("/")[0], filed.position // BLOCK
            _remember(self._reasons, filed.state, (*place, reason))
        if isinstance(error, RefusedFileError) or isinstance(error.__cause__, RefusedFileError):
            self.count(f"not for this store: {_kind(reason)}")
            return
        self.count(f"put aside: {_kind(reason)}")
        self.warn("damaged", f"A unit in {self.storage.where} is of no use and put aside: {culprit}: {reason}")
        own = culprit == filed.state
        name = filed.name if own else f"{filed.name.partition('/')[0]}/kv/{culprit}"
        doomed = [filed.name] if own else [filed.name, name]

        def chore() -> None:
            if self._is_as_it_was(name, seen, own, most):
                self._put_aside(doomed, reason)
            self.forgive(filed.state)

        self.chores(chore)

    def _is_as_it_was(self, name: str, seen: str, own: bool, most: int | None) -> bool:
        """Whether a file is what was refused; others may have put it aside and written it anew since."""
        if not seen:
            return own or (size := self.storage.size(name)) is None or (most is not None and size > most)
        try:
            return _digest(self.storage.read(name)) == seen
        except FileNotFoundError:
            return True

    def _put_aside(self, names: list[str], reason: str) -> None:
        """Moves files out of their places: the state first, so that nobody finds the rest.

        Of one that is longer than any is kept, the beginning: whoever can write here can make files that are mostly a
        hole, and take no room until they are read.
        """
        for name in names:
            own = name.rpartition("/")[2]
            try:
                data = self.storage.read(name, 0, _MOST_ASIDE_BYTES)
            except (FileNotFoundError, DamagedFileError):
                continue
            self.storage.put(f"quarantine/{own}.reason", json.dumps({"file": name, "reason": reason}).encode())
            self.storage.put(f"quarantine/{own}", bytes(data))
            self.storage.remove(name)

    def _check(self, names: dict[str, int | None]) -> None:
        """Puts aside which of these files are damaged, as others rely on them by their names.

        Args:
            names: with the bytes that each may have at most.
        """
        for name, most in names.items():
            try:
                files.proved(Path(name), self._bytes(name, most), self.seal)
            except FileNotFoundError:
                continue
            except DamagedFileError as error:
                self.count(f"put aside: {_kind(printable(str(error)))}")
                self._put_aside([name], printable(str(error)))

    def count(self, what: str) -> None:
        """Counts something that happened, by kind; beyond a number of kinds all others are one."""
        with self._lock:
            known = what in self.counts or len(self.counts) < _MOST_FAILURES
            self.counts[what if known else "something else failed"] += 1

    def warn(self, kind: str, message: str) -> None:
        """Logs one warning of a kind, ever."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s. Requests go on without it; further failures of this kind are counted.", message)

    def write_failed(self, reason: str) -> None:
        """Something could not be written."""
        self.count(f"failed: {_kind(reason)}")
        self.warn("write", f"The shared store {self.storage.where} cannot be written: {printable(reason)}")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _asked(self, job: Callable[[], _T], until: float, what: str, filed: Filed | None = None) -> _T | None:
        """What the storage answers in time; None, with the reason counted, when it does not."""
        if not self.trust.holds:
            self.count("not asked, as it failed lately")
            return None
        if not self._answered:
            now = time.monotonic()
            until = now + FIRST * (until - now)
        try:
            answer = self.hands.wait(self.hands.begin(job), until)
            self._answered = True
            return answer
        except FileNotFoundError as error:
            if filed is None:
                self._failed(_said(error, what))
            else:
                self.count("gone before it was read")
        except DamagedFileError as error:
            if filed is None:
                self._failed(_said(error, what))
            else:
                self.refuse(filed, filed.state, error)
        except Exception as error:
            self._failed(_said(error, what))
        return None

    def _failed(self, reason: str) -> None:
        self.trust.broken(reason)
        self.count(f"failed: {_kind(reason)}")
        self.warn("failed", f"The shared store {self.storage.where} failed: {printable(reason)}")

    def _bytes(self, name: str, most: int | None) -> Plain:
        """A whole file of at most so many bytes."""
        data = self.storage.read(name) if most is None else self.storage.read(name, 0, most + 1)
        if most is not None and len(data) > most:
            raise DamagedFileError(f"it has more than the {most} bytes that what it is for has at most")
        return data

    def _fitting(self, filed: Filed, text: Text, space: str, expected: Lineage | None, opened: Plain) -> UnitFiles:
        """What a state's file says of its unit, held against where it was filed and what was asked."""
        record = state_record(*files.record_of(opened))
        lineage = record.lineage
        if record.space != space:
            raise DamagedFileError("it belongs to another model or namespace than its folder says")
        if len(record.tokens) != filed.position or not (record.tokens == text.tokens).all():
            raise DamagedFileError("it belongs to another prompt than its place says")
        if lineage is None or text.lineage(lineage) != filed.lineage or record.final != filed.final:
            raise DamagedFileError("it was made otherwise than its name says")
        if expected is not None and not expected.begins_with(lineage):
            raise DamagedFileError("it was made by other segments than its name says")
        if any(not files.is_name(name, "kv") for _, name in record.kv):
            raise DamagedFileError("it names files that are none of keys and values")
        kv = {span: StoredFile(Path(name), 0) for span, name in record.kv}
        return UnitFiles(record.space, record.tokens, lineage, record.final, StoredFile(Path(filed.state), 0), kv)


def _begin(text: Text, expected: Lineage, end: int) -> str | None:
    try:
        return text.lineage(expected.through(end))
    except ValueError:
        return None


def _remember(kept: OrderedDict[str, _T], name: str, value: _T) -> None:
    kept.pop(name, None)
    kept[name] = value
    while len(kept) > _MOST_BAD:
        kept.popitem(last=False)


def _digest(data: Plain) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _kind(reason: str) -> str:
    """A reason without what is of one file alone."""
    words = [word for word in reason.split() if "/" not in word and ".safetensors" not in word]
    return "".join(character if not character.isdigit() else "#" for character in " ".join(words))[:120]


def _said(error: BaseException, what: str) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"{what} took too long"
    return f"{what}: {type(error).__name__}: {error}"
