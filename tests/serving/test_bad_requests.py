"""Whatever comes in gets an answer that says what was wrong, and the server goes on."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from served import Running, messages

from hf_sparse_cache.serving.refusals import ApiError
from hf_sparse_cache.serving.requests import ChatRequest, CompletionRequest, ResponsesRequest, checked_request


CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    TEXT: {"prompt": "hello", "max_tokens": 2},
    RESPONSES: {"input": "hello", "max_output_tokens": 2},
}
WRONG: dict[str, list[Any]] = {
    "model": [5, "other", "", ["a"], "x" * 5000],
    "stream": ["yes", 1, []],
    "temperature": [-1, "hot", 1e9, [], True],
    "top_p": [0, -0.5, 1.5, "x"],
    "seed": ["x", 1.5, 2**70, []],
    "user": [],
    "cache_salt": [5, "x" * 300, "\ud800"],
    "generation_config": ["{", "[]", '{"num_beams": 4}', '{"temperature": -1}', 5, '{"cache_implementation": "x"}'],
    "max_tokens": [0, -1, "5", 1.5, 2**40, True],
    "max_completion_tokens": [0, -3, "many"],
    "max_output_tokens": [0, -3, "many"],
    "n": [0, -1, 17, "2", 1.5],
    "stop": ["", [""], [1], {}, ["x"] * 17, "y" * 300],
    "frequency_penalty": [-1, 3, "x"],
    "presence_penalty": [1, "x"],
    "logit_bias": [{"a": 1}, {"1": 500}, {"-1": 1}, {"999999": 1}, [], {"1": "x"}, {"9" * 20: 1}],
    "stream_options": [{"include_usage": True}, 5, {"include_usage": "x"}],
    "logprobs": ["x", -1, 50, 1.5],
    "top_logprobs": [5, -1, 21, "x"],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, "json", 5],
    "tool_choice": ["required", {"type": "function", "function": {"name": "a"}}, 5],
    "tools": [5, [5], [{}], [{"type": "function"}], [{"type": "search"}], [{"type": "function", "function": {}}]],
    "modalities": [["audio"], "text"],
    "audio": [{}],
    "functions": [[]],
    "function_call": ["auto"],
    "web_search_options": [{}],
    "messages": [
        None, 5, "x", [], [5], [{}], [{"role": "user"}], [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[]"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]}],
        [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]}],
    ],
    "prompt": [None, 5, ["a", "b"], [1, 2], [[1]], "", "\udfff", {}],
    "suffix": [5],
    "echo": [True, "x"],
    "best_of": [3, "x"],
    "input": [
        None, 5, [], [5], [{}], [{"type": "image"}], [{"role": "user"}], [{"role": "robot", "content": "x"}],
        [{"type": "function_call", "call_id": "1", "name": "a", "arguments": "{}"}],
        [{"role": "user", "content": "x"}, {"type": "function_call", "name": "a", "arguments": "{}"}],
        [{"role": "user", "content": "x"}, {"type": "function_call", "call_id": "1", "name": "a", "arguments": "x"}],
        [{"role": "user", "content": "x"}, {"type": "function_call_output", "call_id": "1"}],
        [{"role": "user", "content": "x"}, {"type": "item_reference", "id": "1"}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
    ],
    "instructions": [5, ["x"]],
    "text": [{"format": {"type": "json_schema"}}, 5, {"format": 5}],
    "previous_response_id": ["resp_1"],
    "conversation": ["c"],
    "background": [True],
    "truncation": ["auto", 5],
    "include": [["message.output_text.logprobs"], 5],
    "max_tool_calls": [3],
    "chat_template_kwargs": [5, "x"],
    "unknown_field": [1],
}  # fmt: skip
KINDS = {CHAT: ChatRequest, TEXT: CompletionRequest, RESPONSES: ResponsesRequest}
# What asks for nothing at an endpoint that always does it.
FREE = {
    (RESPONSES, "stream_options"): [{"include_usage": True}], (RESPONSES, "prompt"): [None],
}  # fmt: skip


def hostile() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every wrong value of every field at every endpoint that has it, or that has not."""
    for path, good in GOOD.items():
        for field, values in WRONG.items():
            for value in values:
                if value in FREE.get((path, field), []):
                    continue
                yield path, {**good, field: value}


def test_every_wrong_field_is_refused_by_name(served: Running) -> None:
    bodies = list(hostile())
    assert len(bodies) > 400
    with served.http as client:
        for path, body in bodies:
            content = json.dumps(body).encode("utf-8", "surrogatepass")
            answer = client.post(path, content=content, headers={"content-type": "application/json"})
            field = next(name for name in body if name not in GOOD[path] or body[name] is not GOOD[path][name])
            assert 400 <= answer.status_code < 500, (path, field, body[field], answer.status_code, answer.text)
            error = answer.json()["error"]
            assert error["message"] and set(error) == {"message", "type", "param", "code"}
            assert field in f"{error['param']} {error['message']}" or body[field] == "", (path, field, error)
    served.chat("still there")
    served.idle()


def test_good_requests_are_taken() -> None:
    """Twin: what official clients send passes."""
    for path, body in GOOD.items():
        checked_request(KINDS[path], body)
        everything = {"user": "u", "metadata": {"a": "b"}, "store": False, "temperature": 0.5, "seed": 1, "top_p": 1}
        checked_request(KINDS[path], {**body, **everything, "cache_salt": "s", "model": "m"})
    sent_back = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None,
        "tool_calls": [{"id": "1", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}],
    }  # fmt: skip
    tool = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "5"}]}
    chat = checked_request(ChatRequest, {"messages": [GOOD[CHAT]["messages"][0], sent_back, tool]}).upstream()
    assert chat["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{}"
    checked_request(
        ChatRequest,
        {**GOOD[CHAT], "stream": True, "stream_options": {"include_usage": True}, "response_format": {"type": "text"}},
    )
    settings = '{"temperature": 0.7, "do_sample": true, "transformers_version": "5.24.0", "num_beams": 1}'
    checked_request(ChatRequest, {**GOOD[CHAT], "generation_config": settings})


RAW: dict[str, tuple[dict[str, str], bytes]] = {
    "nothing": ({}, b""),
    "no JSON": ({}, b"{"),
    "a list": ({}, b"[]"),
    "a number": ({}, b"5"),
    "null": ({}, b"null"),
    "not UTF-8": ({}, b'{"prompt": "\xff\xfe"}'),
    "UTF-16": ({}, '{"prompt": "x"}'.encode("utf-16")),
    "NaN": ({}, b'{"prompt": "x", "temperature": NaN}'),
    "infinity": ({}, b'{"prompt": "x", "temperature": 1e999}'),
    "deep": ({}, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": ({}, b'{"prompt": "x", "metadata": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}"),
    "a long number": ({}, b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}"),
    "another type": ({"content-type": "text/plain"}, b'{"prompt": "x"}'),
    "a form": ({"content-type": "multipart/form-data; boundary=x"}, b"--x--"),
    "compressed": ({"content-encoding": "gzip"}, b"\x1f\x8b"),
    "odd type": ({"content-type": "\x7f"}, b"{}"),
    "null byte": ({}, b'{"prompt": "x"}\x00'),
    "doubled": ({}, b'{"prompt": "x"}{"prompt": "x"}'),
}


@pytest.mark.parametrize("name", RAW)
def test_bodies_that_are_no_request(served: Running, name: str) -> None:
    headers, content = RAW[name]
    with served.http as client:
        for path in GOOD:
            answer = client.post(path, content=content, headers={"content-type": "application/json", **headers})
            assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"], (path, answer.text)


def test_bodies_beyond_the_limit_are_not_read(start: Any) -> None:
    small = start(most_body_bytes=10_000)
    assert small.post(TEXT, {"prompt": "x" * 20_000}).status_code == 413
    with small.http as client:  # no length said
        answer = client.post(
            TEXT, content=iter([b'{"prompt": "'] + [b"x" * 5_000] * 5), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413
    small.chat = small.post(TEXT, {"prompt": "x", "max_tokens": 1})
    assert small.chat.status_code == 200


def test_what_is_no_http(served: Running) -> None:
    port = int(served.url.rpartition(":")[2])
    random.seed(3)
    lines = [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
        b"\x16\x03\x01" + random.randbytes(200),
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    ]  # fmt: skip
    for line in lines:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            said = b""
            try:
                while part := connection.recv(4096):
                    said += part
            except OSError:
                pass
            assert b" 500 " not in said[:20], (line[:60], said[:100])
    served.chat("still there")
    served.idle()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("DELETE", TEXT, 405), ("PUT", "/health", 405), ("POST", "/v1/nothing", 404),
     ("GET", "/%00", 404),
     ("GET", "/v1/models/other", 404), ("POST", "/cache/nothing", 404), ("PATCH", "/", 405)],
)  # fmt: skip
def test_paths_and_methods(served: Running, method: str, path: str, status: int) -> None:
    with served.http as client:
        answer = client.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ApiError, match="messages.0.content.0.type: 'image_url' cannot be used") as refused:
        checked_request(ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})
    assert refused.value.param == "messages.0.content.0.type"
    with pytest.raises(ApiError, match="messages is missing"):
        checked_request(ChatRequest, {})
    with pytest.raises(ApiError, match="top_logprobs needs logprobs=true"):
        checked_request(ChatRequest, {"messages": messages("x"), "top_logprobs": 2})
