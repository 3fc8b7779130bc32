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
from hf_sparse_cache.store import ahead, files, planes
from hf_sparse_cache.store.headers import Header


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


def spoil(path: Path, whole: bool) -> None:
    """Changes keys and values in a file: one byte of it, or all numbers a little, in a file that can be read."""
    data = bytearray(path.read_bytes() if not whole else bytes(planes.unpacked(path.read_bytes())))
    start = Header.parse(bytes(data), len(data)).start
    for place in [(start + len(data)) // 2] if not whole else range(start + 2, len(data), 4):
        data[place] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("whole", [False, True], ids=["a byte", "all numbers"])
@pytest.mark.parametrize("mode", ["bitwise", "replayable"])
def test_keys_and_values_that_changed_are_never_served(shared_folder: Path, mode: str, whole: bool) -> None:
    """The deepest ones, which are unpacked while they are proved: the answer is right, and the reason is named."""
    model, ids, folder = shared_worker.model("Zamba2"), question(2), shared_folder / f"Zamba2-{mode}"
    spoil(deepest(folder, ids), whole)
    store = CheckpointStore(shared=folder)
    with handle(model, store=store, exactness=mode) as cache:
        answer = logits(model, ids, cache)
        assert cache.last_request is not None
        if mode == "bitwise":
            assert torch.equal(answer, cold_logits(model, ids))
        else:
            again = shared_worker.replayed(cache, ids, cache.last_request.segments)
            assert torch.equal(answer[0], again)
        assert any("put aside" in what and "checksum" in what for what in cache.stats().shared), cache.stats().shared
        store.flush()
    reasons = [path.read_text() for path in (folder / "quarantine").glob("*.reason")]
    assert any("does not match its checksum" in reason for reason in reasons)
    assert store.shared is not None and store.shared.counts["written"] > 0, "what it computed in place is kept"
    store.close()
    again_store = CheckpointStore(shared=folder)
    with handle(model, store=again_store, exactness=mode) as cache:
        answer = logits(model, question(4), cache)
        assert cache.last_request is not None and cache.last_request.resumed_tokens > 0
        assert mode != "bitwise" or torch.equal(answer, cold_logits(model, question(4)))
    again_store.close(flush=False)


def test_the_twin_whose_proof_is_skipped_answers_wrongly(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, folder = shared_worker.model("Zamba2"), question(2), shared_folder / "Zamba2-bitwise"
    spoil(deepest(folder, ids), whole=True)
    monkeypatch.setattr(ahead.files, "prove", lambda path, data, seal, *checksum: None)
    store = CheckpointStore(shared=folder)
    with handle(model, store=store) as cache:
        answer = logits(model, ids, cache)
        assert cache.last_request is not None and cache.last_request.resumed_tokens > 0
    store.close(flush=False)
    assert not torch.equal(answer, cold_logits(model, ids))


def deepest(folder: Path, ids: torch.Tensor) -> Path:
    """The file of the keys and values right below the state that a prompt resumes from."""
    found: dict[int, str] = {}
    for path in folder.rglob("*-state-*.safetensors"):
        record, tokens = files.peek(path)
        if tokens.tolist() == ids[0, : len(tokens)].tolist():
            found[len(tokens)] = record["kv"][-1][-1]
    (path,) = folder.rglob(found[max(found)])
    return path


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
