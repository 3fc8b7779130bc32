"""Clients that leave, wait too long, or are too many."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import pytest
from served import Running


TEXT = "/v1/completions"
LONG = " ".join(f"door {number * 104729 % 99991}" for number in range(600))


def leave(server: Running, body: dict[str, Any], seconds: float) -> None:
    """Ask, and close the connection after some time."""
    with (
        suppress(httpx.HTTPError),
        httpx.Client(base_url=server.url, timeout=httpx.Timeout(60, read=seconds)) as client,
        client.stream("POST", TEXT, json=body) as answer,
    ):
        end = time.monotonic() + seconds
        for _ in answer.iter_raw():  # which may go on and on
            if time.monotonic() > end:
                break


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_who_leaves_while_the_prompt_is_read_frees_the_model(served: Running, stream: bool) -> None:
    prompt = f"{stream} {LONG}"
    started = time.monotonic()
    whole = served.post(TEXT, {"prompt": prompt + "!", "max_tokens": 1, "cache_salt": "whole"}).json()
    taken = time.monotonic() - started
    pieces = whole["usage"]["prompt_tokens"] / 64
    assert pieces > 20
    leave(served, {"prompt": prompt, "max_tokens": 1, "stream": stream}, taken / 8)
    served.idle()
    ticket = served.service.metrics.recent[-1]
    assert str(ticket.error) == "the client left" and not ticket.tokens
    # What was read of it was captured, or not; the next one is right and pays no more than the whole.
    again = served.post(TEXT, {"prompt": prompt, "max_tokens": 4}).json()
    fresh = served.post(TEXT, {"prompt": prompt, "max_tokens": 4, "cache_salt": f"{stream}"}).json()
    assert again["choices"][0]["text"] == fresh["choices"][0]["text"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_who_leaves_while_the_answer_is_written_frees_the_model(served: Running, stream: bool) -> None:
    leave(served, {"prompt": "short", "max_tokens": 100_000, "stream": stream}, 0.5)
    served.idle(10)
    ticket = served.service.metrics.recent[-1]
    assert str(ticket.error) == "the client left" and 0 < ticket.tokens < 100_000


def test_who_leaves_while_waiting_costs_nothing(served: Running) -> None:
    busy = threading.Thread(target=leave, args=(served, {"prompt": "busy", "max_tokens": 100_000}, 1.5))
    busy.start()
    time.sleep(0.3)
    leave(served, {"prompt": "never read", "max_tokens": 5}, 0.3)
    busy.join()
    served.idle()
    gone = next(ticket for ticket in served.service.metrics.recent if ticket.started is None)
    assert str(gone.error) == "the client left" and not gone.requests


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_request_ends_in_time(start: Callable[..., Running], stream: bool) -> None:
    hasty = start(timeout=0.6)
    answer = hasty.post(TEXT, {"prompt": "x", "max_tokens": 100_000, "stream": stream})
    assert answer.status_code == (200 if stream else 408) and "took too long" in answer.text
    waiting = threading.Thread(target=leave, args=(hasty, {"prompt": "x", "max_tokens": 100_000}, 5))
    waiting.start()
    answer = hasty.post(TEXT, {"prompt": "y", "max_tokens": 100_000, "stream": stream})
    assert "took too long" in answer.text
    waiting.join()
    hasty.idle()
    assert hasty.post(TEXT, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_full_line_says_when_to_come_back(start: Callable[..., Running]) -> None:
    narrow = start(most_waiting=2)
    threads = [
        threading.Thread(target=leave, args=(narrow, {"prompt": f"{n}", "max_tokens": 100_000}, 2)) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    while narrow.service.line.inside < 3:
        time.sleep(0.01)
    refused = narrow.post(TEXT, {"prompt": "x", "max_tokens": 1})
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 600
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()
    narrow.idle()
    assert narrow.post(TEXT, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_many_who_leave_at_random_leave_nothing_behind(served: Running) -> None:
    """Each of them asks for more than it waits for, whole or in parts, in one of two conversations."""
    draw = random.Random(7)

    def visit(seed: int) -> None:
        own = random.Random(seed)
        body = {"prompt": LONG[: own.randrange(200, 6000)], "max_tokens": own.choice((1, 20, 10_000))}
        leave(served, {**body, "stream": own.random() < 0.5}, own.uniform(0.02, 0.6))

    for _ in range(4):
        threads = [threading.Thread(target=visit, args=(draw.randrange(10**6),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    served.idle()
    assert not served.service.live and not served.service.line.inside
    with served.service.store.lock:
        served.service.store.verify()
    prompt = {"prompt": LONG[:3000], "max_tokens": 6}
    warm, cold = served.post(TEXT, prompt).json(), served.post(TEXT, {**prompt, "cache_salt": "cold"}).json()
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]
