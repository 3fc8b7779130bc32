"""A handle that never resumes anything says so, once, with the most frequent reason and its remedy."""

import copy
import json
import pickle

import pytest
import torch
from tiny_models import random_ids
from transformers import PreTrainedModel

from hf_sparse_cache import SparsePrefixCache, check_exactness
from hf_sparse_cache.explain import frequent, not_supported, remedy
from hf_sparse_cache.stats import Cause, Reason


GRID = 32


def misses(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "nothing was resumed" in record.getMessage()]


def serve(model: PreTrainedModel, cache: SparsePrefixCache, count: int, shared: int, first: int = 0) -> None:
    """Prompts of 80 tokens that have `shared` tokens in common."""
    for seed in range(first, first + count):
        ids = torch.cat([random_ids(shared, seed=999), random_ids(80 - shared, seed=seed)], dim=1)
        model.generate(ids, past_key_values=cache, max_new_tokens=1)


def test_it_warns_once_and_names_reason_and_remedy(jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with SparsePrefixCache(jamba, grid=GRID, exactness="bitwise") as cache:
        serve(jamba, cache, 19, shared=20)
        assert misses(caplog) == []
        serve(jamba, cache, 25, shared=20, first=19)
    (said,) = misses(caplog)
    assert said.startswith(
        "20 requests and nothing was resumed. Most frequent reason (19 of 20): diverges at token 20. "
        "That is before the first cut: put what changes behind what stays. A smaller grid cuts earlier."
    )


def test_one_hit_is_enough(jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", exactness="bitwise") as cache:
        serve(jamba, cache, 2, shared=70)
        assert cache.last_request.resumed_tokens > 0
        serve(jamba, cache, 30, shared=0, first=40)
    assert misses(caplog) == []


def batch(model: PreTrainedModel, cache: SparsePrefixCache, count: int, shared: int = 0) -> None:
    """One call with prompts of 40 tokens, of which all begin alike."""
    ids = random_ids(40, seed=cache.stats().requests, batch=count)
    ids[:, :shared] = ids[0, :shared]
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1)


def test_the_rows_of_one_call_had_nothing_to_resume_from(
    jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls are counted: a batch of prompts that have nothing in common is no sign of a fault."""
    with SparsePrefixCache(jamba) as cache:
        batch(jamba, cache, 24)
        assert cache.stats().requests == 24 and not cache.stats().resumed_tokens and misses(caplog) == []
        for _ in range(18):
            batch(jamba, cache, 2)
        assert misses(caplog) == []
        for _ in range(3):
            batch(jamba, cache, 2)
    (said,) = misses(caplog)
    assert said.startswith(
        "62 requests in 20 calls and nothing was resumed. Most frequent reason (20 of the last 20): "
    )


def test_what_rows_took_over_from_each_other_was_resumed(
    jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with SparsePrefixCache(jamba) as cache:
        batch(jamba, cache, 3, shared=30)
        assert cache.stats().resumed_tokens == 60
        for _ in range(25):
            batch(jamba, cache, 1)
    assert misses(caplog) == []


class Letters:
    """A tokenizer whose text is one letter, whatever the token."""

    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids: list[int], **options: object) -> str:
        return "x" * len(ids)


@pytest.mark.parametrize(("strings", "told"), [(("x\n",), 1), (("xx",), 0)])
def test_strings_that_no_token_ends_with_are_told_once(
    jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture, strings: tuple[str, ...], told: int
) -> None:
    with SparsePrefixCache(jamba, Letters(), cut_after=strings) as cache:
        serve(jamba, cache, 19, shared=20)
        assert "cut_after" not in caplog.text
        serve(jamba, cache, 25, shared=20, first=19)
    assert caplog.text.count("token that ends with one of cut_after") == told


def test_what_a_mark_would_save_is_said_in_tokens(jamba: PreTrainedModel) -> None:
    """In bitwise mode, which cuts plain text at the grid alone."""
    first, second = (torch.cat([random_ids(60, seed=999), random_ids(20, seed=seed)], dim=1) for seed in (1, 2))
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", exactness="bitwise") as cache:
        jamba.generate(first, past_key_values=cache, max_new_tokens=1)
        said = cache.explain(second)
        assert (said.resumed_tokens, said.recomputed_tokens) == (32, 28)
        assert "28 shared tokens lie behind the last cut" in said.remedy and "cache.mark()" in said.remedy
        cache.mark(first[:, :60])
        jamba.generate(first, past_key_values=cache, max_new_tokens=1)
        jamba.generate(second, past_key_values=cache, max_new_tokens=1)
        assert cache.last_request.recomputed_tokens == 0
        assert "lie behind" not in cache.explain(second).remedy
    with SparsePrefixCache(jamba) as cache:
        jamba.generate(first, past_key_values=cache, max_new_tokens=1)
        jamba.generate(second, past_key_values=cache, max_new_tokens=1)
        assert "lie behind the last cut" not in cache.explain(second).remedy


def test_calls_that_are_not_supported_count(jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with SparsePrefixCache(jamba, grid=GRID, exactness="bitwise") as cache:
        jamba.train()
        serve(jamba, cache, 20, shared=70)
    (said,) = misses(caplog)
    assert "(20 of 20): call not supported: the model is in training mode. Call model.eval() first." in said


def test_a_handle_that_is_to_store_nothing_may_miss(jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    """As the cold runs of `check_exactness` do."""
    with SparsePrefixCache(jamba, grid=GRID, policy="none", exactness="bitwise") as cache:
        serve(jamba, cache, 25, shared=70)
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", exactness="bitwise") as cache:
        check_exactness(jamba, [random_ids(80, seed=seed) for seed in range(21)], cache=cache, max_new_tokens=1)
    assert misses(caplog) == []


def test_reasons_are_counted_without_their_figures() -> None:
    diverges = [Reason(Cause.DIVERGES, token=token) for token in (7, 12, 9)]
    evicted = Reason(Cause.EVICTED)
    assert frequent([diverges[0], evicted, diverges[1], evicted, diverges[2]]) == ("diverges at token 9", 3)
    calls = [not_supported(f"{name} asks for more") for name in ("a1", "a2", "a1")]
    assert frequent(calls) == ("call not supported: a1 asks for more", 2)


def test_a_reason_is_a_sentence_with_its_cause_and_values() -> None:
    reason = Reason(Cause.BEFORE_FIRST, tokens=5, position=8)
    assert reason == str(reason) == "overlap of 5 tokens ends before the first checkpoint at 8"
    for twin in (copy.deepcopy(reason), pickle.loads(pickle.dumps(reason))):
        assert (twin, twin.cause, twin.values) == (reason, Cause.BEFORE_FIRST, {"tokens": 5, "position": 8})
    assert json.dumps({"reason": reason}) == f'{{"reason": "{reason}"}}'
    with pytest.raises(KeyError):
        Reason(Cause.DIVERGES)


def test_every_cause_has_its_remedy() -> None:
    values = {"token": 1, "tokens": 2, "position": 3, "why": "{x} asks for more"}
    said = {cause: remedy(Reason(cause, **values), "n") for cause in Cause}
    assert said.pop(Cause.RESUMED) == "" and all(said.values()) and len(set(said.values())) == len(said)
    assert said[Cause.TRAINING] == "Call model.eval() first." and "{" not in "".join(said.values())
