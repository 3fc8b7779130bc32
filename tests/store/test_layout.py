"""What a model's states must be like, on every family: its own pass, and whatever else is named by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.models import layout as layouts
from hf_sparse_cache.models import states
from hf_sparse_cache.models.families import cache_name_of
from hf_sparse_cache.models.layout import Layout
from hf_sparse_cache.models.live import LiveCache
from hf_sparse_cache.models.tensors import LayerTensors


UNSUPPORTED = {"MiniMax", "xLSTM", "RWKV", "RecurrentGemma"}


def filled(model: Any, tokens: int) -> LiveCache:
    cache = LiveCache(model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(input_ids=tiny_models.random_ids(tokens), use_cache=True, **{cache_name_of(model): cache})
    return cache


def layout_of(model: Any) -> Layout:
    name = cache_name_of(model)

    def probe() -> tuple[Any, Any]:
        cache = LiveCache(model.config.get_text_config(decoder=True))
        return cache, states.probe(model, cache, name)

    return Layout(probe)


def held(payload: LayerTensors) -> int:
    """Bytes of its tensors, as in a file."""
    return sum(value.nbytes for value in payload.tensors())


@pytest.mark.parametrize("family", [name for name in tiny_models.available_families() if name not in UNSUPPORTED])
def test_the_states_of_every_family_are_what_its_layout_says(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_models.build(family, dtype)
        layout = layout_of(model)
        for tokens in (3, 70):  # within the sliding windows, and beyond
            cache = filled(model, tokens)
            state, kv = states.capture_state(cache), states.capture_kv(cache, 1, tokens)
            layout.check_state(state, tokens)
            assert layout.state_bytes(tokens) == held(state)
            assert layout.has_kv == (kv.nbytes > 0)
            if layout.has_kv:
                layout.check_kv(kv, 1, tokens)
                assert layout.kv_bytes(1, tokens) == held(kv)
                with pytest.raises(DamagedFileError, match="shape"):
                    layout.check_kv(kv, 0, tokens)
        other = layout_of(tiny_models.build("Jamba" if family != "Jamba" else "Mamba"))
        with pytest.raises(DamagedFileError):
            other.check_state(state, tokens)


def first(found: LayerTensors) -> tuple[int, str]:
    return next((i, n) for i, layer in enumerate(found.layers) for n, value in layer.items() if torch.is_tensor(value))


def changed(found: LayerTensors, change: Callable[[dict[str, Any], str], None]) -> LayerTensors:
    index, name = first(found)
    layers = [dict(layer) for layer in found.layers]
    change(layers[index], name)
    return LayerTensors(tuple(layers), found.devices)


CHANGES: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "has 'more'": lambda layer, name: layer.update(more=torch.zeros(1)),
    "lacks": lambda layer, name: layer.pop(name),
    "shape": lambda layer, name: layer.update({name: layer[name][..., :-1]}),
    "must be torch.float32": lambda layer, name: layer.update({name: layer[name].double()}),
    "and must be": lambda layer, name: layer.update({name: layer[name][None]}),
    "not finite": lambda layer, name: layer.update({name: layer[name] / 0}),
    "is no tensor": lambda layer, name: layer.update({name: 3}),
}


@pytest.mark.parametrize("said", CHANGES)
@pytest.mark.parametrize("family", ["Jamba", "Zamba2", "Gemma3"])
def test_what_cannot_be_the_models_state_is_named(family: str, said: str) -> None:
    model = tiny_models.build(family)
    layout, cache = layout_of(model), filled(model, 20)
    for captured, check in (
        (states.capture_state(cache), lambda found: layout.check_state(found, 20)),
        (states.capture_kv(cache, 0, 20), lambda found: layout.check_kv(found, 0, 20)),
    ):
        if not captured.nbytes:
            continue
        check(captured)
        with pytest.raises(DamagedFileError, match=said):
            check(changed(captured, CHANGES[said]))
        with pytest.raises(DamagedFileError, match="layers"):
            check(LayerTensors((*captured.layers, {})))
        with pytest.raises(DamagedFileError, match="where the model's are"):
            check(LayerTensors(captured.layers, ("cuda:3",) * len(captured.layers)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_not_finite_is_found_wherever_it_stands(dtype: torch.dtype) -> None:
    """As `isfinite` finds it, number by number: in what is computed many at a time, and in what is left."""
    for count in (1, 3, 67, 300, 2**15 + 33):
        value = torch.linspace(-3, 3, count).to(dtype)
        assert layouts._finite(value) and not layouts._finite(value / 0)
        for place in {0, count // 2, count - 1, *range(0, count, 1 + count // 40)}:
            for odd in (float("nan"), float("inf"), float("-inf")):
                spoiled = value.clone()
                spoiled[place] = odd
                assert not layouts._finite(spoiled) and not spoiled.isfinite().all()
    assert layouts._finite(torch.empty(0, 3, dtype=dtype)) and layouts._finite(torch.zeros(4, 6, dtype=dtype)[:, ::2])
