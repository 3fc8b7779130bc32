"""Files of the disk tier and of saved caches: private, whole or absent, and checked when read.

Each file is a safetensors file of one unit. Its name ends in the checksum of its bytes, so a file proves itself; what
it is for stands in its own header, so a folder needs no index that could disagree with it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..planning.cuts import Tokens


SUFFIX = ".safetensors"
TEMPORARY = ".tmp"
# Not handed to child processes, and on Windows not translated: a state holds bytes that look like line ends.
_PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0) | getattr(os, "O_BINARY", 0)


class DamagedFileError(ValueError):
    """A file is not what its name says."""


def private_folder(path: Path) -> Path:
    """Makes a folder that only the user can open, and its parents; leaves one that exists as it is."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def take_over(folder: Path) -> int | None:
    """A descriptor that keeps other processes out of a folder until it is closed; None when one is in already."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | _PLAIN, 0o600)
    try:
        taken = _lock(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    if not taken:
        os.close(descriptor)
        return None
    return descriptor


def _lock(descriptor: int) -> bool:
    """Whether the file is ours alone now, until the descriptor is closed."""
    try:
        locking: Any = importlib.import_module("fcntl")
    except ImportError:  # on Windows
        locking = importlib.import_module("msvcrt")
        try:
            locking.locking(descriptor, locking.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True
    try:
        locking.flock(descriptor, locking.LOCK_EX | locking.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def checksum(data: bytes) -> str:
    """32 hexadecimal digits of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def new_name(kind: str, data: bytes) -> str:
    """A name no other file has, ending in the checksum of `data`."""
    return f"{kind}-{uuid.uuid4().hex[:12]}-{checksum(data)}{SUFFIX}"


def write(path: Path, data: bytes) -> None:
    """Writes a file that is there in full or not at all, also after a crash, and that only the user can read.

    Raises:
        OSError: whatever the file system says; nothing is left behind as far as it lets us clean up.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException:
        for leftover in (temporary, path):
            with suppress(OSError):
                os.unlink(leftover)
        raise


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path) -> bytes:
    """Reads a whole file and proves it by the checksum in its name.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: its bytes are not those that were written.
    """
    with open(path, "rb") as file:
        data = file.read()
    if checksum(data) != path.name.removesuffix(SUFFIX).rpartition("-")[2]:
        raise DamagedFileError(f"{path} does not match its checksum")
    return data


def units_in(folder: Path) -> tuple[dict[str, int], list[Path]]:
    """Name and size of each unit's file in a folder, and the files that a killed process left unfinished.

    Raises:
        OSError: the folder cannot be listed.
    """
    paths = sorted(folder.iterdir())
    sizes = {path.name: path.stat().st_size for path in paths if path.name.endswith(SUFFIX)}
    return sizes, [path for path in paths if path.name.endswith(TEMPORARY)]


def remove(path: Path) -> None:
    """Deletes a file; one that is gone already is fine.

    Raises:
        OSError: it is still there.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)


def record_of(data: bytes) -> tuple[dict[str, Any], Tokens]:
    """The record and the tokens in the bytes of a unit's file (see `peek`)."""
    header, start = _header(data, len(data))
    begin, end = header["tokens"]["data_offsets"]
    return _record(header), np.frombuffer(data[start + begin : start + end], dtype="<i4").astype(np.int32)


def peek(path: Path) -> tuple[dict[str, Any], Tokens]:
    """Reads only the record and the tokens of a unit's file, without proving them.

    Returns:
        What the unit says of itself, and its tokens, int32 `(position,)`; empty for a KV segment.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: it is cut short or not such a file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), size))
        header, start = _header(head, size)
        begin, end = header["tokens"]["data_offsets"]
        file.seek(start + begin)
        return _record(header), np.frombuffer(file.read(end - begin), dtype="<i4").astype(np.int32)


def _header(data: bytes, size: int) -> tuple[dict[str, Any], int]:
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8:start])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if start + max(ends) != size:
            raise DamagedFileError(f"the file has {size} bytes, its header promises {start + max(ends)}")
        return header, start
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DamagedFileError(f"the file has no readable header: {error}") from error


def _record(header: dict[str, Any]) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(header["__metadata__"]["unit"])
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"the file's header does not describe a unit: {error}") from error
