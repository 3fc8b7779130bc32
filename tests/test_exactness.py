"""The checker accepts exact caches and rejects every kind of wrong state, on each core family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build, random_ids
from transformers import PreTrainedModel

from hf_sparse_cache import SparsePrefixCache, check_exactness, mamba1
from hf_sparse_cache.models.inputs import Prompts
from hf_sparse_cache.models.states import LayerTensors, capture_state
from hf_sparse_cache.store.slabs import taken
from hf_sparse_cache.store.tree import Checkpoint, KVSegment


GRID = 32
DOCUMENT = random_ids(160, seed=1)
PROMPTS = [torch.cat([DOCUMENT, random_ids(40 + extra, seed=2 + extra)], dim=1) for extra in range(2)]


def warmed(model: PreTrainedModel, seed: int = 1) -> SparsePrefixCache:
    """A handle that has seen a document with a question of its own."""
    cache = SparsePrefixCache(model, grid=GRID, policy="balanced", exactness="bitwise")
    model.generate(
        torch.cat([random_ids(160, seed=seed), random_ids(48, seed=9)], dim=1), past_key_values=cache, max_new_tokens=1
    )
    return cache


def stored(cache: SparsePrefixCache) -> list[Checkpoint]:
    return [checkpoint for _, _, checkpoint in cache.store.checkpoints()]


def test_exact_cache_passes(model: PreTrainedModel) -> None:
    with warmed(model) as cache:
        report = check_exactness(model, PROMPTS, cache=cache)
    assert report.passed, str(report)
    assert report.bitwise and report.tokens_equal
    assert report.resumed_tokens >= 2 * 96
    assert report.max_abs_logit_diff <= 1e-4
    assert "bit for bit" in str(report)


def test_nothing_resumed_does_not_pass(model: PreTrainedModel) -> None:
    with SparsePrefixCache(model, grid=GRID, policy="none", exactness="bitwise") as cache:
        report = check_exactness(model, PROMPTS[:1], cache=cache, max_new_tokens=2)
    assert report.bitwise and not report.passed
    assert "nothing was resumed" in str(report)


def zero(kind: str) -> Callable[[SparsePrefixCache], None]:
    def sabotage(cache: SparsePrefixCache) -> None:
        for checkpoint in stored(cache):
            for layer in checkpoint.state.layers:
                for name, value in layer.items():
                    if name.startswith(kind):
                        value.zero_()

    return sabotage


def state_of_another_prompt(cache: SparsePrefixCache) -> None:
    with warmed(cache.model, seed=77) as other:
        others = {checkpoint.position: checkpoint.state for checkpoint in stored(other)}
        for checkpoint in stored(cache):
            if checkpoint.position in others:
                checkpoint.state = others[checkpoint.position]


def position_off_by_one(cache: SparsePrefixCache) -> None:
    """Each state is that of one token earlier."""
    ids = torch.cat([DOCUMENT, random_ids(48, seed=9)], dim=1)
    for checkpoint in stored(cache):
        live = cache.server.live_cache()
        with torch.no_grad():
            cache.server.serve(live, Prompts.of(ids[:, : checkpoint.position - 1], {}), {"use_cache": True})
        checkpoint.state = capture_state(live)


def kv_of_another_prompt(cache: SparsePrefixCache) -> None:
    """The first KV segment is swapped for another prompt's. (In Jamba's attention order is invisible.)"""
    with warmed(cache.model, seed=77) as other:
        first_segment(cache).payload = first_segment(other).payload


def first_segment(cache: SparsePrefixCache) -> KVSegment:
    segment = stored(cache)[0].kv
    assert segment is not None
    while segment.parent is not None:
        segment = segment.parent
    return segment


SABOTAGES = {
    "recurrent state zeroed": zero("recurrent"),
    "conv state zeroed": zero("conv"),
    "state from another prompt": state_of_another_prompt,
    "position off by one": position_off_by_one,
}


@pytest.mark.parametrize("how", SABOTAGES)
def test_sabotaged_state_is_rejected(model: PreTrainedModel, how: str) -> None:
    with warmed(model) as cache:
        SABOTAGES[how](cache)
        report = check_exactness(model, PROMPTS, cache=cache)
    assert report.resumed_tokens > 0
    assert not report.bitwise and not report.passed
    assert report.max_abs_logit_diff > 1e-3  # far outside the tolerance: not a lucky rounding
    assert "NOT EXACT" in str(report)


@pytest.mark.parametrize("family", ["Jamba", "Zamba", "Zamba2"])
def test_swapped_kv_is_rejected(family: str) -> None:
    model = build(family)
    with warmed(model) as cache:
        kv_of_another_prompt(cache)
        report = check_exactness(model, PROMPTS, cache=cache)
    assert report.resumed_tokens > 0
    assert not report.bitwise and not report.passed
    assert report.max_abs_logit_diff > 1e-3


def test_a_call_that_was_not_served_to_its_end_is_reported() -> None:
    """A window one token short is found before it is served: the warm run has no states to compare."""
    model = build("Gemma3")
    with warmed(model) as cache:
        for checkpoint in stored(cache):
            layers = checkpoint.state.layers
            short = (layer | {"seen": layer["seen"] - 1} if "seen" in layer else layer for layer in layers)
            checkpoint.state = LayerTensors(tuple(short))
        report = check_exactness(model, PROMPTS[:1], cache=cache, max_new_tokens=2)
    assert report.resumed_tokens == 0 and not report.bitwise and not report.passed
    assert report.max_abs_logit_diff == 0 and "holds a window of" in str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_bitwise(dtype: torch.dtype) -> None:
    for family in ("Mamba", "Zamba2"):
        model = build(family, dtype=dtype)
        with warmed(model) as cache:
            report = check_exactness(model, PROMPTS, cache=cache, max_new_tokens=2)
        assert report.passed, str(report)


def test_broken_mamba1_resume_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold and warm would agree if the scan forgot its state at every cut: the comparison with stock catches it."""
    model = build("Mamba")
    with warmed(model) as cache:
        monkeypatch.setattr(mamba1, "announce", lambda state: None)
        report = check_exactness(model, PROMPTS, cache=cache)
    assert not report.passed
    assert report.max_abs_logit_diff > 1e-3


def test_prompts_of_every_allowed_shape(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", exactness="bitwise") as cache:
        assert check_exactness(jamba, [PROMPTS[0][0], PROMPTS[1]], cache=cache, max_new_tokens=1).passed
        with pytest.raises(ValueError, match="prompts is empty"):
            check_exactness(jamba, [], cache=cache)
        with pytest.raises(ValueError, match="shape"):
            check_exactness(jamba, [torch.zeros(2, 5, dtype=torch.long)], cache=cache)
        with pytest.raises(ValueError, match="tokenizer"):
            check_exactness(jamba, ["text"], cache=cache)


def test_bytes_are_those_of_the_tensors(jamba: PreTrainedModel) -> None:
    with warmed(jamba) as cache:
        checkpoints = stored(cache)
        segments = set()
        for checkpoint in checkpoints:
            segment = checkpoint.kv
            while segment is not None:
                segments.add(segment)
                segment = segment.parent

        def storage(payload: LayerTensors) -> int:
            held = (value.untyped_storage() for value in payload.tensors())  # which all of a payload share
            return sum({place.data_ptr(): taken(place.nbytes()) for place in held}.values())

        stats = cache.stats()
        assert stats.checkpoint_bytes == sum(storage(checkpoint.state) for checkpoint in checkpoints) > 0
        assert stats.kv_bytes == sum(storage(segment.payload) for segment in segments) > 0
        assert stats.checkpoints == len(checkpoints)


def crafted(monkeypatch: pytest.MonkeyPatch, stock: list[int], warm: list[int], logits: list[float]) -> Any:
    """A report on runs that chose these tokens; warm logits are off stock's by `logits`, step by step."""
    from hf_sparse_cache import exactness

    zeros = torch.zeros(len(stock), 5)
    state = (LayerTensors(({"conv.0": torch.zeros(2)},)),)
    off = torch.tensor(logits)[:, None].expand(-1, 5)
    runs = [
        exactness._Run(torch.tensor(stock), zeros, ()),
        exactness._Run(torch.tensor(warm), off, state),
        exactness._Run(torch.tensor(warm), off, state),
        exactness._Run(torch.tensor(warm), off, state),
    ]
    monkeypatch.setattr(exactness, "_run", lambda *args: runs.pop(0))
    model = build("Mamba2")
    with warmed(model) as cache:
        return check_exactness(model, PROMPTS[:1], cache=cache, max_new_tokens=len(stock))


def test_steps_are_compared_up_to_the_first_other_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it the two runs have read different texts; at it they have not, and it counts."""
    report = crafted(monkeypatch, [5, 6, 7, 8], [5, 6, 9, 8], [1e-5, 2e-5, 0.25, 3.0])
    assert report.max_abs_logit_diff == 0.25 and not report.tokens_equal
    report = crafted(monkeypatch, [5, 6, 7, 8], [4, 6, 7, 8], [0.5, 1.0, 2.0, 3.0])
    assert report.max_abs_logit_diff == 0.5 and not report.tokens_equal
    report = crafted(monkeypatch, [5, 6, 7, 8], [5, 6, 7, 8], [1e-5, 2e-5, 0.25, 3.0])
    assert report.max_abs_logit_diff == 3.0 and report.tokens_equal
    report = crafted(monkeypatch, [5, 6, 7, 8], [5, 6, 7, 1], [0.0, 0.0, 0.0, 0.125])
    assert report.max_abs_logit_diff == 0.125 and not report.tokens_equal
