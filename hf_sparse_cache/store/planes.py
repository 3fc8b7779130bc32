"""Files without loss in fewer bytes: first bytes of all numbers together, second ones, and so on, each through zstd.

The exponents of neighbouring numbers are alike and their last bits are not, so the planes of exponents shrink to a
third and the others are stored as they are. A packed file is a safetensors file, too: its record and its tokens lie in
it as in a plain one, so that a folder is read without unpacking anything, and `planes` holds what `layout` describes.

Whoever can write a folder can describe anything: every number is held against the bytes that are there, and against
what the file is for, before anything of its size is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import safetensors.numpy
import zstandard
from numpy.typing import NDArray

from ..errors import DamagedFileError
from .headers import Header, Plain, canonical, is_count, parse_json, tokens_from
from .slabs import memory


LEVEL = 1
MOST_TIMES = 64  # its own bytes that a file unpacks to; one that would shrink further is stored as it is
_MOST_LAYOUT_BYTES = 2**24
_MOST_WINDOW_BYTES = 2**24  # which zstd may take for itself; this level writes a fraction of it
_LEAST_BYTES = 1024  # a file of less is not worth it
_WORTH = 0.97  # of its bytes: what does not shrink to as much is stored as it is
_NUMBERS = 2**20  # that are packed together: their planes stay in a core's cache
_TRIED_BYTES = 2**14  # of a plane, to see whether it shrinks at all
_PACKED = "packed"  # the name of what marks such a file, in its metadata
_VERSION = "planes of zstd"
_ITEM_BYTES = {"64": 8, "32": 4, "16": 2}  # by the end of a type's name; all others are bytes
_Bytes = NDArray[np.uint8]


def at_once(end: int) -> None:
    """Bytes that need not be waited for."""


def packed(plain: bytes) -> bytes:
    """A plain file in fewer bytes; itself where it does not shrink.

    Args:
        plain: a whole safetensors file with a tensor `tokens`, as `headers.canonical` gives it.
    """
    header = Header.parse(plain, len(plain))
    if len(plain) < _LEAST_BYTES:
        return plain
    begin, end = header.place("tokens", "I32", 4)
    named = sorted(header.entries.items(), key=lambda item: item[1]["data_offsets"])
    tensors: dict[str, Any] = {}
    runs: list[tuple[int, list[_Bytes]]] = []
    at = 0
    for name, entry in named:
        first, last = entry["data_offsets"]
        if name == "tokens":
            continue
        tensors[name] = [entry["dtype"], entry["shape"], at, at + last - first]
        at += last - first
        size = _ITEM_BYTES.get(entry["dtype"][-2:], 1)
        data = np.frombuffer(plain, np.uint8, last - first, header.start + first)
        if not runs or runs[-1][0] != size:
            runs.append((size, []))
        runs[-1][1].append(data)
    pieces, parts = _shrunk(runs)
    layout = json.dumps({"tensors": tensors, "pieces": pieces}, separators=(",", ":")).encode()
    saved = safetensors.numpy.save(
        {
            "tokens": tokens_from(plain[begin:end]),
            "layout": np.frombuffer(_compressor().compress(layout), np.uint8),
            "planes": np.concatenate(parts) if parts else np.zeros(0, np.uint8),
        },
        {**header.metadata, _PACKED: _VERSION},
    )
    written = canonical(saved)
    small = len(written) <= _WORTH * len(plain) and len(layout) <= _MOST_LAYOUT_BYTES
    return written if small and len(plain) <= MOST_TIMES * len(written) else plain


def _shrunk(runs: list[tuple[int, list[_Bytes]]]) -> tuple[list[Any], list[_Bytes]]:
    """Pieces as `[bytes of a number, numbers, strips]`, and the bytes of all strips one after the other.

    A strip is `[its width, its bytes, 1 where they are packed]`: the same few bytes of every number of the piece.
    """
    pieces, parts = [], []
    compressor = _compressor()
    for size, data in runs:
        whole = np.concatenate(data).reshape(-1, size)
        for start in range(0, len(whole), _NUMBERS):
            numbers = whole[start : start + _NUMBERS]
            planes = [np.ascontiguousarray(numbers[:, byte]) for byte in range(size)]
            found = [_squeezed(plane, compressor) for plane in planes]
            strips = []
            byte = 0
            while byte < size:
                small, width = found[byte], _raw_width(found, byte)
                whole_strip = np.ascontiguousarray(numbers[:, byte : byte + width]).reshape(-1)
                strip = whole_strip if small is None else small
                strips.append([width, len(strip), int(small is not None)])
                parts.append(strip)
                byte += width
            pieces.append([size, len(numbers), strips])
    return pieces, parts


def _raw_width(found: list[_Bytes | None], byte: int) -> int:
    """Planes from `byte` on that do not shrink, as one strip: the wider it is, the faster it is read."""
    width = 1
    while 2 * width <= len(found) and not byte % (2 * width) and not any(map(_shrank, found[byte : byte + 2 * width])):
        width *= 2
    return width


def _shrank(small: _Bytes | None) -> bool:
    return small is not None


def _squeezed(plane: _Bytes, compressor: zstandard.ZstdCompressor) -> _Bytes | None:
    """A plane through zstd; None where it does not shrink."""
    tried = plane[:_TRIED_BYTES]
    if len(compressor.compress(tried.data)) > _WORTH * len(tried):
        return None
    small = compressor.compress(plane.data)
    return np.frombuffer(small, np.uint8) if len(small) <= _WORTH * len(plane) else None


def unpacked(data: Plain, most: int | None = None, there: Callable[[int], object] = at_once) -> Plain:
    """The plain file in the bytes of a packed one, in memory of its own that nobody else has; a plain one itself.

    Args:
        most: bytes of what it is for.
        there: waits until that many of the bytes have come; the header is there.

    Raises:
        DamagedFileError: it is not what `packed` makes, or would take more; says what is wrong with it.
    """
    header = Header.parse(data, len(data))
    if _PACKED not in header.metadata:
        there(len(data))
        return data
    if header.metadata[_PACKED] != _VERSION:
        raise DamagedFileError(f"it is packed as {header.metadata[_PACKED][:40]!r}, and {_VERSION!r} is read")
    for name, dtype, item_bytes in (("layout", "U8", 1), ("tokens", "I32", 4)):
        there(header.place(name, dtype, item_bytes)[1])
    layout = parse_json(_frame(_part(data, header, "layout", "U8", 1), None, _MOST_LAYOUT_BYTES))
    if not isinstance(layout, dict):
        raise DamagedFileError("its layout is no object")
    tokens = _part(data, header, "tokens", "I32", 4)
    total = _size_of(layout)
    limit = MOST_TIMES * len(data) if most is None else min(most, MOST_TIMES * len(data))
    if total + len(tokens) > limit:
        raise DamagedFileError(f"it would unpack to {total + len(tokens)} bytes, and may to {limit} at most")
    text = _header(header, layout["tensors"], total, len(tokens))
    found = memory(len(text) + total + len(tokens))
    found[: len(text)] = np.frombuffer(text, np.uint8)
    begin, end = header.place("planes", "U8", 1)
    planes = memoryview(data)[begin:end]
    _fill(found[len(text) : len(text) + total], layout["pieces"], planes, lambda upto: there(begin + upto))
    found[len(text) + total :] = np.frombuffer(tokens, np.uint8)
    return found.data


def _part(data: Plain, header: Header, name: str, dtype: str, item_bytes: int) -> memoryview:
    begin, end = header.place(name, dtype, item_bytes)
    return memoryview(data)[begin:end]


def _size_of(layout: dict[str, Any]) -> int:
    """Bytes of all tensors that a layout describes, each number of which was looked at."""
    tensors, pieces = layout.get("tensors"), layout.get("pieces")
    if not isinstance(tensors, dict) or not isinstance(pieces, list):
        raise DamagedFileError("its layout names no tensors and pieces")
    total = 0
    for piece in pieces:
        if (
            not isinstance(piece, list)
            or len(piece) != 3
            or not all(map(is_count, piece[:2]))
            or piece[0] not in (1, 2, 4, 8)
        ):
            raise DamagedFileError(f"its layout has a piece that is none: {str(piece)[:40]}")
        size, count, strips = piece
        if count > _NUMBERS or not isinstance(strips, list) or not all(map(_is_strip, strips)):
            raise DamagedFileError(f"its layout has strips that are none: {str(piece)[:40]}")
        if sum(width for width, _, _ in strips) != size or any(
            at % width for at, (width, _, _) in zip(np.cumsum([0] + [s[0] for s in strips]), strips, strict=False)
        ):
            raise DamagedFileError(f"the strips of its layout do not make numbers of {size} bytes")
        total += size * count
    ends = sorted(entry[2:] for entry in tensors.values() if isinstance(entry, list) and len(entry) == 4)
    counted = len(ends) == len(tensors) and all(is_count(number) for pair in ends for number in pair)
    if not counted or "tokens" in tensors or any(one[1] != other[0] for one, other in pairwise(ends)):
        raise DamagedFileError("its layout does not say where its tensors lie")
    if (ends[0][0] if ends else 0) != 0 or (ends[-1][1] if ends else 0) != total:
        raise DamagedFileError("the pieces of its layout are not the bytes of its tensors")
    return total


def _is_strip(strip: Any) -> bool:
    return isinstance(strip, list) and len(strip) == 3 and strip[0] in (1, 2, 4, 8) and all(map(is_count, strip))


def _header(outer: Header, tensors: dict[str, Any], total: int, token_bytes: int) -> bytes:
    """The beginning of the plain file: its tokens lie behind all else."""
    entries: dict[str, Any] = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for name, (dtype, shape, begin, end) in tensors.items()
    }
    place = [total, total + token_bytes]
    entries["tokens"] = {"dtype": "I32", "shape": [token_bytes // 4], "data_offsets": place}
    entries["__metadata__"] = {name: text for name, text in outer.metadata.items() if name != _PACKED}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _fill(into: _Bytes, pieces: list[Any], planes: memoryview, there: Callable[[int], object]) -> None:
    """Puts the strips of all pieces where they belong."""
    decompressor = _decompressor()
    at = done = 0
    for size, count, strips in pieces:
        numbers, byte = into[done : done + size * count].reshape(count, size), 0
        for width, length, small in strips:
            there(at + length)
            strip = planes[at : at + length]
            if len(strip) != length:
                raise DamagedFileError("its layout has more bytes than it has itself")
            if small:
                strip = memoryview(_frame(strip, count * width, count * width, decompressor))
            if len(strip) != count * width:
                raise DamagedFileError(f"a strip has {len(strip)} bytes, and must have {count * width}")
            wide = np.dtype(f"u{width}")
            numbers.view(wide)[:, byte // width] = np.frombuffer(strip, wide)
            at, byte = at + length, byte + width
        done += size * count
    if at != len(planes):
        raise DamagedFileError(f"it has {len(planes)} bytes of planes, its layout says {at}")


def _frame(
    data: memoryview, exactly: int | None, most: int, decompressor: zstandard.ZstdDecompressor | None = None
) -> bytes:
    """What a frame of zstd holds, whose size stands at its beginning and is looked at before anything is made.

    Raises:
        DamagedFileError: it is none, holds more, or does not say how much.
    """
    try:
        size = zstandard.frame_content_size(data)
        if size < 0 or size > most or (exactly is not None and size != exactly):
            said = "nothing of its size" if size < 0 else f"{size} bytes"
            raise DamagedFileError(f"a packed part says {said}, and must have {exactly or f'at most {most}'}")
        found: bytes = (decompressor or _decompressor()).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedFileError(f"a packed part cannot be read: {error}") from error
    if len(found) != size:
        raise DamagedFileError(f"a packed part has {len(found)} bytes, and says {size}")
    return found


def _compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=LEVEL)


def _decompressor() -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW_BYTES)
