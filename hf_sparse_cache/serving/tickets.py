"""One request's life on the server: who asks, what came of it, and whether somebody still waits for the answer."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..stats import RequestInfo


class Cancelled(Exception):
    """Nobody waits for this answer any more; says why."""


@dataclass(eq=False)
class Ticket:
    """One answer that is asked for, from its arrival to its last byte.

    Attributes:
        endpoint: the path it came to.
        namespace: whose prefixes it may use.
        deadline: when it ends at the latest, on the monotonic clock; infinite for never.
        seed: of its sampling; None for whatever comes.
        top_logprobs: how many likely tokens to report for each token; None for no log-probabilities at all.
        stops: strings that end the answer and are not part of it.
        id: no other ticket has it.
        arrived: on the monotonic clock.
        started, first_token, ended: the same, of its turn on the model, its first token and its end; None before.
        requests: what the cache did for each prompt it ran.
        tokens: decoded so far.
        logprobs: of each decoded token, where they were asked for.
        stopped: whether one of `stops` came.
        error: what ended it early.
        left: why nobody waits any more; "" while somebody does.
    """

    endpoint: str
    namespace: str
    deadline: float
    seed: int | None = None
    top_logprobs: int | None = None
    stops: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    requests: list[RequestInfo] = field(default_factory=list)
    tokens: int = 0
    logprobs: list[Any] = field(default_factory=list)
    stopped: bool = False
    error: Exception | None = None
    left: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self, why: str) -> None:
        """Have it end at the next token, or the next segment of its prompt."""
        with self._lock:
            self.left = self.left or why

    def check(self) -> None:
        """Go on, or not.

        Raises:
            Cancelled: Nobody waits any more, or its time is over.
        """
        if not self.left and time.monotonic() > self.deadline:
            self.cancel("its time is over")
        if self.left:
            raise Cancelled(self.left)

    def decoded(self) -> None:
        """One more token."""
        self.check()
        self.tokens += 1
        if self.first_token is None:
            self.first_token = time.monotonic()

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        return sum(info.resumed_tokens for info in self.requests)

    @property
    def state(self) -> str:
        """What it is doing, in a word."""
        if self.started is None:
            return "waiting"
        return "reading" if self.first_token is None else "answering"


_current: ContextVar[Ticket] = ContextVar("hf_sparse_cache_ticket")


def current() -> Ticket:
    """The ticket of the request that this task or thread works for."""
    return _current.get()


@contextmanager
def working_for(ticket: Ticket) -> Iterator[None]:
    """Make a ticket the current one."""
    token = _current.set(ticket)
    try:
        yield
    finally:
        _current.reset(token)
