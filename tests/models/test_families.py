"""What is asked of a family, of a release of transformers and of a live cache, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, JambaConfig, LlamaConfig, Mamba2Config, MambaConfig

from hf_sparse_cache import UnsupportedModelError
from hf_sparse_cache.models import families, live, mamba1, methods, versions
from hf_sparse_cache.models.families import FAMILIES, REFUSED, Family
from hf_sparse_cache.models.live import LiveCache


Patch = pytest.MonkeyPatch


@pytest.mark.parametrize(
    ("chunk", "default", "grid", "on_accelerator", "step"),
    [(1, 256, 256, 1024, 64), (64, 512, 512, 1024, 64), ("size", 256, 300, 1100, 100), (65, 256, 260, 1040, 65),
     (1, 2048, 2048, 2048, 64), (63, 63, 63, 1071, 126), (64, 256, 256, 1024, 64)],
)  # fmt: skip
def test_grids_and_steps_are_whole_chunks(chunk: Any, default: int, grid: int, on_accelerator: int, step: int) -> None:
    family, config = Family("Some", kernel_chunk=chunk, default_grid=default), SimpleNamespace(size="100")
    assert family.chunk(config) == (100 if chunk == "size" else chunk)
    assert family.grid(config) == family.grid(config, "cpu") == grid
    assert family.grid(config, "cuda") == on_accelerator and family.step(config) == step


@pytest.mark.parametrize(
    ("chunk", "device", "experts", "weights", "cut", "forward"),
    [
        (1, "cpu", None, 30e6, 8.0, 8.0), (1, "cpu", None, 60e6, 8.0, 4.0), (1, "cpu", None, 15e6, 8.0, 16.0),
        (1, "cpu", None, 1, 8.0, 256.0), (2, "cpu", None, 30e6, 48.0, 48.0), (2, "cpu", None, 3e9, 48.0, 4.0),
        (1, "cpu", 2, 30e6, 8.0, 32.0), (1, "cpu", 1, 3e9, 8.0, 4.0), (2, "cpu", 8, 30e6, 48.0, 48.0),
        (1, "cuda", 8, 1, 1024.0, 1024.0), (2, "cuda", None, 1, 1024.0, 1024.0), (1, "cpu", 0, 3e9, 8.0, 4.0),
    ],
)  # fmt: skip
def test_what_a_forward_costs_in_tokens(
    chunk: int, device: str, experts: int | None, weights: int, cut: float, forward: float
) -> None:
    for name in families._ROUTED:
        family, config = Family("Some", kernel_chunk=chunk), SimpleNamespace(**{name: experts})
        assert family.cut_tokens(config, device) == cut
        assert family.forward_tokens(config, device, weights) == pytest.approx(forward)
    assert Family("Some").cut_tokens(None) == 8.0 and not Family("Some").scans and Family("Some").repeated(None) == ()


def test_layers_that_run_several_times_are_kept_once_more_for_each() -> None:
    config = SimpleNamespace(loop_layer_index_start=1, loop_layer_index_end=3, loop_num_passes=3)
    assert FAMILIES["inkling2_loop_text"].repeated(config) == [1, 2, 1, 2]
    config.loop_num_passes = 1
    assert FAMILIES["inkling2_loop_text"].repeated(config) == []


def model_of(model_type: str, generates: bool = True, **config: Any) -> Any:
    text = SimpleNamespace(model_type=model_type)
    settings = SimpleNamespace(get_text_config=lambda decoder: text if decoder else None, **config)
    return SimpleNamespace(config=settings, generate=None, can_generate=lambda: generates)


def test_the_family_of_a_model_or_why_there_is_none() -> None:
    assert families.family_of(model_of("jamba")) is FAMILIES["jamba"]
    assert families.family_of(model_of("jamba", is_encoder_decoder=False)) is FAMILIES["jamba"]
    for model in (model_of("jamba", is_encoder_decoder=True), model_of("jamba", generates=False)):
        with pytest.raises(UnsupportedModelError, match=r"model_type 'jamba'.* no exact resume is known for it"):
            families.family_of(model)
    with pytest.raises(UnsupportedModelError, match="its forward ignores past_key_values"):
        families.family_of(model_of("rwkv"))
    with pytest.raises(UnsupportedModelError, match=r"Supported are .*Bamba.*Zaya"):
        families.family_of(model_of("unheard"))
    whole = model_of("jamba")
    for name in ("config", "generate"):
        part = SimpleNamespace(**{key: value for key, value in vars(whole).items() if key != name})
        with pytest.raises(UnsupportedModelError, match="not a transformers model with generate"):
            families.family_of(part)
    assert not FAMILIES.keys() & REFUSED.keys()


def test_a_model_inside_its_wrappers() -> None:
    inner = SimpleNamespace()
    adapted = SimpleNamespace(get_base_model=lambda: inner)
    compiled = SimpleNamespace(_orig_mod=adapted)
    for model in (inner, adapted, compiled, SimpleNamespace(_orig_mod=inner)):
        assert families.unwrapped(model) is inner


def test_a_learned_prompt_is_that_of_the_active_adapter_of_a_wrapper() -> None:
    def wrapper(kind: Any, learning: bool = True, active: Any = "a", base: bool = True) -> Any:
        config = SimpleNamespace(peft_type=kind, is_prompt_learning=learning)
        held = {"peft_config": {"a": config}, "active_adapter": active, "get_base_model": len}
        return SimpleNamespace(**{name: value for name, value in held.items() if base or name != "get_base_model"})

    prompt = families.learned_prompt
    assert prompt(wrapper("PROMPT")) == "PROMPT" == prompt(SimpleNamespace(_orig_mod=wrapper("PROMPT")))
    assert prompt(wrapper(SimpleNamespace(value="PREFIX"))) == "PREFIX"
    assert prompt(wrapper("LORA", learning=False)) == "" == prompt(wrapper("PROMPT", active="b"))
    assert prompt(wrapper("PROMPT", active=["a"])) == "" == prompt(wrapper("PROMPT", base=False))
    assert prompt(SimpleNamespace()) == "" == prompt(SimpleNamespace(peft_config="word", active_adapter="w"))


def test_the_name_of_a_cache_is_the_first_that_a_forward_takes() -> None:
    class New:
        def forward(self, past_key_values: Any = None, cache: Any = None) -> None: ...

    class Old:
        def forward(self, cache_params: Any = None) -> None: ...

    class Without:
        def forward(self, **kwargs: Any) -> None: ...

    assert families.cache_name_of(New()) == "cache" and families.cache_name_of(Old()) == "cache_params"
    with pytest.raises(UnsupportedModelError, match=r"Without\.forward takes no cache"):
        families.cache_name_of(Without())


def test_modules_that_stay_in_float32() -> None:
    model = SimpleNamespace(_keep_in_fp32_modules_strict=["strict"], _keep_in_fp32_modules=["half"])
    kept = families.kept_in_float32
    assert kept(model, torch.float16) == {"strict", "half"} and kept(model, torch.bfloat16) == {"strict"}
    assert kept(model, torch.float32) == set() == kept(SimpleNamespace(), torch.float16)


# -- the release ------------------------------------------------------------------------------------------------------


def with_methods(**instead: Any) -> Any:
    def validate(self: Any, model_kwargs: Any) -> None: ...
    def cache(self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any) -> None: ...
    def prefill(self: Any, input_ids: Any, generation_config: Any, model_kwargs: Any) -> None: ...
    def prepare(self: Any, **kwargs: Any) -> None: ...

    held = {"_validate_model_kwargs": validate, "_prepare_cache_for_generation": cache, "_prefill": prefill,
            "prepare_inputs_for_generation": prepare, **instead}  # fmt: skip
    return type("Some", (), {name: value for name, value in held.items() if value is not None})()


def test_a_release_without_a_method_or_a_parameter_is_refused() -> None:
    methods.require_methods(with_methods())

    def few(self: Any, input_ids: Any) -> None: ...
    def whatever(self: Any, **kwargs: Any) -> None: ...

    for instead, said in (
        ({"_prefill": None}, "Some has no _prefill"), ({"_prefill": few}, "_prefill takes no generation_config"),
        ({"_prefill": whatever}, r"Some\._prefill takes no input_ids"),
        ({"prepare_inputs_for_generation": few}, "takes no next_sequence_length"),
        ({"prepare_inputs_for_generation": None}, "has no prepare_inputs"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedModelError, match=said):
            methods.require_methods(with_methods(**instead))


@pytest.mark.parametrize("name", methods._CACHE_METHODS)
def test_a_cache_without_a_method_or_a_parameter_is_refused(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(DynamicCache, name, lambda self: None)
    with pytest.raises(UnsupportedModelError, match=f"{name} takes no {methods._CACHE_METHODS[name][0]}"):
        methods.require_methods(with_methods())
    monkeypatch.setattr(DynamicCache, name, None)
    with pytest.raises(UnsupportedModelError, match=f"DynamicCache has no {name}"):
        methods.require_methods(with_methods())


def test_a_release_outside_the_tested_range_is_warned_of(monkeypatch: Patch) -> None:
    said: list[str] = []
    monkeypatch.setattr(versions.logger, "warning_once", said.append)
    monkeypatch.setattr(versions, "OLDEST", "5.15")
    monkeypatch.setattr(versions, "BEYOND", "5.25")
    for release, tested in (
        ("5.14.9", False), ("5.15", True), ("5.15.0", True), ("5.24.7", True), ("5.25.0.dev0", False),
        ("5.25", False), ("6.0", False), ("4.57", False), ("5.20.0rc1", True),
    ):  # fmt: skip
        said.clear()
        monkeypatch.setattr(versions.transformers, "__version__", release)
        versions.check_version()
        assert len(said) == (0 if tested else 1), release
    assert "transformers>=5.15,<5.25" in "".join(said) or not said


# -- the live cache ---------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 32}
HEADS: dict[str, Any] = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_what_a_live_cache_knows_of_its_layers() -> None:
    recurrent = LiveCache(MambaConfig(**SMALL))
    assert recurrent.recurrent_only and recurrent.full_attention_layers == 0 and len(recurrent.layers) == 4
    assert not recurrent.is_compileable and not recurrent.unfinished and recurrent.rounded == recurrent.length == 0
    recurrent.length = 7
    assert recurrent.get_seq_length() == 7 and recurrent.get_mask_sizes(3, 0) == (10, 0)
    full = LiveCache(LlamaConfig(**HEADS), repeated=[1, 3])
    assert not full.recurrent_only and full.full_attention_layers == 6 == len(full.layers)
    assert full.layers[4] is not full.layers[1] and full.get_seq_length() == 0
    assert full.get_mask_sizes(3, 0) == DynamicCache(config=LlamaConfig(**HEADS)).get_mask_sizes(3, 0)
    full.update(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2), 2)
    assert full.get_seq_length(2) == 5 and full.get_seq_length() == 0
    hybrid = LiveCache(JambaConfig(**HEADS, attn_layer_period=2, attn_layer_offset=1))
    assert not hybrid.recurrent_only and hybrid.full_attention_layers == 2
    fresh = LiveCache(LlamaConfig(**HEADS))
    full.start_anew(fresh)
    assert full.layers is fresh.layers and full.get_seq_length(2) == 0


@pytest.mark.parametrize(
    ("config", "forgets"), [(MambaConfig(**SMALL), True), (Mamba2Config(**SMALL, num_heads=4, head_dim=8), False)]
)
def test_a_state_is_announced_to_scans_that_forget_it(config: Any, forgets: bool, monkeypatch: Patch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(live.mamba1, "announce", told.append)
    monkeypatch.setattr(live.mamba1, "settled", lambda: told.append("settled"))
    cache = LiveCache(config)
    conv, state = torch.ones(1, 8, 4), torch.ones(1, 8, 3)
    cache.update_conv_state(conv, 1)
    assert torch.equal(cache.update_recurrent_state(state, 1), state)
    cache.update_conv_state(conv, 1)
    if forgets:
        assert told[:2] == [None, "settled"] and torch.equal(told[2], state) and len(told) == 3
        cache.as_stock()
        told.clear()
        cache.update_conv_state(conv, 1)
        cache.update_recurrent_state(state, 1)
    assert not told
    assert mamba1.needs_hook(config.model_type) is forgets
