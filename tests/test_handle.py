"""The handle: what it reports, what it refuses, and that the model is given back as it was."""

import gc
import weakref
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import build, random_ids
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, SparseCacheConfig, SparsePrefixCache, UnsupportedModelError
from hf_sparse_cache.models.families import cache_name_of
from hf_sparse_cache.planning import policies


GRID = 32
DOCUMENT = random_ids(128, seed=1)


def question(seed: int, length: int = 40) -> torch.Tensor:
    return torch.cat([DOCUMENT, random_ids(length, seed=seed)], dim=1)


def handle(model: PreTrainedModel, **options: object) -> SparsePrefixCache:
    return SparsePrefixCache(model, **{"grid": GRID, "policy": "balanced", **options})


def stock_logits(model: PreTrainedModel, **inputs: object) -> torch.Tensor:
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def test_second_question_resumes(model: PreTrainedModel) -> None:
    with handle(model) as cache:
        model.generate(question(2), past_key_values=cache, max_new_tokens=2)
        first = cache.last_request
        assert first.resumed_tokens == 0 and first.reason == "nothing stored" and first.captured
        model.generate(question(3), past_key_values=cache, max_new_tokens=2)
        second = cache.last_request
        assert second.overlap_tokens == 128 and second.resumed_tokens == 128 and second.reason == "resumed"
        assert second.resumed_tokens + second.computed_tokens == second.prompt_tokens == 168
        stats = cache.stats()
        assert (stats.requests, stats.prompt_tokens, stats.resumed_tokens) == (2, 336, 128)
        assert stats.capture_seconds > 0 and stats.restore_seconds > 0
        assert "2 requests" in repr(cache)


def test_left_padded_batch_reuses_row_by_row(model: PreTrainedModel) -> None:
    rows = [question(2), question(3, 25), random_ids(9, seed=5), question(2)]
    width = max(row.shape[1] for row in rows) + 3
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    expected = stock_logits(model, input_ids=ids, attention_mask=mask)
    with handle(model) as cache:
        model.generate(question(7), past_key_values=cache, max_new_tokens=1)
        got = stock_logits(model, input_ids=ids, attention_mask=mask, past_key_values=cache)
        assert cache.stats().resumed_tokens == 2 * 128  # the equal rows are one request
        assert cache.stats().requests == 4
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_sampling_draws_the_same_tokens(model: PreTrainedModel) -> None:
    def sample(**options: object) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(question(2), do_sample=True, max_new_tokens=12, **options)

    expected = sample()
    with handle(model) as cache:
        sample(past_key_values=cache)
        assert torch.equal(sample(past_key_values=cache), expected)
        assert cache.last_request.resumed_tokens > 0


def test_model_is_given_back(model: PreTrainedModel) -> None:
    names = ("_prefill", "_prepare_cache_for_generation", "_validate_model_kwargs", "generate")
    before = {name: getattr(model, name) for name in names}
    attributes = set(model.__dict__)
    expected = model.generate(question(2), max_new_tokens=4)
    first, second = handle(model), handle(model)
    model.generate(question(2), past_key_values=first, max_new_tokens=4)
    first.detach()
    first.detach()  # twice is harmless
    model.generate(question(2), past_key_values=second, max_new_tokens=4)
    assert set(model.__dict__) != attributes
    second.detach()
    assert set(model.__dict__) == attributes
    assert {name: getattr(model, name) for name in names} == before
    assert torch.equal(model.generate(question(2), max_new_tokens=4), expected)
    with pytest.raises(ValueError, match="past_key_values is a SparsePrefixCache that was detached"):
        model.generate(question(2), **{cache_name_of(model): second}, max_new_tokens=4)


def test_model_is_given_back_when_the_handle_is_collected(jamba: PreTrainedModel) -> None:
    attributes = set(jamba.__dict__)
    cache = handle(jamba)
    jamba.generate(question(2), past_key_values=cache, max_new_tokens=1)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert set(jamba.__dict__) == attributes


def test_calls_without_a_handle_are_untouched(model: PreTrainedModel) -> None:
    expected = stock_logits(model, input_ids=question(2))
    with handle(model):
        assert torch.equal(stock_logits(model, input_ids=question(2)), expected)


def test_clear_forgets_everything(jamba: PreTrainedModel) -> None:
    with handle(jamba) as cache:
        jamba.generate(question(2), past_key_values=cache, max_new_tokens=1)
        cache.clear()
        assert cache.stats().checkpoints == cache.stats().checkpoint_bytes == cache.stats().kv_bytes == 0
        jamba.generate(question(3), past_key_values=cache, max_new_tokens=1)
        assert cache.last_request.resumed_tokens == 0


def test_changed_weights_are_never_matched(model: PreTrainedModel) -> None:
    with handle(model) as cache:
        model.generate(question(2), past_key_values=cache, max_new_tokens=1)
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        expected = stock_logits(model, input_ids=question(3))
        got = stock_logits(model, input_ids=question(3), past_key_values=cache)
        assert cache.last_request.resumed_tokens == 0
        assert "weights changed" in cache.last_request.reason
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_autocast_shares_nothing_with_full_precision(jamba: PreTrainedModel) -> None:
    with handle(jamba) as cache:
        jamba.generate(question(2), past_key_values=cache, max_new_tokens=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            jamba.generate(question(2), past_key_values=cache, max_new_tokens=1)
        assert cache.last_request.resumed_tokens == 0
        jamba.generate(question(2), past_key_values=cache, max_new_tokens=1)
        assert cache.last_request.resumed_tokens > 0


def test_autocast_and_full_precision_each_read_their_own_files(jamba: PreTrainedModel, tmp_path: Path) -> None:
    """What a file is held against is measured anew: under autocast the states are of another type."""
    ids = random_ids(300)
    kinds: set[torch.dtype] = set()
    for restarted in (False, True):
        with handle(jamba, store=CheckpointStore("64MiB", disk_memory="64MiB", disk_dir=tmp_path)) as cache:
            for enabled in (False, True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                    jamba.generate(ids, past_key_values=cache, max_new_tokens=1)
                assert (cache.last_request.resumed_tokens > 0) == restarted
            layers = [layer for item in cache.store.stored() for layer in item.state.layers]
            kinds |= {value.dtype for layer in layers for value in layer.values() if torch.is_tensor(value)}
            cache.store.close()
    assert len(kinds) > 1


@pytest.mark.parametrize("eviction", ["lru", "learned"])
def test_budget_holds_and_outputs_stay_right(model: PreTrainedModel, eviction: str) -> None:
    with handle(model) as cache:
        one = cache.size.state_bytes + 128 * cache.size.kv_bytes_per_token
    budget = int(2.5 * one)
    with handle(model, store=CheckpointStore(budget, eviction=eviction)) as cache:
        for seed in range(6):
            prompt = torch.cat([random_ids(128, seed=seed % 3), random_ids(20, seed=90 + seed)], dim=1)
            expected = stock_logits(model, input_ids=prompt)
            torch.testing.assert_close(
                stock_logits(model, input_ids=prompt, past_key_values=cache), expected, rtol=0, atol=1e-4
            )
            assert cache.stats().checkpoint_bytes + cache.stats().kv_bytes <= budget
        if eviction == "lru":  # the learned one may rather refuse what is worth less
            assert cache.stats().evictions > 0


def test_namespaces_share_nothing(jamba: PreTrainedModel) -> None:
    store = CheckpointStore("64MiB")
    with handle(jamba, store=store, namespace="a") as first, handle(jamba, store=store, namespace="b") as second:
        jamba.generate(question(2), past_key_values=first, max_new_tokens=1)
        jamba.generate(question(2), past_key_values=second, max_new_tokens=1)
        assert second.last_request.overlap_tokens == second.last_request.resumed_tokens == 0
        jamba.generate(question(2), past_key_values=first, max_new_tokens=1)
        assert first.last_request.resumed_tokens > 0
        second.clear()
        assert second.explain(question(2)).reason == "nothing stored"
        assert first.explain(question(2)).resumed_tokens > 0 and first.stats().checkpoints == len(store) > 0
        first.clear()
        assert len(store) == store.used_bytes == store.remembered_tokens == 0


def test_max_checkpoints_bounds_each_prompt(jamba: PreTrainedModel) -> None:
    with handle(jamba, max_checkpoints=1) as cache:
        jamba.generate(question(2), past_key_values=cache, max_new_tokens=1)
        assert len(cache.last_request.captured) == 1


class TestErrors:
    """Clear, before any compute, and nothing is lost."""

    def test_right_padding(self, model: PreTrainedModel) -> None:
        ids = torch.cat([question(2), torch.zeros(1, 3, dtype=torch.long)], dim=1)
        mask = (ids != 0).long()
        with handle(model) as cache, pytest.raises(ValueError, match="left"):
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1)

    @pytest.mark.parametrize("bad", [-1, 128])
    def test_ids_out_of_range(self, model: PreTrainedModel, bad: int) -> None:
        ids = question(2)
        ids[0, 5] = bad
        with handle(model) as cache, pytest.raises(ValueError, match=f"input_ids contains {bad}"):
            model.generate(ids, past_key_values=cache, max_new_tokens=1)

    def test_cache_of_another_model(self, model: PreTrainedModel) -> None:
        other = build("Jamba", seed=3)
        with handle(other) as cache, handle(model), pytest.raises(ValueError, match="made for another model"):
            model.generate(question(2), past_key_values=cache, max_new_tokens=1)
        with handle(other) as cache, pytest.raises(ValueError, match="past_key_values is a SparsePrefixCache that is"):
            model.generate(question(2), **{cache_name_of(model): cache}, max_new_tokens=1)

    def test_memory_too_small(self, model: PreTrainedModel) -> None:
        with pytest.raises(ValueError, match="max_memory"):
            handle(model, max_memory=100)
        assert "_prefill" not in model.__dict__

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"grid": 1}, "grid"),
            ({"exactness": "loose"}, "exactness"),
            ({"max_checkpoints": -1}, "max_checkpoints"),
            ({"policy": "nonsense"}, "policy"),
            ({"max_memory": "2 parsecs"}, "max_memory"),
        ],
    )
    def test_bad_arguments(self, jamba: PreTrainedModel, options: dict[str, object], name: str) -> None:
        with pytest.raises(ValueError, match=name):
            handle(jamba, **options)
        assert "_prefill" not in jamba.__dict__

    @pytest.mark.parametrize("family", ["MiniMax", "xLSTM", "RWKV", "RecurrentGemma"])
    def test_unsupported_models(self, family: str) -> None:
        if family not in tiny_models.available_families():
            pytest.skip(f"{family} is not in this transformers")
        model = build(family)
        with pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__}.*Mamba2"):
            handle(model)

    def test_not_a_model(self) -> None:
        with pytest.raises(UnsupportedModelError, match="Linear"):
            SparsePrefixCache(torch.nn.Linear(2, 2), exactness="bitwise")

    def test_cache_implementation(self, jamba: PreTrainedModel) -> None:
        with handle(jamba) as cache, pytest.raises(ValueError, match="cache_implementation"):
            jamba.generate(question(2), past_key_values=cache, cache_implementation="static", max_new_tokens=1)


def test_what_it_says_of_itself(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=32, policy="last", exactness="bitwise") as cache:
        cache.model.generate(tiny_models.random_ids(50, seed=1), past_key_values=cache, max_new_tokens=1)
        said = repr(cache)
        assert "of 2.0 GiB: 1 request " in said and "computed 50 · 1 checkpoint, " in said and "recomputed" not in said
        assert said.endswith("0 evictions)") and str(cache.store).startswith("CheckpointStore(1 checkpoint, ")
    with SparsePrefixCache(jamba, max_memory=None, exactness="bitwise") as cache:
        assert "without a limit" in repr(cache)


# -- arguments --------------------------------------------------------------------------------------------------------


def test_what_is_given_is_what_is_used(jamba: PreTrainedModel) -> None:
    class Ones(policies.Policy):
        def place(self, prompt: object) -> list[int]:
            return []

    policy, store = Ones(), CheckpointStore("64MiB")
    with SparsePrefixCache(jamba, policy=policy, store=store, cut_after=(), prove=False) as cache:
        assert cache.policy is policy and cache.store is store and cache.config.policy == "Ones"
    config = SparseCacheConfig(grid=48, max_memory="3MiB", policy="last")
    with SparsePrefixCache(jamba, config=config, prove=False) as cache:
        assert cache.config is config and cache.grid == 48 and type(cache.policy).__name__ == "Last"
        assert cache.store.max_memory == 3 * 2**20
    with SparsePrefixCache(jamba, prove=False) as cache:
        assert cache.config == SparseCacheConfig() and cache.tokenizer is None and not cache.server.proof.wanted
        assert (cache.model, cache.family) == (jamba, cache.server.binding.family)
    with SparsePrefixCache(jamba) as cache:
        assert cache.server.proof.wanted and cache.stats().proved


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"store": "64MiB"}, ValueError, "store is '64MiB': give a CheckpointStore, or leave it out"),
        ({"tokenizer": "gpt2"}, ValueError, "tokenizer is 'gpt2': give the model's tokenizer"),
        ({"policy": policies.Last}, TypeError, "policy is the class Last"),
        ({"policy": 3}, TypeError, "policy is 3"),
        ({"config": SparseCacheConfig(), "grid": 48}, ValueError, "give either config or single keywords, not both"),
        ({"config": SparseCacheConfig(), "policy": policies.Last()}, ValueError, "give either config or single"),
    ],
)
def test_arguments_that_are_none_are_refused(
    options: dict[str, object], error: type[Exception], said: str, jamba: PreTrainedModel
) -> None:
    with pytest.raises(error, match=said):
        SparsePrefixCache(jamba, **options)
    assert "_prefill" not in jamba.__dict__


def test_a_budget_of_just_one_checkpoint_is_enough(jamba: PreTrainedModel) -> None:
    with handle(jamba, prove=False) as cache:
        need = cache.server.binding.facts.bytes_of(GRID)
    with handle(jamba, max_memory=need, prove=False) as cache:
        assert cache.store.max_memory == need
    with pytest.raises(ValueError, match=r"max_memory is .*, less than one checkpoint of this model"):
        handle(jamba, max_memory=need - 1, prove=False)
    with handle(jamba, store=CheckpointStore(None), prove=False) as cache:
        assert cache.store.max_memory is None


def test_a_handle_that_may_not_be_used_unasked_gives_the_model_back(jamba: PreTrainedModel) -> None:
    attributes = set(jamba.__dict__)
    first = handle(jamba, ambient=True, prove=False)
    with pytest.raises(ValueError, match="already use another SparsePrefixCache unasked"):
        handle(jamba, ambient=True, prove=False)
    first.detach()
    assert set(jamba.__dict__) == attributes


def test_scores_of_nothing_and_of_a_window_of_one_token(jamba: PreTrainedModel) -> None:
    text = random_ids(6, seed=1)[0].tolist()
    with handle(jamba, prove=False) as cache:
        for bad in ({"batch_size": 0}, {"max_length": 0}, {"batch_size": True}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                cache.loglikelihood_rolling([text], prefix=1, **bad)
            with pytest.raises(ValueError, match=next(iter(bad))):
                cache.loglikelihood([(text, [5])], **bad)
        assert cache.stats().requests == 0
        pairs = [([before], [token]) for before, token in zip([1, *text], text, strict=False)]
        expected = sum(value for value, _ in cache.loglikelihood(pairs))
        (found,) = cache.loglikelihood_rolling([text], prefix=1, max_length=1, batch_size=1)
        assert found == pytest.approx(expected, abs=1e-4)
        jamba.config.max_position_embeddings = 3
        assert cache._window(None) == 3 and cache._window(2) == 2
    for call in (cache.loglikelihood_rolling, cache.loglikelihood):
        with pytest.raises(ValueError, match="the cache is a SparsePrefixCache that was detached"):
            call([])
    with pytest.raises(ValueError, match="this is a SparsePrefixCache that was detached"):
        cache.prefill(random_ids(5))


def test_a_progress_bar_is_shown_where_it_is_asked_for(
    jamba: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with handle(jamba, prove=False) as cache:
        for progress, shown in ((True, True), (False, False), (None, False)):
            cache.loglikelihood([([5, 6], [7]), ([5, 6], [8])], progress=progress)
            said = capsys.readouterr().err
            assert ("score" in said) is shown and ("0/2" in said) is shown  # how often it comes is a matter of time
