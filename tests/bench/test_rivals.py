"""One worked example for each rival, by its published behaviour."""

from __future__ import annotations

import numpy as np
import pytest
from cutting import every

from benchmarks.clairvoyant import ClairvoyantEviction, ClairvoyantPolicy, Future
from benchmarks.rivals import (
    MLXLM,
    RIVALS,
    HitsPerToken,
    LlamaCpp,
    MarconiAdmission,
    MarconiEviction,
    PaperDP,
    SegLen,
    SGLang,
    Thinning,
    VLLMAlign,
    VLLMAll,
)
from hf_sparse_cache.planning.policies import Policy
from hf_sparse_cache.request import Request, open_request
from hf_sparse_cache.simulator import Sized, simulate
from hf_sparse_cache.store.eviction import FIFO
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.tools.traces import Trace


def serve(store: CheckpointStore, policy: Policy, ids: np.ndarray) -> Request:
    with open_request(store, policy, ids, every(64)) as request:
        for position in request.planned:
            request.add(position, Sized(1))
    return request


def prompt(shared: int, own: int, seed: int = 1) -> np.ndarray:
    """`shared` tokens that all prompts start with, then `own` ones that none shares."""
    return np.concatenate([np.arange(shared), np.full(own, 1_000_000 + seed)]).astype(np.int32)


def test_vllm_align_keeps_step_ends_and_the_last_full_block() -> None:
    ids = prompt(20_000, 0)
    assert serve(CheckpointStore(None), VLLMAlign(512, 8192), ids).captured == [8192, 16384, 19968]


def test_vllm_align_misses_when_the_split_moves() -> None:
    """vLLM issue 45238: 1600 shared of 2200 hit, 1500 shared do not, as the only state lies at the last full block."""
    store = CheckpointStore(None)
    serve(store, VLLMAlign(), prompt(1600, 600))
    assert serve(store, VLLMAlign(), prompt(1600, 600)).resumed_tokens == 2048
    assert serve(store, VLLMAlign(), prompt(1500, 700, 2)).resumed_tokens == 0


def test_vllm_all_keeps_every_block_and_nothing_of_short_prompts() -> None:
    assert serve(CheckpointStore(None), VLLMAll(512), prompt(2000, 0)).captured == [512, 1024, 1536]
    assert serve(CheckpointStore(None), VLLMAll(512), prompt(500, 0)).captured == []


def test_sglang_keeps_the_tracked_end_and_the_branch() -> None:
    store = CheckpointStore(None)
    assert serve(store, SGLang(), prompt(1000, 376)).captured == [1280]
    second = serve(store, SGLang(), prompt(1000, 376, 2))
    assert second.resumed_tokens == 0  # SGLang issue 22935: the divergent suffix is longer than the interval
    assert second.captured == [960, 1280]
    assert serve(store, SGLang(), prompt(1000, 376, 3)).resumed_tokens == 960


def test_marconi_admits_end_and_branch_and_weighs_savings_against_recency() -> None:
    store = CheckpointStore(3, MarconiEviction(alpha=10.0))
    assert serve(store, MarconiAdmission(), prompt(0, 3000, 1)).captured == [2944]
    assert serve(store, MarconiAdmission(), prompt(0, 200, 2)).captured == [192]
    assert serve(store, MarconiAdmission(), prompt(0, 500, 3)).captured == [448]
    serve(store, MarconiAdmission(), prompt(0, 900, 4))
    assert serve(store, MarconiAdmission(), prompt(0, 3000, 1)).resumed_tokens == 2944  # oldest, but saves most
    recent = CheckpointStore(3, MarconiEviction(alpha=0.0))
    for seed, length in enumerate((3000, 200, 500, 900)):
        serve(recent, MarconiAdmission(), prompt(0, length, seed))
    assert serve(recent, MarconiAdmission(), prompt(0, 3000, 0)).resumed_tokens == 0


def test_seglen_weighs_what_must_be_replayed_against_recency() -> None:
    store = CheckpointStore(3, SegLen())
    for seed, length in enumerate((3000, 200, 500, 900)):
        serve(store, SGLang(64), prompt(0, length, seed))
    assert sorted(item.position for item in store.stored()) == [448, 896, 2944]  # the oldest has most to replay
    recent = CheckpointStore(3, SegLen(weight=0.0))
    for seed, length in enumerate((3000, 200, 500, 900)):
        serve(recent, SGLang(64), prompt(0, length, seed))
    assert sorted(item.position for item in recent.stored()) == [192, 448, 896]


def test_seglen_counts_from_the_nearest_state_and_refreshes_the_node_it_used_alone() -> None:
    store = CheckpointStore(None, SegLen(weight=0.0))
    serve(store, MarconiAdmission(), prompt(1000, 0))
    serve(store, MarconiAdmission(), prompt(2000, 0))
    upper, lower = sorted(store.stored(), key=lambda item: item.position)[:2]
    assert store.eviction.gain(lower) == lower.position - upper.position  # type: ignore[attr-defined]
    serve(store, MarconiAdmission(), prompt(2000, 0))
    assert store.eviction.victim(None, 1) is upper


def test_thinning_keeps_every_other_state_of_an_old_path() -> None:
    store = CheckpointStore(8, Thinning())
    serve(store, LlamaCpp(1024), prompt(8200, 0))
    assert [item.position for item in store.stored()] == [1024 * n for n in range(1, 8)] + [8192]
    for seed in range(4):
        serve(store, SGLang(64), prompt(0, 5000, seed))
    kept = sorted(item.position for item in store.stored() if item.position % 1024 == 0)
    assert kept == [2048, 4096, 6144, 8192]


def test_hits_per_token_is_frequency_over_size() -> None:
    store = CheckpointStore(3, HitsPerToken())
    serve(store, SGLang(64), prompt(0, 3000, 1))
    serve(store, SGLang(64), prompt(0, 500, 2))
    for _ in range(9):
        serve(store, SGLang(64), prompt(0, 1000, 3))
    serve(store, SGLang(64), prompt(0, 800, 4))
    assert sorted(item.position for item in store.stored()) == [448, 768, 960]  # one hit for 2,944 tokens goes first
    serve(store, SGLang(64), prompt(0, 700, 5))
    assert sorted(item.position for item in store.stored()) == [448, 640, 960]  # 9 hits for 960 tokens stay


def test_llama_cpp_keeps_steps_and_the_end_up_to_its_count() -> None:
    assert serve(CheckpointStore(None), LlamaCpp(8192), prompt(20_000, 0)).captured == [8192, 16384, 19968]
    assert len(serve(CheckpointStore(None), LlamaCpp(64, 32), prompt(20_000, 0)).captured) == 32


def test_mlx_keeps_system_user_and_tail() -> None:
    ids = prompt(1000, 0)
    ids[[199, 699, 899]] = 248046
    assert serve(CheckpointStore(None), MLXLM(), ids).captured == [192, 896, 960]
    assert serve(CheckpointStore(None), MLXLM(), prompt(1000, 0)).captured == [960]


def test_paper_plans_on_absolute_depths_and_evicts_in_order() -> None:
    store, policy = CheckpointStore(None, FIFO()), PaperDP(1)
    for seed in range(5):
        serve(store, policy, prompt(1000, 400, seed))
    assert serve(store, policy, np.arange(5000, 7000, dtype=np.int32)).captured == [960]


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_every_variant_runs_within_the_budget(rival: object) -> None:
    trace = [prompt(int(shared), 300, seed) for seed, shared in enumerate(np.linspace(100, 3000, 25))]
    for _, policy, eviction in rival.variants:  # type: ignore[attr-defined]
        result = simulate(trace, policy=policy(), eviction=eviction(), max_memory=6, state_bytes=1)
        assert result.peak_bytes <= 6


def test_clairvoyant_keeps_what_comes_back_first() -> None:
    documents = [prompt(0, 1000, seed) for seed in range(6)]
    order = [0, 1, 2, 3, 4, 5, 0, 5, 0, 5, 0, 5]
    trace = Trace([documents[number] for number in order])
    future = Future(trace)
    result = simulate(
        trace,
        policy=ClairvoyantPolicy(future),
        eviction=ClairvoyantEviction(future, trace),
        max_memory=2,
        state_bytes=1,
    )
    assert result.resumed_tokens == 6 * 960
    assert result.checkpoints == 2
