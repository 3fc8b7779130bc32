"""Two processes with one shared store: what one read the other resumes, bit for bit, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import shared_worker
import torch
from persisting import cold_logits, handle, logits, question

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.models.tensors import LayerTensors


WORKER = Path(shared_worker.__file__)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process of its own left in a shared store, of two families in both modes."""
    folder = tmp_path_factory.mktemp("left")
    asked = [f"{family}:{mode}:1" for family in ("Mamba", "Zamba2") for mode in ("bitwise", "replayable")]
    run = subprocess.run(
        [sys.executable, str(WORKER), str(folder), *asked], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return folder


@pytest.fixture
def shared_folder(left: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return shutil.copytree(left, tmp_path / "shared")


@pytest.mark.parametrize("family", ["Mamba", "Zamba2"])
@pytest.mark.parametrize("mode", ["bitwise", "replayable"])
def test_what_another_process_read_is_resumed(shared_folder: Path, family: str, mode: str) -> None:
    model, store = shared_worker.model(family), CheckpointStore(shared=shared_folder / f"{family}-{mode}")
    ids = question(2)
    with handle(model, store=store, exactness=mode) as cache:
        assert cache.explain(ids).resumed_tokens > 0
        warm = logits(model, ids, cache)
        assert cache.last_request is not None and cache.last_request.resumed_tokens > 0
        assert cache.stats().shared["resumed from"] == 1
        if mode == "replayable":
            again = shared_worker.replayed(cache, ids, cache.last_request.segments)
            assert torch.equal(warm[0], again)
            assert not torch.equal(warm[0], shared_worker.replayed(cache, question(3), cache.last_request.segments))
        else:
            assert torch.equal(warm, cold_logits(model, ids))
            assert not torch.equal(warm, cold_logits(model, question(3)))
    store.close(flush=False)


def test_a_wrong_state_is_noticed(shared_folder: Path) -> None:
    model, ids = shared_worker.model("Zamba2"), question(2)
    store = CheckpointStore(shared=shared_folder / "Zamba2-bitwise")
    with handle(model, store=store) as cache:

        def wrong(data: bytes) -> Any:
            payload = LayerTensors.from_bytes(data)
            for layer in payload.layers:
                for value in layer.values():
                    if torch.is_tensor(value) and value.dtype.is_floating_point:
                        value.mul_(1.5)
            return payload

        cache.store.read_with(wrong)
        spoiled = logits(model, ids, cache)
        assert cache.last_request is not None and cache.last_request.resumed_tokens > 0
    store.close(flush=False)
    assert not torch.equal(spoiled, cold_logits(model, ids))


def test_what_does_not_fit_is_not_served_and_explain_says_why(shared_folder: Path) -> None:
    model, ids = shared_worker.model("Mamba"), question(2)
    store = CheckpointStore(shared=shared_folder / "Mamba-bitwise")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with handle(model, store=store) as cache:
            told = str(cache.explain(ids))
            assert f"threads {threads} instead of {threads + 1}" in told
            logits(model, ids, cache)
            assert cache.last_request is not None and cache.last_request.resumed_tokens == 0
    finally:
        torch.set_num_threads(threads)
    with handle(model, store=CheckpointStore(shared=shared_folder / "Mamba-bitwise"), namespace="another") as cache:
        assert cache.explain(ids).resumed_tokens == 0 and "instead of" not in str(cache.explain(ids))
    store.close(flush=False)


def test_a_kept_end_is_resumed_without_computing(shared_folder: Path) -> None:
    model, ids = shared_worker.model("Mamba"), question(1)
    store = CheckpointStore(shared=shared_folder / "Mamba-bitwise")
    with handle(model, store=store) as cache:
        warm = logits(model, ids, cache)
        assert cache.last_request is not None
        reused = cache.last_request.resumed_tokens
    store.close(flush=False)
    assert torch.equal(warm, cold_logits(model, ids)) and reused > 0


def test_a_handle_shows_its_shared_store(tmp_path: Path) -> None:
    model = shared_worker.model("Mamba")
    with SparsePrefixCache(model) as cache:
        assert cache.stats().shared == {} and cache.explain(question(1)).shared == ""
    with SparsePrefixCache(model, store=CheckpointStore(shared=tmp_path)) as cache:
        logits(model, question(1), cache)
        cache.store.flush()
        assert cache.stats().shared["written"] >= 1
        assert "shared store" in str(cache.explain(question(1)))
        cache.store.close()
