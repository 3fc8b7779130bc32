"""Files of one unit that threads read and prove, while whoever waits for them unpacks those that have come.

To prove a file takes as long as to unpack it, and both leave the other threads of Python alone. Without a key a file
is therefore unpacked while it is proved: whoever can write one can give it the right checksum, so that whatever reads
it must take anything as it is. With a key nothing is looked at before it is known who wrote it. In either case nothing
may leave the hands of the caller before `prove` has said that it is proved.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from ..errors import DamagedFileError
from . import files
from .hands import Hands
from .headers import Plain
from .seal import Seal


_T = TypeVar("_T")


class StorageFailedError(RuntimeError):
    """The storage did not give what it has, or not in time, as its cause says; says nothing about the file."""


class Ahead:
    """Files that are read ahead, by name.

    Args:
        hands: the threads that read and prove.
        seal: what proves the files.
    """

    def __init__(self, hands: Hands, seal: Seal) -> None:
        self._hands, self._seal = hands, seal
        self._data: dict[str, Future[Plain]] = {}
        self._proof: dict[str, Future[None]] = {}

    def begin(self, name: str, read: Callable[[], Plain]) -> None:
        """Starts to read and to prove a file.

        Args:
            name: of the file, which ends in its checksum.
            read: gives its bytes; called in another thread.

        Raises:
            BusyError: all threads hang.
        """
        data: Future[Plain] = Future()

        def job() -> None:
            try:
                found = read()
            except BaseException as error:
                data.set_exception(error)
                raise
            data.set_result(found)
            files.prove(Path(name), found, self._seal)

        self._proof[name] = self._hands.begin(job)
        self._data[name] = data

    def plain(self, name: str, most: int | None, until: float) -> Plain:
        """What a file says; without a key, before it is proved.

        Args:
            name: of the file.
            most: bytes that it may unpack to.
            until: how long to wait for it, of `time.monotonic`.

        Raises:
            DamagedFileError: it is gone, or cannot be read.
            StorageFailedError: it did not come in time.
        """
        data = self._given(self._data[name], name, until)
        if self._seal.keyed:
            self.prove(name, until)
        return files.unsealed(data, self._seal, most)

    def prove(self, name: str, until: float) -> None:
        """Waits until a file is proved.

        Raises:
            DamagedFileError: it is not what was written, or is gone; its `path` is the file's name.
            StorageFailedError: it did not come in time.
        """
        self._given(self._proof[name], name, until)

    def seen(self, name: str) -> Plain | None:
        """The bytes of a file, as far as they have come."""
        data = self._data[name]
        return data.result() if data.done() and not data.cancelled() and data.exception() is None else None

    def give_up(self) -> None:
        """Nobody waits any more for what has not begun."""
        for future in self._proof.values():
            future.cancel()

    def _given(self, future: Future[_T], name: str, until: float) -> _T:
        try:
            return self._hands.wait(future, until)
        except FileNotFoundError:
            raise _of(name, DamagedFileError("it is gone")) from None
        except DamagedFileError as error:
            _of(name, error)
            raise
        except Exception as error:
            raise StorageFailedError(str(error)) from error


def _of(name: str, error: DamagedFileError) -> DamagedFileError:
    error.path = Path(name)
    return error
