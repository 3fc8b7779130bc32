"""The disk tier: one file a unit in one private folder, found again at the next start.

A state's file names the KV files it builds on by their checksums, and every file is proved when it is read, so nothing
damaged, lost or swapped is ever used. Files are written and read with no lock held. Whatever the file system does, the
store goes on without the unit: it is never worth more than a prefill. What else lies in the folder is left alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path

from ..checks import printable
from ..errors import DamagedFileError, out_of_memory
from ..planning.lineage import Span
from . import files
from .chains import Footing
from .eviction import LRU
from .headers import RefusedFileError
from .ledger import Ledger
from .seal import Seal
from .tier import Demote, Tier
from .tree import KVSegment, Payload
from .unit import Expected, Unit, shared_chain
from .unit_files import Found, Packing, StoredFile, UnitFiles, UnitReader, find


_SPACE_FOLDER = re.compile(r"[0-9a-f]{32}")


class DiskTier(Tier):
    """Units whose payloads are files. Build it with `open`.

    Args:
        folder: holds a folder for each space.
        max_memory: bytes of all files, unfinished ones too; None for no limit.
        seal: what proves the files, and whether they are encrypted.
    """

    name = "disk"
    durable = True

    def __init__(self, folder: Path, max_memory: int | None, seal: Seal = files.CHECKSUMS) -> None:
        super().__init__(Ledger(max_memory, LRU()))
        self.folder = folder
        self.seal = seal
        self._expected: weakref.WeakValueDictionary[str, Expected] = weakref.WeakValueDictionary()
        self._lock_file: weakref.finalize[[int], DiskTier] | None = None
        self._start()

    def _start(self) -> None:
        self.ledger.freed = []
        self._stuck: list[StoredFile] = []  # files that could not be deleted: they still take their room
        self._aside: list[StoredFile] = []  # of another key or version: not read, and the first to go
        self._named: set[Path] = set()  # files that a warning has named
        self._sweeping = threading.Lock()

    @classmethod
    def open(cls, folder: Path, max_memory: int | None, seal: Seal = files.CHECKSUMS) -> DiskTier | None:
        """Takes over a folder with what it holds; None, with one warning, when it cannot be used."""
        tier = cls(folder, max_memory, seal)
        try:
            files.private_folder(folder)
            lock = files.lock_of(folder)
            if lock.name != files.LOCKS[0]:
                tier.warn("lock", f"{folder / files.LOCKS[0]} is no file, so {lock.name} stands for it")
            descriptor = files.take_over(folder)
            if descriptor is None:
                tier.warn("open", f"The disk tier {folder} is in use by another process, so this one has none")
                return None
            tier._lock_file = weakref.finalize(tier, os.close, descriptor)
            tier.load()
        except OSError as error:
            tier.release()
            tier.warn("open", f"The disk tier {folder} cannot be used: {error}")
            return None
        except BaseException:
            tier.release()
            raise
        return tier

    def after_fork(self) -> None:
        """The folder stays the parent's."""
        super().after_fork()
        self._start()
        self.release()

    def start_over(self) -> None:
        """Begins anew with what lies in the folder."""
        with self.lock:
            super().start_over()
            self.ledger.freed = []
            self._stuck, self._aside = [], []
        try:
            self.load()
        except OSError as error:
            self.warn("open", f"The disk tier {self.folder} could not be read again: {error}")

    def release(self) -> None:
        """Lets another process take the folder over."""
        if self._lock_file is not None:
            self._lock_file()
            self._lock_file = None

    # -- into the folder ----------------------------------------------------------------------------------------------

    def accept(self, unit: Unit, demote: Demote | None = None) -> bool:
        """Writes a unit; False, with one warning a kind, when the file system does not let it."""
        try:
            return self.write(unit)
        except Exception as error:
            if not isinstance(error, OSError) and not out_of_memory(error):
                raise
            self.warn("write", f"A state could not be written to {self.folder}: {error}")
            return False

    def write(self, unit: Unit) -> bool:
        """Writes a unit's files; False when there is no room for it.

        Raises:
            OSError: the file system does not let it; nothing is left behind.
        """
        for _ in range(3):
            written = self._write(unit)
            if written is not None:
                return written
        return False

    def _write(self, unit: Unit) -> bool | None:
        """Writes a unit's files; None when another thread changed the chain that it was to build on."""
        with self.ledger.footing(unit.tokens, unit.space) as footing:
            with self.lock:
                match = self.match(unit.tokens, unit.space)
                if any(item.lineage == unit.lineage for item in match.checkpoints(unit.position)):
                    return True
                self.ledger.missing_spans(footing, unit.spans)  # what is there stays while it is written
            contents = self._contents(unit, footing.shared(unit.spans))
            need = sum(map(len, contents.values()))
            if not self._claim(need):
                return False
            written: list[StoredFile] = []
            entered = False
            try:
                folder = self._made_folder(unit.space)
                for name, data in contents.items():
                    files.write(folder / name, data)
                    written.append(StoredFile(folder / name, len(data)))
                with self.lock:
                    entered = self._enter(unit, footing, written, need)
            finally:
                if not entered:
                    with self.lock:
                        if footing in self.ledger.chains.footings:  # not in books that started over meanwhile
                            self.ledger.reserved_bytes -= need
                    self._discard(written)
        if not entered:
            return None
        self.sweep()
        return True

    def _contents(self, unit: Unit, chain: list[KVSegment]) -> dict[str, bytes]:
        """The files of a unit by name, its state last; those of `chain` are there already."""
        packing = Packing(self.seal)
        names = [_file(segment.payload).path.name for segment in chain]
        contents: dict[str, bytes] = {}
        for span in unit.spans[len(chain) :]:
            name, contents[name] = packing.kv(unit.kv[span], span, unit.space)
            names.append(name)
        name, contents[name] = packing.state(unit, names)
        return contents

    def _enter(self, unit: Unit, footing: Footing, written: list[StoredFile], need: int) -> bool:
        """Puts written files in the books, which is what `need` bytes were reserved for; False when another thread
        was faster with some of them.
        """
        missing = self.ledger.missing_spans(footing, unit.spans)
        if len(missing) != len(written) - 1:
            return False
        new = dict(zip(missing, written, strict=False))
        filed = replace(unit, state=written[-1], kv=new)
        self.ledger.reserved_bytes -= need
        stored = self.put(filed, None, footing, urgent=True)
        if stored is None or stored.state is not written[-1]:
            self.ledger.reserved_bytes += need
            return False
        return True

    def _claim(self, need: int) -> bool:
        """Reserves room for files about to be written, deleting others first."""
        with self.lock:
            again, self._stuck = self._stuck, []
            while self._aside and self._over(need - sum(item.nbytes for item in again)):
                again.append(self._aside.pop(0))
            self._give_up(again)
        self.sweep()
        with self.lock:
            if self._stuck and self._over(need):
                return False  # evicting would only lose more: the folder does not let go of anything
            granted = self.ledger.make_room(need).granted
            self.ledger.reserved_bytes += need if granted else 0
        self.sweep()
        with self.lock:
            if granted and self._stuck and self._over(0):
                self.ledger.reserved_bytes -= need
                return False
            return granted

    def _over(self, need: int) -> bool:
        return self.max_memory is not None and self.used_bytes + self.reserved_bytes + need > self.max_memory

    def folder_of(self, space: str) -> Path:
        """Where the files of a space lie: a folder of its own, named by a hash."""
        return self.folder / hashlib.blake2b(space.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _made_folder(self, space: str) -> Path:
        folder = self.folder_of(space)
        if files.kind_of(folder) not in (None, "a folder"):
            raise OSError(f"{folder} is {files.kind_of(folder)}, not a folder that was made here")
        return files.private_folder(folder)

    # -- out of the folder for good -----------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Deletes the files of what was evicted."""
        self.sweep()

    def sweep(self) -> None:
        """Deletes the files of what was evicted; called without the lock.

        When it returns, all that left the books before it was called is gone, whichever thread deletes it.
        """
        with self._sweeping:
            with self.lock:
                doomed, self.ledger.freed = [_file(payload) for payload in self.ledger.freed or ()], []
                self.ledger.trim()
            for item in doomed:
                self._unlink(item)

    def _discard(self, doomed: list[StoredFile]) -> None:
        with self.lock:
            self.ledger.freed = [*(self.ledger.freed or ()), *doomed]
        self.sweep()

    def _give_up(self, counted: list[StoredFile]) -> None:
        """Dooms files that were counted without being in the books."""
        self.ledger.reserved_bytes -= sum(item.nbytes for item in counted)
        self.ledger.freed = [*(self.ledger.freed or ()), *counted]

    def _unlink(self, item: StoredFile) -> None:
        try:
            files.remove(item.path)
        except DamagedFileError as error:
            if item.path not in self._named:
                self.warn("foreign", f"{printable(str(error))}, and stays")
        except OSError as error:
            with self.lock:
                self.ledger.reserved_bytes += item.nbytes
                self._stuck.append(item)
            self.warn("remove", f"{item.path} could not be deleted, and still counts: {error}")

    def clear(self, space: str | None = None) -> None:
        """Deletes what is stored of one space, or everything."""
        super().clear(space)
        with self.lock:
            folder = None if space is None else self.folder_of(space)
            gone = [item for item in self._aside if folder in (None, item.path.parent)]
            self._aside = [item for item in self._aside if item not in gone]
            self._give_up(gone)
        self.sweep()

    def drop(self, space: str | None) -> None:
        """Nothing: a file names the weights it belongs to by their content, and they may come back."""

    def resize(self, max_memory: int | None, demote: Demote | None = None) -> None:
        """Changes the budget and deletes files down to it."""
        super().resize(max_memory, demote)
        self.sweep()

    # -- out of the folder --------------------------------------------------------------------------------------------

    def fetch(self, unit: Unit, spans: list[Span]) -> Unit | None:
        """Reads and proves a unit; drops it, with one warning a kind, when that fails."""
        if self.reader is None:
            return None
        kv = {span: _file(payload) for span, payload in unit.kv.items()}
        stored = UnitFiles(unit.space, unit.tokens[: unit.position], unit.lineage, unit.final, _file(unit.state), kv)
        try:
            read = UnitReader(self.reader, self.seal, self._expected.get(unit.space)).read(stored, spans)
        except DamagedFileError as error:
            culprit = next(file for file in (stored.state, *kv.values()) if file.path == error.path)
            self._named.add(culprit.path)
            self.warn("read", f"A stored state is lost, as {culprit.path} cannot be used: {printable(str(error))}")
            self.lose(culprit)
            return None
        files.mark_used(stored.state.path)  # the next start keeps the order of use
        return replace(unit, state=read.state, kv=read.kv)

    def expect(self, space: str, like: Expected) -> None:
        """Learns what the states of a space must be; as long as `like` lives, none that is not is brought up."""
        self._expected[space] = like

    def lose(self, culprit: StoredFile) -> None:
        """Drops every checkpoint that needs a file, and the file."""
        self.ledger.lose(culprit)
        self.sweep()

    def load(self) -> None:
        """Finds the units of all spaces again, least recently used first; deletes what nothing needs.

        Raises:
            OSError: the folder cannot be listed.
        """
        folders = [found for path in sorted(self.folder.iterdir()) if (found := self._found(path)) is not None]
        for unit in sorted((unit for found in folders for unit in found.units), key=lambda unit: unit.used):
            self._load_unit(unit)
        with self.lock:
            self.ledger.freed, used = [], {id(payload) for payload in self.ledger.payloads()}
            self.ledger.trim()
        for found in folders:
            unused = [item for item in found.stored.values() if id(item) not in used and self._provable(item.path)]
            # What is kept for another key or version may need any of them.
            kept = any(isinstance(reason, RefusedFileError) for reason in found.lost.values())
            self._discard([*found.unfinished, *([] if kept else unused)])
            for item in unused if kept else ():
                self._put_aside(item)

    def _found(self, path: Path) -> Found | None:
        """What lies in one folder, if it is that of a space."""
        if not _SPACE_FOLDER.fullmatch(path.name):
            return None
        try:
            if files.kind_of(path) != "a folder":
                raise DamagedFileError(f"it is {files.kind_of(path)}, not a folder that was made here")
            found = find(path, self.seal)
        except (OSError, DamagedFileError) as error:
            self._lost(path, error)
            return None
        for unit in list(found.units):
            why = "" if self.folder_of(unit.space) == path else "it lies in the folder of another model or namespace"
            why = why or ("" if unit.lineage is not None else "it was written before states named what made them")
            if why:
                found.units.remove(unit)
                found.lost[unit.state.path] = DamagedFileError(why)
        for lost, reason in found.lost.items():
            self._lost(lost, reason)
        return found

    def _provable(self, path: Path) -> bool:
        """Whether a file is ours; else it is left alone, and named like all that looks like a unit and is none."""
        try:
            if files.is_ours(path):
                return True
            self._lost(path, DamagedFileError("it is not a file that was written here"))
        except OSError as error:
            self._lost(path, error)
        return False

    def _load_unit(self, unit: UnitFiles) -> None:
        spans = list(unit.kv)
        chain = shared_chain(self.match(unit.tokens, unit.space), spans)
        # Else it is left over from before its keys and values were written anew.
        if all(segment.payload is unit.kv[segment.span] for segment in chain):
            self.put(unit.unit(), urgent=True)

    def _put_aside(self, item: StoredFile) -> None:
        """Keeps a file that is not for this store, as long as there is room."""
        if self._over(item.nbytes):
            self._discard([item])
            return
        with self.lock:
            self.ledger.reserved_bytes += item.nbytes
            self._aside.append(item)

    def _lost(self, path: Path, reason: Exception) -> None:
        self._named.add(path)
        self.warn(
            "load", f"A stored state is lost, as {printable(str(path))} cannot be used: {printable(str(reason))}"
        )


def _file(payload: Payload) -> StoredFile:
    assert isinstance(payload, StoredFile)
    return payload
