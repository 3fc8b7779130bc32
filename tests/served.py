"""A server of a tiny model on a port of this machine, and how tests ask it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from hf_sparse_cache import CheckpointStore, SparseCacheConfig
from hf_sparse_cache.serving.listening import Address, PortServer
from hf_sparse_cache.serving.service import Service
from hf_sparse_cache.serving.settings import Settings


NAME = "jamba-3m"
WORDS = " ".join(f"room {number} has the code {number * 7919 % 10007}." for number in range(400))
SYSTEM = {"role": "system", "content": WORDS[:3000]}


@dataclass
class Running:
    """A server that runs."""

    service: Service
    server: PortServer
    thread: threading.Thread
    url: str

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        with self.http as client:
            return client.post(path, json=body, **more)

    def chat(self, *texts: str, **fields: Any) -> dict[str, Any]:
        """One answer to a chat whose user and assistant speak in turn."""
        answer = self.post("/v1/chat/completions", {"messages": messages(*texts), "max_tokens": 4, **fields})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def idle(self, seconds: float = 30) -> None:
        """Wait until nobody is served."""
        end = time.monotonic() + seconds
        while self.service.line.inside or self.service.live:
            assert time.monotonic() < end, (self.service.line.inside, self.service.live)
            time.sleep(0.01)


def messages(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [SYSTEM, *({"role": roles[index % 2], "content": text} for index, text in enumerate(texts))]


def start(
    manager: Any, store: CheckpointStore | None = None, exactness: str = "replayable", **settings: Any
) -> Running:
    """A server of a model that is loaded, on a port that is free."""
    config = SparseCacheConfig(exactness=exactness, pieces=64 if exactness == "replayable" else None)
    store = CheckpointStore("200MB") if store is None else store
    service = Service(manager, store, config, Settings(**{"timeout": 60.0, **settings}))
    server = PortServer(service, Address(port=0, drain=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    return Running(service, server, thread, f"http://127.0.0.1:{port}")


def stop(one: Running) -> None:
    """Have it end as a signal would."""
    one.server.should_exit = True
    one.thread.join(30)
    assert not one.thread.is_alive()
