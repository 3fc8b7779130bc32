"""The store against the naive list: same matches, same bytes, nothing orphaned, budget and pins respected."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from cutting import every
from prompting import GRID, begin, run
from reference_store import Blob

from hf_sparse_cache.planning.policies import NoCheckpoints, make_policy
from hf_sparse_cache.request import open_request
from hf_sparse_cache.stats import parse_bytes
from hf_sparse_cache.store.store import CheckpointStore


def test_document_is_stored_once() -> None:
    document = list(range(100, 1100))
    one, many = CheckpointStore(None, "lru"), CheckpointStore(None, "lru")
    run(one, [*document, 1, 2, 3, 4], [500, 1000], kv=8)
    for question in range(100):
        run(many, [*document, question, 1, 2, 3], [500, 1000], kv=8)
    assert many.kv_bytes == one.kv_bytes == 1000 * 8
    assert many.remembered_tokens == 1000 + 100 * 4


def test_kv_above_the_deepest_checkpoint_is_freed() -> None:
    store = CheckpointStore(None, "lru")
    run(store, list(range(12)), [4, 10], kv=1)
    shallow, deep = sorted((item for _, _, item in store.checkpoints()), key=lambda item: item.position)
    assert store.kv_bytes == 10
    store.evict(deep)
    assert store.kv_bytes == 4
    store.evict(shallow)
    assert store.used_bytes == 0


def test_evicting_a_middle_checkpoint_keeps_the_kv_below_the_deeper_one() -> None:
    store = CheckpointStore(None, "lru")
    run(store, list(range(12)), [4, 10], kv=1)
    store.evict(min((item for _, _, item in store.checkpoints()), key=lambda item: item.position))
    assert store.kv_bytes == 10
    assert len(store) == 1


def test_remembered_tokens_are_bounded_and_checkpoints_survive() -> None:
    store = CheckpointStore(None, "lru", max_remembered=6_000)
    for start in range(40):
        run(store, [start, *range(1000, 1019)], [6] if start == 0 else [])
        assert store.tree_bytes <= 6_000
    assert run(store, [0, *range(1000, 1019)], []).resumed_tokens == 6


def test_a_leaf_that_has_grown_since_keeps_no_other_from_being_forgotten() -> None:
    store = CheckpointStore(None, "lru", max_remembered=6_000)
    run(store, list(range(10)), [])
    for length in (20, 30, 40):  # the first leaf of the queue has children when its turn comes
        run(store, list(range(length)), [])
    for start in range(1000, 9000, 200):
        run(store, list(range(start, start + 100)), [])
        assert store.tree_bytes <= 6_000


def test_reasons() -> None:
    store = CheckpointStore(10, "lru")
    first = list(range(20))
    other = [*first[:5], *range(50, 70)]
    assert run(store, first, [8]).reason == "nothing stored"
    assert run(store, first, []).reason == "resumed"
    assert run(store, [0, 99, 98, 97, 96], []).reason == "diverges at token 1"
    assert run(store, other, []).reason == "overlap of 5 tokens ends before the first checkpoint at 8"
    run(store, other, [20])
    assert run(store, first, []).reason == "evicted"
    fresh = CheckpointStore(10, "lru")
    run(fresh, first, [])
    assert run(fresh, first, []).reason == "never captured: the policy placed no checkpoint on the first 18 tokens"


def test_an_error_inside_the_block_keeps_what_was_added_and_pins_nothing() -> None:
    store = CheckpointStore(None, "lru")
    run(store, list(range(12)), [4])
    with pytest.raises(RuntimeError), begin(store, list(range(12))) as request:
        request.add(8, Blob(10))
        raise RuntimeError
    assert run(store, list(range(12)), []).resumed_tokens == 8
    assert all(not item.pins for _, _, item in store.checkpoints())


def test_pinned_checkpoints_stay() -> None:
    store = CheckpointStore(10, "lru")
    run(store, list(range(12)), [4])
    with begin(store, list(range(12))) as request:
        assert request.checkpoint is not None
        assert not request.add(8, Blob(10))
        with pytest.raises(ValueError, match="pinned"):
            store.evict(request.checkpoint)
    assert run(store, list(range(12)), [8]).resumed_tokens == 4


SIZES = [("2GiB", 2**31), ("500MB", 5 * 10**8), ("1.5 KiB", 1536), (7, 7), ("12", 12), (None, None)]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes(text: int | str | None, size: int | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["2 gigs", "", "-1GB", -1, True, 1.5])
def test_bad_sizes_name_the_argument(text: int | str) -> None:
    with pytest.raises(ValueError, match="max_memory="):
        parse_bytes(text)


BAD_CALLS: list[Callable[[], object]] = [
    lambda: CheckpointStore(eviction="best"),
    lambda: CheckpointStore(max_remembered=0),
    lambda: make_policy("best"),
    lambda: open_request(CheckpointStore(), NoCheckpoints(), np.zeros((1, 4), np.int32), every(GRID)),
    lambda: open_request(CheckpointStore(), NoCheckpoints(), np.asarray([1, 2**31]), every(GRID)),
    lambda: run(CheckpointStore(), list(range(9)), [3]),
]


@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_say_what_to_do(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="choose|at least|pass|those end at"):
        call()


def test_threads_share_one_store() -> None:
    store = CheckpointStore(400, "lru", max_remembered=20_000)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(200):
                ids = [int(generator.integers(3)), int(generator.integers(3)), *range(int(generator.integers(4, 40)))]
                request = run(store, ids, list(range(2, len(ids) - 1, 6)), kv=1)
                assert store.used_bytes <= 400
                assert request.resumed_tokens <= request.overlap_tokens
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    store.clear()
    assert store.used_bytes == 0
