"""`cache.record()`: what each call did, right under threads, tasks, batches, and calls that are not served."""

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import build, random_ids
from transformers import GenerationMixin, PreTrainedModel

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models import prefill
from hf_sparse_cache.models.watch import ChangedPrefillError
from hf_sparse_cache.stats import Recorder, RequestInfo


GREEDY: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("Jamba")


@pytest.fixture
def cache(model: PreTrainedModel) -> Iterator[SparsePrefixCache]:
    with SparsePrefixCache(model) as handle:
        yield handle


def call(cache: SparsePrefixCache, length: int, seed: int | None = None, **options: Any) -> Any:
    ids = random_ids(length, seed=length if seed is None else seed)
    kwargs = {"attention_mask": torch.ones_like(ids), **GREEDY, **options}
    return cache.model.generate(ids, past_key_values=cache, **kwargs)


def lengths(requests: list[RequestInfo]) -> list[int]:
    return [info.prompt_tokens for info in requests]


def test_what_the_call_did(cache: SparsePrefixCache) -> None:
    call(cache, 150)
    with cache.record() as requests:
        assert requests == []
        call(cache, 150)
        assert requests == [cache.last_request]
        call(cache, 70)
    call(cache, 90)
    assert lengths(requests) == [150, 70]
    assert requests[0].resumed_tokens == 150 and requests[1].resumed_tokens == 0


def test_forty_calls_of_threads(cache: SparsePrefixCache) -> None:
    found: list[tuple[int, list[RequestInfo], RequestInfo | None]] = []
    barrier = threading.Barrier(4)

    def serve(length: int) -> None:
        for _ in range(10):
            barrier.wait()
            with cache.record() as requests:
                call(cache, length)
            found.append((length, requests, cache.last_request))

    threads = [threading.Thread(target=serve, args=(length,)) for length in (30, 40, 50, 60)]
    with cache.record() as outside:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 40
    assert all(lengths(requests) == [length] for length, requests, _ in found)
    assert outside == []  # other threads' calls are told to blocks of their own
    # What the test is there for: the handle's latest request is mostly another thread's.
    assert any(last is None or last.prompt_tokens != length for length, _, last in found)


def test_tasks_that_wait_in_between(cache: SparsePrefixCache) -> None:
    async def serve(length: int) -> list[int]:
        with cache.record() as requests:
            await asyncio.sleep(0)
            call(cache, length)
            await asyncio.sleep(0)
            await asyncio.to_thread(call, cache, length + 1)
        return lengths(requests)

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(serve(length) for length in range(20, 60, 5)))

    assert asyncio.run(all_of_them()) == [[length, length + 1] for length in range(20, 60, 5)]


def test_a_task_that_outlives_the_block(cache: SparsePrefixCache) -> None:
    async def later(gate: asyncio.Event) -> None:
        await gate.wait()
        call(cache, 40)

    async def work() -> list[int]:
        gate = asyncio.Event()
        with cache.record() as requests:
            task = asyncio.create_task(later(gate))
            await asyncio.sleep(0)
        gate.set()
        await task
        return lengths(requests)

    assert asyncio.run(work()) == [] and cache.stats().requests == 1


def test_a_block_that_is_left_in_another_context(cache: SparsePrefixCache) -> None:
    async def blocks() -> Any:
        with cache.record() as requests:
            yield requests

    async def work() -> None:
        generator = blocks()
        requests = await asyncio.create_task(anext(generator))
        call(cache, 20)
        assert requests == []  # another task's
        await generator.aclose()
        with cache.record() as own:
            call(cache, 30)
        assert lengths(own) == [30]

    asyncio.run(work())


def test_blocks_in_blocks_and_errors(cache: SparsePrefixCache) -> None:
    with pytest.raises(KeyError), cache.record() as outer:
        call(cache, 30)
        with cache.record() as inner:
            call(cache, 40)
        raise KeyError
    call(cache, 50)
    assert (lengths(outer), lengths(inner)) == ([30, 40], [40])


def test_another_handle(model: PreTrainedModel, cache: SparsePrefixCache) -> None:
    with SparsePrefixCache(model, store=cache.store) as other, cache.record() as requests, other.record() as others:
        call(cache, 30)
        call(other, 40)
    assert (lengths(requests), lengths(others)) == ([30], [40])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of a class's generate that is called by itself
@pytest.mark.parametrize("of_class", [False, True])
@pytest.mark.parametrize("copies", [{}, {"num_return_sequences": 3, "do_sample": True}, {"num_beams": 2}])
def test_rows_in_their_order(cache: SparsePrefixCache, copies: dict[str, Any], of_class: bool) -> None:
    """By the model's own `generate()`, and by its class's, which does not say how many prompts it was given."""
    rows = [random_ids(length, seed=length) for length in (30, 60, 45, 30)]
    ids = torch.cat([torch.nn.functional.pad(row, (60 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (60 - row.shape[1], 0)) for row in rows])
    generate = partial(GenerationMixin.generate, cache.model) if of_class else cache.model.generate
    with cache.record() as requests:
        generate(ids, attention_mask=mask, past_key_values=cache, **{**GREEDY, **copies})
    assert lengths(requests) == [30, 60, 45, 30]
    assert requests[3] is requests[0]  # computed once
    assert cache.stats().computed_tokens == 30 + 60 + 45


@pytest.mark.parametrize("why", [{"use_cache": False}, {"output_hidden_states": True}])
def test_calls_that_run_uncached(cache: SparsePrefixCache, why: dict[str, Any]) -> None:
    with cache.record() as requests:
        ids = random_ids(30, batch=2)
        cache.model.generate(ids, past_key_values=cache, **GREEDY, **why)
    assert lengths(requests) == [30, 30]
    assert all("call not supported" in info.reason and info.computed_tokens == 30 for info in requests)


def test_a_batch_that_ends_uncached_is_counted_once(cache: SparsePrefixCache, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[int] = []

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        served.append(args[3])
        if len(served) == 3:  # the first prompt was served by then
            raise ChangedPrefillError("a hook takes tokens out")
        return own(*args, **kwargs)

    own = prefill.segment
    monkeypatch.setattr(prefill, "segment", second_fails)
    ids = random_ids(90, batch=2)
    ids[1, :60] = ids[0, :60]
    with cache.record() as requests:
        cache.model.generate(ids, past_key_values=cache, **GREEDY)
    assert len(served) == 3 and lengths(requests) == [90, 90]
    assert all("a hook takes tokens out" in info.reason for info in requests)
    assert cache.stats().requests == 2


def test_after_a_fork_blocks_go_on() -> None:
    recorder, info = Recorder(), RequestInfo(3, reason=None)  # type: ignore[arg-type]
    with recorder.block() as found:
        recorder._lock.acquire()
        recorder.start_anew()
        recorder.add(info)
        recorder.tell([info])
    assert found == [info] and recorder.totals().requests == 1
