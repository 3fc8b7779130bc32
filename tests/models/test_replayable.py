"""Replayable mode: only what is new is computed, and a cold run over the same segments gives the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lineages import differing
from tiny_models import available_families, build, random_ids
from torch import Tensor
from transformers.utils import logging

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, check_exactness
from hf_sparse_cache.explain import remedy
from hf_sparse_cache.models import prefill, states
from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.stats import Cause, RequestInfo


DOCUMENT = random_ids(300, seed=1)  # on no grid
CORE = ["Mamba", "Jamba", "Zamba2", "Qwen3.5", "LFM2", "Llama"]
ALONE = sorted(set(available_families()) - {"MiniMax", "xLSTM", "RWKV", "RecurrentGemma"})
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def question(seed: int, length: int = 16) -> Tensor:
    return torch.cat([DOCUMENT, random_ids(length, seed=100 + seed)], dim=1)


def ask(model: Any, ids: Tensor, cache: SparsePrefixCache | None = None) -> Tensor:
    options = OPTIONS if cache is None else {**OPTIONS, "past_key_values": cache}
    return torch.stack(model.generate(ids, attention_mask=torch.ones_like(ids), **options).logits)


def last(cache: SparsePrefixCache) -> RequestInfo:
    assert cache.last_request is not None
    return cache.last_request


def test_it_is_the_default() -> None:
    with SparsePrefixCache(build("Llama")) as cache:
        assert cache.config.exactness == "replayable"


@pytest.mark.parametrize("family", CORE)
def test_only_what_is_new_is_computed(family: str) -> None:
    model = build(family)
    with SparsePrefixCache(model) as cache:
        for seed in range(4):
            expected = ask(model, question(seed))
            assert (ask(model, question(seed), cache) - expected).abs().max() <= 1e-4
            if seed >= 2:  # the second question has shown where they part
                assert last(cache).computed_tokens == 16, last(cache)
        assert last(cache).segments[-1] == 316 and 300 in last(cache).segments
        assert not differing(cache)
        cache.store.verify()


@pytest.mark.parametrize("family", ALONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cold_prompt_in_one_segment_equals_stock_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    with SparsePrefixCache(model, policy="none", grid=4096) as cache:
        ids = random_ids(150, seed=3)
        assert torch.equal(ask(model, ids, cache), ask(model, ids))
        assert last(cache).segments == (150,)


@pytest.mark.parametrize("mode", ["replayable", "bitwise"])
@pytest.mark.parametrize("family", CORE)
def test_the_identical_prompt_computes_nothing(family: str, mode: str) -> None:
    model = build(family)
    with SparsePrefixCache(model, exactness=mode, grid=64) as cache:
        first = ask(model, DOCUMENT, cache)
        for _ in range(2):
            assert torch.equal(ask(model, DOCUMENT, cache), first)
            assert (last(cache).computed_tokens, last(cache).resumed_tokens) == (0, 300)
        batch = DOCUMENT.repeat(2, 1)
        assert torch.equal(ask(model, batch, cache)[0, 0], first[0, 0])
        assert cache.size.logits_bytes == first[0].nbytes
        final = next(item for item in cache.store.stored() if item.final)
        assert final.nbytes >= cache.size.logits_bytes
        final.state.layers[-1]["logits"].zero_()  # the twin that must fail
        assert not torch.equal(ask(model, DOCUMENT, cache)[0], first[0])
        if mode == "bitwise":  # a longer prompt is not cut where a shorter one ends
            ask(model, question(0), cache)
            assert last(cache).resumed_tokens == 256


@pytest.mark.parametrize("family", ["Zamba2", "Llama"])
def test_nobody_goes_on_from_what_one_token_left(family: str) -> None:
    """A forward over one token is a decode step."""
    model, one = build(family), DOCUMENT[:, :1]
    with SparsePrefixCache(model, policy="last") as cache:
        first = ask(model, one, cache)
        assert torch.equal(ask(model, one, cache), first) and last(cache).computed_tokens == 0
        for length in (2, 3, 40):
            ask(model, DOCUMENT[:, :length], cache)
            assert last(cache).segments[0] != 1 and 1 not in last(cache).segments
            assert last(cache).resumed_tokens != 1


def longer(lineage: Lineage, by: int) -> Lineage:
    """Another lineage of the same positions: its first segment in two."""
    ends = [entry for entry in lineage.ends if isinstance(entry, int)]
    return Lineage([ends[0] - by, *ends])


@pytest.mark.parametrize("family", CORE)
def test_the_check_replays_and_rejects(family: str) -> None:
    model = build(family)

    def checked(spoil: Any = None) -> bool:
        with SparsePrefixCache(model) as cache:
            ask(model, question(0), cache)
            ask(model, question(1), cache)
            for checkpoint in cache.store.stored() if spoil is not None else ():
                spoil(cache, checkpoint)
            report = check_exactness(model, [question(2)], cache=cache, max_new_tokens=3)
            assert report.mode == "replayable" and report.resumed_tokens == 300
            return report.passed

    def wiped(cache: SparsePrefixCache, checkpoint: Any) -> None:
        for payload in [checkpoint.state, *(segment.payload for segment in checkpoint.chain())]:
            for layer in payload.layers:
                for value in layer.values():
                    if torch.is_tensor(value):
                        value.zero_()

    def of_another_prompt(cache: SparsePrefixCache, checkpoint: Any) -> None:
        live = cache.server.binding.live_cache()
        other = torch.flip(DOCUMENT[0], (0,))[: checkpoint.position]
        other = torch.nn.functional.pad(other, (0, checkpoint.position - len(other)), value=7)
        with torch.no_grad():
            prefill.replay(cache.server.binding, live, Row(other, {"use_cache": True}), checkpoint.lineage)
        checkpoint.state = states.capture_state(live)
        for segment in checkpoint.chain():
            segment.payload = states.capture_kv(live, segment.start, segment.end)

    def of_another_lineage(cache: SparsePrefixCache, checkpoint: Any) -> None:
        checkpoint.lineage = longer(checkpoint.lineage, 17)

    assert checked()
    assert not checked(wiped)
    assert not checked(of_another_prompt)
    assert not checked(of_another_lineage)


@pytest.mark.parametrize("family", ["Jamba", "Zamba2"])
def test_what_is_stored_goes_from_mode_to_mode_as_far_as_it_fits(family: str) -> None:
    model, store = build(family), CheckpointStore("1GiB")
    with SparsePrefixCache(model, store=store, exactness="bitwise", grid=64) as bitwise:
        cold = ask(model, question(0), bitwise)
    with SparsePrefixCache(model, store=store) as replayable:
        ask(model, question(1), replayable)
        assert last(replayable).resumed_tokens == 256  # from bitwise mode's
        ask(model, question(2), replayable)
        assert last(replayable).resumed_tokens == 300
        assert not differing(replayable)
    with SparsePrefixCache(model, store=store, exactness="bitwise", grid=64) as bitwise:
        warm = ask(model, question(3), bitwise)
        assert last(bitwise).resumed_tokens == 256  # not from the junction at 300
    with SparsePrefixCache(model, exactness="bitwise", grid=64) as bitwise:
        assert torch.equal(warm, ask(model, question(3), bitwise))
        assert torch.equal(cold, ask(model, question(0), bitwise))
    with SparsePrefixCache(model, store=store, exactness="bitwise", grid=48) as other:
        ask(model, question(3), other)
        assert last(other).resumed_tokens == 0 and last(other).reason.cause is Cause.CUT_OTHERWISE
        assert "exactness='replayable', which resumes from any" in remedy(last(other).reason)
    store.verify()


@pytest.mark.parametrize("where", ["in memory", "on disk"])
@pytest.mark.parametrize(
    "settings",
    [{"grid": 48}, {"grid": 64, "cut_after": ("x?",)}, {"grid": 64, "marked": 40}],
    ids=["grid", "cut_after", "mark"],
)
def test_settings_that_orphan_what_is_stored_say_so_once(
    where: str, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, disk = build("Jamba"), {"disk_memory": "1GiB", "disk_dir": tmp_path} if where == "on disk" else {}
    logging.enable_propagation()
    document = DOCUMENT.clone()
    document[document == 9] = 10
    document[0, 39] = 9
    marked = settings.get("marked")
    options = {name: value for name, value in settings.items() if name != "marked"}

    def asked(cache: SparsePrefixCache, seed: int) -> Tensor:
        return ask(model, torch.cat([document, random_ids(16, seed=seed).clamp(min=10)], dim=1), cache)

    def said() -> int:
        return caplog.text.count("was made with another grid, cut_after, marks or exactness")

    store = CheckpointStore("1GiB", **disk)
    with SparsePrefixCache(model, Letters(), store=store, exactness="bitwise", grid=64) as cache:
        asked(cache, 50)
        asked(cache, 51)
    if disk:
        store.close()
        store = CheckpointStore("1GiB", **disk)
    with SparsePrefixCache(model, Letters(), store=store, exactness="bitwise", grid=64) as cache:
        asked(cache, 52)
        assert last(cache).resumed_tokens == 256 and not said()  # the twin: nothing was orphaned
    with SparsePrefixCache(model, Letters(), store=store, exactness="bitwise", policy="none", **options) as cache:
        if marked:
            cache.mark(document[:, :marked])
        told = cache.explain(torch.cat([document, DOCUMENT[:, :20]], dim=1))
        assert told.reason.cause is Cause.CUT_OTHERWISE
        assert marked or "grid, cut_after and marks" in told.remedy
        for seed in (60, 61, 62):
            asked(cache, seed)
            if seed == 60 or not marked:  # a mark keeps a checkpoint of its own
                assert last(cache).resumed_tokens == 0 and last(cache).reason.cause is Cause.CUT_OTHERWISE
        assert said() == 1
    with SparsePrefixCache(model, Letters(), store=store) as cache:  # which resumes from any
        asked(cache, 63)
        assert last(cache).resumed_tokens >= 256 and said() == 1
    store.close()


@pytest.mark.parametrize("mode", ["replayable", "bitwise"])
@pytest.mark.parametrize("family", ["Mamba", "Zamba2"])
def test_a_mark_cuts_at_its_very_end(family: str, mode: str) -> None:
    model = build(family)
    with SparsePrefixCache(model, exactness=mode, grid=64) as cache:
        cache.mark(DOCUMENT)
        ask(model, question(0), cache)
        assert 300 in last(cache).captured
        for seed in (1, 2):
            warm = ask(model, question(seed), cache)
            assert last(cache).computed_tokens == 16
        with SparsePrefixCache(model, exactness=mode, grid=64) as fresh:
            fresh.mark(DOCUMENT)
            cold = ask(model, question(2), fresh)
        assert mode == "replayable" or torch.equal(warm, cold)
        assert check_exactness(model, [question(3)], cache=cache, max_new_tokens=2).passed
        with pytest.raises(ValueError, match="no segment has fewer than 2: mark a longer prefix"):
            cache.mark(DOCUMENT[:, :1])


class Letters:
    """A tokenizer of one letter a token."""

    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join("?" if token == 9 else "x" for token in ids)


@pytest.mark.parametrize("mode", ["replayable", "bitwise"])
def test_a_prompt_is_cut_after_strings(mode: str) -> None:
    model = build("Jamba")
    document = DOCUMENT.clone()
    document[document == 9] = 10
    document[0, [39, 299]] = 9
    with SparsePrefixCache(model, Letters(), exactness=mode, grid=64, cut_after=("x?",)) as cache:
        for seed in range(3):
            ids = torch.cat([document, random_ids(16, seed=50 + seed).clamp(min=10)], dim=1)
            ask(model, ids, cache)
            assert seed == 0 or mode == "replayable" or last(cache).resumed_tokens == 300
        assert last(cache).computed_tokens == 16
        assert check_exactness(model, [ids], cache=cache, max_new_tokens=2).passed
        assert cache.explain(ids).resumed_tokens == 316


def test_first_sight_captures_where_the_next_one_leaves() -> None:
    model = build("Jamba")
    special = Letters()
    special.all_special_ids = (9,)
    document = DOCUMENT.clone()
    document[document == 9] = 10
    document[0, 299] = 9
    with SparsePrefixCache(model, special) as cache:
        for seed in range(2):
            ids = torch.cat([document, random_ids(16, seed=50 + seed).clamp(min=10)], dim=1)
            ask(model, ids, cache)
        assert last(cache).computed_tokens == 16  # at the second question already


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """A saved cache in replayable mode, with a disk tier in use meanwhile."""
    model = build("Zamba2")
    store = CheckpointStore("1GiB", disk_memory="1GiB", disk_dir=tmp_path / "disk")
    with SparsePrefixCache(model, store=store) as cache:
        for seed in range(3):
            ask(model, question(seed), cache)
        cache.mark(DOCUMENT)
        cache.save_pretrained(tmp_path / "saved")
        store.close()
    yield model, tmp_path


def test_lineages_survive_on_disk(served: tuple[Any, Path]) -> None:
    model, folder = served
    with SparsePrefixCache.from_pretrained(folder / "saved", model) as loaded:
        assert loaded.config.exactness == "replayable"
        ask(model, question(7), loaded)
        assert last(loaded).computed_tokens == 16
        again = ask(model, question(2), loaded)
        assert last(loaded).computed_tokens == 0
        assert not differing(loaded)
        assert check_exactness(model, [question(8)], cache=loaded, max_new_tokens=2).passed
    store = CheckpointStore("1GiB", disk_memory="1GiB", disk_dir=folder / "disk")
    with SparsePrefixCache(model, store=store) as cache:
        assert torch.equal(ask(model, question(2), cache)[0], again[0]) and last(cache).computed_tokens == 0
        ask(model, question(9), cache)
        assert last(cache).computed_tokens == 16 and not differing(cache)
        store.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exactness": "numerical"}, "'replayable' took the place of 'numerical'"),
        ({"exactness": "exact"}, "must be 'replayable' or 'bitwise', not 'exact'"),
        ({"cut_after": ("Question:",)}, "cut_after=.* needs a tokenizer"),
        ({"cut_after": "Question:"}, "cut_after must be strings"),
        ({"cut_after": ("",)}, "cut_after must be strings of at least one character"),
        ({"pieces": 1}, "pieces must be None or at least 2 tokens, not 1"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsePrefixCache(build("Llama"), **options)


def test_pieces_bound_every_forward() -> None:
    model = build("Llama")
    with SparsePrefixCache(model, policy="none", pieces=70) as cache:
        ask(model, DOCUMENT, cache)
        assert last(cache).segments == (70, 140, 210, 280, 300)
