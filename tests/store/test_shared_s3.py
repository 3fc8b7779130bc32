"""The shared store on an S3-compatible server that the tests start: `make test-shared`; skipped without moto, s3fs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import shared_worker
import torch
from persisting import cold_logits, handle, logits, question
from reference_store import Blob
from sharing import drained, prompt, serve, written

from hf_sparse_cache import CheckpointStore
from hf_sparse_cache.store import behind, keeper, shared


moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed: make test-shared")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: make test-shared")

# Third parties' own warnings, about threads and sockets of theirs.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = moto_server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server,
    }.items():
        monkeypatch.setenv(name, value)
    for owner, name in ((shared, "LOOK_SECONDS"), (shared, "READ_SECONDS"), (behind, "_STALLED_SECONDS")):
        monkeypatch.setattr(owner, name, 120.0)  # the server is Python on a machine that does other things too
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    fs.mkdir(name)
    return f"s3://{name}/prefix"


def opened(url: str, **options: Any) -> CheckpointStore:
    store = CheckpointStore("1GiB", "lru", shared=url, **options)
    store.read_with(Blob.from_bytes)
    return store


def files_at(url: str) -> list[str]:
    found: list[str] = s3fs.S3FileSystem(skip_instance_cache=True).find(url)
    return found


def test_what_one_stored_another_resumes(bucket: str) -> None:
    first = opened(bucket)
    assert serve(first, prompt(1, 3000), (128, 1024, 2048)) == 0
    assert written(first)["written"] == 3
    second = opened(bucket)
    assert serve(second, prompt(1, 3000, 2100)) == 2048
    assert serve(opened(bucket), prompt(1, 3000, 1500, 7)) == 1024
    assert serve(opened(bucket), prompt(2, 3000)) == 0
    assert serve(opened(bucket, key="a key of sixteen bytes"), prompt(1, 3000)) == 0


@pytest.mark.parametrize("kind", ["state-", "kv-"])
@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_damaged_objects_are_put_aside(bucket: str, kind: str, how: str) -> None:
    serve(store := opened(bucket), prompt(1, 1300), (512, 1024))
    written(store)
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    for path in files_at(bucket):
        if kind in path.rpartition("/")[2]:
            data = bytearray(fs.cat_file(path))
            data[len(data) // 2] ^= 1
            if how == "deleted":
                fs.rm_file(path)
            else:
                fs.pipe_file(path, bytes(data if how == "flipped" else data[:-5]))
    other = opened(bucket)
    assert serve(other, prompt(1, 1300)) == 0
    counts = written(other)
    assert (how == "deleted" and kind == "state-") or any("put aside" in what for what in counts), counts
    serve(third := opened(bucket), prompt(1, 1300), (512, 1024))
    written(third)
    counts |= {f"third: {what}": count for what, count in written(third).items()}
    assert serve(fourth := opened(bucket), prompt(1, 1300)) == 1024, (counts, fourth.shared.counts)  # type: ignore[union-attr]


def test_the_budget_holds(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its clock counts whole seconds: within one of them nothing tells the latest unit from the others.
    monkeypatch.setattr(keeper, "FRESH_SECONDS", 1.5)
    stores = [opened(bucket, shared_memory=120_000) for _ in range(2)]
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    for first in range(24):
        serve(stores[first % 2], prompt(first, 700), (512,))
        drained(stores[first % 2])
    assert sum(item["size"] for item in fs.find(bucket, detail=True).values()) <= 120_000 * 1.05
    assert serve(opened(bucket), prompt(23, 700)) == 512


def test_a_server_that_goes_away_costs_no_request(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LOOK_SECONDS", 1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = opened(bucket)
    assert serve(store, prompt(1, 1300), (512,)) == 0
    assert serve(store, prompt(1, 1300)) == 512
    assert store.shared is not None and any(what.startswith("failed") for what in store.shared.counts)
    store.shared.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_connects_anew(bucket: str) -> None:
    serve(store := opened(bucket), prompt(1, 1300), (1024,))
    written(store)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if serve(store, prompt(1, 1300)) == 1024 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("mode", ["bitwise", "replayable"])
def test_a_model_in_another_process(bucket: str, mode: str) -> None:
    worker = Path(shared_worker.__file__)
    command = [sys.executable, str(worker), bucket, f"Zamba2:{mode}:1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    model, ids = shared_worker.model("Zamba2"), question(2)
    store = CheckpointStore(shared=f"{bucket}/Zamba2-{mode}")
    assert store.shared is not None
    store.shared.tier.storage.least_tokens = 2  # a tiny model's prompts are short
    with handle(model, store=store, exactness=mode) as cache:
        warm = logits(model, ids, cache)
        assert cache.last_request is not None and cache.last_request.resumed_tokens > 0
        if mode == "replayable":
            assert torch.equal(warm[0], shared_worker.replayed(cache, ids, cache.last_request.segments))
        else:
            assert torch.equal(warm, cold_logits(model, ids))
    store.close(flush=False)


def test_inspect_reads_a_bucket(bucket: str) -> None:
    from hf_sparse_cache.cli import inspecting

    serve(store := opened(bucket), prompt(1, 1300), (512, 1024))
    written(store)
    assert sorted(len(item.tokens) for item in inspecting.stored_in(bucket)) == [512, 1024]
