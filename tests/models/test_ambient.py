"""`ambient=True`: calls of generate() use the handle unasked, and runs that others are compared with never do."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tiny_models import build, random_ids
from torch import Tensor

from hf_sparse_cache import SparseCacheConfig, SparsePrefixCache, check_exactness
from hf_sparse_cache.bench.clock import timed
from hf_sparse_cache.models import ambient


GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
PROMPT = random_ids(150, seed=1)


def ask(model: Any, ids: Tensor = PROMPT, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})


@pytest.fixture(params=["Jamba", "Mamba"])
def cache(request: pytest.FixtureRequest) -> Iterator[SparsePrefixCache]:
    with SparsePrefixCache(build(request.param), ambient=True) as handle:
        yield handle


def test_a_call_uses_it_unasked(cache: SparsePrefixCache) -> None:
    expected = ask(build(type(cache.model).__name__.removesuffix("ForCausalLM")))
    for _ in range(2):
        assert torch.equal(ask(cache.model), expected)
    assert cache.stats().requests == 2 and cache.last_request.resumed_tokens == 150
    ids = torch.cat([expected, random_ids(10, seed=3)], dim=1)
    ask(cache.model, ids, num_beams=2)
    assert cache.last_request.resumed_tokens == 153  # the answer was kept
    with SparsePrefixCache(cache.model) as given:  # what is given is what is used
        ask(cache.model, past_key_values=given)
        assert given.stats().requests == 1 and cache.stats().requests == 3
        own = transformers.DynamicCache(config=cache.model.config)
        if "Jamba" in type(cache.model).__name__:
            ask(cache.model, **{cache.server.binding.cache_name: own})
            assert cache.stats().requests == 3 and own.get_seq_length() == 153


def test_runs_to_compare_with_never_use_it(cache: SparsePrefixCache) -> None:
    report = check_exactness(cache.model, [PROMPT], cache=cache)
    assert report.passed and cache.stats().requests == 2  # warm, twice
    with SparsePrefixCache(cache.model) as other:
        assert check_exactness(cache.model, [random_ids(150, seed=5)], cache=other).passed
    timed(cache.model, PROMPT, 2)
    with ambient.off():
        ask(cache.model)
    assert cache.stats().requests == 2
    ask(cache.model)  # and behind it as before
    assert cache.stats().requests == 3


def test_a_pipeline_and_an_agent_of_ones_own() -> None:
    from hf_sparse_cache.tools.builtin import load

    model, tokenizer = load("jamba-3m", ["a text to learn words from"])
    with SparsePrefixCache(model, tokenizer, ambient=True) as cache:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        text = "a text of some words " * 20
        first = pipe(text, max_new_tokens=4, do_sample=False, return_full_text=False)
        assert pipe(text, max_new_tokens=4, do_sample=False, return_full_text=False) == first
        assert cache.stats().requests == 2 and cache.last_request.computed_tokens == 0


def test_one_for_each_model(cache: SparsePrefixCache) -> None:
    before = dict(vars(cache.model))
    with pytest.raises(ValueError, match="already use another SparsePrefixCache unasked"):
        SparsePrefixCache(cache.model, ambient=True)
    assert vars(cache.model) == before  # and the first one goes on
    ask(cache.model)
    assert cache.stats().requests == 1
    with SparsePrefixCache(cache.model):
        pass  # one that has to be given may stand beside it
    model = cache.model
    cache.detach()
    ask(model)
    with SparsePrefixCache(model, ambient=True) as other:
        ask(model)
        assert other.stats().requests == 1 and cache.stats().requests == 1


def test_a_handle_that_is_collected_is_gone() -> None:
    model = build("Jamba")
    handle = SparsePrefixCache(model, ambient=True)
    del handle
    gc.collect()
    ask(model)
    with SparsePrefixCache(model, ambient=True) as other:
        twin = copy.deepcopy(model)
        ask(twin)  # a copy has no handle
        assert other.stats().requests == 0


def test_what_it_cannot_serve_runs_as_without_it(cache: SparsePrefixCache) -> None:
    expected = ask(cache.model, use_cache=False)
    assert "use_cache=False" in cache.last_request.reason
    if "Jamba" in type(cache.model).__name__:
        assert torch.equal(ask(cache.model, cache_implementation="dynamic"), expected)
        assert "cache_implementation='dynamic' asks for a cache of its own" in cache.last_request.reason
    settings = copy.deepcopy(cache.model.generation_config)
    assert ambient.handle_for(cache.model, {"generation_config": settings}) is cache
    settings.is_assistant = True
    assert ambient.handle_for(cache.model, {"generation_config": settings}) is None


def test_it_is_a_setting() -> None:
    config = SparseCacheConfig(ambient=True)
    assert SparseCacheConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="ambient must be True or False, not 'yes'"):
        SparseCacheConfig(ambient="yes")  # type: ignore[arg-type]
    model = build("Jamba")
    with SparsePrefixCache(model, config=config) as cache:
        ask(model)
        assert cache.stats().requests == 1
