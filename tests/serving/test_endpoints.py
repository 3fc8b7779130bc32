"""What the three endpoints answer: as `generate()` without a cache, with the tokens counted that were not read."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from served import NAME, Running, messages


ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def body(path: str, text: str, **fields: Any) -> dict[str, Any]:
    """A request with one and the same text at whichever endpoint."""
    prompt = messages(text)
    if path == "/v1/chat/completions":
        return {"messages": prompt, "max_tokens": 4, **fields}
    if path == "/v1/completions":
        return {"prompt": f"{prompt[0]['content']} {text}", "max_tokens": 4, **fields}
    return {"input": prompt, "max_output_tokens": 4, **fields}


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, whose last word is not JSON."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def cached(usage: dict[str, Any]) -> int:
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    tokens: int = details["cached_tokens"]
    return tokens


def streamed_usage(found: list[Any]) -> dict[str, Any]:
    last = found[-1]
    usage: dict[str, Any] = last["response"]["usage"] if "response" in last else last["usage"]
    return usage


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_tokens_that_were_not_read_are_counted(served: Running, path: str, stream: bool) -> None:
    name = f"{path} {stream}"
    usages = []
    for text in ("one", "two", "three", "three"):
        answer = served.post(path, body(path, f"{name}: what is in room {text}?", stream=stream))
        usages.append(streamed_usage(events(answer)) if stream else answer.json()["usage"])
    counted = [usage.get("prompt_tokens") or usage["input_tokens"] for usage in usages]
    assert cached(usages[2]) > 0.8 * counted[2] and cached(usages[3]) == counted[3]
    assert all(0 <= cached(usage) <= count for usage, count in zip(usages, counted, strict=True))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answers_are_those_of_generate_without_a_cache(served: Running, stream: bool) -> None:
    """Warm answers, beside stock `generate()` on the same messages."""
    model, tokenizer = served.service.model, served.service.tokenizer
    for question in ("first?", "second?", "third?"):
        answer = served.post(ENDPOINTS[0], body(ENDPOINTS[0], question, max_tokens=12, stream=stream))
        if stream:
            text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events(answer))
        else:
            text = answer.json()["choices"][0]["message"]["content"]
        inputs = tokenizer.apply_chat_template(
            messages(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        stock = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(stock[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_next_turn_reads_its_message(served: Running) -> None:
    texts = ["Where is room 7?"]
    for turn in range(4):
        found = served.chat(*texts, max_tokens=16)
        usage = found["usage"]
        if turn:
            assert usage["prompt_tokens"] - cached(usage) <= 80
        texts += [found["choices"][0]["message"]["content"], f"And room {turn}?"]


def test_usage_comes_apart_when_it_is_asked_for(served: Running) -> None:
    for path in ENDPOINTS[:2]:
        asked = body(path, "apart", stream=True, stream_options={"include_usage": True}, n=2)
        found = events(served.post(path, asked))
        assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 8
        assert not any(event.get("usage") for event in found[:-1])
        assert len({event["id"] for event in found}) == 1
        assert {event["choices"][0]["index"] for event in found[:-1]} == {0, 1}


def test_choices_with_a_seed_come_again(served: Running) -> None:
    asked = body(ENDPOINTS[1], "sampled", n=3, seed=5, temperature=1.5, max_tokens=6)
    first, second = (served.post(ENDPOINTS[1], asked).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in second["choices"]] and len(set(texts)) > 1
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert first["usage"]["completion_tokens"] == 18
    assert first["usage"]["total_tokens"] == first["usage"]["prompt_tokens"] + 18
    other = served.post(ENDPOINTS[1], {**asked, "seed": 6}).json()
    assert texts != [choice["text"] for choice in other["choices"]]


def test_seeds_of_requests_that_run_beside_each_other_do_not_mix(served: Running) -> None:
    asked = [body(ENDPOINTS[1], "mixed", seed=seed, temperature=1.5, max_tokens=6) for seed in range(4)]
    alone = [served.post(ENDPOINTS[1], one).json()["choices"][0]["text"] for one in asked]
    found: dict[int, str] = {}

    def ask(seed: int) -> None:
        found[seed] = served.post(ENDPOINTS[1], asked[seed]).json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == alone


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(served: Running, stream: bool) -> None:
    plain = served.post(ENDPOINTS[1], body(ENDPOINTS[1], "stopping", max_tokens=24)).json()["choices"][0]["text"]
    middle = len(plain) // 2
    stop = plain[middle : middle + 3]
    end = plain.index(stop)
    answer = served.post(ENDPOINTS[1], body(ENDPOINTS[1], "stopping", max_tokens=24, stop=[stop], stream=stream))
    if stream:
        found = events(answer)
        text = "".join(event["choices"][0]["text"] for event in found)
        reason = found[-1]["choices"][0]["finish_reason"]
    else:
        text, reason = (answer.json()["choices"][0][name] for name in ("text", "finish_reason"))
    assert text == plain[:end] and reason == "stop"


def test_log_probabilities_are_those_of_the_model(served: Running) -> None:
    asked = body(ENDPOINTS[0], "probable", logprobs=True, top_logprobs=3)
    content = served.post(ENDPOINTS[0], asked).json()["choices"][0]["logprobs"]["content"]
    model, tokenizer = served.service.model, served.service.tokenizer
    inputs = tokenizer.apply_chat_template(
        messages("probable"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    stock = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert len(content) == 4
    for entry, logits in zip(content, stock.logits, strict=True):
        scores = torch.log_softmax(logits[0].float(), -1)
        assert entry["logprob"] == pytest.approx(float(scores.max()), abs=1e-4)
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] and len(entry["top_logprobs"]) == 3
    text = served.post(ENDPOINTS[1], body(ENDPOINTS[1], "probable", logprobs=2)).json()["choices"][0]
    assert "".join(text["logprobs"]["tokens"]) == text["text"] and len(text["logprobs"]["top_logprobs"][0]) == 2


def test_the_official_client(served: Running) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == [NAME]
    asked: Any = {"model": NAME, "messages": messages("client"), "max_tokens": 4}
    whole = client.chat.completions.create(**asked)
    parts = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    response = client.responses.create(model=NAME, input=asked["messages"], max_output_tokens=4)
    assert response.output_text == text
    with client.responses.stream(model=NAME, input=asked["messages"], max_output_tokens=4) as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == text
    with pytest.raises(openai.BadRequestError, match="presence_penalty") as refused:
        client.chat.completions.create(**asked, presence_penalty=1.0)
    assert refused.value.param == "presence_penalty"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(**{**asked, "model": "other"})


def test_tools_reach_the_template(served: Running) -> None:
    template = served.service.tokenizer.chat_template
    served.service.tokenizer.chat_template = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + template
    try:
        tool = {"type": "function", "function": {"name": "open_door", "parameters": {"type": "object"}}}
        plain = served.chat("tools")["usage"]["prompt_tokens"]
        assert served.chat("tools", tools=[tool])["usage"]["prompt_tokens"] > plain
        assert served.chat("tools", tools=[tool], tool_choice="none")["usage"]["prompt_tokens"] == plain
    finally:
        served.service.tokenizer.chat_template = template


def test_a_template_that_refuses_the_messages_is_the_clients_error(served: Running) -> None:
    template = served.service.tokenizer.chat_template
    served.service.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        answer = served.post(ENDPOINTS[0], body(ENDPOINTS[0], "x"))
        assert answer.status_code == 400 and "roles must alternate" in answer.json()["error"]["message"]
    finally:
        served.service.tokenizer.chat_template = template
