"""Replicas on Ray Serve: prompts find their prefixes, a killed replica costs no request, scaling loses nothing.

One cluster of small processes serves all tests, in their order: `make test-ray`, as Ray is no part of `[dev]`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest


ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402
from served import NAME, WORDS, messages  # noqa: E402

from hf_sparse_cache.serving.listening import Address, PortServer  # noqa: E402
from hf_sparse_cache.serving.options import RayOptions  # noqa: E402
from hf_sparse_cache.serving.ray_app import build  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own making, in every one of its threads

FOLDERS = [parent / "shared" / "workloads" for parent in Path(__file__).parents]
SETTINGS: dict[str, Any] = {
    "model": NAME, "learn_from": WORDS, "max_memory": "200MB", "api_keys": ("ann=1234", "bob=5678"), "pieces": 256,
    "admin_key": "operator",
}  # fmt: skip
FLEET: dict[str, Any] = {"cpus": 0, "publish_seconds": 0.3, "most_ahead": 4, "drain": 20}
KEYS = {"ann": {"Authorization": "Bearer 1234"}, "bob": {"Authorization": "Bearer 5678"}}
ADMIN = {"Authorization": "Bearer operator"}
PATIENCE = 300.0


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


class Cluster:
    """Ray Serve on this machine, and how it is asked."""

    def __init__(self) -> None:
        os.environ |= {
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
            "RAY_worker_niceness": "0",  # as `serve --replicas` has it: beside other work, Ray's own 15 is hardly any
        }  # fmt: skip
        number = port()
        self.url = f"http://127.0.0.1:{number}"
        ray.init(
            num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, logging_level="error",
            log_to_driver=False,
        )  # fmt: skip
        options = {"host": "127.0.0.1", "port": number, "request_timeout_s": 600}
        for _ in range(
            5
        ):  # a slow machine takes longer than Ray waits, and the second call finds what the first began
            try:
                serve.start(http_options=options)
                break
            except TimeoutError:
                continue

    def run(self, **settings: Any) -> None:
        serve.run(build(RayOptions(**{**SETTINGS, **FLEET, **settings})))
        self.wait(lambda: self.health() == 200)

    def health(self) -> int:
        try:
            return httpx.get(f"{self.url}/health", timeout=60).status_code
        except httpx.HTTPError:
            return 0

    def wait(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < end
            time.sleep(0.1)

    def replicas(self) -> list[str]:
        """Those that run."""
        found = serve.status().applications["default"].deployments["Replica"].replica_states
        return ["RUNNING"] * found.get("RUNNING", 0)

    def post(self, path: str, body: Any, who: str = "ann", **headers: str) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers={**KEYS[who], **headers}, timeout=PATIENCE)

    def chat(self, *texts: str, who: str = "ann", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": messages(*texts), "max_tokens": 2, **fields}, who)

    def clear(self) -> None:
        for who in KEYS:
            answer = httpx.post(f"{self.url}/cache/clear", json={"tenant": who}, headers=ADMIN, timeout=PATIENCE)
            assert answer.status_code == 200, answer.text
        time.sleep(3 * FLEET["publish_seconds"])  # until the routers know


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    one = Cluster()
    one.run(replicas=2)
    yield one
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def alone() -> Iterator[str]:
    """One server with all the traffic, as `hf-sparse-cache serve` is one."""
    options = RayOptions(**SETTINGS).of_each()
    server = PortServer(options.service(), Address(port=0, drain=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def recorded(name: str, groups: int, each: int) -> list[dict[str, Any]]:
    """Bodies of the first requests of some groups of a workload, one group's in turn with the others', cut to size."""
    folder = next((found for base in FOLDERS if (found := base / name).is_dir()), None)
    if folder is None:
        pytest.skip(f"the recorded requests of {name} are not here")
    texts = {
        row["id"]: row for row in map(json.loads, (folder / "texts.jsonl").read_text("utf-8").rstrip().split("\n"))
    }
    members: dict[str, list[Any]] = defaultdict(list)
    for row in map(json.loads, (folder / "requests.jsonl").read_text("utf-8").rstrip().split("\n")):
        if len(members) < groups or row["group_id"] in members:
            members[row["group_id"]].append([texts[text] for text in row["segments"]])
    bodies = []
    for turn in range(each):
        for name_of, rows in members.items():
            parts = rows[turn] if turn < len(rows) else rows[-1]
            said = [
                {"role": part.get("role", "user"), "content": part["text"][: 1500 if not number else 200] or "-"}
                for number, part in enumerate(parts)
            ]
            bodies.append({"messages": said, "max_tokens": 1, "prompt_cache_key": name_of})
    return bodies


def cached(url: str, bodies: list[dict[str, Any]], sessions: bool) -> tuple[int, int]:
    """Tokens that were cached of those that were asked, one request after the other."""
    found = [0, 0]
    for body in bodies:
        fields = body if sessions else {name: value for name, value in body.items() if name != "prompt_cache_key"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=fields, headers=KEYS["ann"], timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        found[0] += usage["prompt_tokens_details"]["cached_tokens"]
        found[1] += usage["prompt_tokens"]
    return found[0], found[1]


# An odd number of groups: with an even one two replicas that take turns would each have half of them to themselves.
TRAFFIC = {"agent_tau_airline": (5, 4), "sysprompts_open": (5, 4)}
_ALONE: dict[str, int] = {}


@pytest.fixture(params=sorted(TRAFFIC))
def traffic(request: pytest.FixtureRequest, alone: str) -> tuple[list[dict[str, Any]], int]:
    """Requests, and how many of their tokens one server has cached that gets them all."""
    name = request.param
    bodies = recorded(name, *TRAFFIC[name])
    if name not in _ALONE:
        _ALONE[name] = cached(alone, bodies, sessions=False)[0]
    return bodies, _ALONE[name]


def test_it_answers_as_the_server_does(cluster: Cluster) -> None:
    first, again = cluster.chat("hello").json(), cluster.chat("hello").json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"]
    assert again["choices"][0]["message"]["content"] == first["choices"][0]["message"]["content"]
    other = cluster.chat("hello", who="bob").json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    body = {"messages": messages("hello"), "max_tokens": 3, "stream": True}
    lines = [line for line in cluster.post("/v1/chat/completions", body).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 2
    assert cluster.post("/v1/completions", {"prompt": 7}).status_code == 400
    assert httpx.post(f"{cluster.url}/v1/completions", json={"prompt": "a b"}, timeout=60).status_code == 401
    assert cluster.post("/nowhere", {}).status_code == 404
    assert cluster.post("/v1/responses", {"input": "hello", "max_output_tokens": 2}).status_code == 200
    figures = httpx.get(f"{cluster.url}/metrics", timeout=60).text
    for number in range(2):
        assert f'hf_sparse_cache_checkpoints{{replica="{number}",tier="memory"}}' in figures
    asked = {"tenant": "ann", "messages": messages("hello")}
    told = httpx.post(f"{cluster.url}/cache/explain", json=asked, headers=ADMIN, timeout=60).json()
    assert told["resumed_tokens"] == first["usage"]["prompt_tokens"], told


def test_two_replicas_have_cached_what_one_would(cluster: Cluster, traffic: tuple[Any, int]) -> None:
    bodies, wanted = traffic
    cluster.clear()
    found, asked = cached(cluster.url, bodies, sessions=False)
    print(f"2 replicas, prefix: {found} of {asked} tokens cached, {wanted} by one")
    assert found >= 0.95 * wanted > 0


def test_a_killed_replica_costs_no_request(cluster: Cluster) -> None:
    bodies = [{"prompt": f"{WORDS[:600]} {number % 8}", "max_tokens": 24, "seed": 1} for number in range(16)]
    bodies += [{**body, "stream": True} for body in bodies[:8]]

    def ask(body: dict[str, Any]) -> httpx.Response:
        return cluster.post("/v1/completions", body)

    calm = [ask(body) for body in bodies[:8]]
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, body) for body in bodies]
        while sum(future.done() for future in asked) < 6:
            time.sleep(0.02)
        kill_one()
        answers = [future.result() for future in asked]
    assert [answer.status_code for answer in answers] == [200] * len(bodies)
    for number, answer in enumerate(answers):
        wanted = calm[number % 8].json()["choices"][0]["text"]
        # A stream leaves out half a character at the end, which is shown as a mark of replacement.
        assert text_of(answer).rstrip("\ufffd") == wanted.rstrip("\ufffd") != "", number
    cluster.wait(lambda: len(cluster.replicas()) == 2)


def kill_one() -> None:
    """Kill the process of one replica, as a machine would that goes down."""
    names = [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "#Replica#" in actor["name"]
    ]
    ray.kill(ray.get_actor(sorted(names)[0], namespace="serve"))


def text_of(answer: httpx.Response) -> str:
    if not answer.headers["content-type"].startswith("text/event-stream"):
        text: str = answer.json()["choices"][0]["text"]
        return text
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]" and not any("error" in event for event in events)
    parts = [choice["text"] for event in events for choice in json.loads(event)["choices"]]
    assert len({json.loads(event)["id"] for event in events}) == 1
    return "".join(parts)


def test_scaling_up_and_down_loses_nothing(cluster: Cluster, traffic: tuple[Any, int]) -> None:
    bodies, wanted = traffic
    going, lost = True, []

    def keep_asking() -> None:
        while going:
            answer = cluster.chat("hello", str(time.monotonic()), "and")
            lost.extend([answer.text] if answer.status_code != 200 else [])

    cluster.run(replicas=2)
    crowd = [threading.Thread(target=keep_asking) for _ in range(2)]
    for thread in crowd:
        thread.start()
    cluster.run(replicas=4)
    cluster.wait(lambda: len(cluster.replicas()) == 4)
    going = False
    for thread in crowd:
        thread.join()
    cluster.clear()
    found, asked = cached(cluster.url, bodies, sessions=True)
    print(f"4 replicas, prefix and sessions: {found} of {asked} tokens cached, {wanted} by one")
    going = True
    crowd = [threading.Thread(target=keep_asking) for _ in range(2)]
    for thread in crowd:
        thread.start()
    cluster.run(replicas=2)
    cluster.wait(lambda: len(cluster.replicas()) == 2)
    going = False
    for thread in crowd:
        thread.join()
    assert lost == [] and found > 0
    assert found >= 0.95 * wanted


def test_round_robin_beside_it(cluster: Cluster, traffic: tuple[Any, int]) -> None:
    """The twin: a router that does not look at prefixes reaches less, or the figures above would say nothing."""
    bodies, wanted = traffic
    cluster.run(replicas=2, router="round_robin")
    cluster.clear()
    found, asked = cached(cluster.url, bodies, sessions=False)
    print(f"2 replicas, round robin: {found} of {asked} tokens cached, {wanted} by one")
    assert found < 0.95 * wanted
