"""What a file says of itself: JSON and safetensors headers from files that anybody may have written.

Every number is bounded by the file's own size before anything of that size is made, and whatever is wrong is a
`DamagedFileError`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import jsontext
from ..errors import DamagedFileError
from ..planning.cuts import Tokens
from ..planning.lineage import Lineage, Span


MAX_HEADER_BYTES = 100_000_000  # as safetensors itself has it
MAX_POSITION = 2**26
Plain = bytes | memoryview  # a file as it was written, or as it was unpacked into memory that nobody else has


class RefusedFileError(DamagedFileError):
    """A file may be whole, and is not to be read with this key, or by this version."""


def parse_json(data: Plain | str, *, constants: bool = False) -> Any:
    """Reads strict JSON (see `jsontext`), of text that UTF-8 can hold.

    Args:
        constants: whether NaN and infinities are read as well.

    Raises:
        DamagedFileError: it is anything else.
    """
    try:
        text = data if isinstance(data, str) else bytes(data)
        value = jsontext.parse(text, "it", constants=constants)
        if b"\\u" in (text.encode() if isinstance(text, str) else text):
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair has no UTF-8
    except ValueError as error:
        raise DamagedFileError(str(error).removesuffix("; mend it")) from error
    return value


def is_count(value: object, most: int = 2**62) -> bool:
    """Whether a value from JSON is a whole number from 0 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        entries: dtype, shape and place of each tensor, by name.
        metadata: strings by name.
        start: where the tensors begin in the file.
    """

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    @classmethod
    def parse(cls, head: Plain, size: int, whole: bool = True) -> Header:
        """Reads the header at the beginning of a file of `size` bytes.

        Args:
            whole: whether the file must be of the size that its header promises.

        Raises:
            DamagedFileError: it is none, or promises another file than this one.
        """
        length = header_bytes(head, size)
        value = parse_json(head[8 : 8 + length])
        if not isinstance(value, dict):
            raise DamagedFileError("its header is no object")
        metadata = value.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
            raise DamagedFileError("its header's metadata are not strings")
        start = 8 + length
        end = max((_end_of(name, entry) for name, entry in value.items()), default=0)
        if whole and start + end != size:
            raise DamagedFileError(f"it has {size} bytes, its header promises {start + end}")
        return cls(value, metadata, start)

    def place(self, name: str, dtype: str, item_bytes: int) -> tuple[int, int]:
        """Where the bytes of a one-dimensional tensor begin and end in the file.

        Raises:
            DamagedFileError: there is no such tensor, or it is of another kind.
        """
        entry = self.entries.get(name)
        if entry is None or entry.get("dtype") != dtype:
            raise DamagedFileError(f"its header names no tensor {name!r} of type {dtype}")
        begin, end = entry["data_offsets"]
        if entry.get("shape") != [(end - begin) // item_bytes] or (end - begin) % item_bytes:
            raise DamagedFileError(f"the shape of its tensor {name!r} is not its size")
        return self.start + begin, self.start + end

    def record(self) -> dict[str, Any]:
        """What the file says it is.

        Raises:
            DamagedFileError: nothing of this library.
        """
        record = parse_json(self.metadata["unit"]) if "unit" in self.metadata else None
        if not isinstance(record, dict) or not is_count(record.get("format")):
            raise DamagedFileError("its header does not describe a unit")
        return record


def header_bytes(head: Plain, size: int) -> int:
    """The length of a header from the first 8 bytes of a file.

    Raises:
        DamagedFileError: no file of `size` bytes has such a header.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise DamagedFileError(f"its first 8 bytes promise a header of {length} bytes, in a file of {size}")
    return length


def _end_of(name: str, entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(is_count, offsets))
        or offsets[0] > offsets[1]
    ):
        raise DamagedFileError(f"its header gives no place for the tensor {name[:40]!r}")
    return int(offsets[1])


def tokens_from(data: Plain) -> Tokens:
    """Token ids from the bytes of a tensor `tokens`, int32."""
    return np.frombuffer(data, dtype="<i4").astype(np.int32)


def canonical(data: bytes) -> bytes:
    """A safetensors file with its header in one order: equal content gives equal bytes."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]))


@dataclass(frozen=True)
class StateRecord:
    """What the file of a state says: whose it is, what made it, and which files hold the keys and values below it.

    Attributes:
        lineage: the segments that made it; None where a file of format 1 does not say.
        final: whether it keeps the logits of the last token of a prompt.
        kv: each span and its file's name, gapless from 0 to the position, or none.
    """

    format: int
    space: str
    tokens: Tokens
    lineage: Lineage | None
    final: bool
    kv: tuple[tuple[Span, str], ...]

    @classmethod
    def parse(cls, record: dict[str, Any], tokens: Tokens) -> StateRecord:
        """Checks a record against the tokens that stand beside it.

        Raises:
            DamagedFileError: a field is missing or cannot be.
        """
        space, position, kv = record.get("space"), record.get("position"), record.get("kv")
        if not isinstance(space, str) or not is_count(position, MAX_POSITION) or not isinstance(kv, list):
            raise DamagedFileError("its record lacks its space, its position or its keys and values")
        if position != len(tokens) or not len(tokens):
            raise DamagedFileError(f"it says position {position} and holds {len(tokens)} tokens")
        spans, names = _spans(kv)
        if spans and spans[-1].end != position:
            raise DamagedFileError(f"its keys and values end at {spans[-1].end}, not at its position {position}")
        lineage = _lineage(record, spans)
        if lineage is not None and (lineage.end != position or (spans and lineage.unrounded != Lineage.of(spans))):
            raise DamagedFileError("its segments are not those of its keys and values, or do not lead to its position")
        final = record.get("final", False)
        if not isinstance(final, bool):
            raise DamagedFileError("it does not say whether it stands at the end of a prompt")
        return cls(record["format"], space, tokens, lineage, final, tuple(zip(spans, names, strict=True)))


def _spans(kv: list[Any]) -> tuple[list[Span], list[str]]:
    """Spans and file names from a record, gapless from 0 on."""
    spans: list[Span] = []
    for item in kv:
        end = spans[-1].end if spans else 0
        name = item[-1] if isinstance(item, list) and len(item) >= 3 else None
        if not isinstance(name, str) or not is_count(item[0]) or item[0] != end:
            raise DamagedFileError(f"its keys and values are not gapless at {end}")
        rounded = not end
        for forward in item[1:-1]:
            rounds = forward == end and not rounded
            if type(forward) is not int or not (rounds or end < abs(forward) <= MAX_POSITION):
                raise DamagedFileError(f"its keys and values are not gapless at {end}")
            end, rounded = abs(forward), rounds
        if end == item[0] or rounded:
            raise DamagedFileError(f"its keys and values are not gapless at {end}")
        spans.append(Span(item[:-1]))
    return spans, [item[-1] for item in kv]


def _lineage(record: dict[str, Any], spans: list[Span]) -> Lineage | None:
    if record["format"] == 1:
        return Lineage.of(spans) if spans else None
    try:
        return Lineage.from_json(record.get("lineage"))
    except ValueError as error:
        raise DamagedFileError(str(error)) from error
