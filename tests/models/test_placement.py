"""Weights that are offloaded, dispatched or quantised: the same prefix reuse, as far as a CPU can express it."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from matrix import Bench
from tiny_models import build

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.config import SparseCacheConfig
from hf_sparse_cache.models import binding
from hf_sparse_cache.models.cost import prefill_cost
from hf_sparse_cache.models.families import family_of, learned_prompt


CPU = torch.device("cpu")


def offloaded_to_memory(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=CPU)


def offloaded_to_disk(model: Any, folder: Path) -> Any:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)
    return model


def dispatched(model: Any, folder: Path) -> Any:
    """Every second layer on disk."""
    base = next(name for name, module in model.named_children() if hasattr(module, "layers"))
    places = {f"{base}.{name}": "cpu" for name, _ in getattr(model, base).named_children() if name != "layers"}
    layers = range(len(getattr(model, base).layers))
    places |= {f"{base}.layers.{index}": "disk" if index % 2 else "cpu" for index in layers}
    places |= {name: "cpu" for name, _ in model.named_children() if name != base}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def placed_by_device_map(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "model")
    budget = {"cpu": "300KB"}  # too little: the rest goes to disk
    return (
        type(model)
        .from_pretrained(folder / "model", device_map="auto", max_memory=budget, offload_folder=folder / "offload")
        .eval()
    )


PLACEMENTS = [offloaded_to_memory, offloaded_to_disk, dispatched, placed_by_device_map]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Mamba", "Jamba", "Zamba2", "Qwen3.5"])
@pytest.mark.parametrize("place", PLACEMENTS)
def test_placement_keeps_reuse_exact(family: str, place: Any, tmp_path: Path) -> None:
    expected = Bench(family).generate(Bench(family).prompt(1), None)
    bench = Bench(family, model=place(build(family), tmp_path))
    bench.model.generation_config.eos_token_id = None
    with bench.handle(policy="none") as cache:
        cold = bench.generate(bench.prompt(1), cache)
    with bench.handle() as cache:
        bench.warm(cache)
        for _ in range(2):  # weights that come and go are no change of weights
            warm = bench.generate(bench.prompt(1), cache)
            assert cache.last_request.reason == "resumed"
            assert warm.equals(cold)
            assert warm.distance(expected) <= 1e-4


@pytest.mark.filterwarnings("ignore")
def test_states_stay_beside_their_layer() -> None:
    """Restored states lie on the device on which they were captured; here all on the only one there is."""
    bench = Bench("Jamba")
    with bench.handle() as cache:
        bench.warm(cache)
        for _, _, checkpoint in cache.store.checkpoints():
            tensors = [
                value for layer in checkpoint.state.layers for value in layer.values() if torch.is_tensor(value)
            ]
            assert tensors and all(value.device == CPU for value in tensors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Jamba", "Mamba2"])
def test_weights_quantised_by_torchao(family: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    bench = Bench(family, model=build(family))

    def quantizable(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "dt_proj" not in name  # stock multiplies that weight itself

    quantization.quantize_(bench.model, quantization.Int8WeightOnlyConfig(), quantizable)
    assert any(hasattr(parameter, "__tensor_flatten__") for parameter in bench.model.parameters())
    expected = bench.generate(bench.prompt(1), None)
    with bench.handle(policy="none") as cache:
        cold = bench.generate(bench.prompt(1), cache)
    with bench.handle() as cache:
        bench.warm(cache)
        warm = bench.generate(bench.prompt(1), cache)
        assert cache.last_request.reason == "resumed"
        assert warm.equals(cold) and warm.distance(expected) <= 1e-4
        quantized = next(
            parameter for parameter in bench.model.parameters() if hasattr(parameter, "__tensor_flatten__")
        )
        quantized.data.qdata.zero_()
        bench.generate(bench.prompt(1), cache)
        assert "weights changed" in cache.last_request.reason


def test_a_model_is_collected_although_it_was_served() -> None:
    model = build("Mamba")
    bench = Bench("Mamba", model=model)
    with bench.handle() as cache:
        bench.warm(cache)
    gone = []
    torch.nn.Module.__setattr__(model, "watched", _Told(gone))
    del bench, cache, model
    gc.collect()
    assert gone == ["collected"]


class _Told:
    """Says when the model that holds it has been collected."""

    def __init__(self, gone: list[str]) -> None:
        self._gone = gone

    def __del__(self) -> None:
        self._gone.append("collected")


@pytest.mark.parametrize(("family", "layers"), [("Jamba", 1), ("Mamba", 0)])
def test_what_a_prefill_costs_is_a_matter_of_the_models_shape(family: str, layers: int) -> None:
    """G(t) = t + layers * channels / weights * t²: linear where nothing attends to all that went before."""
    model = build(family)
    cost = prefill_cost(model, layers)(np.array([0.0, 1000.0]))
    config = model.config
    channels = (
        getattr(config, "num_attention_heads", 0) * config.hidden_size // getattr(config, "num_attention_heads", 1)
    )
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert cost[0] == 0 and cost[1] == pytest.approx(1000 + layers * channels / weights * 1000**2)
    assert (cost[1] > 1001) == bool(layers)


@pytest.mark.parametrize("family", ["Jamba", "Zamba2", "Qwen3.5", "Llama"])
def test_an_accelerator_gathers_cuts_rarely_and_needs_no_pieces(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the weights lie decides: a forward costs an accelerator what many tokens do, and no scan is slow there."""
    model = build(family)
    with SparsePrefixCache(model) as cache:
        here = cache.server.binding.segmenting
    found = {}
    for device in ("cuda", "mps", "xpu", "cpu"):
        monkeypatch.setattr(binding, "input_device", lambda model, device=device: torch.device(device))
        found[device] = binding._segmenting(model, family_of(model), here.rule, SparseCacheConfig())
    assert found["cpu"] == here and not here.gathers and (here.piece is None) is (family != "Jamba")
    for device in ("cuda", "mps", "xpu"):
        there = found[device]
        assert there.gathers and there.piece is None and there.cut_tokens == there.forward_tokens > here.cut_tokens


def test_which_prompt_an_adapter_puts_before_the_tokens() -> None:
    """Of the adapter that is active, and only where it does."""
    learned, other = SimpleNamespace(is_prompt_learning=True, peft_type="PROMPT_TUNING"), SimpleNamespace()

    def of(**values: Any) -> str:
        return learned_prompt(SimpleNamespace(get_base_model=None, **values))

    known = {"a": learned, "b": other}
    assert of(peft_config=known, active_adapter="a") == "PROMPT_TUNING"
    assert of(peft_config=known, active_adapter="b") == of(peft_config=known, active_adapter="c") == ""
    assert of(peft_config=known, active_adapter=["a"]) == of(peft_config=known) == of() == ""
    assert of(peft_config=[learned], active_adapter="a") == ""
    inner = SimpleNamespace(get_base_model=None, peft_config=known, active_adapter="a")
    assert learned_prompt(SimpleNamespace(_orig_mod=inner)) == "PROMPT_TUNING"
    assert learned_prompt(SimpleNamespace(peft_config=known, active_adapter="a")) == ""
