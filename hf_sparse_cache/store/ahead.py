"""Files of one unit that threads read and prove, while whoever waits for them unpacks what has come of them.

To prove a file takes longer than to unpack it, and reading, proving and unpacking leave the other threads of Python
alone. So one thread reads a file, another proves the parts that have come, and without a key the caller unpacks them
meanwhile: whoever can write a file can give it the right checksum, so that whatever reads it must take anything as it
is. With a key nothing is looked at before it is known who wrote it. In either case nothing is computed from what a
file holds before `prove` has said that it is proved; where the caller hands it on before, a `Pledge` goes with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import NoReturn

from ..errors import DamagedFileError, UnprovedError
from . import files
from .hands import Hands
from .headers import Plain, header_bytes
from .seal import Seal


Parts = Iterator[tuple[Plain, int]]  # a file's memory, and how many bytes of it have come


class StorageFailedError(RuntimeError):
    """The storage did not give what it has, or not in time, as its cause says; says nothing about the file."""


class _Coming:
    """A file while it is read by one thread, for others that use what has come of it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # taken itself, as an interrupt inside `Condition.__enter__` would keep it
        self._news = threading.Condition(self._lock)
        self._data: Plain = b""
        self._count = 0
        self._error: BaseException | None = None
        self._ended = False

    def fill(self, read: Callable[[], Parts]) -> None:
        """Reads it; on the thread that does."""
        error: BaseException | None = None
        try:
            for data, count in read():
                with self._lock:
                    self._data, self._count = data, count
                    self._news.notify_all()
        except BaseException as found:
            error = found
        with self._lock:
            self._error, self._ended = error, True
            self._news.notify_all()

    def upto(self, end: int | None, until: float) -> tuple[Plain, int]:
        """Its memory, and how many bytes have come: at least `end`, or all that there are; None for all.

        Raises:
            TimeoutError: they have not come until then, of `time.monotonic`.
        """

        def come() -> bool:
            return self._ended or (end is not None and self._count >= end)

        with self._lock:
            if not come() and not self._news.wait_for(come, max(0.0, until - time.monotonic())):
                raise TimeoutError
            if self._error is not None:
                raise self._error
            return self._data, self._count

    @property
    def whole(self) -> Plain | None:
        """All of its bytes; None as long as they have not come."""
        return self._data if self._ended and self._error is None else None


class Ahead:
    """Files that are read ahead, by name.

    Args:
        hands: the threads that read and prove.
        seal: what proves the files.
        until: how long to wait for any of them, of `time.monotonic`.
    """

    def __init__(self, hands: Hands, seal: Seal, until: float) -> None:
        self._hands, self._seal, self._until = hands, seal, until
        self._coming: dict[str, _Coming] = {}
        self._reading: dict[str, Future[None]] = {}
        self._proof: dict[str, Future[None]] = {}

    def begin(self, name: str, read: Callable[[], Parts]) -> None:
        """Starts to read and to prove a file.

        Args:
            name: of the file, which ends in its checksum.
            read: gives its bytes, part by part; called in another thread.

        Raises:
            BusyError: all threads hang.
        """
        coming = self._coming[name] = _Coming()
        # In this order: a thread that waits for another one's work never holds up the one that is to do it.
        self._reading[name] = self._hands.begin(partial(coming.fill, read))
        self._proof[name] = self._hands.begin(partial(self._prove, name, coming))

    def _prove(self, name: str, coming: _Coming) -> None:
        hashing, hashed = self._seal.hashing(), 0
        while True:
            data, count = coming.upto(hashed + 1, self._until)
            if count == hashed:
                break
            hashing.update(memoryview(data)[hashed:count])
            hashed = count
        files.prove(Path(name), data, self._seal, hashing.hexdigest())

    def plain(self, name: str, most: int | None) -> Plain:
        """What a file says; without a key, before it is proved.

        Args:
            name: of the file.
            most: bytes that it may unpack to.

        Raises:
            DamagedFileError: it is gone, or cannot be read.
            StorageFailedError: it did not come in time.
        """
        if self._seal.keyed:
            self.prove(name)
        data = self._upto(name, 8)
        self._upto(name, 8 + header_bytes(data, len(data)))
        return files.unsealed(data, self._seal, most, partial(self._upto, name))

    def prove(self, name: str) -> None:
        """Waits until a file is proved.

        Raises:
            DamagedFileError: it is not what was written, or is gone; its `path` is the file's name.
            StorageFailedError: it did not come in time.
        """
        try:
            self._hands.wait(self._proof[name], self._until)
        except Exception as error:
            _tell(name, error)

    def seen(self, name: str) -> Plain | None:
        """The bytes of a file, where all of them have come."""
        return self._coming[name].whole

    def give_up(self) -> None:
        """Nobody waits any more for what has not begun."""
        for future in (*self._reading.values(), *self._proof.values()):
            future.cancel()

    def _upto(self, name: str, end: int) -> Plain:
        try:
            return self._coming[name].upto(end, self._until)[0]
        except Exception as error:
            if isinstance(error, TimeoutError):
                self._hands.gave_up(self._reading[name])
            _tell(name, error)


class Pledge:
    """What goes with keys and values that are handed on while they are still being proved.

    Whoever needs their values calls it first: it returns once they are proved, and raises for ever where they are not.

    Attributes:
        broken: whether it is known that they are not.
    """

    def __init__(self, hands: Hands, until: float) -> None:
        self._hands, self._until = hands, until
        self._reason: Future[str] | None = None
        self._kept = self.broken = False

    def begin(self, settle: Callable[[], str]) -> None:
        """Starts to find out, on a thread: `settle` returns why they are not what was written, or "".

        Raises:
            BusyError: all threads hang.
        """

        def job() -> str:
            reason = settle()
            self.broken = bool(reason)
            return reason

        self._reason = self._hands.begin(job)

    def __call__(self) -> None:
        """Waits until they are proved.

        Raises:
            UnprovedError: they are not what was written, or it could not be found out in time.
        """
        if self._kept:
            return
        assert self._reason is not None
        try:
            reason = self._hands.wait(self._reason, self._until)
        except TimeoutError:
            reason = "it was not proved in time"
        if reason:
            self.broken = True
            raise UnprovedError(reason)
        self._kept = True


def _tell(name: str, error: Exception) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise _of(name, DamagedFileError("it is gone")) from None
    if isinstance(error, DamagedFileError):
        raise _of(name, error) from error.__cause__
    raise StorageFailedError(str(error)) from error


def _of(name: str, error: DamagedFileError) -> DamagedFileError:
    error.path = Path(name)
    return error
