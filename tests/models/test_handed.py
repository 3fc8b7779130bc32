"""`cache.prefill()`: logits of the last tokens, and a live cache that forwards, loops and generate() continue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import available_families, build, random_ids
from torch import Tensor

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models import prefill, states
from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.models.live import LiveCache
from hf_sparse_cache.planning.lineage import Lineage


ALONE = sorted(set(available_families()) - {"MiniMax", "xLSTM", "RWKV", "RecurrentGemma"})
TEXT = random_ids(330, seed=1)
PROMPT = TEXT[:, :300]
CORE = ["Mamba", "Jamba", "Mamba2", "Bamba", "Zamba2", "Qwen3.5", "LFM2", "Llama"]
GREEDY: dict[str, Any] = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def same(one: LiveCache, other: LiveCache, tokens: int) -> bool:
    """Whether two live caches hold the same, to the bit."""
    for left, right in (
        (states.capture_state(one), states.capture_state(other)),
        (states.capture_kv(one, 0, tokens), states.capture_kv(other, 0, tokens)),
    ):
        for a, b in zip(left.layers, right.layers, strict=True):
            for name, value in a.items():
                if not (torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]):
                    return False
    return True


def replayed(cache: SparsePrefixCache, ids: Tensor, lineage: Lineage) -> tuple[LiveCache, Tensor]:
    """A run from nothing over segments, and the logits behind it."""
    live = cache.server.binding.live_cache()
    with torch.no_grad():
        row = Row(ids[0], {"use_cache": True, "logits_to_keep": 1})
        output = prefill.replay(cache.server.binding, live, row, lineage)
    return live, output.logits[:, -1:]


def wiped(live: LiveCache) -> None:
    for layer in live.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if torch.is_tensor(tensor) and tensor.is_floating_point():
                    tensor.zero_()


@torch.no_grad()
def forwards(cache: SparsePrefixCache, live: LiveCache, ends: list[int], start: int = 300) -> Tensor:
    """A loop of one's own: plain forwards of what comes next, and nothing but that."""
    for end in ends:
        given = {cache.server.binding.cache_name: live, "use_cache": True}
        logits = cache.model(input_ids=TEXT[:, start:end], **given).logits
        start = end
    return logits[:, -1:]


@pytest.mark.parametrize("family", ALONE)
def test_forwards_of_ones_own_continue_it(family: str) -> None:
    """In pieces of several tokens and of one, where stock forgets its state or counts positions from 0, too."""
    with SparsePrefixCache(build(family)) as cache:
        cache.prefill(TEXT[:, :200])
        output = cache.prefill(PROMPT)  # resumed
        assert cache.last_request is not None and cache.last_request.resumed_tokens >= 128
        assert output.cache is output.past_key_values and output.logits.shape[:2] == (1, 1)
        ends = [320, 321, 322, 330]
        found = forwards(cache, output.past_key_values, ends)
        lineage = Lineage(cache.last_request.segments).then([320]).decoded(322).then([330])
        expected, logits = replayed(cache, TEXT, lineage)
        assert same(output.past_key_values, expected, 330)
        assert (found - logits).abs().max() <= 1e-5  # the head may run on more rows
        assert output.past_key_values.get_seq_length() == 330
        lost = cache.prefill(PROMPT).past_key_values
        wiped(lost)  # the twin that must fail
        assert not same(lost, expected, 330) and (forwards(cache, lost, ends) - logits).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["replayable", "bitwise"])
@pytest.mark.parametrize("family", CORE)
def test_generate_continues_it(family: str, mode: str) -> None:
    model = build(family)
    expected = torch.stack(model.generate(TEXT, **GREEDY).logits)
    with SparsePrefixCache(model, exactness=mode, grid=64) as cache:
        live = cache.prefill(PROMPT).past_key_values
        assert cache.last_request is not None
        before = cache.stats().requests
        segments = cache.last_request.segments
        found = torch.stack(model.generate(TEXT, past_key_values=live, **GREEDY).logits)
        _, logits = replayed(cache, TEXT, Lineage(segments).then([330]))
        assert torch.equal(found[0], logits[:, -1]) and (found - expected).abs().max() <= 1e-4
        assert cache.stats().requests == before  # it is the caller's
        other = cache.prefill(PROMPT).past_key_values
        wiped(other)
        assert (
            torch.stack(model.generate(TEXT, past_key_values=other, **GREEDY).logits) - expected
        ).abs().max() > 1e-3


@pytest.mark.parametrize("family", CORE)
def test_generate_with_the_very_prompt_computes_nothing(family: str) -> None:
    model = build(family)
    expected = torch.stack(model.generate(PROMPT, **GREEDY).logits)
    with SparsePrefixCache(model) as cache:
        for _ in range(2):  # the second time all of it is restored
            live = cache.prefill(PROMPT).past_key_values
            seen: list[int] = []
            hook = model.register_forward_pre_hook(
                lambda _, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
            )
            found = torch.stack(model.generate(PROMPT, past_key_values=live, **GREEDY).logits)
            hook.remove()
            assert seen == [1, 1, 1] and (found - expected).abs().max() <= 1e-4
        with pytest.raises(ValueError, match="holds 303 tokens of another text: input_ids has 300 tokens"):
            model.generate(PROMPT, past_key_values=live, **GREEDY)


@pytest.mark.parametrize("family", ["Mamba", "Jamba", "Mamba2"])
def test_only_what_is_new_may_be_given(family: str) -> None:
    model = build(family)
    expected = torch.stack(model.generate(TEXT, **GREEDY).logits)
    with SparsePrefixCache(model) as cache:
        live = cache.prefill(PROMPT).past_key_values
        mask = torch.ones_like(TEXT)
        found = model.generate(TEXT[:, 300:], attention_mask=mask, past_key_values=live, **GREEDY)
        assert (torch.stack(found.logits) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_what_does_not_continue_it_is_refused_and_changes_nothing(family: str) -> None:
    model = build(family)
    with SparsePrefixCache(model) as cache:
        live = cache.prefill(PROMPT).past_key_values
        other = TEXT.clone()
        other[0, 7] += 1
        for ids, options, why in (
            (other, {}, "another text: input_ids differs at token 7"),
            (TEXT[:, :290], {}, "another text: input_ids has 290 tokens"),
            (TEXT.repeat(2, 1), {}, "holds one prompt, and the call has 2 rows"),
            (TEXT, {"num_beams": 2}, "holds one prompt, and the call has 2 rows"),
            (TEXT[:, 300:], {"attention_mask": torch.ones_like(TEXT[:, 1:])}, "covers 329 tokens.* holds 300"),
        ):
            with pytest.raises(ValueError, match=why):
                model.generate(ids, past_key_values=live, **{**GREEDY, **options})
        with pytest.raises(ValueError, match="holds one prompt, and the forward has 2 rows"):
            model(TEXT[:, 300:].repeat(2, 1), **{cache.server.binding.cache_name: live})
        forwards(cache, live, [330])
        with pytest.raises(ValueError, match="nothing left to compute"):
            model.generate(TEXT, past_key_values=live, **GREEDY)
        assert same(live, replayed(cache, TEXT, Lineage(cache.last_request.segments).then([330]))[0], 330)
        elsewhere = build(family, seed=1)
        with SparsePrefixCache(elsewhere), pytest.raises(ValueError, match="of another model, or one that is gone"):
            elsewhere.generate(TEXT, past_key_values=live, **GREEDY)


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_a_forward_that_fails_halfway(family: str) -> None:
    model = build(family)
    with SparsePrefixCache(model) as cache:
        live = cache.prefill(PROMPT).past_key_values

        def fails(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = list(model.modules())[-1].register_forward_pre_hook(fails)
        layers = [
            module
            for module in model.modules()
            if "ecoderLayer" in type(module).__name__ or "Block" in type(module).__name__
        ]
        hook = layers[-1].register_forward_pre_hook(fails)
        with pytest.raises(KeyboardInterrupt):
            forwards(cache, live, [310])
        hook.remove()
        with pytest.raises(ValueError, match="failed halfway"):
            forwards(cache, live, [310])
        with pytest.raises(ValueError, match="failed halfway"):
            model.generate(TEXT, past_key_values=live, **GREEDY)


@pytest.mark.parametrize("mode", ["replayable", "bitwise"])
@pytest.mark.parametrize("family", CORE)
def test_logits_may_span_segments(family: str, mode: str) -> None:
    model = build(family)
    with torch.no_grad():
        stock = model(input_ids=PROMPT).logits
    with SparsePrefixCache(model, exactness=mode, grid=64) as cache:
        cache.prefill(PROMPT[:, :128])
        cold = cache.prefill(PROMPT, logits_to_keep=150).logits
        assert cold.shape == stock[:, -150:].shape and (cold - stock[:, -150:]).abs().max() <= 1e-4
        for tokens in (1, 2, 150, 299, 300):
            found = cache.prefill(PROMPT, logits_to_keep=tokens).logits
            assert found.shape[1] == tokens and (found - stock[:, -tokens:]).abs().max() <= 1e-4
            info = cache.last_request
            assert info is not None and info.resumed_tokens <= 300 - tokens
            if tokens == 150:
                assert info.resumed_tokens >= 64 and (mode == "replayable" or torch.equal(found, cold))
        cache.prefill(PROMPT)
        assert cache.prefill(PROMPT).logits.shape[1] == 1 and cache.last_request.computed_tokens == 0
        cache.store.verify()


def test_rows_of_logits_do_not_end_up_as_the_last_one() -> None:
    """The last row of many may differ in its last bits from the row alone, so it is not kept for the same prompt."""
    model = build("Jamba")
    with SparsePrefixCache(model) as cache:
        cache.prefill(PROMPT, logits_to_keep=5)
        assert not [item for item in cache.store.stored() if item.final]
        cache.prefill(PROMPT)
        assert [item.position for item in cache.store.stored() if item.final] == [300]


def test_it_prepares_the_next_turn_in_bitwise_mode() -> None:
    model = build("Jamba")
    with SparsePrefixCache(model, exactness="bitwise", grid=64) as cache:
        answer = model.generate(PROMPT, past_key_values=cache, **GREEDY).sequences
        conversation = torch.cat([answer, random_ids(90, seed=4)], dim=1)
        cache.prefill(conversation)  # in idle time, for example as the template renders it
        ids = torch.cat([conversation, random_ids(20, seed=5)], dim=1)
        warm = model.generate(ids, past_key_values=cache, **GREEDY)
        assert cache.last_request.resumed_tokens == 384
        with SparsePrefixCache(model, exactness="bitwise", grid=64) as cold:
            assert torch.equal(
                torch.stack(model.generate(ids, past_key_values=cold, **GREEDY).logits), torch.stack(warm.logits)
            )


def test_bad_input() -> None:
    model = build("Jamba")
    with SparsePrefixCache(model) as cache:
        for wrong in (0, 301, -1, 2.5, True, "1"):
            with pytest.raises(ValueError, match="logits_to_keep is .*: give 1 to 300"):
                cache.prefill(PROMPT, logits_to_keep=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="ids contains 100000"):
            cache.prefill(torch.tensor([[5, 100000]]))
        with pytest.raises(ValueError, match="there is no tokenizer"):
            cache.prefill("text")
        model.train()
        with pytest.raises(ValueError, match="the model is in training mode"):
            cache.prefill(PROMPT)
        model.eval()
        assert cache.stats().requests == 0
        with cache.record() as requests:
            cache.prefill(PROMPT[:, :1])
        assert [info.prompt_tokens for info in requests] == [1]
    with pytest.raises(ValueError, match="was detached"):
        cache.prefill(PROMPT)
