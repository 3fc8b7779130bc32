"""Who may come in, and that nothing of one tenant's ever serves another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from served import Running, messages

from hf_sparse_cache.serving.settings import Settings, salted_namespace


CHAT = "/v1/chat/completions"
KEYS = {"key-of-ann": "ann", "key-of-bob": "bob"}


def asked(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": messages(text), "max_tokens": 2, **fields}


def cached(answer: Any) -> int:
    assert answer.status_code == 200, answer.text
    tokens: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def key(name: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {name}"}}


@pytest.fixture
def guarded(start: Callable[..., Running]) -> Running:
    return start(api_keys=KEYS, admin_key="operator")


def test_only_known_keys_come_in(guarded: Running) -> None:
    for path, body in ((CHAT, asked()), ("/v1/completions", {"prompt": "x"}), ("/v1/responses", {"input": "x"})):
        for headers in (
            {},
            key("wrong")["headers"],
            {"Authorization": "Bearer"},
            {"Authorization": "Basic !!"},
            key("operator")["headers"],
        ):
            answer = guarded.post(path, body, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    with guarded.http as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", **key("key-of-ann")).status_code == 200
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_what_one_tenant_asked_serves_no_other(guarded: Running) -> None:
    ann, bob = key("key-of-ann"), key("key-of-bob")
    assert cached(guarded.post(CHAT, asked(), **ann)) == 0
    assert cached(guarded.post(CHAT, asked(), **ann)) > 0
    assert cached(guarded.post(CHAT, asked(), **bob)) == 0  # the same prompt
    assert cached(guarded.post(CHAT, asked(), **bob)) > 0
    assert cached(guarded.post(CHAT, asked(cache_salt="x"), **ann)) == 0
    assert cached(guarded.post(CHAT, asked(cache_salt="x"), **ann)) > 0
    assert cached(guarded.post(CHAT, asked(cache_salt="y"), **ann)) == 0
    assert cached(guarded.post(CHAT, asked(cache_salt="x"), **bob)) == 0


def test_no_two_pairs_of_tenant_and_salt_share_a_namespace() -> None:
    pairs = [(tenant, salt) for tenant in ("", "a", "a#", "#a", "a#b") for salt in ("", "a", "b", "#", "#a")]
    assert len({salted_namespace(*pair) for pair in pairs}) == len(pairs)


def test_operators_alone_see_and_change(guarded: Running) -> None:
    guarded.post(CHAT, asked(), **key("key-of-ann"))
    with guarded.http as client:
        for headers in ({}, key("key-of-ann")["headers"]):
            assert client.get("/", headers=headers).status_code == 401
            for verb in ("prefill", "explain", "mark", "clear"):
                answer = client.post(f"/cache/{verb}", json={"prompt": "x y z", "tenant": "ann"}, headers=headers)
                assert answer.status_code == 401, (verb, answer.text)
        assert client.get("/", auth=("anybody", "operator")).status_code == 200
        told = client.post("/cache/explain", json={"messages": messages("hello"), "tenant": "ann"}, **key("operator"))
        assert told.json()["resumed_tokens"] > 0
        told = client.post("/cache/explain", json={"messages": messages("hello"), "tenant": "bob"}, **key("operator"))
        assert told.json()["resumed_tokens"] == 0
        cleared = client.post("/cache/clear", json={"tenant": "ann"}, **key("operator"))
        assert cleared.json()["cleared_checkpoints"] > 0
        assert client.post("/cache/clear", json={"tenant": "eve"}, **key("operator")).status_code == 400
    assert cached(guarded.post(CHAT, asked(), **key("key-of-ann"))) == 0


def test_an_open_server_takes_operators_on_its_own_machine(served: Running) -> None:
    with served.http as client:
        assert client.get("/").status_code == 200
        for headers in ({"Origin": "https://elsewhere.example"}, {"Host": "elsewhere.example"}, {"Origin": "null"}):
            assert client.post("/cache/clear", json={}, headers=headers).status_code == 403, headers


def test_a_prefix_is_announced_explained_and_marked(served: Running) -> None:
    prompt = {"prompt": "Announced: " + messages("x")[0]["content"]}
    with served.http as client:
        before = client.post("/cache/explain", json=prompt).json()
        assert before["resumed_tokens"] == 0 and "nothing" in before["text"].lower()
        told = client.post("/cache/prefill", json=prompt).json()
        assert told["computed_tokens"] == told["prompt_tokens"] and told["captured"]
        assert client.post("/cache/mark", json=prompt).json()["marked_tokens"] == told["prompt_tokens"]
    answer = served.post("/v1/completions", {**prompt, "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == told["prompt_tokens"]
    with served.http as client:
        for body in (
            {},
            {"prompt": "x", "messages": messages("x")},
            {"prompt": 5},
            {"prompt": "", "tenant": "x"},
            {"foo": 1},
        ):
            for verb in ("prefill", "explain", "mark"):
                assert client.post(f"/cache/{verb}", json=body).status_code == 400


def test_handles_of_tenants_that_come_back_late_find_what_is_theirs(start: Callable[..., Running]) -> None:
    few = start(most_tenants=2)
    for salt in "abcd":
        few.post(CHAT, asked(cache_salt=salt))
    assert len(few.service.tenants.all()) == 2
    assert cached(few.post(CHAT, asked(cache_salt="a"))) > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_keys": {"": "a"}},
        {"api_keys": {"ü": "a"}},
        {"api_keys": {"k": "a"}, "admin_key": "k"},
        {"timeout": -1},
        {"most_waiting": 0},
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Settings(**wrong)
