"""A front reads prompts without a model: the very tokens that the server reads, and whose they are."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from served import NAME, WORDS, Running, messages

from hf_sparse_cache.planning.cuts import Tokens
from hf_sparse_cache.serving.model import Loading
from hf_sparse_cache.serving.prompts import PromptReader
from hf_sparse_cache.serving.settings import salted_namespace
from hf_sparse_cache.store.unit import namespace_of


CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOOL = {"type": "function", "function": {"name": "open", "parameters": {"type": "object", "properties": {}}}}
# Each has another end, as the prompts of all of them lie in one store.
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": messages("hello")}),
    (CHAT, {"messages": messages("where", "there", "and then"), "cache_salt": "pepper"}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": WORDS[:400]}]}]}),
    (TEXT, {"prompt": WORDS[:500]}),
    (TEXT, {"prompt": WORDS[200:900], "cache_salt": "salt"}),
    (RESPONSES, {"input": WORDS[300:800]}),
    (RESPONSES, {"input": [{"role": "user", "content": WORDS[100:700]}], "instructions": "Be brief."}),
]


@pytest.fixture(scope="module")
def reader() -> PromptReader:
    return PromptReader(Loading(NAME, learn_from=WORDS).processor(), {})


def read(reader: PromptReader, path: str, body: Any, tenant: str = "") -> tuple[str, Tokens, str]:
    return reader.read(path, json.dumps(body).encode(), tenant)


def stored(server: Running, namespace: str, ids: Tokens) -> int:
    """How many tokens of a prompt the server has a checkpoint behind."""
    paths = [path for space, path, _ in server.service.store.checkpoints() if namespace_of(space) == namespace]
    return max((len(path) for path in paths if len(path) <= len(ids) and (ids[: len(path)] == path).all()), default=0)


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[f"{n}-{path}" for n, (path, _) in enumerate(BODIES)])
def test_it_reads_what_the_server_reads(
    served: Running, reader: PromptReader, path: str, body: dict[str, Any]
) -> None:
    namespace, ids, _ = read(reader, path, body)
    assert ids.dtype == np.int32 and ids.ndim == 1 and namespace == salted_namespace("", body.get("cache_salt", ""))
    before = stored(served, namespace, ids)
    most = {"max_output_tokens": 1} if path == RESPONSES else {"max_tokens": 1}
    answer = served.post(path, {**body, **most})
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert len(ids) == usage["input_tokens" if path == RESPONSES else "prompt_tokens"]
    # The end of a prompt is stored: these very tokens, in this namespace, and no others.
    assert stored(served, namespace, ids) == len(ids) > before
    other = ids.copy()
    other[0] += 1
    assert stored(served, namespace, other) == stored(served, "elsewhere", ids) == 0


def test_what_operators_ask_for_is_read_too(reader: PromptReader) -> None:
    chat = {"messages": messages("hello")}
    namespace, ids, _ = read(reader, "/cache/prefill", {**chat, "tenant": "ann", "cache_salt": "x"}, "")
    assert namespace == salted_namespace("ann", "x") and (ids == read(reader, CHAT, chat)[1]).all()
    text = {"prompt": WORDS[:300]}
    assert (read(reader, "/cache/explain", text)[1] == read(reader, TEXT, text)[1]).all()


def test_a_session_is_named_by_a_text_or_by_nothing(reader: PromptReader) -> None:
    body: dict[str, Any] = {"messages": messages("hello")}
    assert read(reader, CHAT, body, "ann")[::2] == ("ann", "")
    assert read(reader, CHAT, {**body, "prompt_cache_key": "mine"}, "ann")[::2] == ("ann", "mine")


def test_the_template_of_all_chats_and_of_one(reader: PromptReader) -> None:
    """Tools and arguments of the template change the prompt, where the template looks at them."""
    processor = Loading(NAME, learn_from=WORDS).processor()
    processor.chat_template = (
        "{% for message in messages %}{{ message['content'] }} {% endfor %}{{ mood }} {{ tools | length if tools }}"
    )
    plain, calm = PromptReader(processor, {}), PromptReader(processor, {"mood": "calm"})
    body = {"messages": messages("hello")}
    found = [
        processor.decode(read(*asked)[1])
        for asked in (
            (plain, CHAT, body),
            (calm, CHAT, body),
            (calm, CHAT, {**body, "chat_template_kwargs": {"mood": "wild"}}),
            (plain, CHAT, {**body, "tools": [TOOL]}),
        )
    ]
    assert len(set(found)) == 4 and "calm" in found[1] and "wild" in found[2] and "calm" not in found[2]


@pytest.mark.parametrize(
    ("path", "body"),
    [(TEXT, {"prompt": 7}), (TEXT, {}), (CHAT, {"messages": []}), (CHAT, {"messages": "hello"}), (TEXT, [1, 2]),
     (RESPONSES, {}), ("/cache/prefill", {})],
)  # fmt: skip
def test_what_is_no_prompt_is_left_to_who_answers(reader: PromptReader, path: str, body: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017  # of any kind: the front sends such a request to any replica
        read(reader, path, body)
