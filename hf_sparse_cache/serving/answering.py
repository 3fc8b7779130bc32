"""From a request to its answer, streamed or whole, while somebody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import anyio
import jinja2
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from transformers.utils import logging

from . import gate, replies
from .refusals import ApiError
from .requests import ApiRequest, checked_request
from .service import Endpoint, Service
from .settings import salted_namespace
from .tickets import Cancelled, Ticket, working_for


logger = logging.get_logger(__name__)
_T = TypeVar("_T")
_LEFT = "the client left"
# What a chat template, or a tokenizer, says of messages that it cannot use.
_UNUSABLE = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


async def respond(service: Service, endpoint: Endpoint, request: Request) -> Response:
    """Answer one request.

    Raises:
        ApiError: It is not to be answered; says why.
    """
    tenant = gate.tenant_of(request, service.settings)
    asked = checked_request(endpoint.kind, await gate.body_of(request, service.settings))
    service.check_model(asked.model)
    with ExitStack() as stack:
        stack.enter_context(service.line.place())
        job = Job(service, endpoint, asked, salted_namespace(tenant, asked.cache_salt or ""))
        stack.callback(job.close)
        if not asked.stream:
            return JSONResponse(await job.waited_for(request, job.whole()))
        await job.waited_for(request, job.begin())  # what is wrong with the prompt is said before a stream begins
        return EventStream(job, stack.pop_all())


class Job:
    """One request on its way to its answer, which has a ticket for each choice.

    Args:
        service: answers it.
        endpoint: where it came in.
        asked: what it says.
        namespace: whose prefixes it may use.
    """

    def __init__(self, service: Service, endpoint: Endpoint, asked: ApiRequest, namespace: str) -> None:
        self._service, self._endpoint, self._asked, self._namespace = service, endpoint, asked, namespace
        seconds = service.settings.timeout
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds
        self._tickets: list[Ticket] = []
        self._first: StreamingResponse | None = None
        self._created = int(time.time())

    async def waited_for(self, request: Request, work: Awaitable[_T]) -> _T:
        """The result of some work, which ends when the client leaves or the time is over.

        Raises:
            ApiError: The time is over; or there is nobody to tell.
        """
        task, left = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
        try:
            await asyncio.wait({task, left}, timeout=self._remaining(), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            why = _LEFT if left.done() else replies.OVER
            self.cancel(why)
            raise replies.cancelled(why)
        finally:
            for waiting in (task, left):
                waiting.cancel()
            await asyncio.gather(task, left, return_exceptions=True)

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        bodies = []
        for _ in range(self._asked.choices):
            ticket = self._ticket()
            response = await self._handled(ticket)
            body = replies.completed(response, ticket, self._asked, self._service.tokenizer.decode)
            self._service.ended(ticket)
            bodies.append(body)
        return replies.joined(bodies) if len(bodies) > 1 else bodies[0]

    async def begin(self) -> None:
        """Have the first choice of a stream worked on."""
        self._first = await self._handled(self._ticket())

    async def events(self) -> AsyncIterator[str]:
        """The answer in parts; what fails from here on is a part, too."""
        responses = not self._endpoint.part
        stream = replies.Stream(self._asked, self._name(self._tickets[0]))
        try:
            for index in range(self._asked.choices):
                response = self._first if index == 0 else await self._handled(self._ticket())
                assert response is not None
                parts = stream.choice(aiter(response.body_iterator), self._tickets[-1], index)
                async for part in self._in_time(parts):
                    yield part
                self._service.ended(self._tickets[-1])
            for part in stream.end(self._service.model_name, self._endpoint.part, self._created):
                yield part
        except ApiError as error:
            for part in replies.failed_stream(error, responses):
                yield part

    def cancel(self, why: str) -> None:
        """Nobody waits any more."""
        for ticket in self._tickets:
            ticket.cancel(why)

    def close(self) -> None:
        """The last byte is out, or nobody is there to read it."""
        self.cancel(_LEFT)
        for ticket in self._tickets:
            if ticket.ended is None and ticket.error is None:
                ticket.error = Cancelled(ticket.left)
            self._service.ended(ticket)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _ticket(self) -> Ticket:
        asked, index = self._asked, len(self._tickets)
        ticket = Ticket(
            self._endpoint.path,
            self._namespace,
            self.deadline,
            seed=None if asked.seed is None else (asked.seed + index) % 2**63,
            top_logprobs=asked.top,
            stops=asked.stop_strings,
        )
        self._tickets.append(ticket)
        self._service.live[ticket.id] = ticket
        return ticket

    def _name(self, ticket: Ticket) -> str:
        return f"{self._endpoint.prefix}{ticket.id}"

    async def _handled(self, ticket: Ticket) -> Any:
        """What transformers' handler answers.

        Raises:
            ApiError: It cannot.
        """
        try:
            with working_for(ticket):
                return await self._endpoint.handler.handle_request(self._asked.upstream(), self._name(ticket))
        except HTTPException as error:
            raise ApiError(error.status_code, str(error.detail)) from None
        except ApiError:
            raise
        except Exception as error:
            if ticket.error is not None:
                raise replies.failure(ticket) from None
            if not isinstance(error, _UNUSABLE):
                raise
            logger.warning(f"A prompt cannot be made of a request: {type(error).__name__}: {error}", exc_info=error)
            said = str(error).partition("\n")[0] or type(error).__name__
            raise ApiError(400, f"no prompt can be made of this by the model's chat template: {said}") from None

    async def _in_time(self, parts: AsyncIterator[str]) -> AsyncIterator[str]:
        """The parts, as long as there is time."""
        while True:
            try:
                part = await asyncio.wait_for(anext(parts), self._remaining())
            except StopAsyncIteration:
                return
            except TimeoutError:
                self.cancel(replies.OVER)
                raise replies.cancelled(replies.OVER) from None
            yield part

    def _remaining(self) -> float | None:
        return None if self.deadline == float("inf") else max(0.0, self.deadline - time.monotonic())


class EventStream(Response):
    """The parts of an answer as server-sent events, and an eye on whether somebody reads them.

    Args:
        job: makes the parts.
        held: what is given back behind the last of them.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, held: ExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job, self._held = job, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._job.events()
        try:
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    await _gone(receive)
                    self._job.cancel(_LEFT)
                    group.cancel_scope.cancel()

                group.start_soon(watch)
                with suppress(OSError):  # it left while a part was on its way
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    async for part in events:
                        await send({"type": "http.response.body", "body": part.encode(), "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                group.cancel_scope.cancel()
        finally:
            self._held.close()
            with anyio.CancelScope(shield=True):
                await events.aclose()  # type: ignore[attr-defined]


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
