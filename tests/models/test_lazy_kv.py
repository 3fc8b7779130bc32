"""Restored keys and values are joined by the first forward, once, and nobody can see them before that."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build, random_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, LinearAttentionAndFullAttentionLayer

from hf_sparse_cache import SparsePrefixCache, check_exactness
from hf_sparse_cache.models import lazy_kv, states


LENGTHS = (3, 4, 5)
LAYERS = (DynamicLayer, DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer)
GRID, PREFIX, PROMPT = 32, 96, 120


def drawn(*lengths: int, seed: int = 0, batch: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, length, 8, generator=generator) for length in lengths]


def waiting_and_ready(stock: type, lengths: tuple[int, ...] = LENGTHS) -> tuple[Any, Any]:
    """The same keys and values twice: in spans, and joined as an update leaves them."""
    keys, values = drawn(*lengths, seed=1), drawn(*lengths, seed=2)
    layer, ready = stock(), stock()
    layer = lazy_kv.waiting(layer, keys, values)
    ready.update(torch.cat(keys, dim=-2), torch.cat(values, dim=-2))
    return layer, ready


def still_waits(layer: Any) -> bool:
    return isinstance(layer, lazy_kv.Waiting) and not {"keys", "values"} & vars(layer).keys()


def assert_same(layer: Any, ready: Any) -> None:
    assert layer.is_initialized == ready.is_initialized and layer.get_seq_length() == ready.get_seq_length()
    for ours, theirs in ((layer.keys, ready.keys), (layer.values, ready.values)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    layers = [layer]
    lazy_kv.settle(layers)
    assert type(layers[0]) is type(ready) and vars(layers[0]).keys() == vars(ready).keys()
    assert layers[0].keys is layer.keys and layers[0].values is layer.values


@pytest.mark.parametrize("stock", LAYERS)
def test_questions_about_the_length_join_nothing(stock: type) -> None:
    layer, ready = waiting_and_ready(stock)
    assert layer.get_seq_length() == ready.get_seq_length() == sum(LENGTHS)
    assert layer.get_mask_sizes(7) == ready.get_mask_sizes(7)
    assert layer.get_max_length() == ready.get_max_length()
    assert layer.is_initialized and layer.is_compileable == ready.is_compileable
    assert layer.device == ready.device and getattr(layer, "dtype", None) == getattr(ready, "dtype", None)
    assert isinstance(layer, stock)
    assert still_waits(layer)


@pytest.mark.parametrize("stock", LAYERS)
def test_an_update_returns_and_keeps_what_a_ready_layer_does(stock: type) -> None:
    layer, ready = waiting_and_ready(stock)
    for step in range(2):
        # As models give them: heads and positions swapped in a view.
        new = [torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(step)).transpose(1, 2)] * 2
        for ours, theirs in zip(layer.update(*new), ready.update(*new), strict=True):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
        assert not still_waits(layer)
        assert_same(layer, ready)


def set_keys(layer: Any) -> None:
    layer.keys = layer.values[..., :2, :]


def offload(layer: Any) -> None:
    layer.offload()
    layer.prefetch()


FIRST: dict[str, Callable[[Any], object]] = {
    "read keys": lambda layer: layer.keys,
    "read values": lambda layer: layer.values,
    "set keys": set_keys,
    "set values": lambda layer: setattr(layer, "values", None),
    "reset": lambda layer: layer.reset(),
    "crop": lambda layer: DynamicLayer.crop(layer, -4),
    "beams": lambda layer: DynamicLayer.reorder_cache(layer, torch.tensor([0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(3),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([0, 0])),
    "offload": offload,
}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("stock", LAYERS)
def test_whoever_comes_before_the_update_finds_everything(stock: type, first: str) -> None:
    layer, ready = waiting_and_ready(stock)
    for each in (layer, ready):
        FIRST[first](each)
    assert not still_waits(layer)
    assert_same(layer, ready)


def test_a_copy_waits_by_itself() -> None:
    layer, ready = waiting_and_ready(DynamicLayer)
    twin = copy.deepcopy(layer)
    twin.keys.zero_()
    assert still_waits(layer) and not still_waits(twin)
    assert_same(layer, ready)


def test_what_is_stored_is_never_written_to() -> None:
    """One span too, which joining could have handed out as it is."""
    (keys,), (values,) = drawn(5, seed=1), drawn(5, seed=2)
    layer = DynamicLayer()
    layer = lazy_kv.waiting(layer, [keys], [values])
    layer.keys.zero_()
    assert bool(keys.any())


def test_without_memory_to_join_it_goes_on_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("full")

    layer, ready = waiting_and_ready(DynamicLayer)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "cat", full)
        layer.update(*drawn(1, 1))
    assert still_waits(layer)
    assert_same(layer, ready)


class Joined(TorchDispatchMode):
    """Counts the bytes that concatenations write."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.nbytes += result.nbytes
        return result


@pytest.mark.parametrize("family", ["Jamba", "Zamba2", "Llama"])
@torch.no_grad()
def test_a_warm_forward_copies_what_a_ready_live_cache_copies(family: str) -> None:
    """Attention layers alone, layers with both kinds of state, and no recurrent state at all."""
    model = build(family)
    ids = random_ids(PROMPT)
    with SparsePrefixCache(model, grid=GRID, exactness="bitwise") as handle:
        name, binding = handle.server.binding.cache_name, handle.server.binding
        source = binding.live_cache()
        model(ids[:, :PREFIX], use_cache=True, **{name: source})
        state = states.capture_state(source)
        spans = [states.capture_kv(source, start, start + GRID) for start in range(0, PREFIX, GRID)]

        def resumed(ready: bool) -> tuple[int, int, states.LayerTensors]:
            live = binding.live_cache()
            with Joined() as restoring:
                states.restore(live, state, spans)
            if ready:
                lazy_kv.settle(live.layers)
            live.length = PREFIX
            with Joined() as forward:
                model(ids[:, PREFIX:], use_cache=True, **{name: live})
            return restoring.nbytes, forward.nbytes, states.capture_kv(live, 0, PROMPT)

        restoring, forward, kv = resumed(ready=False)
        _, limit, expected = resumed(ready=True)
    assert restoring == 0 and forward == limit > kv.nbytes - 1
    for ours, theirs in zip(kv.layers, expected.layers, strict=True):
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)


def test_a_restored_cache_that_nobody_ran_can_be_captured() -> None:
    model = build("Zamba2")
    with SparsePrefixCache(model, grid=GRID, exactness="bitwise") as handle:
        source, live = handle.server.live_cache(), handle.server.live_cache()
        with torch.no_grad():
            model(random_ids(PREFIX), use_cache=True, **{handle.server.binding.cache_name: source})
        halves = [states.capture_kv(source, 0, GRID), states.capture_kv(source, GRID, PREFIX)]
        states.restore(live, states.capture_state(source), halves)
        assert live.get_seq_length() == PREFIX and isinstance(live, DynamicCache)
        whole, again = states.capture_kv(source, 0, PREFIX), states.capture_kv(live, 0, PREFIX)
    assert whole.nbytes == again.nbytes > 0
    for ours, theirs in zip(again.layers, whole.layers, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[part], theirs[part]) for part in ours)


@pytest.mark.parametrize("family", ["Jamba", "Zamba2", "Llama"])
@pytest.mark.parametrize("sabotaged", [False, True])
def test_spans_in_the_wrong_place_are_noticed(family: str, sabotaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first span stands where the second belongs."""

    def first_twice(layer: Any, keys: Any, values: Any) -> Any:
        return wait(layer, [keys[0], keys[0], *keys[2:]], [values[0], values[0], *values[2:]])

    wait = lazy_kv.waiting
    model = build(family)
    prompt = random_ids(PROMPT)
    with SparsePrefixCache(model, grid=GRID, policy="balanced", exactness="bitwise") as handle:
        model.generate(prompt, past_key_values=handle, max_new_tokens=1)
        if sabotaged:
            monkeypatch.setattr(states, "waiting", first_twice)
        report = check_exactness(model, [prompt], cache=handle, max_new_tokens=2)
    assert report.resumed_tokens >= 2 * GRID
    assert report.passed is not sabotaged, str(report)
    assert report.bitwise is not sabotaged
