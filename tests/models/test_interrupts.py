"""Ways out of a prefill: what is asked between its segments."""

import threading

import pytest
from tiny_models import random_ids
from transformers import PreTrainedModel

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models.interrupts import ask, interruptible


def test_what_was_set_is_called_inside_of_the_block_and_of_the_innermost() -> None:
    said: list[str] = []
    ask()
    with interruptible(lambda: said.append("outer")):
        ask()
        with interruptible(lambda: said.append("inner")):
            ask()
        ask()
    ask()
    assert said == ["outer", "inner", "outer"]


def test_another_thread_is_not_asked() -> None:
    said: list[str] = []
    with interruptible(lambda: said.append("asked")):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert said == []


def test_an_error_of_the_check_passes_and_ends_the_block() -> None:
    def stop() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError), interruptible(stop):
        ask()
    ask()


def test_a_prefill_asks_before_each_segment_and_keeps_what_it_captured(jamba: PreTrainedModel) -> None:
    ids, asked = random_ids(100), []

    def third() -> None:
        asked.append(None)
        if len(asked) == 3:
            raise TimeoutError

    with SparsePrefixCache(jamba, grid=32, policy="balanced", exactness="bitwise", prove=False) as cache:
        with pytest.raises(TimeoutError), interruptible(third):
            cache.prefill(ids)
        kept = cache.explain(ids).resumed_tokens
        assert kept == 64
        cache.prefill(ids)
        assert cache.last_request.resumed_tokens == 64
