"""What one tenant marks stays when another clears, and what was cleared is referenced by nobody."""

import gc
import weakref

import numpy as np
import pytest
import torch
from persisting import GRID, question
from tiny_models import random_ids
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.store.marks import Marks


@pytest.fixture
def store() -> CheckpointStore:
    return CheckpointStore(None, "fifo")


def handle(model: PreTrainedModel, store: CheckpointStore, namespace: str) -> SparsePrefixCache:
    settings = {"grid": GRID, "policy": "balanced", "exactness": "bitwise"}
    return SparsePrefixCache(model, store=store, namespace=namespace, **settings)


def serve(model: PreTrainedModel, cache: SparsePrefixCache, ids: torch.Tensor) -> int:
    model.generate(ids, past_key_values=cache, max_new_tokens=1)
    assert cache.last_request is not None
    return cache.last_request.resumed_tokens


@pytest.mark.parametrize("stored_first", [True, False])
def test_clear_of_one_tenant_leaves_the_marks_of_another(
    jamba: PreTrainedModel, store: CheckpointStore, stored_first: bool
) -> None:
    """The same prefix is marked by both; kept already, or only announced when the other clears."""
    ids = question(2)
    with handle(jamba, store, "a") as a, handle(jamba, store, "b") as b:
        for cache in (a, b):
            if stored_first:
                serve(jamba, cache, ids)
            cache.mark(ids[:, : 2 * GRID])
        kept = [item for space, item in store.marks.kept if space.endswith("b")]
        a.clear()
        assert [item for _, item in store.marks.kept] == kept and len(kept) == stored_first
        if stored_first:
            assert kept[0].pins == 1 and kept[0].stored
        else:
            serve(jamba, b, ids)
        # Under a budget for little more than the mark, everything else goes and the mark stays.
        store.resize(2 * (b.size.state_bytes + 2 * GRID * b.size.kv_bytes_per_token))
        for seed in range(4):
            serve(jamba, b, random_ids(100, seed=50 + seed))
        assert serve(jamba, b, ids) == 2 * GRID
        # a's own mark is gone: what it serves again is evicted like anything else.
        serve(jamba, a, ids)
        assert not [item for space, item in store.marks.kept if space.endswith("a")]


@pytest.mark.parametrize("everything", [True, False])
def test_nothing_refers_to_what_was_marked_and_cleared(
    jamba: PreTrainedModel, store: CheckpointStore, everything: bool
) -> None:
    with handle(jamba, store, "a") as a:
        a.mark(question(2)[:, : 2 * GRID])
        serve(jamba, a, question(2))
        (_, kept), *others = store.marks.kept
        gone = [weakref.ref(kept), weakref.ref(kept.state)]
        assert not others and kept.pins == 1
        del kept, _
        if everything:
            store.clear()
        else:
            a.clear()
        gc.collect()
        assert [ref() for ref in gone] == [None, None]
        assert not store.marks.kept and not store.marks.tokens and store.used_bytes == store.remembered_tokens == 0
        # The announcement is gone too: the same prompt is kept for nobody.
        serve(jamba, a, question(2))
        assert not store.marks.kept and not any(item.pins for item in store.stored())


def prefix(*tokens: int) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def test_announced_prefixes_are_found_by_whoever_begins_with_them() -> None:
    marks = Marks()
    announced = {"a": [prefix(1, 2, 3), prefix(1, 2), prefix(0, 2), prefix(1, 2, 4, 5)], "b": [prefix(1)]}
    for space, all_of_it in announced.items():
        for each in all_of_it * 2:  # once more changes nothing
            marks.add(each, space)
    assert marks.tokens == 3 + 2 + 2 + 4 + 1
    for ids, lengths in (((1, 2, 3, 4), [2, 3]), ((1, 2), [2]), ((0, 2, 3), [2]), ((1,), []), ((1, 2, 4, 5), [2, 4])):
        assert marks.lengths(prefix(*ids), "a") == lengths
    assert marks.lengths(prefix(1, 2), "b") == [1] and marks.lengths(prefix(1, 2), "c") == []
    assert marks.knows(prefix(1, 2), "a") and not marks.knows(prefix(1, 3), "a")
    assert not marks.knows(prefix(1, 2), "b") and not marks.knows(prefix(1), "a") and not marks.knows(prefix(1), "c")
    told = [each.tolist() for each in marks.prefixes("a")]
    assert told == [[0, 2], [1, 2], [1, 2, 3], [1, 2, 4, 5]] and marks.prefixes("c") == []
    assert all(each.dtype == np.int32 for each in marks.prefixes("a"))


def test_what_is_kept_is_released_with_its_space() -> None:
    marks = Marks()
    first, second, third = object(), object(), object()
    marks.kept = [("a", first), ("b", second), ("a", third)]  # type: ignore[list-item]
    for space in ("a", "b"):
        marks.add(prefix(1, 2), space), marks.add(prefix(1, 3), space)
    assert marks.forget("c") == [] and marks.tokens == 8
    assert marks.forget("a") == [first, third] and marks.kept == [("b", second)]
    assert marks.tokens == 4 and marks.prefixes("a") == [] and len(marks.prefixes("b")) == 2
    marks.add(prefix(9), "a")
    assert marks.forget() == [second] and marks.kept == [] and marks.tokens == 0 and marks.prefixes("a") == []
    marks.add(prefix(1, 2), "b")
    assert marks.tokens == 2
