"""A server that is told to stop, and the next one, which goes on warm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from commands import Run
from served import NAME, messages


def begin(folder: Path, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    """The command itself, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "hf_sparse_cache", "serve", NAME, "--port", str(port), "--disk-memory", "200MB",
        "--disk-dir", str(folder), "--log-level", "warning", "--drain", "2", *options,
    ]  # fmt: skip
    with open(folder.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            httpx.get(f"{url}/health")
            return process, url
        except httpx.HTTPError:
            assert process.poll() is None, folder.with_suffix(".log").read_text()[-2000:]
            assert time.monotonic() < end
            time.sleep(0.1)


def chat(url: str, text: str = "hello", **fields: Any) -> Any:
    body = {"messages": messages(text), "max_tokens": 2, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_next_start_answers_the_old_conversation_warm(tmp_path: Path) -> None:
    process, url = begin(tmp_path)
    first = chat(url)
    ended: list[int] = []

    def ask_for_too_much() -> None:
        body = {"prompt": "x", "max_tokens": 10**6}
        ended.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code)

    running = threading.Thread(target=ask_for_too_much)
    running.start()
    time.sleep(0.5)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert time.monotonic() - told < 20
    running.join()
    assert ended == [503]
    process, url = begin(tmp_path)
    try:
        again = chat(url)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"]
    assert again["choices"][0]["message"]["content"] == first["choices"][0]["message"]["content"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("first", "second", "reused"), [("exact", "exact", True), ("bf16", "bf16", True), ("exact", "bf16", False)]
)
def test_what_one_server_read_another_resumes_in_the_same_storage(
    tmp_path: Path, first: str, second: str, reused: bool
) -> None:
    found = []
    for name, storage in (("one", first), ("other", second)):
        process, url = begin(tmp_path / name, "--shared", str(tmp_path / "shared"), "--storage", storage)
        try:
            found.append(chat(url))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
    before, after = (answer["usage"] for answer in found)
    assert before["prompt_tokens_details"]["cached_tokens"] == 0
    assert (after["prompt_tokens_details"]["cached_tokens"] > 0.9 * before["prompt_tokens"]) is reused
    if first == second:
        assert found[1]["choices"][0]["message"]["content"] == found[0]["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere"], "no folder, Hub id or built-in model"),
        ([NAME, "--api-key", "secret"], "--api-key is given without a name"),
        ([NAME, "--tenant-memory", "ann=1GB"], "which no --api-key names"),
        ([NAME, "--max-memory", "much"], "is not a size"),
        ([NAME, "--chat-template", "/nowhere"], "--chat-template /nowhere cannot be read"),
        ([NAME, "--chat-template-kwargs", "[]"], "--chat-template-kwargs must be a JSON object"),
        ([NAME, "--log-level", "loud"], "--log-level is 'loud'"),
        ([NAME, "--exactness", "maybe"], "exactness"),
        ([NAME, "--storage", "tiny"], "storage must be 'exact', 'bf16' or 'int8', not 'tiny'"),
        ([NAME, "--timeout", "-1"], "timeout is -1"),
    ],
)
def test_options_that_cannot_be(run: Run, options: list[str], said: str) -> None:
    code, _, error = run("serve", *options)
    assert code == 2 and said in error and "secret" not in error, error
