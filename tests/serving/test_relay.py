"""What stands between a client and the replica that answers: requests relayed, answers taken up where one died."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from hf_sparse_cache.routing.names import Keys
from hf_sparse_cache.serving import relay
from hf_sparse_cache.serving.relay import (
    Destination,
    Diverged,
    HttpCall,
    Relayed,
    SentParts,
    WholeAnswer,
    joint_response,
    messages,
)  # fmt: skip


Part = str | Exception
PATH = "/v1/completions"


class Lost(Exception):
    """A replica that died."""


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


def call(body: bytes = b"", path: str = PATH, method: str = "POST", query: bytes = b"") -> HttpCall:
    return HttpCall(method, path, query, ((b"x-who", b"ann"),), body, ("127.0.0.1", 7))


# -- an application that is asked in another process ------------------------------------------------------------------


async def echo(request: Request) -> Response:
    said = {"body": (await request.body()).decode(), "who": request.headers["x-who"], "query": request.url.query}
    return JSONResponse({**said, "host": None if request.client is None else request.client.host}, 201)


def test_an_application_is_asked_what_came() -> None:
    app = Starlette(routes=[Route(PATH, echo, methods=["POST"])])

    async def asked(one: HttpCall) -> WholeAnswer:
        return WholeAnswer.of([message async for message in messages(app, one, set())])

    answer = run(asked(call(b"hello", query=b"a=1")))
    assert answer.status == 201 and dict(answer.headers)[b"content-type"] == b"application/json"
    assert json.loads(answer.body) == {"body": "hello", "who": "ann", "query": "a=1", "host": "127.0.0.1"}
    assert run(asked(call(path="/elsewhere"))).status == 404
    response = answer.response()
    assert response.status_code == 201 and response.body == answer.body
    assert response.raw_headers == list(answer.headers)  # none of its own making beside them


def test_who_stops_listening_has_left_and_the_application_ends() -> None:
    heard: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        heard.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        heard.append((await receive())["type"])
        with pytest.raises(OSError, match="left"):
            await send({"type": "http.response.body", "body": b"two", "more_body": True})
        heard.append("ended")

    async def leave() -> None:
        running: set[asyncio.Task[None]] = set()
        said = messages(endless, call(), running)
        found = [await anext(said), await anext(said)]
        assert [message["type"] for message in found] == ["http.response.start", "http.response.body"]
        assert len(running) == 1 and heard == ["http.request"]
        await said.aclose()  # type: ignore[attr-defined]
        while running:
            await asyncio.sleep(0)

    run(leave())
    assert heard == ["http.request", "http.disconnect", "ended"]


# -- replicas that die ------------------------------------------------------------------------------------------------


def event(text: str, name: str = "a" * 32, created: int = 1) -> str:
    return f'data: {{"id": "{name}", "created": {created}, "text": "{text}"}}\n\n'


class Replicas:
    """Each answers in parts of its own, or dies in the middle; asked one after the other."""

    def __init__(self, *answers: list[Part], kind: str = "text/event-stream") -> None:
        self.answers, self.kind, self.asked, self.closed = [*answers], kind, 0, 0

    async def __call__(self) -> AsyncIterator[Message]:
        parts = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        try:
            if parts and isinstance(parts[0], str):
                yield {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(b"content-type", self.kind.encode())],
                }
            for part in parts:
                if isinstance(part, Exception):
                    raise part
                yield {"type": "http.response.body", "body": part.encode(), "more_body": True}
                await asyncio.sleep(0)
            yield {"type": "http.response.body", "body": b"", "more_body": False}
        finally:
            self.closed += 1


def relayed(replicas: Callable[[], AsyncIterator[Message]], path: str = PATH) -> WholeAnswer:
    """What a client is sent."""
    said: list[Message] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        said.append(dict(message))

    run(Relayed(replicas, Lost, path)({"type": "http", "method": "POST", "path": path}, receive, send))
    assert [message["type"] for message in said].count("http.response.start") == 1
    assert not said[-1].get("more_body", False)
    return WholeAnswer.of(said)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_PAUSE", 0.0)


def test_an_answer_passes_as_it_is() -> None:
    whole = Replicas(["{", "}"], kind="application/json")
    assert relayed(whole).body == b"{}"
    stream = Replicas([event("x"), event("y")])
    assert relayed(stream).body == (event("x") + event("y")).encode()
    assert whole.asked == stream.asked == whole.closed == stream.closed == 1


def test_where_one_dies_another_is_asked() -> None:
    before = Replicas([Lost()], ["{}"], kind="application/json")
    amid = Replicas(["{", Lost()], ["{", "}"], kind="application/json")
    assert relayed(before).body == relayed(amid).body == b"{}"
    assert before.asked == amid.asked == before.closed == amid.closed == 2


def test_a_stream_goes_on_behind_what_is_out_under_its_first_name() -> None:
    other = [event(text, "b" * 32, created=2) for text in "xyz"]
    replicas = Replicas([event("x"), event("y"), Lost()], [*other[:1], Lost()], other)
    answer = relayed(replicas)
    assert replicas.asked == 3 and answer.status == 200
    assert answer.body == (event("x") + event("y") + event("z", created=2)).encode()


def test_a_stream_that_another_writes_otherwise_ends_with_an_error() -> None:
    for path, kind in ((PATH, "server_error"), ("/v1/responses", "error")):
        answer = relayed(Replicas([event("x"), event("y"), Lost()], [event("x"), event("z")]), path)
        events = answer.body.decode().split("\n\n")
        assert events[:2] == [event("x").strip(), event("y").strip()] and events[-2:] == ["data: [DONE]", ""]
        told = json.loads(events[2].rpartition("data: ")[2])
        assert (told["type"] if kind == "error" else told["error"]["type"]) == kind and "z" not in events[2][:9]


def test_where_all_die_the_client_is_told() -> None:
    replicas = Replicas([Lost()])
    answer = relayed(replicas)
    assert answer.status == 503 and json.loads(answer.body)["error"]["type"] == "server_error"
    assert replicas.asked == replicas.closed == relay._MOST_TRIES


def test_other_failures_are_nobodys_death() -> None:
    replicas = Replicas([ValueError("a fault of ours")])
    with pytest.raises(ExceptionGroup):
        relayed(replicas)
    assert replicas.asked == 1


def test_a_client_that_leaves_ends_what_its_replica_does() -> None:
    replicas = Replicas([event(str(number)) for number in range(100_000)])
    sent: list[Message] = []
    gone = asyncio.Event

    async def leave() -> None:
        left = gone()

        async def receive() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            if len(sent) == 5:
                left.set()

        await Relayed(replicas, Lost, PATH)({"type": "http"}, receive, send)

    run(leave())
    assert replicas.closed == 1 and 5 <= len(sent) < 100


def test_parts_that_are_out_are_not_said_twice() -> None:
    parts = SentParts()
    assert parts.new(event("x").encode()) == event("x").encode()
    parts.again()
    assert parts.new(event("x", "b" * 32, 9).encode()) is None
    assert parts.new(event("y", "b" * 32, 9).encode()) == event("y", created=9).encode()
    parts.again()
    with pytest.raises(Diverged):
        parts.new(event("y").encode())


# -- what the router and operators see --------------------------------------------------------------------------------


def test_names_of_prefixes_stay_where_they_are_made() -> None:
    keys = Keys(b"a secret of the tests")
    sent = pickle.loads(pickle.dumps(Destination(keys.names("ann", [1, 2, 3]), 5)))  # type: ignore[arg-type]
    assert sent == Destination() and sent.names is None and sent.session is None


def whole(body: Any, status: int = 200) -> WholeAnswer:
    return WholeAnswer(status, ((b"content-type", b"application/json"),), json.dumps(body).encode())


def test_answers_of_all_replicas_are_one() -> None:
    cleared = joint_response("/cache/clear", [whole({"cleared_checkpoints": 2}), whole({"cleared_checkpoints": 3})])
    assert json.loads(bytes(cleared.body)) == {"cleared_checkpoints": 5}
    marked = joint_response("/cache/mark", [whole({"marked_tokens": 7})] * 2)
    assert json.loads(bytes(marked.body)) == {"marked_tokens": 7}
    refused = joint_response("/cache/clear", [whole({"cleared_checkpoints": 2}), whole({"error": {}}, 401)])
    assert refused.status_code == 401 and json.loads(bytes(refused.body)) == {"error": {}}
    assert joint_response("/metrics", []).status_code == 503


def test_figures_of_all_replicas_are_one_page() -> None:
    page = '# HELP a_total What.\n# TYPE a_total counter\na_total {}\n# TYPE b gauge\nb{{tier="memory"}} {}\n'
    pages = [page.format(1, 2), page.format(3, 4)]
    answer = joint_response("/metrics", [WholeAnswer(200, (), text.encode()) for text in pages])
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert bytes(answer.body).decode().splitlines() == [
        "# HELP a_total What.", "# TYPE a_total counter", 'a_total{replica="0"} 1', 'a_total{replica="1"} 3',
        "# TYPE b gauge", 'b{replica="0",tier="memory"} 2', 'b{replica="1",tier="memory"} 4',
    ]  # fmt: skip


def test_a_stream_of_starlettes_passes_whole() -> None:
    """From an application to a client, both ends as they are."""

    async def stream(request: Request) -> Response:
        async def parts() -> AsyncIterator[str]:
            for text in "xyz":
                yield event(text)

        return StreamingResponse(parts(), media_type="text/event-stream")

    app = Starlette(routes=[Route(PATH, stream, methods=["POST"])])
    running: set[asyncio.Task[None]] = set()
    answer = relayed(lambda: messages(app, call(), running))
    assert answer.body.decode() == event("x") + event("y") + event("z")
