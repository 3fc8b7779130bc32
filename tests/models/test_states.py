"""Capture, restore, rows and rounding of one layer of every class, made by hand: what each attribute becomes."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from handmade import MAKE, WINDOW, empty, feed
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_sparse_cache.errors import UnsupportedModelError
from hf_sparse_cache.models import lazy_kv, states
from hf_sparse_cache.models.rounding import EXACT, NotRoundableError, Rounding, rounding_of
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.store.slabs import PAGE_BYTES


def restored(cache: Any, spans: list[LayerTensors], kinds: tuple[str, ...] = (), rounding: Rounding = EXACT) -> Any:
    fresh = empty(*kinds)
    states.restore(fresh, states.capture_state(cache, rounding), spans, rounding)
    return fresh


def same(one: Any, other: Any) -> bool:
    """Of values as layers have them."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def unlike(one: Any, other: Any) -> list[str]:
    """Where two caches differ, layer by layer."""
    found = []
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        kind = type(mine).__name__
        found += [kind] if type(mine) is not type(theirs) or vars(mine).keys() != vars(theirs).keys() else []
        found += [f"{kind}.{name}" for name, value in vars(mine).items() if not same(value, getattr(theirs, name))]
    return found


@pytest.mark.parametrize("cuts", [(0, 9), (0, 1, 4, 9), (0, 3, 6, 9)], ids=str)
def test_a_restored_cache_is_what_was_captured_and_goes_on_alike(cuts: tuple[int, ...]) -> None:
    cache = feed(empty(), 9)
    spans = [states.capture_kv(cache, start, end) for start, end in pairwise(cuts)]
    fresh = restored(cache, spans)
    assert fresh.layers[1].get_seq_length() == 9 and isinstance(fresh.layers[1], lazy_kv.Waiting)
    assert not unlike(feed(copy.deepcopy(cache), 3, seed=1), settled(feed(copy.deepcopy(fresh), 3, seed=1)))
    assert not unlike(cache, settled(fresh))
    before = copy.deepcopy(fresh)
    for layer in cache.layers:
        for value in tensors_in(vars(layer)):
            value.zero_()
    assert not unlike(before, fresh) and unlike(cache, fresh)


def settled(cache: Any) -> Any:
    lazy_kv.settle(cache.layers)
    return cache


def test_states_stay_where_they_are_for_compiled_graphs() -> None:
    """As those that a layer of transformers has made for itself: they are updated in place."""
    cache = feed(empty("linear"), 4)
    (layer,) = restored(cache, [], ("linear",)).layers
    for held in (cache.layers[0], layer):
        for state in (held.conv_states[0], held.recurrent_states[0]):
            assert getattr(state, "_dynamo_static_input_type", None) is not None


def tensors_in(values: dict[Any, Any]) -> list[torch.Tensor]:
    nested = [each for value in values.values() if isinstance(value, dict) for each in tensors_in(value)]
    return nested + [value for value in values.values() if torch.is_tensor(value)]


def test_what_a_layer_has_not_is_neither_captured_nor_restored() -> None:
    cache = empty()
    state, kv = states.capture_state(cache), states.capture_kv(cache, 0, 2)
    assert not any(state.layers) and not any(kv.layers) and len(state.layers) == len(kv.layers) == len(MAKE)
    for spans in ([], [kv]):
        fresh = empty()
        states.restore(fresh, state, spans)
        assert not unlike(cache, fresh)
    conv = empty("linear")
    conv.layers[0].update_conv_state(torch.ones(1, 6, 4), 1)
    (found,) = states.capture_state(conv).layers
    assert list(found) == ["conv.1"] and torch.equal(found["conv.1"], torch.ones(1, 6, 4))
    (both,) = states.capture_state(feed(empty("linear"), 4)).layers
    assert list(both) == ["conv.0", "recurrent.0", "recurrent.1"]


def test_an_index_has_positions_or_none() -> None:
    for without in ("indexer_position_ids", "indexer_keys"):
        cache = feed(empty("indexed"), 5)
        setattr(cache.layers[0], without, None)
        cache.layers[0].is_indexer_initialized = without != "indexer_keys"
        spans = [states.capture_kv(cache, 0, 2), states.capture_kv(cache, 2, 5)]
        assert without not in spans[0].layers[0] and len(spans[0].layers[0]) == 3
        fresh = settled(restored(cache, spans, ("indexed",)))
        for name in ("indexer_position_ids", "indexer_keys"):
            assert same(getattr(fresh.layers[0], name), getattr(cache.layers[0], name)), name
        again = empty("indexed")
        states.stack(again, [cache, cache], 6)
        assert getattr(again.layers[0], without) is None
    old = feed(empty("indexed"), 2)
    del old.layers[0].indexer_position_ids  # as in older versions
    assert list(states.capture_kv(old, 0, 1).layers[0]) == ["keys", "values", "indexer_keys"]
    states.stack(empty("indexed"), [old], 2)


# -- rows -------------------------------------------------------------------------------------------------------------


def padded(rows: list[torch.Tensor], dim: int, length: int, batch: int = 0) -> torch.Tensor:
    """Rows with zeros before them up to a length, as one tensor."""
    shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    shape[dim], shape[batch] = length, len(rows)
    found = rows[0].new_zeros(shape)
    for index, row in enumerate(rows):
        found.narrow(batch, index, 1).narrow(dim, length - row.shape[dim], row.shape[dim]).copy_(row)
    return found


@pytest.mark.parametrize("width", [9, 12])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 2, 7), (1, 4), (2,)], ids=str)
def test_rows_of_a_batch_have_zeros_before_them(lengths: tuple[int, ...], width: int) -> None:
    rows = [feed(empty(), tokens, seed=tokens) for tokens in lengths]
    batch = empty()
    states.stack(batch, rows, width)
    linear, full, window, indexed, both, swa, dummy = batch.layers
    assert same(vars(dummy), vars(rows[0].layers[-1]))
    for index, layer in ((0, linear), (4, both), (5, swa)):
        own = [row.layers[index] for row in rows]
        assert torch.equal(layer.conv_states[0], torch.cat([each.conv_states[0] for each in own]))
        for state in range(layer.number_of_states):
            there = torch.cat([each.recurrent_states[state] for each in own])
            assert torch.equal(layer.recurrent_states[state], there)
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
            assert getattr(layer, name) == getattr(own[0], name), name
        assert layer.conv_kernel_size == own[0].conv_kernel_size and layer.device == own[0].device
    for index, layer, held in ((1, full, width), (2, window, 5), (3, indexed, width), (4, both, width), (5, swa, 5)):
        own = [row.layers[index] for row in rows]
        assert layer.is_initialized and layer.keys.shape[-2] == held
        assert torch.equal(layer.keys, padded([each.keys for each in own], -2, held))
        assert torch.equal(layer.values, padded([each.values for each in own], -2, held))
    assert window.cumulative_length == swa.cumulative_length == width
    own = [row.layers[3] for row in rows]
    assert indexed.is_indexer_initialized
    assert torch.equal(indexed.indexer_keys, padded([each.indexer_keys for each in own], 1, width))
    positions = padded([each.indexer_position_ids for each in own], -1, width, 1)
    assert torch.equal(indexed.indexer_position_ids, positions)


def test_a_window_that_is_not_full_is_padded_to_the_batch() -> None:
    batch = empty("window")
    states.stack(batch, [feed(empty("window"), 3), feed(empty("window"), 1)], 3)
    assert batch.layers[0].keys.shape == (2, 2, 3, 16) and not batch.layers[0].keys[1, :, :2].any()


def test_rows_of_nothing_stay_nothing() -> None:
    batch = empty()
    states.stack(batch, [empty(), empty()], 4)
    assert not unlike(batch, empty())


# -- rounded values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize(("start", "end"), [(0, 9), (3, 7), (4, 4)])
def test_a_cache_is_rounded_where_it_is_to_be_and_nowhere_else(storage: str, start: int, end: int) -> None:
    rounding, cache = rounding_of(storage), feed(empty(), 9)
    before, kept = copy.deepcopy(cache), states.capture_state(cache, rounding)
    taken = states.round_off(cache, rounding, start, end)
    for found in (kept, states.capture_state(cache, rounding)):
        assert all(same(one, other) for one, other in zip(found.layers, taken.layers, strict=True))
    for layer, old in zip(cache.layers, before.layers, strict=True):
        for name in ("keys", "values", "indexer_keys"):
            grown, held = getattr(old, name, None), getattr(layer, name, None)
            if grown is None:
                continue
            fixed, dim = isinstance(layer, DynamicSlidingWindowLayer), 1 if name == "indexer_keys" else -2
            expected, part = grown.clone(), grown if fixed else grown.narrow(dim, start, end - start)
            if part.numel():
                read = rounding.read(rounding.kept({name: part}))[name]
                (expected if fixed else expected.narrow(dim, start, end - start)).copy_(read)
                assert not torch.equal(expected, grown)
            assert torch.equal(held, expected), name
    state = before.layers[0].recurrent_states[1]
    read = rounding.read(rounding.kept({"recurrent.1": state}))["recurrent.1"]
    assert torch.equal(cache.layers[0].recurrent_states[1], read) and not torch.equal(read, state)


def test_what_is_rounded_is_restored_and_cannot_be_what_it_is_not() -> None:
    rounding, cache = rounding_of("int8"), feed(empty(), 9)
    states.round_off(cache, rounding, 0, 9)
    spans = [states.capture_kv(cache, start, end, rounding) for start, end in ((0, 4), (4, 9))]
    assert not unlike(cache, settled(restored(cache, spans, rounding=rounding)))
    cache.layers[1].keys[0, 0, 5, 3] = float("inf")
    with pytest.raises(NotRoundableError, match="keys"):
        states.round_off(cache, rounding, 0, 9)
    with pytest.raises(NotRoundableError, match="keys"):
        states.capture_kv(cache, 5, 6, rounding)
    states.round_off(cache, rounding, 0, 5)  # which is not where it lies


# -- the logits of the last token -------------------------------------------------------------------------------------


def test_the_logits_of_the_last_token_are_kept_behind_the_layers() -> None:
    cache, logits = feed(empty(), 4), torch.randn(1, 3, 11)
    state = states.capture_state(cache)
    last = states.with_logits(state, logits)
    assert len(last.layers) == len(state.layers) + 1 and list(last.layers[-1]) == [states.LOGITS]
    found = states.logits_of(last)
    assert torch.equal(found, logits[:, -1:]) and found.shape == (1, 1, 11)
    found.zero_(), logits.zero_()
    assert states.logits_of(last).all()
    told: list[int] = []
    states.logits_of(last.pledged(lambda: told.append(1)))
    assert told == [1]


# -- what is still being proved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "rounding", "waits"),
    [(("linear", "full", "full"), EXACT, True), (("linear", "indexed"), EXACT, False),
     (("linear", "full"), rounding_of("bf16"), False)],
)  # fmt: skip
def test_who_reads_first_waits_for_what_is_proved(kinds: tuple[str, ...], rounding: Rounding, waits: bool) -> None:
    cache, told = feed(empty(*kinds), 4), list[str]()
    spans = [states.capture_kv(cache, start, start + 2, rounding) for start in (0, 2)]
    pledged = [span.pledged(lambda: told.append("span")) for span in spans]
    state = states.capture_state(cache, rounding).pledged(lambda: told.append("state"))
    fresh = empty(*kinds)
    states.restore(fresh, state, [pledged[0], spans[1]], rounding)
    assert told == (["state"] if waits else ["state", "span"]) and not hasattr(fresh.layers[0], "ready")
    assert fresh.layers[1].get_seq_length() == 4
    fresh.layers[1].update(*torch.randn(2, 1, 2, 1, 16))
    assert told == ["state", "span"]
    fresh = empty(*kinds)
    told.clear()
    states.restore(fresh, state, pledged, rounding)
    settled(fresh)
    assert told[:3] == ["state", "span", "span"]


# -- which layers and tensors are known -------------------------------------------------------------------------------


def test_a_layer_that_is_like_a_known_one_is_refused() -> None:
    states.check_layers(empty(), "Some")

    class Other(DynamicLayer):
        pass

    cache = empty("full", "linear")
    cache.layers.append(Other())
    with pytest.raises(
        UnsupportedModelError, match=r"Some keeps .* class Other, .* DummyLayer, DynamicIndexedLayer, "
    ):
        states.check_layers(cache, "Some")


@pytest.mark.parametrize("tokens", [3, 9])
def test_lengths_say_what_each_layer_keeps_of_the_tokens(tokens: int) -> None:
    held, kept = min(tokens, WINDOW - 1), [("keys", tokens, tokens), ("values", tokens, tokens)]
    windowed = [("keys", held, held), ("values", held, held), ("a window", tokens, tokens)]
    expected = [[], kept, windowed, [*kept, ("an index", tokens, tokens)], kept, windowed, []]
    cache = feed(empty(), tokens)
    assert [list(states.lengths(layer, tokens)) for layer in cache.layers] == expected
    assert not any([*states.lengths(layer, tokens)] for layer in empty().layers)
    due = [list(states.lengths(layer, tokens + 1)) for layer in cache.layers]
    assert due[1] == [("keys", tokens, tokens + 1), ("values", tokens, tokens + 1)]
    longer = min(tokens + 1, WINDOW - 1)
    assert due[2] == [("keys", held, longer), ("values", held, longer), ("a window", tokens, tokens + 1)]
    assert due[3][-1] == ("an index", tokens, tokens + 1)
    cut = copy.deepcopy(cache.layers[1])
    cut.values = cut.values[..., 1:, :]
    assert list(states.lengths(cut, tokens)) == [kept[0], ("values", tokens - 1, tokens)]


@pytest.mark.parametrize("value", [torch.ones(1), {1: {2: torch.ones(1)}}, [3, (torch.ones(1),)]], ids=str)
def test_tensors_without_a_rule_are_named(value: Any) -> None:
    cache = feed(empty(), 4)
    assert states.unruled(cache) == "" == states.unruled(empty())
    cache.layers[2].own = cache.own = {"a": [1, "b"], "c": None}
    assert states.unruled(cache) == ""
    cache.own = value
    assert states.unruled(cache) == "the cache keeps tensors in own, outside its layers"
    cache.layers[2].own = value
    assert states.unruled(cache) == (
        "layer 2 (DynamicSlidingWindowLayer) keeps tensors in own, for which there is no rule"
    )


def test_windows_learn_their_lengths_where_the_model_is() -> None:
    model = SimpleNamespace(get_input_embeddings=lambda: None, device=torch.device("meta"))
    caches = [empty(), empty()]
    for cache in caches:
        states.place_windows(cache, model)
    for index in (2, 5):
        first, second = (cache.layers[index]._sliding_window_tensor for cache in caches)
        assert first.device.type == "meta" and first.dtype is torch.long and first is second
    states.place_windows(caches[0], SimpleNamespace(get_input_embeddings=lambda: None, device=torch.device("cpu")))
    assert int(caches[0].layers[2]._sliding_window_tensor) == WINDOW
    assert all(not hasattr(caches[0].layers[index], "_sliding_window_tensor") for index in (0, 1, 3, 4, 6))


# -- how large it is --------------------------------------------------------------------------------------------------


def test_a_probe_is_a_forward_of_two_tokens_without_gradients() -> None:
    seen: dict[str, Any] = {}

    class Model:
        device = torch.device("cpu")

        def get_input_embeddings(self) -> None:
            return None

        def __call__(self, **given: Any) -> str:
            seen.update(given, grad=torch.is_grad_enabled())
            return "output"

    cache = empty()
    assert states.probe(Model(), cache, "cache_params") == "output"
    ids = seen.pop("input_ids")
    assert torch.equal(ids, torch.zeros(1, 2, dtype=torch.long)) and ids.dtype is torch.long
    assert seen == {"use_cache": True, "return_dict": True, "cache_params": cache, "grad": False}


@pytest.mark.parametrize("rounding", [EXACT, rounding_of("int8"), rounding_of("bf16")], ids=lambda each: each.name)
def test_the_size_of_a_state_is_that_of_a_long_prompt(rounding: Rounding) -> None:
    """Windows full, and so many bytes for each further token."""
    size = states.measure(feed(empty(), 2), SimpleNamespace(logits=torch.zeros(1, 2, 50)), rounding)
    full, more = feed(empty(), 9), feed(empty(), 10)
    assert size.state_bytes == states.capture_state(full, rounding).nbytes
    kept = [states.capture_kv(cache, 0, tokens, rounding).nbytes for cache, tokens in ((full, 9), (more, 10))]
    assert size.kv_bytes_per_token == kept[1] - kept[0] and kept[0] == 9 * size.kv_bytes_per_token
    assert size.logits_bytes == 200 and type(size.kv_bytes_per_token) is type(size.state_bytes) is int
    assert states.StateSize(1, 2) == states.StateSize(1, 2, 0, 1)


def test_what_lies_in_pages_is_a_multiple_of_them() -> None:
    """Whichever part of it does; a model that keeps nothing has none."""
    output = SimpleNamespace(logits=torch.zeros(1, 2, 50))
    for kind, page in (("linear", PAGE_BYTES), ("full", PAGE_BYTES), ("dummy", 1)):
        assert states.measure(feed(empty(kind), 2), output).page_bytes == page
