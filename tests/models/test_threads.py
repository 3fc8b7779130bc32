"""Threads, forks and a lack of memory, on pure, hybrid and shared-attention models."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from persisting import cold_logits, counts_what_it_holds, handle, logits, question, small_store
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, fingerprint, states
from hf_sparse_cache.models.tensors import LayerTensors


def test_eight_threads_and_constant_eviction(family: str, tmp_path: Path, stores: list[CheckpointStore]) -> None:
    """8 x 200 requests in the full run; fewer by default, as each is a real prefill."""
    rounds = int(os.environ.get("HF_SPARSE_CACHE_TEST_ROUNDS", "5"))
    model = tiny_models.build(family)
    prompts = [question(seed, 10) if seed % 2 else tiny_models.random_ids(70 + seed, seed=seed) for seed in range(6)]
    with handle(model, policy="none") as cache:
        expected = [logits(model, ids, cache) for ids in prompts]
    stores.append(small_store(model, tmp_path))
    wrong: list[Any] = []

    def work(first: int) -> None:
        order = np.random.default_rng(first)
        try:
            for _ in range(rounds):
                index = int(order.integers(len(prompts)))
                if not torch.equal(logits(model, prompts[index], cache), expected[index]):
                    wrong.append(index)
        except BaseException as error:
            wrong.append(error)

    with handle(model, store=stores[0]) as cache:
        for ids, wanted in zip(prompts, expected, strict=True):  # so that the threads find the tier below in use
            assert torch.equal(logits(model, ids, cache), wanted)
        assert stores[0].demotions > 0
        run_threads([threading.Thread(target=work, args=(first,)) for first in range(8)])
        assert not wrong
        assert cache.stats().requests == len(prompts) + 8 * rounds
        stores[0].verify()
        for tier in stores[0].tiers:
            assert tier.used_bytes <= (tier.max_memory or 0) and tier.reserved_bytes == 0
            assert not any(checkpoint.pins for _, _, checkpoint in tier.checkpoints())
        assert counts_what_it_holds(cache)


def run_threads(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive(), "deadlock"


def test_two_threads_store_a_new_document_once(jamba: PreTrainedModel) -> None:
    with handle(jamba) as cache:
        start, found = threading.Barrier(2), []

        def work() -> None:
            start.wait()
            with cache.record() as requests:
                logits(jamba, question(2), cache)
            found.extend(requests)

        run_threads([threading.Thread(target=work) for _ in range(2)])
        length = question(2).shape[-1]
        assert sorted(info.computed_tokens for info in found) == [0, length]  # one of them waited for the other
        stats = cache.stats()
        assert stats.kv_bytes == length * cache.size.kv_bytes_per_token
        assert counts_what_it_holds(cache)


def in_child(cache: SparsePrefixCache, sender: Any) -> None:
    try:
        before = (len(cache.store), cache.store.used_bytes, cache.stats().requests, cache.store.below)
        with cache.store.lock:
            pass
        result = logits(cache.model, question(3), cache)
        sender.send((before, result.numpy(), cache.last_request.reason, None))
    except BaseException as error:
        sender.send((None, None, None, repr(error)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_process_starts_clean(jamba: PreTrainedModel, tmp_path: Path, stores: list[CheckpointStore]) -> None:
    stores.append(small_store(jamba, tmp_path))
    cold = cold_logits(jamba, question(3))
    with handle(jamba, store=stores[0]) as cache:
        logits(jamba, question(2), cache)
        held = (len(stores[0]), len(stores[0].below))
        locked, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with stores[0].lock, cache.server.space._lock, cache.policy.lock, fingerprint._lock:
                locked.set()
                leave.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        locked.wait()
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=in_child, args=(cache, sender))
        child.start()
        assert receiver.poll(60), "the child hangs"
        before, result, reason, error = receiver.recv()
        child.join(10)
        leave.set()
        holder.join()
        assert error is None and before == (0, 0, 0, None) and reason == "nothing stored"
        assert np.array_equal(result, cold.numpy())
        assert (len(stores[0]), len(stores[0].below)) == held  # the parent has lost nothing
        assert torch.equal(logits(jamba, question(3), cache), cold)
        assert cache.last_request.resumed_tokens == 96


def test_no_memory_to_capture(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build(family)
    cold, own, calls = cold_logits(model, question(2)), states.capture_state, []

    def capture(cache: Any, *rounding: Any) -> LayerTensors:
        calls.append(cache)
        if len(calls) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(cache, *rounding)

    with handle(model) as cache:
        monkeypatch.setattr(states, "capture_state", capture)
        assert torch.equal(logits(model, question(2), cache), cold)
        assert len(cache.last_request.captured) == len(calls) // 2 > 0
        assert torch.equal(logits(model, question(2), cache), cold)
        assert cache.last_request.resumed_tokens > 0


def test_no_memory_to_move(
    jamba: PreTrainedModel, tmp_path: Path, stores: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.append(small_store(jamba, tmp_path))
    cold = cold_logits(jamba, question(2))

    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with handle(jamba, store=stores[0]) as cache:
        monkeypatch.setattr(LayerTensors, "to_bytes", fail)
        for _ in range(2):
            assert torch.equal(logits(jamba, question(2), cache), cold)
        assert len(stores[0].below) == 0 and stores[0].below.reserved_bytes == 0
        assert stores[0].evictions > 0 == stores[0].demotions
