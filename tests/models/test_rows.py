"""Prompts of one call: what they share is computed once, and what runs together is named, close, and never stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lineages import differing
from matrix import left_padded
from tiny_models import build, random_ids
from torch import Tensor

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, check_exactness
from hf_sparse_cache.models import prefill, states
from hf_sparse_cache.stats import Cause, RequestInfo


CORE = ["Mamba", "Jamba", "Zamba2", "Qwen3.5", "LFM2", "Gemma3"]
SHARED = random_ids(200, seed=1)
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "do_sample": False,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def behind(shared: Tensor, *lengths: int) -> list[Tensor]:
    """Prompts that share a prefix, with so many tokens of their own."""
    return [torch.cat([shared, random_ids(own, seed=50 + index)], dim=1) for index, own in enumerate(lengths)]


def served(model: Any, rows: list[Tensor], cache: SparsePrefixCache) -> tuple[float, list[RequestInfo]]:
    """The largest difference to stock of any logit, and what happened to each row."""
    inputs = left_padded(rows)
    expected = torch.stack(model.generate(**inputs, **OPTIONS).logits)
    with cache.record() as infos:
        found = torch.stack(model.generate(**inputs, past_key_values=cache, **OPTIONS).logits)
    cache.store.verify()
    assert sum(checkpoint.pins for checkpoint in cache.store.stored()) == len(cache.store.marks.kept)
    return float((found - expected).abs().max()), infos


def computed(infos: list[RequestInfo]) -> int:
    """Tokens computed for a call; rows that are equal count once."""
    return sum(info.computed_tokens for info in {id(info): info for info in infos}.values())


def short(info: RequestInfo) -> bool:
    """Whether any segment has fewer than two tokens."""
    start = 0
    for entry in info.segments:
        end = entry if isinstance(entry, int) else entry[1]
        if end - start < 2:
            return True
        start = end
    return False


@pytest.mark.parametrize("family", CORE)
def test_a_shared_prefix_is_computed_once_at_the_first_call(family: str) -> None:
    model = build(family)
    with SparsePrefixCache(model) as cache:
        apart, infos = served(model, behind(SHARED, 24, 24, 24, 24), cache)
        assert apart <= 1e-4
        assert computed(infos) == 200 + 4 * 24
        assert sorted(info.resumed_tokens for info in infos) == [0, 200, 200, 200]
        assert [info.segments[-1] for info in infos].count((200, 224, 3)) == 3
        assert sum(info.batched for info in infos) == 3
        assert not differing(cache)
        assert 200 in {checkpoint.position for checkpoint in cache.store.stored()}
        apart, infos = served(model, behind(SHARED, 24, 24, 24, 24), cache)
        assert apart <= 1e-4 and computed(infos) <= 4 * 24


@pytest.mark.parametrize("mode", ["replayable", "bitwise"])
@pytest.mark.parametrize("family", ["Jamba", "Zamba2"])
def test_ragged_rows_nested_junctions_and_prefixes(family: str, mode: str) -> None:
    model = build(family)
    inner = torch.cat([SHARED, random_ids(60, seed=7)], dim=1)
    rows = [*behind(SHARED, 16, 19, 40), *behind(inner, 25, 33), SHARED, SHARED[:, :-1], inner, inner[:, :-1]]
    grid = {} if mode == "replayable" else {"grid": 64}
    with SparsePrefixCache(model, exactness=mode, **grid) as cache:
        apart, infos = served(model, rows, cache)
        assert apart <= 1e-4 and not any(map(short, infos))
        floor = 200 + 60 + 16 + 19 + 40 + 25 + 33
        assert computed(infos) <= floor + (16 if mode == "replayable" else 64 * len(rows))
        assert not differing(cache)
    if mode == "bitwise":  # what others computed never shows: to the bit what each gives by itself
        for row, info in zip(rows, infos, strict=True):
            with SparsePrefixCache(model, exactness=mode, **grid) as alone:
                served(model, [row], alone)
                assert alone.last_request.segments == info.segments and not info.batched


def test_bitwise_rows_equal_rows_alone() -> None:
    model = build("Jamba")
    rows = behind(SHARED, 24, 24, 30)
    with SparsePrefixCache(model, exactness="bitwise", grid=64, policy="none") as cache:
        inputs = left_padded(rows)
        together = model.generate(**inputs, past_key_values=cache, **OPTIONS).logits[0]
        assert cache.stats().computed_tokens == 192 + 3 * 8 + 24 + 24 + 30
        cache.clear()
        for index, row in enumerate(rows):
            mask = torch.ones_like(row)
            alone = model.generate(row, attention_mask=mask, past_key_values=cache, **OPTIONS).logits[0]
            assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize("policy", ["none", "learned"])
@pytest.mark.parametrize("family", CORE)
def test_unrelated_short_rows_run_in_one_forward(family: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forwards = build(family), []
    own = prefill._forward

    def counted(binding: Any, live: Any, rows: Any, *further: Any) -> Any:
        forwards.append(rows.ids.shape)
        return own(binding, live, rows, *further)

    with SparsePrefixCache(model, policy=policy) as cache:
        monkeypatch.setattr(prefill, "_forward", counted)
        apart, infos = served(model, [random_ids(length, seed=length) for length in (90, 100, 100, 97)], cache)
        assert apart <= 1e-4
        assert forwards == [(3, 100)]  # two of them are equal
        assert all(info.segments == ((0, info.prompt_tokens, 3),) for info in infos)
        assert len(cache.store) == 0  # nothing of it is stored


def test_rows_that_come_back_are_kept() -> None:
    model = build("Jamba")
    rows = [random_ids(length, seed=length) for length in (90, 100, 97)]
    with SparsePrefixCache(model) as cache:
        assert [computed(served(model, rows, cache)[1]) for _ in range(3)] == [287, 287, 0]
        assert not differing(cache)


def test_why_rows_that_ran_together_are_not_kept_is_said() -> None:
    model = build("Jamba")
    rows = [random_ids(length, seed=length) for length in (90, 100, 97)]
    with SparsePrefixCache(model) as cache:
        served(model, [torch.cat([rows[0], random_ids(9, seed=1)], dim=1)], cache)  # by itself
        assert cache.explain(rows[1]).reason.cause is Cause.DIVERGES or cache.explain(rows[1]).overlap_tokens == 0
        cache.clear()
        _, infos = served(model, rows, cache)
        assert all(info.batched and not info.captured and info.computed_tokens == info.prompt_tokens for info in infos)
        grown = torch.cat([rows[1], random_ids(30, seed=3)], dim=1)
        said = cache.explain(grown)
        assert said.reason == "never captured: the first 100 tokens ran in one forward with other prompts"
        assert "comes back runs by itself" in said.remedy and said.difference is None
        served(model, [grown], cache)
        assert cache.last_request.reason == said.reason and not cache.last_request.batched
        assert cache.explain(grown).reason == "resumed"
        served(model, rows[:2], cache)  # one of them resumes, or ran alone: no longer told so
        assert cache.explain(rows[1]).reason.cause is not Cause.BATCHED
    with SparsePrefixCache(model, policy="none") as cache:  # by itself: the policy did it
        served(model, rows[:1], cache)
        assert cache.explain(grown[:, :1]).reason.cause is not Cause.BATCHED
        assert cache.explain(torch.cat([rows[0], rows[1]], dim=1)).reason.cause is Cause.NOT_PLACED


def test_logits_are_kept_of_the_end_of_a_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row takes over where another one ends is no end of its own: with logits no file of it could be read."""
    put, own = [], CheckpointStore.put

    def seen(store: CheckpointStore, unit: Any, *args: Any, **kwargs: Any) -> Any:
        put.append((unit.position, unit.final, states.LOGITS in unit.state.layers[-1]))
        return (
            None if unit.final else own(store, unit, *args, **kwargs)
        )  # no room for the first, which others go on from

    monkeypatch.setattr(CheckpointStore, "put", seen)
    with SparsePrefixCache(build("Jamba"), policy="dyadic") as cache:
        cache.mark(SHARED)
        served(cache.model, [SHARED, *behind(SHARED, 90, 95)], cache)
    assert (200, True, True) in put and (200, False, False) in put
    assert all(final == logits for _, final, logits in put)


def test_marks_among_rows_are_captured() -> None:
    model = build("Jamba")
    with SparsePrefixCache(model) as cache:
        cache.mark(SHARED[:, :50])
        rows = [torch.cat([SHARED[:, :50], random_ids(30, seed=3)], dim=1), random_ids(90, seed=4)]
        assert served(model, rows, cache)[0] <= 1e-4
        assert 50 in {checkpoint.position for checkpoint in cache.store.stored()}


def test_a_budget_of_nothing_still_shares() -> None:
    model = build("Jamba")
    with SparsePrefixCache(model, policy="none") as cache:
        apart, infos = served(model, behind(SHARED, 16, 20, 24), cache)
        assert apart <= 1e-4 and computed(infos) == 200 + 16 + 20 + 24 and len(cache.store) == 0


@pytest.mark.parametrize("family", ["Mamba", "Jamba", "Zamba2"])
def test_a_wrong_handover_shows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that must fail: what is taken over is wiped."""
    model, own = build(family), states.restore

    def wiped(cache: Any, *stored: Any) -> None:
        own(cache, *stored)
        for layer in cache.layers:
            for held in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
                for value in held.values() if isinstance(held, dict) else held:
                    if torch.is_tensor(value):
                        value.zero_()

    with SparsePrefixCache(model) as cache:
        monkeypatch.setattr(states, "restore", wiped)
        assert served(model, behind(SHARED, 24, 24, 24), cache)[0] > 1e-3


@pytest.mark.parametrize("fails", ["capture_state", "stack"])
def test_a_lack_of_memory_costs_time_and_nothing_else(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own, calls = build("Jamba"), getattr(states, fails), []

    def once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*args)

    with SparsePrefixCache(model) as cache:
        monkeypatch.setattr(states, fails, once)
        assert served(model, behind(SHARED, 24, 24, 24), cache)[0] <= 1e-4 and calls
        assert not differing(cache)


def test_the_check_says_what_ran_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Jamba")
    with SparsePrefixCache(model) as cache:
        served(model, behind(SHARED, 24, 24), cache)
        ids = behind(SHARED, 30)[0]
        assert check_exactness(model, [ids], cache=cache, max_new_tokens=2).bitwise
        monkeypatch.setattr(RequestInfo, "batched", True)
        report = check_exactness(model, [ids], cache=cache, max_new_tokens=2)
        assert report.passed and report.rows[0].batched and "no run repeats bit for bit" in str(report)
        assert "batched" in str(report).splitlines()[2]
        assert not check_exactness(model, [ids], cache=cache, max_new_tokens=2, tolerance=-1.0).passed
