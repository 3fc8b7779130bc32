"""One unit as files: how it is packed, found in a folder again, and proved when it is read.

A state's file says its space and position, holds its tokens, and names the files of the keys and values below it.
Names end in checksums, so nothing damaged, lost or swapped is ever used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..errors import DamagedFileError
from ..planning.cuts import Tokens
from ..planning.lineage import Lineage, Span
from . import files, planes
from .headers import Plain, RefusedFileError, StateRecord, canonical, is_count
from .seal import Seal
from .tree import Payload
from .unit import Expected, MovablePayload, Unit, movable


FORMAT = 3  # of the files
READ_FORMATS = (1, 2, 3)  # 1 does not name the space of keys and values, and knows no key; up to 2 none is packed
NO_TOKENS = np.zeros(0, dtype=np.int32)
_FRAME_BYTES = 2**20  # of a file beyond its tensors and tokens: header, names of keys and values, encryption


@dataclass(frozen=True, eq=False)
class StoredFile:
    """A file and its size: the payload of a tier on disk."""

    path: Path
    nbytes: int


@dataclass(frozen=True)
class Packing:
    """How payloads become files: what proves them, how they are named, and whether equal ones give equal bytes."""

    seal: Seal
    name: Callable[[str, bytes, Seal], str] = files.new_name
    steady: bool = False

    def kv(self, payload: Payload, span: Span, space: str) -> tuple[str, bytes]:
        """Name and bytes of the file of one span of keys and values."""
        return self._file("kv", movable(payload).to_bytes, {"space": space, "span": list(span)}, NO_TOKENS)

    def state(self, unit: Unit, names: Sequence[str]) -> tuple[str, bytes]:
        """Name and bytes of the file of a state, which builds on the files `names`, one for each span of the unit."""
        kv = [[*span, name] for span, name in zip(unit.spans, names, strict=True)]
        about = {"space": unit.space, "position": unit.position, "lineage": unit.lineage.to_json(), "kv": kv}
        about |= {"final": True} if unit.final else {}
        return self._file("state", movable(unit.state).to_bytes, about, unit.tokens[: unit.position])

    def marks(self, prefixes: Sequence[Tokens], space: str) -> tuple[str, bytes]:
        """Name and bytes of the file of announced prefixes."""
        about = {"space": space, "lengths": [len(prefix) for prefix in prefixes]}
        return self._file("marks", _only_tokens, about, np.concatenate([NO_TOKENS, *prefixes]))

    def _file(
        self, kind: str, to_bytes: Callable[[str, Tokens], bytes], about: dict[str, Any], tokens: Tokens
    ) -> tuple[str, bytes]:
        record = {"format": FORMAT, **about, **({"keyed": self.seal.keyed} if self.seal.keyed else {})}
        plain = canonical(to_bytes(json.dumps(record), tokens))
        data = self.seal.closed(planes.packed(plain), record, tokens, self.steady)
        return self.name(kind, data, self.seal), data


def _only_tokens(record: str, tokens: Tokens) -> bytes:
    data: bytes = safetensors.numpy.save({"tokens": tokens}, {"unit": record})
    return data


@dataclass(frozen=True, eq=False)
class UnitFiles:
    """One unit on disk.

    Attributes:
        lineage: the segments that made it; None where its file is of format 1 and does not say.
        final: whether it keeps the logits of the last token of a prompt.
        kv: the file of each of its spans, from 0 upwards.
        used: when it was last used or written, in nanoseconds since the epoch.
    """

    space: str
    tokens: Tokens
    lineage: Lineage | None
    final: bool
    state: StoredFile
    kv: dict[Span, StoredFile]
    used: int = 0

    def unit(self, state: Payload | None = None, kv: Mapping[Span, Payload] | None = None) -> Unit:
        """As a unit: of the files themselves, or of what was read of them.

        Raises:
            DamagedFileError: it does not say what made it.
        """
        if self.lineage is None:
            raise DamagedFileError("it was written before states named the segments that made them")
        payloads = self.kv if kv is None else kv
        state = self.state if state is None else state
        return Unit(self.space, self.tokens, self.lineage, state, list(self.kv), payloads, final=self.final)


@dataclass(frozen=True)
class Found:
    """What of ours a folder holds.

    Attributes:
        units: least recently used first.
        stored: every file that has a unit's name, by name.
        unfinished: what a process that was killed left.
        lost: files that look like a unit's and are none that can be used, with the reason.
    """

    units: list[UnitFiles]
    stored: dict[str, StoredFile]
    unfinished: list[StoredFile]
    lost: dict[Path, Exception]


def find(folder: Path, seal: Seal) -> Found:
    """Looks for units in a folder. Only their headers and tokens are read.

    Raises:
        OSError: the folder cannot be listed.
    """
    listing = files.units_in(folder)
    stored = {name: StoredFile(folder / name, size) for name, size in listing.units.items()}
    unfinished = [StoredFile(path, size) for path, size in listing.unfinished.items()]
    odd = {path: DamagedFileError(f"it is {files.kind_of(path)} that was not written here") for path in listing.odd}
    found = Found([], stored, unfinished, {**odd})
    for name in (name for name in stored if files.is_name(name, "state")):
        try:
            found.units.append(_unit(stored[name], stored, seal))
        except (OSError, DamagedFileError) as error:
            found.lost[folder / name] = error
    found.units.sort(key=lambda unit: (unit.used, unit.state.path.name))
    return found


def _unit(state: StoredFile, stored: dict[str, StoredFile], seal: Seal) -> UnitFiles:
    record = state_record(*files.peek(state.path, seal))
    if any(not files.is_name(name, "kv") or name not in stored for _, name in record.kv):
        raise DamagedFileError("keys and values it builds on are gone")
    kv = {span: stored[name] for span, name in record.kv}
    used = state.path.stat().st_mtime_ns
    return UnitFiles(record.space, record.tokens, record.lineage, record.final, state, kv, used)


@dataclass(frozen=True)
class UnitReader:
    """Reads what `find` found.

    Attributes:
        make: a payload from the bytes of a plain file, in host memory.
        expected: what the payloads must be; None where nothing is known of them.
        fetch: the proved bytes of a file that has at most so many.
    """

    make: Callable[[Plain], MovablePayload]
    seal: Seal
    expected: Expected | None = None
    fetch: Callable[[StoredFile, int | None], Plain] | None = None

    def read(self, unit: UnitFiles, spans: Sequence[Span]) -> Unit:
        """Reads and proves a unit's state and the keys and values of some of its spans.

        Raises:
            DamagedFileError: a file, named by its `path`, cannot be used.
        """
        most = self.most(len(unit.tokens), None, unit.final)
        state = self._payload(unit.state, partial(self._state, unit), most)
        kv = {
            span: self._payload(unit.kv[span], partial(self._kv, unit.space, span), self.most(0, span))
            for span in spans
        }
        return unit.unit(state, kv)

    def _payload(self, file: StoredFile, make: Callable[[Plain], MovablePayload], most: int | None) -> MovablePayload:
        try:
            read = files.read(file.path, self.seal, most) if self.fetch is None else self.fetch(file, most)
            return make(read).moved_to("device")
        except (OSError, ValueError) as error:
            refused = DamagedFileError(str(error))
            refused.path = file.path
            raise refused from error

    def most(self, position: int, span: Span | None, final: bool = False) -> int | None:
        """Most bytes of the file of a state, or of a span's keys and values; None where nothing is expected."""
        if self.expected is None:
            return None
        expected = self.expected
        tensors = expected.state_bytes(position, final) if span is None else expected.kv_bytes(span.start, span.end)
        return tensors + _FRAME_BYTES + 256 * position

    def _state(self, unit: UnitFiles, data: Plain) -> MovablePayload:
        record = state_record(*files.record_of(data))
        named = tuple((span, file.path.name) for span, file in unit.kv.items())
        told = record.space, record.kv, record.final, record.lineage or unit.lineage
        if told != (unit.space, named, unit.final, unit.lineage) or not np.array_equal(record.tokens, unit.tokens):
            raise DamagedFileError("it belongs to another prompt than its folder says")
        payload = self.make(data)
        if self.expected is not None:
            if bool(unit.kv) != self.expected.has_kv:
                raise DamagedFileError("it has keys and values where the model has none, or none where it has them")
            self.expected.check_state(payload, len(unit.tokens), unit.final)
        return payload

    def _kv(self, space: str, span: Span, data: Plain) -> MovablePayload:
        record, _ = files.record_of(data)
        if record["format"] not in READ_FORMATS or record.get("span") != list(span):
            raise DamagedFileError(f"it holds other keys and values than those of tokens {span.start} to {span.end}")
        if record.get("space", space if record["format"] == 1 else None) != space:
            raise DamagedFileError("its keys and values belong to another model or namespace")
        payload = self.make(data)
        if self.expected is not None:
            self.expected.check_kv(payload, span.start, span.end)
        return payload


def state_record(record: dict[str, Any], tokens: Tokens) -> StateRecord:
    """Checks the record of a state's file, of any format that is read.

    Raises:
        DamagedFileError: it is none.
    """
    if record["format"] not in READ_FORMATS:
        raise RefusedFileError(f"it has format {record['format']}, and formats {READ_FORMATS} are read")
    return StateRecord.parse(record, tokens)


def read_marks(path: Path, space: str, seal: Seal, most: int | None) -> list[Tokens]:
    """The announced prefixes in a file.

    Args:
        most: bytes that their tokens may take; None for no bound.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: it is not such a file, of another space, or larger than marks can be.
    """
    # An encrypted file has the tokens as text as well.
    record, tokens = files.record_of(files.read(path, seal, None if most is None else _FRAME_BYTES + 4 * most))
    lengths = record.get("lengths")
    if record["format"] not in READ_FORMATS:
        raise RefusedFileError(f"it has format {record['format']}, and formats {READ_FORMATS} are read")
    if record.get("space") != space:
        raise DamagedFileError("its marks belong to another model or namespace")
    if not isinstance(lengths, list) or not all(map(is_count, lengths)) or sum(lengths) != len(tokens):
        raise DamagedFileError(f"its marks do not add up to its {len(tokens)} tokens")
    ends = np.cumsum(lengths).tolist()
    return [tokens[end - length : end] for length, end in zip(lengths, ends, strict=True)]
