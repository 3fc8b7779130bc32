"""The disk tier: one file a unit in one private folder, found again at the next start.

A state's file names the KV files it builds on by their checksums, and every file is proved when it is read, so nothing
damaged, lost or swapped is ever used. Files are written and read with no lock held. Whatever the file system does, the
store goes on without the unit: it is never worth more than a prefill.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..planning.cuts import Tokens
from . import files
from .eviction import LRU
from .ledger import Ledger
from .tier import Demote, Tier
from .tree import Checkpoint, KVSegment, Payload
from .unit import Span, Unit, movable, shared_chain


FORMAT = 1  # of the files; another number is not read
NO_TOKENS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class StoredFile:
    """The payload of this tier: a file and its size."""

    path: Path
    nbytes: int


class DiskTier(Tier):
    """Units whose payloads are files. Build it with `open`."""

    name = "disk"
    durable = True

    def __init__(self, folder: Path, max_memory: int | None, read_only: bool = False) -> None:
        super().__init__(Ledger(max_memory, LRU()))
        self.folder = folder
        self.read_only = read_only  # a saved cache is not changed by reading it
        self.ledger.freed = []
        self._stuck: list[StoredFile] = []  # files that could not be deleted: they still take their room
        self._lock_file: int | None = None

    @classmethod
    def open(cls, folder: Path, max_memory: int | None) -> DiskTier | None:
        """Takes over a folder with what it holds; None, with one warning, when it cannot be used."""
        tier = cls(folder, max_memory)
        try:
            files.private_folder(folder)
            tier._lock_file = files.take_over(folder)
            if tier._lock_file is None:
                tier.warn("open", f"The disk tier {folder} is in use by another process, so this one has none")
                return None
            for space_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
                tier.load(space_folder)
        except OSError as error:
            tier.warn("open", f"The disk tier {folder} cannot be used: {error}")
            return None
        return tier

    def after_fork(self) -> None:
        """The folder stays the parent's."""
        super().after_fork()
        self.ledger.freed = []
        self.release()

    def release(self) -> None:
        """Lets another process take the folder over."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    # -- into the folder ----------------------------------------------------------------------------------------------

    def accept(self, unit: Unit, demote: Demote | None = None) -> bool:
        """Writes a unit; False, with one warning a kind, when the file system does not let it."""
        try:
            return self.write(unit)
        except (OSError, MemoryError, RuntimeError) as error:  # of memory, torch says RuntimeError
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
        with ExitStack() as stack:
            with self.lock:
                match = self.match(unit.tokens, unit.space)
                if any(item.position == unit.position for item in match.checkpoints(unit.position)):
                    return True
                chain = shared_chain(match, unit.spans)
                stack.enter_context(self.ledger.holding(chain[-1] if chain else None))
            contents = _contents(unit, chain)
            need = sum(map(len, contents.values()))
            if not self._claim(need):
                return False
            written: list[StoredFile] = []
            entered = False
            try:
                folder = files.private_folder(self.folder_of(unit.space))
                for name, data in contents.items():
                    files.write(folder / name, data)
                    written.append(StoredFile(folder / name, len(data)))
                with self.lock:
                    self.ledger.reserved_bytes -= need
                    need = 0
                    entered = self._enter(unit, chain, written)
            finally:
                if not entered:
                    with self.lock:
                        self.ledger.reserved_bytes -= need
                    self._unlink(written)
        if not entered:
            return None
        self.sweep()
        return True

    def _enter(self, unit: Unit, chain: list[KVSegment], written: list[StoredFile]) -> bool:
        """Puts written files in the books; False when the chain that they build on is no longer as it was."""
        if len(shared_chain(self.match(unit.tokens, unit.space), unit.spans)) != len(chain):
            return False
        new = dict(zip(unit.spans[len(chain) :], written, strict=False))
        filed = Unit(unit.space, unit.tokens, unit.position, written[-1], unit.spans, new, unit.hits)
        stored = self.put(filed, urgent=True)
        return stored is not None and stored.state is written[-1]

    def _claim(self, need: int) -> bool:
        """Reserves room for files about to be written, deleting others first."""
        with self.lock:
            again, self._stuck = self._stuck, []
            self.ledger.reserved_bytes -= sum(item.nbytes for item in again)
        self._unlink([*again, *self._taken_out()])
        with self.lock:
            if self._stuck and self._over(need):
                return False  # evicting would only lose more: the folder does not let go of anything
            if not self.ledger.make_room(need).granted:
                return False
            self.ledger.reserved_bytes += need
        self.sweep()
        with self.lock:
            if not (self._stuck and self._over(0)):
                return True
            self.ledger.reserved_bytes -= need
            return False

    def _over(self, need: int) -> bool:
        return self.max_memory is not None and self.used_bytes + self.reserved_bytes + need > self.max_memory

    def folder_of(self, space: str) -> Path:
        """Where the files of a space lie: a folder of its own, named by a hash."""
        return self.folder / hashlib.blake2b(space.encode(), digest_size=16).hexdigest()

    def _taken_out(self) -> list[StoredFile]:
        """The files of what was evicted, which nothing knows any more."""
        with self.lock:
            trash, self.ledger.freed = [_file(payload) for payload in self.ledger.freed or ()], []
            self.ledger.trim()
            return trash

    def _unlink(self, trash: list[StoredFile]) -> None:
        for item in () if self.read_only else trash:
            try:
                files.remove(item.path)
            except OSError as error:
                with self.lock:
                    self.ledger.reserved_bytes += item.nbytes
                    self._stuck.append(item)
                self.warn("remove", f"{item.path} could not be deleted, and still counts: {error}")

    def sweep(self) -> None:
        """Deletes the files of what was evicted; called without the lock."""
        self._unlink(self._taken_out())

    def clear(self, space: str | None = None) -> None:
        """Deletes what is stored of one space, or everything."""
        super().clear(space)
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
        culprit = _file(unit.state)
        chain = {span: _file(payload) for span, payload in unit.kv.items()}
        try:
            data = files.read(culprit.path)
            record, tokens = files.record_of(data)
            expected = [[*span, file.path.name] for span, file in chain.items()]
            same = record["space"] == unit.space and record["kv"] == expected and np.array_equal(tokens, unit.tokens)
            if not same:
                raise files.DamagedFileError(f"{culprit.path} belongs to another prompt than its folder says")
            state, kv = self.reader(data), {}
            for span in spans:
                culprit = chain[span]
                kv[span] = self.reader(files.read(culprit.path))
        except (OSError, ValueError, KeyError) as error:
            self.warn("read", f"A stored state is lost, as {culprit.path} cannot be used: {error}")
            self.lose(culprit)
            return None
        with suppress(OSError):
            os.utime(_file(unit.state).path)  # the next start keeps the order of use
        return Unit(unit.space, unit.tokens, unit.position, state, unit.spans, kv, unit.hits)

    def lose(self, culprit: StoredFile) -> None:
        """Drops every checkpoint that needs a file, and the file."""
        self.ledger.lose(culprit)
        self.sweep()

    def load(self, folder: Path) -> list[Checkpoint]:
        """Finds the units of one folder again, least recently used first; deletes what nothing needs.

        Raises:
            OSError: the folder cannot be listed.
        """
        sizes, leftovers = files.units_in(folder)
        self._unlink([StoredFile(path, 0) for path in leftovers])  # of a process that was killed
        found: list[tuple[float, str, dict[str, Any], Tokens]] = []
        for name in (name for name in sizes if name.startswith("state-")):
            path = folder / name
            try:
                record, tokens = files.peek(path)
                if record["format"] != FORMAT or record["position"] != len(tokens) or len(tokens) == 0:
                    raise files.DamagedFileError(f"it has format {record['format']}, not {FORMAT}, or lacks tokens")
                if any(kv_name not in sizes for _, _, kv_name in record["kv"]):
                    raise files.DamagedFileError("keys and values it builds on are gone")
                found.append((path.stat().st_mtime, name, record, tokens))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.warn("load", f"A stored state is lost, as {path} cannot be used: {error}")
        payloads = {name: StoredFile(folder / name, size) for name, size in sizes.items()}
        loaded: list[Checkpoint | None] = []
        for _, name, record, tokens in sorted(found, key=lambda item: item[:2]):
            spans = [(start, end) for start, end, _ in record["kv"]]
            new = {(start, end): payloads[kv_name] for start, end, kv_name in record["kv"]}
            chain = shared_chain(self.match(tokens, record["space"]), spans)
            if any(segment.payload is not new[segment.start, segment.end] for segment in chain):
                continue  # left over from before its keys and values were written anew
            unit = Unit(record["space"], tokens, len(tokens), payloads[name], spans, new)
            loaded.append(self.put(unit, urgent=True))
        self._taken_out()
        used = {id(payload) for payload in self.ledger.payloads()}
        self._unlink([payload for payload in payloads.values() if id(payload) not in used])
        return [item for item in loaded if item is not None and id(item.state) in used]


def _contents(unit: Unit, chain: list[KVSegment]) -> dict[str, bytes]:
    """The files of a unit by name, its state last; those of `chain` are there already."""
    spans = unit.spans
    names = [_file(segment.payload).path.name for segment in chain]
    contents: dict[str, bytes] = {}
    for span in spans[len(chain) :]:
        data = movable(unit.kv[span]).to_bytes(json.dumps({"format": FORMAT, "span": span}), NO_TOKENS)
        names.append(files.new_name("kv", data))
        contents[names[-1]] = data
    kv = [[*span, name] for span, name in zip(spans, names, strict=True)]
    record = {"format": FORMAT, "space": unit.space, "position": unit.position, "kv": kv}
    data = movable(unit.state).to_bytes(json.dumps(record), unit.tokens)
    contents[files.new_name("state", data)] = data
    return contents


def _file(payload: Payload) -> StoredFile:
    assert isinstance(payload, StoredFile)
    return payload
