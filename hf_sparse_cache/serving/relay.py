"""A request that is answered in another process: taken apart here, asked of an application there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.utils import logging

from ..routing.names import Names
from . import replies
from .refusals import ApiError


logger = logging.get_logger(__name__)
_MOST_TRIES = 6
_PAUSE = 0.1


@dataclass(frozen=True)
class HttpCall:
    """A request with its whole body.

    Attributes:
        headers: as they came.
        client: address and port of who asks.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    client: tuple[str, int] | None

    def scope(self) -> dict[str, Any]:
        """As an application is asked."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }


@dataclass(frozen=True)
class Destination:
    """What the router looks at. None of it leaves the process: the replica has no use for it.

    Attributes:
        names: of the prefixes of the prompt; None where nobody knows it.
        session: the name of its session; None for none.
    """

    names: Names | None = None
    session: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Destination, ())


async def messages(app: ASGIApp, call: HttpCall, running: set[asyncio.Task[None]]) -> AsyncIterator[Message]:
    """What an application answers. Who stops listening has left, and the application is told.

    Args:
        app: the application.
        call: asks it.
        running: holds what has to come to its end though nobody listens any more.
    """
    said: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if left.is_set():
            raise OSError("the client left")
        said.put_nowait(message)

    task = asyncio.ensure_future(_ended(app(call.scope(), receive, send), said))
    running.add(task)
    task.add_done_callback(running.discard)
    try:
        while (message := await said.get()) is not None:
            yield message
    finally:
        left.set()


async def _ended(work: Any, said: asyncio.Queue[Message | None]) -> None:
    try:
        await work
    finally:
        said.put_nowait(None)


@dataclass(frozen=True)
class WholeAnswer:
    """A whole answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @classmethod
    def of(cls, said: Iterable[Message]) -> WholeAnswer:
        """The messages of one, put together."""
        start, *rest = said
        body = b"".join(message.get("body", b"") for message in rest)
        return cls(start["status"], tuple((bytes(name), bytes(value)) for name, value in start["headers"]), body)

    def response(self) -> Response:
        response = Response(self.body, self.status)
        response.raw_headers = [*self.headers]
        return response


class Relayed(Response):
    """What a replica answers. Where it dies, another one is asked, and what is out already is not said twice.

    Args:
        ask: asks a replica, another one each time.
        lost: what is raised where it cannot be reached any more.
        path: where the request came to.
    """

    def __init__(self, ask: Callable[[], AsyncIterator[Message]], lost: type[Exception], path: str) -> None:
        super().__init__()
        self._ask, self._lost, self._path = ask, lost, path
        self._out = SentParts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            await self._answer(scope, receive, send)
            group.cancel_scope.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        for attempt in range(_MOST_TRIES):
            if attempt:
                await asyncio.sleep(_PAUSE * 2**attempt)
            try:
                await self._relay(send)
                return
            except self._lost as lost:
                logger.warning(f"A replica was lost in the middle of a request to {self._path}: {lost}")
            except Diverged:
                break
        error = ApiError(503, "the replica that was answering is gone, and no other could go on; ask again")
        if not self._out.begun:
            await error.response()(scope, receive, send)
            return
        for part in replies.failed_stream(error, self._path == "/v1/responses"):
            await send({"type": "http.response.body", "body": part.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _relay(self, send: Send) -> None:
        """One replica's answer, from where the last one's ended. Nothing is out before its first part is whole."""
        held: list[Message] = []
        streamed = False
        self._out.again()
        async with contextlib.aclosing(self._ask()) as answer:  # type: ignore[type-var]
            async for message in answer:
                if message["type"] == "http.response.start":
                    streamed = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
                if message["type"] == "http.response.start" or not streamed:
                    held.append(message)
                    continue
                part = self._out.new(message["body"])
                for earlier in held if not self._out.begun else ():
                    await send(earlier)
                held, self._out.begun = [], True
                if part is not None:
                    await send({**message, "body": part})
        for message in held:
            await send(message)


class Diverged(Exception):
    """Another replica writes another answer."""


class SentParts:
    """The parts of a stream that are out, so that an answer that is written again goes on behind them.

    Attributes:
        begun: whether anything is out.
    """

    def __init__(self) -> None:
        self.begun = False
        self._out: list[bytes] = []
        self._name = b""
        self._next = 0

    def again(self) -> None:
        """An answer begins, perhaps once more."""
        self._next = 0

    def new(self, part: bytes) -> bytes | None:
        """A part under the name that its answer has for the client; None where it is out.

        Raises:
            Diverged: something else is out.
        """
        named = _ID.search(part)
        self._name = self._name or (named[0] if named else b"")
        self._next += 1
        plain = _ID.sub(b"", _TIME.sub(b"", part))
        if self._next <= len(self._out):
            if self._out[self._next - 1] != plain:
                raise Diverged
            return None
        self._out.append(plain)
        return _ID.sub(self._name, part) if self._name else part


_ID, _TIME = re.compile(rb"[0-9a-f]{32}"), re.compile(rb'"created(_at)?": ?[0-9.]+')


def joint_response(path: str, answers: Sequence[WholeAnswer]) -> Response:
    """What every replica said, as one answer: the first refusal, or all of it together."""
    refused = [answer for answer in answers if answer.status >= 400]
    if not answers:
        return ApiError(503, "there is no replica just now; come back").response()
    if refused:
        return refused[0].response()
    if path == "/metrics":
        return Response(merged([answer.body.decode() for answer in answers]), headers=_METRICS)
    bodies = [json.loads(answer.body) for answer in answers]
    cleared = [body["cleared_checkpoints"] for body in bodies if "cleared_checkpoints" in body]
    return JSONResponse({**bodies[0], **({"cleared_checkpoints": sum(cleared)} if cleared else {})})


def merged(pages: Sequence[str]) -> str:
    """The figures of several replicas for Prometheus, each with the label `replica`."""
    families: dict[str, list[str]] = {}
    for number, page in enumerate(pages):
        name = ""
        for line in page.splitlines():
            if line.startswith("# "):
                name = line.split(" ")[2]
                if line not in families.setdefault(name, []):
                    families[name].append(line)
            elif line:
                families.setdefault(name, []).append(_labelled(line, number))
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def _labelled(sample: str, number: int) -> str:
    label, (name, brace, rest) = f'replica="{number}"', sample.partition("{")
    if brace:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"


_METRICS = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
