"""Rounded storage: what is kept is smaller, and a warm run equals a cold one bit for bit all the same."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lineages import differing
from matrix import BITWISE, BROKEN_UPSTREAM, REPLAYABLE, Bench, build_shared, supported_families
from tiny_models import build, random_ids

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, UnsupportedModelError, check_exactness
from hf_sparse_cache.models import rounding, states
from hf_sparse_cache.models.deviation import INT8, MOST_HALF
from hf_sparse_cache.models.rounding import NotRoundableError, rounding_of
from hf_sparse_cache.models.tensors import LayerTensors


ROUNDED = ["bf16", "int8"]
MOVED_BY_16_BITS = {"Qwen3-Next": "0.24", "KimiLinear": "0.67", "GLM5Next": "0.26", "Inkling2-Loop": "2.5"}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DOCUMENT = random_ids(150, seed=1)


def handle(model: Any, storage: str, **options: Any) -> SparsePrefixCache:
    """Also on families that refuse 8 bits: what is kept must be repeatable, however far it is from stock."""
    return SparsePrefixCache(model, storage=storage, **{"prove": False, **options})


def question(seed: int) -> torch.Tensor:
    return torch.cat([DOCUMENT, random_ids(20, seed=100 + seed)], dim=1)


def ask(model: Any, ids: torch.Tensor, cache: SparsePrefixCache | None = None, tokens: int = 3) -> torch.Tensor:
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    options |= {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return torch.stack(out.logits)


# -- the numbers ------------------------------------------------------------------------------------------------------


VALUES = st.tuples(
    st.sampled_from(["keys", "indexer_keys", "recurrent.0", "conv.1"]),
    st.sampled_from([(1, 2, 3, 16), (1, 5, 64), (1, 3, 7, 37), (1, 16, 3), (1, 40)]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.integers(-60, 40),
)


def drawn(values: tuple[str, tuple[int, ...], torch.dtype, int, int]) -> tuple[str, torch.Tensor]:
    name, shape, dtype, seed, power = values
    generator = torch.Generator().manual_seed(seed)
    # Spread over many octaves within a group, below 1e8, and with groups of nothing but zeros.
    wide = torch.randn(shape, generator=generator, dtype=torch.float64).pow(3) * 2.0 ** min(max(power, -60), 18)
    wide[..., 0] = 0
    return name, wide.to(dtype)


def rounds_once(kept: Any, name: str, value: torch.Tensor) -> bool:
    once = kept.read(kept.kept({name: value}))[name]
    return torch.equal(kept.read(kept.kept({name: once}))[name], once)


@pytest.mark.parametrize("storage", ROUNDED)
@given(VALUES)
@settings(deadline=None, max_examples=150)
def test_what_is_rounded_is_not_rounded_again(storage: str, values: Any) -> None:
    name, value = drawn(values)
    kept = rounding_of(storage)
    if not bool(value.isfinite().all()):
        return
    numbers = kept.kept({name: value})
    read = kept.read(numbers)[name]
    assert read.shape == value.shape and read.dtype == value.dtype and bool(read.isfinite().all())
    assert rounds_once(kept, name, value)
    assert rounding.sound(next(iter(numbers)), numbers)
    least = {"bf16": 2.0**-14, "int8": 2.0**-6}[storage]
    tiny = 2.0 ** (-44 + 1)
    assert float((read - value).abs().max()) <= least * float(value.abs().max()) + tiny


def test_the_smallest_scale_that_holds_a_group_would_round_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: what is rounded with a scale must not fall to where the scale below would do."""
    value, kept = torch.linspace(0.3, 111.2, 16)[None], rounding_of("int8")
    assert rounds_once(kept, "recurrent.0", value)
    own = rounding._grid(torch.int8, True, torch.float32, value.device)
    borders = torch.tensor([127 * rounding._scale(code - 1) for code in range(1, 256)])
    monkeypatch.setattr(rounding, "_grid", lambda *_: replace(own, borders=borders))
    monkeypatch.setattr(rounding, "_codec", rounding._codec.__wrapped__)
    assert not rounds_once(kept, "recurrent.0", value)


PINNED = {
    ("bf16", "keys"): "4ff865ac50fc8d78", ("bf16", "recurrent.0"): "a526975b827bc38e",
    ("int8", "keys"): "6d1a01f049239ff4", ("int8", "recurrent.0"): "a1d04d465d0fe6c1",
}  # fmt: skip


@pytest.mark.parametrize(("storage", "name"), PINNED)
def test_the_bits_that_are_kept_are_those_of_the_format(storage: str, name: str) -> None:
    """What other processes and later versions read from files, and round anew beside it."""
    numbers = torch.arange(4 * 37 * 64, dtype=torch.int64)
    group = numbers // 64
    spread = 2.0 ** (group % 24 - 16).double() * (5 + group % 7).double() / 12  # another scale for each
    value = ((numbers * 2_654_435_761 % 2**20 - 2**19).double() / 2**19 * spread).float().view(1, 4, 37, 64)
    kept = rounding_of(storage).kept({name: value})
    digest = hashlib.blake2b(digest_size=8)
    for key in sorted(kept):
        digest.update(key.encode() + kept[key].contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == PINNED[storage, name]


@pytest.mark.parametrize("storage", ROUNDED)
def test_what_cannot_be_rounded_is_refused_and_zeros_stay(storage: str) -> None:
    kept = rounding_of(storage)
    for wrong in (float("nan"), float("inf"), -float("inf"), 1e30):
        value = torch.zeros(1, 64)
        value[0, 5] = wrong
        with pytest.raises(NotRoundableError, match=r"recurrent\.0"):
            kept.kept({"recurrent.0": value})
    zeros = torch.zeros(1, 2, 64)
    assert torch.equal(kept.read(kept.kept({"conv.0": zeros}))["conv.0"], zeros)


@pytest.mark.parametrize("storage", ROUNDED)
def test_whole_numbers_are_never_rounded(storage: str) -> None:
    ids = torch.arange(10_000, 10_040)[None]
    layer = LayerTensors.captured([rounding_of(storage).kept({"conv.0": ids, "seen": 7})]).layers[0]
    assert torch.equal(layer["conv.0"], ids) and layer["conv.0"].data_ptr() != ids.data_ptr() and layer["seen"] == 7


@pytest.mark.parametrize("storage", ["exact", *ROUNDED])
@pytest.mark.parametrize("name", ["recurrent.0", "keys", "token_ids"])
def test_what_is_restored_shares_nothing_with_what_is_kept(storage: str, name: str) -> None:
    value = torch.arange(48).reshape(1, 3, 16)
    value = value if name == "token_ids" else value.float()
    kept = rounding_of(storage).kept({name: value})
    before = rounding_of(storage).restored(kept)[name].clone()
    rounding_of(storage).restored(kept)[name].zero_()
    assert torch.equal(rounding_of(storage).restored(kept)[name], before) and before.any()


def test_files_cannot_bring_numbers_that_the_result_cannot_hold() -> None:
    numbers = rounding_of("int8").kept({"keys": torch.ones(1, 1, 2, 32, dtype=torch.float16)})
    assert rounding.sound("keys:float16", numbers)
    numbers["keys:scale"].fill_(255)
    assert not rounding.sound("keys:float16", numbers)


def test_it_takes_as_many_bytes_as_it_says() -> None:
    for dtype, storage, most in [
        (torch.float32, "bf16", 0.51),
        (torch.float32, "int8", 0.28),
        (torch.bfloat16, "bf16", 1.0),
        (torch.bfloat16, "int8", 0.53),
    ]:
        for name, shape in (("keys", (1, 2, 30, 64)), ("recurrent.0", (1, 8, 64, 128)), ("conv.0", (1, 320, 4))):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            layer = rounding_of(storage).kept({name: value})
            assert sum(item.nbytes for item in layer.values()) <= most * value.nbytes, (dtype, storage, name)


# -- every family -----------------------------------------------------------------------------------------------------


CELLS = {
    BITWISE: [("int8", "float32"), ("bf16", "float64")],
    REPLAYABLE: [("bf16", "float32"), ("int8", "bfloat16")],
}
EVERY = [(storage, dtype) for storage in ROUNDED for dtype in ("float32", "float64", "bfloat16")]


def holds_wide_floats(cache: SparsePrefixCache) -> bool:
    """Whether states of fixed size are floats of more than 16 bits, whatever the model's own are."""
    live, binding = cache.server.live_cache(), cache.server.binding
    states.probe(binding.model, live, binding.cache_name)
    held = states.capture_state(live).tensors()
    return any(value.is_floating_point() and value.element_size() > 2 for value in held)


@pytest.mark.parametrize("mode", [BITWISE, REPLAYABLE])
@pytest.mark.parametrize("family", supported_families())
def test_warm_equals_cold(family: str, mode: str) -> None:
    for storage, dtype in EVERY if os.environ.get("FULL_MATRIX") else CELLS[mode]:
        if dtype in BROKEN_UPSTREAM.get(family, {}):
            continue
        bench = Bench(family, dtype, mode=mode)
        with bench.handle(storage="exact") as cache:
            exact, wide = cache.size, holds_wide_floats(cache)
        with bench.handle(storage=storage, prove=False) as cache:
            bench.warm(cache)
            report = check_exactness(bench.model, [bench.prompt(1)], cache=cache, max_new_tokens=2, tolerance=1e9)
            assert report.passed, f"{storage} {dtype}: {report}"
            assert not differing(cache), f"{storage} {dtype}"
            smaller = [
                cache.size.kv_bytes_per_token < exact.kv_bytes_per_token,
                cache.size.state_bytes < exact.state_bytes,
            ]
            if (storage, dtype) == ("bf16", "bfloat16"):  # by its wide states alone, if the family has any
                assert smaller == [False, wide]
            else:  # of a model in 16 bits some families keep keys and values as they are
                assert (
                    any(smaller)
                    if dtype == "bfloat16"
                    else all(smaller) or not exact.state_bytes * exact.kv_bytes_per_token
                )
            cache.store.verify()


@pytest.mark.parametrize("storage", ROUNDED)
@pytest.mark.parametrize("family", ["Jamba", "Qwen3.5", "Gemma3"])
def test_a_wrong_state_is_rejected_by_a_wide_margin(family: str, storage: str) -> None:
    """The twin: a state of one token earlier, rounded as the right one is."""
    bench = Bench(family)

    def checked(spoil: bool) -> Any:
        with bench.handle(storage=storage, prove=False) as cache:
            bench.warm(cache)
            for checkpoint in cache.store.stored() if spoil else ():
                live = cache.server.live_cache()
                kwargs = {cache.server.binding.cache_name: live}
                bench.model.generate(bench.stored[:, : checkpoint.position - 1], max_new_tokens=1, **kwargs)
                taken = states.capture_state(live, cache.server.binding.rounding)
                plain = [
                    {name: value for name, value in honest.items() if not torch.is_tensor(value)}
                    for honest in checkpoint.state.layers
                ]
                layers = (layer | counts for layer, counts in zip(taken.layers, plain, strict=False))
                checkpoint.state = states.LayerTensors(tuple(layers))
            return check_exactness(bench.model, [bench.prompt(1)], cache=cache, max_new_tokens=2)

    honest, wrong = checked(False), checked(True)
    assert honest.bitwise and honest.resumed_tokens and honest.max_abs_logit_diff < 0.1
    assert not wrong.bitwise and not wrong.passed
    assert wrong.max_abs_logit_diff > 20 * honest.max_abs_logit_diff or wrong.resumed_tokens == 0


# -- what is kept on the way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ROUNDED)
@pytest.mark.parametrize("family", ["Jamba", "Qwen3.5", "Llama", "Gemma3"])
def test_conversations_rows_and_the_identical_prompt(family: str, storage: str) -> None:
    """In replayable mode the live cache stays as it is at the end of a prompt, and what is kept of it is rounded."""
    model = build(family)
    with handle(model, storage) as cache:
        text = question(0)
        for turn in range(3):
            result = model.generate(text, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
            text = torch.cat([result, random_ids(24, seed=50 + turn)], dim=1)
        rows = torch.cat([question(seed) for seed in (1, 2, 3)])
        for _ in range(2):
            model.generate(rows, past_key_values=cache, max_new_tokens=2, do_sample=False, pad_token_id=0)
        first, again = (ask(model, question(1), cache) for _ in range(2))
        assert cache.last_request is not None and cache.last_request.resumed_tokens == 170
        assert torch.equal(first, again)
        lineages = [str(checkpoint.lineage) for checkpoint in cache.store.stored()]
        assert all(lineage.endswith("rounded") for lineage in lineages)
        assert any("…" in lineage for lineage in lineages) and len(lineages) > 3
        assert not differing(cache)
        cache.store.verify()


def test_the_end_of_a_prompt_is_shared_with_what_answers_it() -> None:
    """Whether the state was rounded there changes what comes behind it, not the keys and values before it."""
    model = build("Llama")
    with handle(model, "int8", policy="last") as cache:
        ids = question(0)
        model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
        end, answer = sorted(cache.store.stored(), key=lambda item: item.position)
        assert (end.position, answer.position) == (170, 175)
        assert end.chain() == answer.chain()[:1]
        assert str(end.lineage) == "170, rounded" and str(answer.lineage) == "170, 170…175, rounded"


def test_scores_do_not_depend_on_what_else_is_asked() -> None:
    model = build("Jamba")
    pairs = [(DOCUMENT[0, :90].tolist(), random_ids(4, seed=seed)[0].tolist()) for seed in range(3)]
    pairs.append((DOCUMENT[0, :120].tolist(), [5, 6]))
    with handle(model, "int8", exactness="bitwise", grid=32) as cache:
        together = cache.loglikelihood(pairs)
        again = cache.loglikelihood(pairs[::-1])[::-1]
    alone = []
    for pair in pairs:
        with handle(model, "int8", exactness="bitwise", grid=32) as cache:
            alone += cache.loglikelihood([pair])
    assert together == again == alone


@pytest.mark.parametrize("mode", [BITWISE, REPLAYABLE])
def test_what_cannot_be_rounded_runs_uncached(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Jamba")
    with handle(model, "int8", exactness=mode, policy="balanced", grid=32) as cache:
        stock = ask(model, question(0))
        own = rounding._grid(torch.int8, True, torch.float32, torch.device("cpu"))
        monkeypatch.setattr(rounding, "_grid", lambda *_: replace(own, limit=0.0))
        monkeypatch.setattr(rounding, "_codec", rounding._codec.__wrapped__)
        assert torch.equal(ask(model, question(0), cache), stock)
        assert cache.last_request is not None and "cannot be rounded" in cache.last_request.reason
        assert not list(cache.store.stored())


# -- everything downstream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ROUNDED)
def test_saved_loaded_and_read_from_disk(storage: str, tmp_path: Path) -> None:
    model = build("Jamba")
    with handle(model, storage, policy="balanced", grid=32, exactness="bitwise") as cache:
        cold = ask(model, question(0), cache)
        assert cache.save_pretrained(tmp_path / "a") > 0
    with SparsePrefixCache.from_pretrained(tmp_path / "a", model, policy="balanced", prove=False) as cache:
        assert cache.config.storage == storage
        assert torch.equal(ask(model, question(0), cache), cold)
        assert cache.last_request is not None and cache.last_request.resumed_tokens > 0
        assert not differing(cache)
    with pytest.raises(ValueError, match="storage"):
        SparsePrefixCache.from_pretrained(tmp_path / "a", model, storage="exact")
    store = CheckpointStore("1MB", disk_memory="1GiB", disk_dir=tmp_path / "disk")
    with handle(model, storage, store=store, policy="balanced", grid=32, exactness="bitwise") as cache:
        ask(model, question(0), cache)
    store.close()
    store = CheckpointStore("1GiB", disk_memory="1GiB", disk_dir=tmp_path / "disk")
    with handle(model, storage, store=store, policy="balanced", grid=32, exactness="bitwise") as cache:
        assert torch.equal(ask(model, question(0), cache), cold)
        assert cache.last_request is not None and cache.last_request.resumed_tokens > 0
    with SparsePrefixCache(model, store=store, policy="balanced", grid=32, exactness="bitwise") as exact:
        ask(model, question(0), exact)
        assert exact.last_request is not None and exact.last_request.resumed_tokens == 0
    store.close()


def test_handles_that_keep_otherwise_share_a_store_and_nothing_in_it() -> None:
    model, store = build("Jamba"), CheckpointStore("1GiB")
    for storage in ("exact", *ROUNDED):
        with handle(model, storage, store=store) as cache:
            for seed in range(2):
                ask(model, question(seed), cache)
                assert cache.last_request is not None and cache.last_request.overlap_tokens == 150 * seed
            assert not [line for line in differing_own(cache) if line]


def differing_own(cache: SparsePrefixCache) -> list[str]:
    """As `differing`, of what lies in the space of one handle."""
    space, stored = cache.server.space.now()[0], list(cache.store.checkpoints())
    own = [item for item in stored if item[0] == space]
    cache.store.checkpoints = lambda: iter(own)  # type: ignore[method-assign]
    try:
        return differing(cache)
    finally:
        del cache.store.checkpoints  # type: ignore[method-assign]


def test_a_family_that_8_bits_move_too_far_refuses_them() -> None:
    model = build_shared("Mamba")
    with pytest.raises(UnsupportedModelError, match=r"storage='int8' moves logits of Mamba by up to 0\.0"):
        handle(model, "int8", prove=True)
    with handle(model, "int8") as cache, handle(model, "bf16", prove=True) as half:
        assert cache.size.state_bytes < 0.28 * 2 * half.size.state_bytes


def test_the_default_tolerance_goes_with_the_storage() -> None:
    model = build_shared("Llama")
    prompts = [random_ids(140, seed=3)]
    for storage, most in (("exact", 1e-4), ("bf16", 5e-3), ("int8", 1e-2)):
        with handle(model, storage, exactness="bitwise", grid=64, policy="balanced") as cache:
            report = check_exactness(model, prompts, cache=cache, max_new_tokens=1)
            assert (report.tolerance, report.storage) == (most, storage) and report.bitwise
            assert f"{report.max_abs_logit_diff:.1e}" in str(report)


@pytest.mark.parametrize("family", [name for name in supported_families() if name in MOVED_BY_16_BITS])
def test_families_whose_tokens_change_experts_refuse_16_bits(family: str) -> None:
    model = build_shared(family)
    with pytest.raises(UnsupportedModelError, match=rf"16 bits: .*by up to {MOVED_BY_16_BITS[family]} .*'exact'"):
        handle(model, "bf16", prove=True)
    with handle(model, "bf16") as cache:  # for who knows better
        assert cache.size.state_bytes
    own = INT8[model.config.get_text_config().model_type]
    assert own.half > MOST_HALF and not replace(own, half=0.0).shortcoming(family, "bf16")


@pytest.mark.parametrize("family", supported_families())
def test_every_family_says_what_may_be_kept_in_8_bits(family: str) -> None:
    """The parts that may, which are proved and take less room; or none, and the figure why."""
    model = build_shared(family)
    measured = INT8[model.config.get_text_config().model_type]
    if not measured.parts:
        with pytest.raises(UnsupportedModelError, match=r"moves logits of .* by up to [0-9.]+, measured"):
            handle(model, "int8", prove=True)
        return
    with handle(model, "int8", prove=True) as cache, handle(model, "bf16") as half:
        assert cache.stats().proved
        assert cache.size.state_bytes + cache.size.kv_bytes_per_token < (
            half.size.state_bytes + half.size.kv_bytes_per_token
        )
    assert set(measured.parts) <= set(rounding.PARTS) and measured.moved > 0


def test_a_storage_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="storage must be 'exact', 'bf16' or 'int8', not 'fp8'"):
        handle(build_shared("Llama"), "fp8")
