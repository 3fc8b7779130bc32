"""Threads for what may hang: nobody waits longer than he said, and a place that failed is left alone for a while.

A thread that hangs in a call of the operating system cannot be stopped. It is a daemon, so that it holds up no exit,
and there are few of them: where all hang, nothing more is begun.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar


_T = TypeVar("_T")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0


class BusyError(RuntimeError):
    """All threads hang in earlier calls."""


class Hands:
    """A few daemon threads.

    Args:
        most: how many.
        name: of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._open = 0
        self._stalled = False

    def begin(self, job: Callable[[], _T]) -> Future[_T]:
        """Starts a job; its result, or what it raised, comes through the future.

        Raises:
            BusyError: earlier jobs were given up, and none of them has come to an end since.
        """
        future: Future[_T] = Future()
        with self._lock:
            if self._stalled and self._open >= self._most:
                raise BusyError(f"{self._open} earlier calls have not come back")
            self._open += 1
            if self._threads < min(self._most, self._open):
                self._threads += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        self._jobs.put((future, job))
        return future

    def wait(self, future: Future[_T], until: float) -> _T:
        """The result of a job, if it comes before `until` (of `time.monotonic`).

        Raises:
            TimeoutError: it did not; the job goes on, and nobody wants its result.
        """
        try:
            return future.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            self.gave_up(future)
            raise

    def gave_up(self, future: Future[Any]) -> None:
        """Nobody waits any longer for a job that took too long."""
        if not future.done():
            future.cancel()
            with self._lock:
                self._stalled = True

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
            with self._lock:
                self._open -= 1
                self._stalled = False
            del future, job


class Trust:
    """Whether a place is asked at all: after a failure it is left alone for a while, longer each time."""

    def __init__(self) -> None:
        self._pause, self._until = _FIRST_PAUSE_SECONDS, 0.0
        self.reason = ""

    @property
    def holds(self) -> bool:
        """Whether it may be asked now."""
        return time.monotonic() >= self._until

    def kept(self) -> None:
        """It answered."""
        self._pause, self._until, self.reason = _FIRST_PAUSE_SECONDS, 0.0, ""

    def broken(self, reason: str) -> None:
        """It failed, or took too long."""
        self.reason = reason
        self._until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
