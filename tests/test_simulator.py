"""`simulate`: what it counts, what it reads, and that it is the store and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cutting import every

from hf_sparse_cache.config import KEPT
from hf_sparse_cache.models.rounding import rounding_of
from hf_sparse_cache.planning.policies import make_policy
from hf_sparse_cache.request import open_request
from hf_sparse_cache.simulator import Sized, simulate
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.tools.traces import interleave, load_trace


def prompts(count: int = 60) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    roots = [generator.integers(0, 9, 300).astype(np.int32) for _ in range(5)]
    sizes = generator.integers(50, 300, count).tolist()
    parts = [(roots[i % 5][:size], generator.integers(0, 9, 80)) for i, size in enumerate(sizes)]
    return [np.concatenate(part).astype(np.int32) for part in parts]


def common(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    return int(np.argmin(np.append(a[:size] == b[:size], False)))


def test_overlap_is_the_dense_limit() -> None:
    trace = prompts()
    dense = [max((common(ids, other) for other in trace[:i]), default=0) for i, ids in enumerate(trace)]
    result = simulate(trace, policy="last", max_memory=3, state_bytes=1, grid=16, warmup=0.5)
    assert result.requests == 30
    assert result.overlap_tokens == sum(dense[30:])
    assert result.prompt_tokens == sum(map(len, trace[30:]))
    assert result.resumed_tokens <= result.overlap_tokens
    assert result.peak_bytes == 3


def test_exact_repeats_resume_at_the_last_cut() -> None:
    ids = np.arange(100, dtype=np.int32)
    result = simulate([ids, ids, ids], policy="last", state_bytes=1, grid=16)
    assert result.resumed_tokens == 2 * 96
    assert result.resume_rate == 192 / 300
    assert result.capture_rate == 192 / 200
    assert result.checkpoints == 1


@pytest.mark.parametrize(("storage", "state", "kv"), [("exact", 1000, 100), ("bf16", 508, 51), ("int8", 266, 27)])
def test_storage_scales_what_a_checkpoint_takes(storage: str, state: int, kv: int) -> None:
    ids = np.arange(100, dtype=np.int32)
    sizes = {"state_bytes": 1000, "kv_bytes_per_token": 100, "logits_bytes": 7, "policy": "last", "grid": 50}
    result = simulate([ids], storage=storage, exactness="replayable", **sizes)
    assert result.peak_bytes == result.checkpoints * (state + 7) + 100 * kv
    with pytest.raises(ValueError, match="storage must be 'exact', 'bf16' or 'int8', not 'fp8'"):
        simulate([ids], storage="fp8", **sizes)


def test_what_storages_keep_is_what_rounding_keeps() -> None:
    for storage, share in KEPT.items():
        kept = rounding_of(storage).kept({"keys": torch.randn(1, 4, 50, 64), "recurrent.0": torch.randn(1, 4, 64, 16)})
        assert sum(value.nbytes for value in kept.values()) == share * 4 * (4 * 50 * 64 + 4 * 64 * 16)


def test_no_policy_resumes_nothing() -> None:
    result = simulate(prompts(), policy="none", state_bytes=1)
    assert (result.resumed_tokens, result.checkpoints, result.peak_bytes) == (0, 0, 0)


@pytest.mark.parametrize("policy", ["learned", "dp", "junction"])
@pytest.mark.parametrize("kv", [0, 2])
def test_same_as_driving_the_store_by_hand(policy: str, kv: int) -> None:
    trace, store, place = prompts(), CheckpointStore(2000, max_remembered=None), make_policy(policy)
    resumed = captured = 0
    for ids in trace:
        with open_request(store, place, ids, every(16)) as request:
            for position in request.planned:
                request.add(position, Sized(50), (lambda a, b: Sized(kv * (b - a))) if kv else None)
        resumed += request.resumed_tokens
        captured += len(request.captured)
    result = simulate(trace, policy=policy, max_memory=2000, state_bytes=50, kv_bytes_per_token=kv, grid=16)
    assert (result.resumed_tokens, result.checkpoints) == (resumed, captured)
    assert (result.peak_bytes, result.evictions) == (store.peak_bytes, store.evictions)
    assert result.peak_bytes <= 2000
    assert resumed > 0


def test_deterministic() -> None:
    first, second = (simulate(prompts(), max_memory=500, state_bytes=50, grid=16) for _ in range(2))
    assert first.resumed_tokens == second.resumed_tokens


def test_json_lines_and_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    trace = prompts(20)
    lines = tmp_path / "trace.jsonl"
    lines.write_text("\n".join(json.dumps({"input_ids": ids.tolist()}) for ids in trace), encoding="utf-8")
    table = datasets.Dataset.from_dict({"input_ids": [ids.tolist() for ids in trace]})
    wanted = simulate(trace, state_bytes=1, grid=16).resumed_tokens
    assert simulate(lines, state_bytes=1, grid=16).resumed_tokens == wanted
    assert simulate(table, state_bytes=1, grid=16).resumed_tokens == wanted


def folder(path: Path, template: str, **meta: Any) -> Path:
    path.mkdir()
    (path / "meta.json").write_text(json.dumps({"template": template, **meta}), encoding="utf-8")
    return path


def test_folders_of_texts(tmp_path: Path) -> None:
    concat = folder(tmp_path / "concat", "concat")
    (concat / "texts.jsonl").write_text('{"id": "a", "text": "story "}\n{"id": "b", "text": "why?"}', encoding="utf-8")
    request = {"group_id": "g", "request_id": "1", "segments": ["a", "b"]}
    (concat / "requests.jsonl").write_text(json.dumps(request), encoding="utf-8")
    assert bytes(load_trace(concat, tokenize=lambda text: list(text.encode()))[0].tolist()) == b"story why?"
    chat = folder(tmp_path / "chat", "chatml")
    (chat / "texts.jsonl").write_text('{"id": "a", "text": "hi", "role": "user"}', encoding="utf-8")
    (chat / "requests.jsonl").write_text(json.dumps(request | {"segments": ["a"]}), encoding="utf-8")
    text = bytes(load_trace(chat, tokenize=lambda text: list(text.encode()))[0].tolist())
    assert text == b"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_folders_of_block_hashes(tmp_path: Path) -> None:
    blocks = folder(tmp_path / "blocks", "hash_ids", block=512)
    rows = [{"hash_ids": [0, 1], "input_length": 600}, {"hash_ids": [0, 2], "input_length": 1024}]
    (blocks / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    trace = load_trace(blocks)
    assert [len(ids) for ids in trace] == [600, 1024]
    assert common(trace[0], trace[1]) == 512
    result = simulate(blocks, policy="junction", state_bytes=1, grid=512)
    assert (result.overlap_tokens, result.resumed_tokens) == (512, 512)


def test_interleaving_keeps_groups_in_order_and_follows_the_seed() -> None:
    groups = ["a"] * 5 + ["b"] * 5 + ["c"] * 5
    order = interleave(groups, 42)
    assert sorted(order.tolist()) == list(range(15))
    for start in (0, 5, 10):
        assert [i for i in order.tolist() if start <= i < start + 5] == list(range(start, start + 5))
    assert order.tolist() == interleave(groups, 42).tolist() != interleave(groups, 1).tolist()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"state_bytes": 0}, "state_bytes"),
        ({"state_bytes": 1, "kv_bytes_per_token": -1}, "kv_bytes_per_token"),
        ({"state_bytes": 1, "warmup": 1.0}, "warmup"),
        ({"state_bytes": 1, "policy": "best"}, "policy"),
        ({"state_bytes": 1, "trace": []}, "no prompt"),
        ({"state_bytes": 1, "trace": [[0.5]]}, "integer token ids"),
    ],
)
def test_errors_name_the_argument(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(kwargs.pop("trace", [[1, 2, 3]]), **kwargs)


def test_missing_trace() -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        simulate("nowhere", state_bytes=1)


def test_a_terminal_shows_a_bar_that_names_the_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    simulate(prompts(5), state_bytes=1, policy="junction", progress=False)
    assert capsys.readouterr().err == ""
    simulate(prompts(5), state_bytes=1, policy="junction")
    assert "simulate junction" in capsys.readouterr().err
