"""A handle that never resumes anything says so, once, with the most frequent reason and its remedy."""

import pytest
import torch
from tiny_models import random_ids
from transformers import PreTrainedModel

from hf_sparse_cache import SparsePrefixCache, check_exactness
from hf_sparse_cache.explain import frequent


GRID = 32


def misses(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "nothing was resumed" in record.getMessage()]


def serve(model: PreTrainedModel, cache: SparsePrefixCache, count: int, shared: int, first: int = 0) -> None:
    """Prompts of 80 tokens that have `shared` tokens in common."""
    for seed in range(first, first + count):
        ids = torch.cat([random_ids(shared, seed=999), random_ids(80 - shared, seed=seed)], dim=1)
        model.generate(ids, past_key_values=cache, max_new_tokens=1)


def test_it_warns_once_and_names_reason_and_remedy(jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with SparsePrefixCache(jamba, grid=GRID) as cache:
        serve(jamba, cache, 19, shared=20)
        assert misses(caplog) == []
        serve(jamba, cache, 25, shared=20, first=19)
    (said,) = misses(caplog)
    assert said.startswith(
        "20 requests and nothing was resumed. Most frequent reason (19 of 20): diverges at token 20. "
        "That is before the first cut: put what changes behind what stays. A smaller grid cuts earlier."
    )


def test_one_hit_is_enough(jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced") as cache:
        serve(jamba, cache, 2, shared=70)
        assert cache.last_request.resumed_tokens > 0
        serve(jamba, cache, 30, shared=0, first=40)
    assert misses(caplog) == []


def test_calls_that_are_not_supported_count(jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with SparsePrefixCache(jamba, grid=GRID) as cache:
        jamba.train()
        serve(jamba, cache, 20, shared=70)
    (said,) = misses(caplog)
    assert "(20 of 20): call not supported: the model is in training mode. Call model.eval() first." in said


def test_a_handle_that_is_to_store_nothing_may_miss(jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    """As the cold runs of `check_exactness` do."""
    with SparsePrefixCache(jamba, grid=GRID, policy="none") as cache:
        serve(jamba, cache, 25, shared=70)
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced") as cache:
        check_exactness(jamba, [random_ids(80, seed=seed) for seed in range(21)], cache=cache, max_new_tokens=1)
    assert misses(caplog) == []


def test_reasons_are_counted_without_their_figures() -> None:
    reasons = ["diverges at token 7", "evicted", "diverges at token 12", "evicted", "diverges at token 9"]
    assert frequent(reasons) == ("diverges at token 9", 3)
