"""Files of the disk tier and of saved caches: private, whole or absent, and proved to be ours before they are touched.

Each file is a safetensors file of one unit, packed where that makes it smaller (see `planes`). Its name ends in the
checksum of its bytes, so a file proves itself; what it is for stands in its own header, so a folder needs no index
that could disagree with it. A folder may hold anything else, too: what is not a regular file of our form is neither
opened nor changed.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import DamagedFileError as DamagedFileError
from ..planning.cuts import Tokens
from .headers import MAX_POSITION, Header, Plain, RefusedFileError, header_bytes, tokens_from
from .planes import at_once, unpacked
from .seal import Seal, same_digits


SUFFIX = ".safetensors"
TEMPORARY = ".tmp"
LOCKS = ("lock", "sparse_cache.lock")  # the second where the first is something else
_NAME = re.compile(r"(state|kv|marks)-[0-9a-f]{12}-[0-9a-f]{32}\.safetensors")
_LIKE_OURS = re.compile(r"(state|kv|marks)-.*\.safetensors", re.DOTALL)
# Not handed to child processes, and on Windows not translated: a state holds bytes that look like line ends.
_PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0) | getattr(os, "O_BINARY", 0)
# No link is followed, and no pipe is waited for.
CAREFUL = _PLAIN | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
CHECKSUMS = Seal()
# How the record begins in every header, and how far from the beginning of a file it is looked for.
_MARK, _MARKED_BYTES = b'"unit":"{\\"format\\": ', 2**16
_MAX_HEAD_BYTES = 16 * MAX_POSITION  # tokens as text
_FINEST_NS = 1_000  # what every file system that keeps more than seconds tells apart
_last_used, _last_used_lock = [0], threading.Lock()


def private_folder(path: Path) -> Path:
    """Makes a folder that only the user can open, and its parents; leaves one that exists as it is."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def lock_of(folder: Path) -> Path:
    """The file that stands for a folder's use: the first name that is free, or a regular file.

    Raises:
        OSError: there is none.
    """
    for path in (folder / name for name in LOCKS):
        if kind_of(path) in (None, "a file"):
            return path
    raise OSError(f"{folder / LOCKS[0]} is {kind_of(folder / LOCKS[0])}, and so is {LOCKS[1]}; remove them")


def take_over(folder: Path) -> int | None:
    """A descriptor that keeps other processes out of a folder until it is closed; None when one is in already."""
    descriptor = os.open(lock_of(folder), os.O_RDWR | os.O_CREAT | CAREFUL, 0o600)
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


def kind_of(path: str | Path) -> str | None:
    """What lies at a path, in words, following no link; None for nothing."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode):
        return "a file"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a link" if stat.S_ISLNK(mode) else "a pipe, a socket or a device"


def new_name(kind: str, data: bytes, seal: Seal = CHECKSUMS) -> str:
    """A name no other file has, ending in the checksum of `data`."""
    return f"{kind}-{uuid.uuid4().hex[:12]}-{seal.checksum(data)}{SUFFIX}"


def same_name(kind: str, data: bytes, seal: Seal = CHECKSUMS) -> str:
    """The name that `data` has in every save."""
    digits = seal.checksum(data)
    return f"{kind}-{_tag(digits)[:12]}-{digits}{SUFFIX}"


def is_name(name: str, kind: str = "") -> bool:
    """Whether a name has the form of those of units."""
    return _NAME.fullmatch(name) is not None and name.startswith(kind)


def _tag(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"hf_sparse_cache").hexdigest()


def own_tag(text: str) -> str:
    """32 hexadecimal digits that prove, within a name, that this library made the name."""
    return _tag(text)


def proves_itself(name: str) -> bool:
    """Whether a unit's name holds a checksum of itself, as that of `same_name` does: no other file has such a name."""
    kind, _, rest = name.removesuffix(SUFFIX).rpartition("-")
    return is_name(name) and kind.rpartition("-")[2] == _tag(rest)[:12]


def temporary_of(path: Path) -> Path:
    """A new name for a file until it is whole. It holds a checksum of itself, as an unfinished file proves nothing."""
    name = f"{path.name}.{uuid.uuid4().hex[:12]}"
    return path.with_name(f"{name}-{_tag(name)}{TEMPORARY}")


def is_temporary(path: Path) -> bool:
    """Whether a path is an unfinished file of ours."""
    name, _, tag = path.name.removesuffix(TEMPORARY).rpartition("-")
    if not path.name.endswith(TEMPORARY) or kind_of(path) != "a file":
        return False
    return tag == _tag(name) or (is_name(path.name.removesuffix(TEMPORARY)) and _says_ours(path))


def is_ours(path: Path) -> bool:
    """Whether a path is a file of a unit, by its name, its kind and its header; what it holds may be damaged."""
    return is_name(path.name) and _says_ours(path)


def _says_ours(path: Path) -> bool:
    """Whether a header is ours: read as one, or, where it is damaged itself, by the words that no other file has."""
    try:
        with open_regular(path) as file:
            head = file.read(_MARKED_BYTES)
            if _MARK in head:
                return True
            file.seek(0)
            _header(file, whole=False).record()
    except DamagedFileError:
        return False
    return True


def open_regular(path: Path) -> IO[bytes]:
    """Opens a regular file for reading, through no link and without waiting for a pipe.

    Raises:
        OSError: it cannot be opened.
        DamagedFileError: it is something else.
    """
    if (kind := kind_of(path)) not in (None, "a file"):
        raise DamagedFileError(f"{path} is {kind}, not a file that was written here")
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | CAREFUL))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedFileError(f"{path} is not a regular file")
    return file


def write(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Writes a file that is there in full or not at all, also after a crash, and that only the user can read.

    Args:
        replace: whether a file of this name may be there, which then stays as it is unless all goes well.

    Raises:
        OSError: whatever the file system says; nothing is left behind as far as it lets us clean up.
    """
    if not replace and kind_of(path) is not None:
        raise FileExistsError(f"{path} is there already")
    temporary, made = temporary_of(path), []
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | CAREFUL, 0o600)
        made.append(temporary)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        mark_used(temporary)
        os.replace(temporary, path)
        made += [] if replace else [path]
        _flush_folder(path.parent)
    except BaseException:
        for leftover in made:
            with suppress(OSError):
                os.unlink(leftover)
        raise


def mark_used(path: Path) -> None:
    """Notes that a file was used now, after all that was noted before, as far as the file system takes times.

    The clock of most file systems moves a few milliseconds at a time: it does not tell which of two files that were
    used within one of its ticks came first.
    """
    with _last_used_lock:
        _last_used[0] = now = max(time.time_ns(), _last_used[0] + _FINEST_NS)
    with suppress(OSError, NotImplementedError):
        os.utime(path, ns=(now, now), follow_symlinks=os.utime not in os.supports_follow_symlinks)


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path, seal: Seal = CHECKSUMS, most: int | None = None) -> Plain:
    """Reads a whole file, proves it by the checksum in its name, decrypts it where it is encrypted, and unpacks it.

    Args:
        most: bytes; a larger file is not read, and none is unpacked to more.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: its bytes are not those that were written, or this key does not open it.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise DamagedFileError(f"{path} has {size} bytes; what it is for has at most {most}")
        data = file.read(size)
    return proved(path, data, seal, most)


def proved(path: Path, data: Plain, seal: Seal = CHECKSUMS, most: int | None = None) -> Plain:
    """What a file says, whose bytes were read from wherever it lies.

    Args:
        most: bytes that it may unpack to.

    Raises:
        DamagedFileError: its bytes are not those that were written, it would take more, or this key does not open it.
    """
    prove(path, data, seal)
    return unsealed(data, seal, most)


def prove(path: Path, data: Plain, seal: Seal = CHECKSUMS, checksum: str | None = None) -> None:
    """Holds the bytes of a file against the checksum in its name.

    Args:
        checksum: of all of them; None to find it out.

    Raises:
        DamagedFileError: they are not those that were written, or are not to be read with this key.
    """
    if reason := _refusal(data, seal):
        raise RefusedFileError(f"{path} is refused: {reason}")
    checksum = seal.checksum(data) if checksum is None else checksum
    if not same_digits(checksum, path.name.removesuffix(SUFFIX).rpartition("-")[2]):
        raise DamagedFileError(f"{path} does not match its checksum")


def unsealed(
    data: Plain, seal: Seal = CHECKSUMS, most: int | None = None, there: Callable[[int], object] = at_once
) -> Plain:
    """What a file says: decrypted where it is encrypted, and unpacked. Nothing of it is proved here.

    Args:
        most: bytes that it may unpack to.
        there: waits until that many of the bytes have come; the header is there, and all of an encrypted file.

    Raises:
        DamagedFileError: it would take more, or cannot be read.
    """
    return unpacked(seal.opened(data), most, there)


def _refusal(data: Plain, seal: Seal) -> str | None:
    try:
        return seal.refusal(Header.parse(data, len(data)).record())
    except DamagedFileError:
        return None


@dataclass(frozen=True)
class Listing:
    """What of ours a folder may hold.

    Attributes:
        units: name and size of each unit's file.
        unfinished: files that a killed process left, with their sizes.
        odd: paths that are named as ours are and are something else.
    """

    units: dict[str, int] = field(default_factory=dict)
    unfinished: dict[Path, int] = field(default_factory=dict)
    odd: list[Path] = field(default_factory=list)


def units_in(folder: Path) -> Listing:
    """Lists a folder; nothing in it is opened but what has a name of ours.

    Raises:
        OSError: the folder cannot be listed.
    """
    found = Listing()
    for path in sorted(folder.iterdir()):
        named = is_name(path.name)
        with suppress(FileNotFoundError):
            if named and kind_of(path) == "a file":
                found.units[path.name] = os.lstat(path).st_size
            elif is_temporary(path):
                found.unfinished[path] = os.lstat(path).st_size
            elif named or _LIKE_OURS.fullmatch(path.name):
                found.odd.append(path)
    return found


def remove(path: Path) -> None:
    """Deletes a file of ours; one that is gone already is fine.

    Raises:
        OSError: it is still there.
        DamagedFileError: it is still there, as nothing proves that it is ours.
    """
    with suppress(FileNotFoundError):
        if kind_of(path) is not None and not (is_ours(path) or is_temporary(path)):
            raise DamagedFileError(f"{path} is not, or no longer, a file that was written here")
        os.unlink(path)


def record_of(data: Plain) -> tuple[dict[str, Any], Tokens]:
    """The record and the tokens in the bytes of a unit's file (see `peek`)."""
    header = Header.parse(data, len(data))
    begin, end = header.place("tokens", "I32", 4)
    return header.record(), tokens_from(data[begin:end])


def peek(path: Path, seal: Seal = CHECKSUMS, *, any_key: bool = False) -> tuple[dict[str, Any], Tokens]:
    """Reads only the record and the tokens of a unit's file, without proving them.

    Args:
        any_key: whether to look at files of another key, too, as far as they are not encrypted.

    Returns:
        What the unit says of itself, and its tokens, int32 `(position,)`; empty for a KV segment.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: it is cut short, not such a file, or not to be read with this key.
    """
    with open_regular(path) as file:

        def part(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        return peek_parts(part, os.fstat(file.fileno()).st_size, seal, any_key=any_key)


def peek_parts(
    part: Callable[[int, int], Plain], size: int, seal: Seal = CHECKSUMS, *, any_key: bool = False
) -> tuple[dict[str, Any], Tokens]:
    """`peek` for a file of which `part(start, end)` gives any bytes, wherever it lies."""
    head = part(0, min(size, _MARKED_BYTES))
    length = header_bytes(head[:8], size)
    if len(head) < 8 + length:
        head = bytes(head) + bytes(part(len(head), 8 + length))
    header = Header.parse(head, size)
    record = header.record()
    hidden = record.get("encrypted") is True
    if not any_key and (reason := seal.refusal(record)):
        raise RefusedFileError(reason)
    begin, end = header.place("head", "U8", 1) if hidden else header.place("tokens", "I32", 4)
    if end - begin > (_MAX_HEAD_BYTES if hidden else 4 * MAX_POSITION):
        raise DamagedFileError(f"it promises {end - begin} bytes of tokens")
    data = head[begin:end] if end <= len(head) else part(begin, end)
    return seal.head(data) if hidden else (record, tokens_from(data))


def _header(file: IO[bytes], whole: bool = True) -> Header:
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    return Header.parse(head + file.read(header_bytes(head, size)), size, whole)
