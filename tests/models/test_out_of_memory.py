"""Where memory runs out: captures are left out, stored bytes are given back, and nothing half done is ever used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from persisting import GRID, question
from tiny_models import build, random_ids
from transformers import DynamicCache, PreTrainedModel

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.errors import out_of_memory
from hf_sparse_cache.models import inputs, server, states, tensors


def cpu_allocator() -> None:
    """What torch itself raises on a CPU."""
    torch.empty(1 << 55)


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


FAILURES = {
    "cpu": cpu_allocator,
    "python": raising(MemoryError()),
    "torch": raising(torch.OutOfMemoryError("no room")),
    "cuda": raising(RuntimeError("CUDA error: out of memory")),
    "library": raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
}


def handle(model: PreTrainedModel, **options: Any) -> SparsePrefixCache:
    return SparsePrefixCache(model, **{"grid": GRID, "policy": "balanced", "exactness": "bitwise", **options})


def logits(model: PreTrainedModel, ids: torch.Tensor, cache: SparsePrefixCache | None = None, **kwargs: Any) -> Any:
    kwargs |= {} if cache is None else {"past_key_values": cache}
    out = model.generate(
        ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )
    return torch.stack(out.logits)


def settled(store: CheckpointStore) -> bool:
    """Whether no request holds anything any more; what marks keep stays pinned."""
    store.verify()
    pinned = [item for item in store.stored() if item.pins]
    return not store.ledger.chains.footings and len(pinned) == len(store.marks.kept)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """Let forward number `at` of a model, and as many after it as said, fail; returns a list that counts them."""

    def install(model: PreTrainedModel, at: int, how: Callable[[], None], times: int = 1) -> list[int]:
        kind, calls, own = type(model), [0], type(model).forward

        @functools.wraps(own)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            output = own(self, *args, **kwargs)  # so that the live cache has moved on
            if at <= calls[0] < at + times:
                how()
            return output

        monkeypatch.setattr(kind, "forward", forward)
        return calls

    yield install


def test_only_a_lack_of_memory_is_one() -> None:
    for fail in FAILURES.values():
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            fail()
        assert out_of_memory(caught.value)
    others = (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x"), AssertionError())
    assert not any(map(out_of_memory, others))


@pytest.mark.parametrize("how", FAILURES)
def test_without_memory_to_capture_the_request_goes_on(
    model: PreTrainedModel, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with handle(model) as cache:
        cold = logits(model, question(2), cache)
        cache.clear()
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "slotted", lambda *_: FAILURES[how]())
            assert torch.equal(logits(model, question(2), cache), cold)
        assert cache.last_request.captured == () and cache.stats().checkpoints == cache.store.used_bytes == 0
        assert settled(cache.store)
        assert torch.equal(logits(model, question(2), cache), cold) and cache.last_request.captured
        assert torch.equal(logits(model, question(2), cache), cold) and cache.last_request.resumed_tokens


def test_a_fault_in_a_capture_is_not_swallowed(jamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with handle(jamba) as cache:
        monkeypatch.setattr(tensors, "slotted", lambda *_: raising(RuntimeError("shape mismatch"))())
        with pytest.raises(RuntimeError, match="shape mismatch"):
            logits(jamba, question(2), cache)
        assert settled(cache.store)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_forward_without_memory_runs_once_more(
    model: PreTrainedModel, at: int, failing: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with handle(model) as cache:
        first, cold = logits(model, question(2), cache), logits(model, question(3, 70), cache)
        cache.clear()
        assert torch.equal(logits(model, question(2), cache), first)
        with monkeypatch.context():
            calls = failing(model, at, cpu_allocator)
            got = logits(model, question(3, 70), cache)
        assert calls[0] > at and torch.equal(got, cold)
        info = cache.last_request
        assert (info.resumed_tokens, info.captured, info.reason) == (0, (), "evicted")
        assert cache.stats().requests == 4 and cache.store.used_bytes == 0 and settled(cache.store)
        assert torch.equal(logits(model, question(3, 70), cache), cold) and cache.last_request.captured
        assert torch.equal(logits(model, question(3, 70), cache), cold) and cache.last_request.resumed_tokens


def test_a_forward_that_never_has_memory_fails(model: PreTrainedModel, failing: Callable[..., list[int]]) -> None:
    expected = logits(model, question(2))
    with handle(model) as cache:
        cold = logits(model, question(2), cache)
        calls = failing(model, 2, cpu_allocator, times=99)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            logits(model, question(3, 70), cache)
        assert calls[0] == 3  # the first was right, the second failed, and so did the first of the second attempt
        assert settled(cache.store) and cache.stats().requests == 1
        calls[0] = 1000
        assert torch.equal(logits(model, question(2), cache), cold)
        assert torch.equal(logits(model, question(2)), expected)


def test_another_error_in_a_forward_is_raised_at_once(jamba: PreTrainedModel, failing: Callable[..., Any]) -> None:
    with handle(jamba) as cache:
        cold = logits(jamba, question(2), cache)
        stored = cache.store.used_bytes
        calls = failing(jamba, 1, raising(RuntimeError("shape mismatch")))
        with pytest.raises(RuntimeError, match="shape mismatch"):
            logits(jamba, question(3), cache)
        assert calls[0] == 1 and cache.store.used_bytes == stored and settled(cache.store)
        assert torch.equal(logits(jamba, question(2), cache), cold)


@pytest.mark.parametrize("how", FAILURES)
def test_a_restore_without_memory_is_never_half_used(
    model: PreTrainedModel, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = states.restore

    def half(cache: Any, *stored: Any) -> None:
        own(cache, *stored)
        for layer in cache.layers[::2]:
            for value in vars(layer).values():
                for tensor in value.values() if isinstance(value, dict) else ():
                    if torch.is_tensor(tensor):
                        tensor.zero_()
        FAILURES[how]()

    with handle(model) as cache:
        cold = logits(model, question(2), cache)
        with monkeypatch.context() as patch:
            patch.setattr(states, "restore", half)
            assert torch.equal(logits(model, question(2), cache), cold)
        assert cache.last_request.resumed_tokens == 0 and settled(cache.store)
        patched = logits(model, question(2), cache)
        assert torch.equal(patched, cold)


def test_what_is_stored_makes_way(jamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full device: forwards fail for as long as anything is stored, but for what a mark keeps."""
    with handle(jamba) as cache:
        cold = logits(jamba, question(2), cache)
        own = type(jamba).forward
        kept = 0

        @functools.wraps(own)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if cache.store.used_bytes > kept:
                cpu_allocator()
            return own(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(type(jamba), "forward", forward)
            assert torch.equal(logits(jamba, question(2), cache), cold)
        assert cache.store.used_bytes == 0
        cache.mark(question(2)[:, :GRID])
        assert torch.equal(logits(jamba, question(2), cache), cold) and cache.store.marks.kept
        kept = cache.size.state_bytes + GRID * cache.size.kv_bytes_per_token
        with monkeypatch.context() as patch:
            patch.setattr(type(jamba), "forward", forward)
            assert torch.equal(logits(jamba, question(3), cache), logits(jamba, question(3), cache))
        assert cache.store.used_bytes == kept and settled(cache.store)
        assert cache.explain(question(2)).resumed_tokens == GRID


def test_rows_that_cannot_be_joined_at_first(jamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.cat([question(2), question(3)])
    own, calls = states.stack, []

    def stack(cache: Any, *args: Any) -> None:
        calls.append(own(cache, *args))
        if len(calls) == 1:
            cpu_allocator()

    with handle(jamba) as cache:
        cold = logits(jamba, ids, cache)
        monkeypatch.setattr(states, "stack", stack)
        assert torch.equal(logits(jamba, ids, cache), cold) and len(calls) == 2
        assert cache.store.used_bytes == 0 and settled(cache.store) and cache.stats().requests == 4


def test_a_tier_below_takes_what_makes_way(
    jamba: PreTrainedModel, tmp_path: Path, failing: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore("64MiB", disk_memory="1GiB", disk_dir=tmp_path / "disk")
    with handle(jamba, store=store) as cache:
        cold = logits(jamba, question(2), cache)
        failing(jamba, 1, cpu_allocator)
        logits(jamba, random_ids(100, seed=9), cache)
        assert store.used_bytes == 0 < store.below.used_bytes and settled(store)
        assert torch.equal(logits(jamba, question(2), cache), cold) and cache.last_request.resumed_tokens
        store.close()


def test_a_restore_that_never_has_memory(
    jamba: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark that stays, and a disk that brings back what made way, are not resumed from again."""
    store = CheckpointStore("64MiB", disk_memory="1GiB", disk_dir=tmp_path / "disk")
    with handle(jamba, store=store) as cache:
        cache.mark(question(2)[:, :GRID])
        cold = logits(jamba, question(2), cache)
        with monkeypatch.context() as patch:
            patch.setattr(states, "restore", lambda *_: cpu_allocator())
            assert torch.equal(logits(jamba, question(2), cache), cold)
        info = cache.last_request
        assert (info.resumed_tokens, info.computed_tokens, str(info.reason)) == (0, info.prompt_tokens, "evicted")
        assert settled(store)
        assert torch.equal(logits(jamba, question(2), cache), cold) and cache.last_request.resumed_tokens
        store.close()


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("place", ["positions", "model"])
def test_to_look_at_a_call_and_at_the_model_takes_memory_as_well(
    jamba: PreTrainedModel, how: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with handle(jamba) as cache:
        cold = logits(jamba, question(2), cache)
        where, name = (inputs, "_positions_are_plain") if place == "positions" else (server, "identity")
        own, left = getattr(where, name), [1]

        def once(*args: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                FAILURES[how]()
            return own(*args)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, once)
            assert torch.equal(logits(jamba, question(2), cache), cold)
            assert left[0] < 0 and cache.last_request.resumed_tokens == 0 and settled(cache.store)
            left[0] = 2
            with pytest.raises((MemoryError, RuntimeError)):
                logits(jamba, question(2), cache)
        assert settled(cache.store)
        for _ in range(2):
            assert torch.equal(logits(jamba, question(2), cache), cold)
        assert cache.last_request.resumed_tokens


@pytest.mark.parametrize("family", ["Mamba", "Zamba"])
def test_a_state_announced_to_a_scan_that_never_began(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    own, calls = DynamicCache.update_conv_state, []

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == 2:
            cpu_allocator()
        return own(self, *args, **kwargs)

    with handle(model) as cache:
        cold = logits(model, question(2), cache)
        with monkeypatch.context() as patch:
            patch.setattr(DynamicCache, "update_conv_state", update)
            assert torch.equal(logits(model, question(2), cache), cold) and len(calls) > 2
        assert torch.equal(logits(model, question(2), cache), cold)


@pytest.mark.parametrize("family", ["LFM3", "Qwen4Exp"])
def test_windows_and_indexers_are_rebuilt(family: str, failing: Callable[..., list[int]]) -> None:
    model = build(family)
    with handle(model) as cache:
        logits(model, question(2), cache)
        cold = logits(model, question(3, 70), cache)
        failing(model, 2, cpu_allocator)
        assert torch.equal(logits(model, question(3, 70), cache), cold)


@pytest.mark.parametrize("ids", [[0.5, 1.0], [[1, 2], [3]], [True], [2**70], [-1], [128], [], "x", None, [2**31]])
def test_ids_that_no_prompt_has(jamba: PreTrainedModel, ids: Any) -> None:
    with handle(jamba) as cache:
        for call in (cache.explain, cache.mark):
            with pytest.raises(ValueError, match="ids"):
                call(ids)
        assert not cache.store.marks.kept and cache.store.remembered_tokens == 0
