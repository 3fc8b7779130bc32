"""What others put between `generate()` and the layers: exact, or uncached with a reason, never another answer."""

import copy
import functools
import inspect
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from matrix import Bench
from tiny_models import build, random_ids
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models.families import CACHE_NAMES, cache_name_of
from hf_sparse_cache.models.live import LiveCache
from hf_sparse_cache.models.weights import identity
from hf_sparse_cache.tools.random_weights import draw_weights


GLOBAL = {"strength": 0.0}


@pytest.fixture(params=["Jamba", "Mamba2"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param, model=build(request.param))


def is_stock(bench: Bench, cache: SparsePrefixCache, seed: int = 1) -> bool:
    expected = bench.generate(bench.prompt(seed), None)
    return bench.generate(bench.prompt(seed), cache).distance(expected) <= 1e-4


def reason(cache: SparsePrefixCache) -> str:
    assert cache.last_request is not None
    return cache.last_request.reason


# -- steering: a hook that stays while its strength changes -----------------------------------------------------------


def layer(model: PreTrainedModel, index: int = 1) -> torch.nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith(f"layers.{index}"))


def added(output: Any, what: Any) -> Any:
    return (output[0] + what, *output[1:]) if isinstance(output, tuple) else output + what


VECTOR = torch.randn(64, generator=torch.Generator().manual_seed(0))


def by_closure(model: PreTrainedModel) -> Callable[[float], None]:
    held = {"strength": 0.0}
    layer(model).register_forward_hook(lambda module, args, output: added(output, held["strength"] * VECTOR))
    return lambda strength: held.update(strength=strength)


def by_global(model: PreTrainedModel) -> Callable[[float], None]:
    def steer(module: Any, args: Any, output: Any) -> Any:
        return added(output, GLOBAL["strength"] * VECTOR)

    GLOBAL["strength"] = 0.0
    layer(model).register_forward_hook(steer)
    return lambda strength: GLOBAL.update(strength=strength)


def by_object(model: PreTrainedModel) -> Callable[[float], None]:
    class Steer:
        strength = 0.0

        def __call__(self, module: Any, args: Any, output: Any) -> Any:
            return added(output, self.strength * VECTOR)

    steer = Steer()
    layer(model).register_forward_hook(steer)
    return lambda strength: setattr(steer, "strength", strength)


def by_bound_method(model: PreTrainedModel) -> Callable[[float], None]:
    class Slotted:
        __slots__ = ("vector",)

        def steer(self, module: Any, args: Any, output: Any) -> Any:
            return added(output, self.vector)

    held = Slotted()
    held.vector = 0 * VECTOR
    layer(model).register_forward_hook(held.steer)
    return lambda strength: held.vector.copy_(strength * VECTOR)


def by_partial(model: PreTrainedModel) -> Callable[[float], None]:
    def steer(settings: Any, module: Any, args: Any, output: Any) -> Any:
        return added(output, settings.strength * VECTOR)

    settings = SimpleNamespace(strength=0.0)
    layer(model).register_forward_hook(functools.partial(steer, settings))
    return lambda strength: setattr(settings, "strength", strength)


def by_pre_hook_through_data(model: PreTrainedModel) -> Callable[[float], None]:
    vector = 0 * VECTOR
    layer(model).register_forward_pre_hook(lambda module, args: (args[0] + vector, *args[1:]))

    def change(strength: float) -> None:
        vector.data[:] = strength * VECTOR

    return change


def by_everybody(model: PreTrainedModel) -> Callable[[float], None]:
    """A hook on all modules at once."""
    held, chosen = {"strength": 0.0}, layer(model)

    def steer(module: Any, args: Any, output: Any) -> Any:
        return added(output, held["strength"] * VECTOR) if module is chosen else None

    handle = torch.nn.modules.module.register_module_forward_hook(steer)

    def change(strength: float | None) -> None:
        if strength is None:
            handle.remove()
        else:
            held["strength"] = strength

    return change


class Steered(torch.nn.Module):
    """A wrapper in the place of a projection, with numbers of its own that are no parameters."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.strength, self.vectors = inner, 0.0, {"up": VECTOR}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * (1 + self.strength) + 0 * self.vectors["up"].sum()


def by_wrapper(model: PreTrainedModel) -> Callable[[float], None]:
    parent = next(module for module in model.modules() if hasattr(module, "out_proj") or hasattr(module, "o_proj"))
    name = "out_proj" if hasattr(parent, "out_proj") else "o_proj"
    wrapper = Steered(getattr(parent, name))
    setattr(parent, name, wrapper)
    return lambda strength: setattr(wrapper, "strength", strength)


def by_patched_forward(model: PreTrainedModel) -> Callable[[float], None]:
    held, module = {"strength": 0.0}, layer(model)
    own = module.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return added(own(*args, **kwargs), held["strength"] * VECTOR)

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return lambda strength: held.update(strength=strength)


STEERINGS = [
    by_closure,
    by_global,
    by_object,
    by_bound_method,
    by_partial,
    by_pre_hook_through_data,
    by_everybody,
    by_wrapper,
    by_patched_forward,
]


@pytest.mark.parametrize("how", STEERINGS)
def test_steering_is_noticed_and_costs_no_reuse(bench: Bench, how: Callable[[Any], Callable[[Any], None]]) -> None:
    change = how(bench.model)
    try:
        with bench.handle() as cache:
            bench.warm(cache)
            before = bench.generate(bench.prompt(1), None)
            change(1.0)
            assert bench.generate(bench.prompt(1), None).distance(before) > 1e-2, "it does not steer"
            assert is_stock(bench, cache) and "weights changed" in reason(cache)
            assert is_stock(bench, cache, 2) and reason(cache) == "resumed"
            change(0.0)  # what was stored before is there still
            assert is_stock(bench, cache, 3) and reason(cache) == "resumed"
    finally:
        if how is by_everybody:
            change(None)


def test_a_hook_that_looks_at_where_a_segment_ends(bench: Bench) -> None:
    """Steering of the last position alone: in segments there would be more last positions."""

    def last(module: Any, args: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[:, -1] += 2 * VECTOR
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with bench.handle() as cache:
        bench.warm(cache)
        handle = layer(bench.model).register_forward_hook(last)
        for seed in (1, 1, 2):
            assert is_stock(bench, cache, seed) and "after two pieces" in reason(cache), reason(cache)
        handle.remove()
        assert is_stock(bench, cache, 3) and reason(cache) == "resumed"


def test_a_hook_that_is_another_after_every_forward(bench: Bench) -> None:
    """It records. Nobody can know that it does nothing else: calls run uncached, with a reason, while it is there."""
    seen: list[torch.Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0, -1].clone())

    with bench.handle() as cache:
        bench.warm(cache)
        handle = layer(bench.model).register_forward_hook(record)
        for seed in (1, 2):
            assert is_stock(bench, cache, seed) and "is another after every forward" in reason(cache)
        handle.remove()
        assert is_stock(bench, cache, 3) and reason(cache) == "resumed"


def test_what_a_module_writes_down_itself_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that counts calls, keeps the last router scores, and fills a dictionary."""
    bench = Bench("Jamba", model=build("Jamba"))
    kind = type(layer(bench.model))
    own = kind.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        self.scores = hidden_states.mean(-1)
        self.__dict__.setdefault("kept", {})["width"] = hidden_states.shape[1]
        return own(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    with bench.handle() as cache:
        bench.warm(cache)
        for seed in (1, 2):
            assert is_stock(bench, cache, seed) and reason(cache) == "resumed"


def test_a_setting_that_changes_while_the_binding_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, say: it is a setting still, whose later changes are noticed."""
    bench = Bench("Llama", model=build("Llama"))
    attention, own = attentions(bench.model)[0], type(bench.model).forward

    def meddling(self: Any, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        attention.scaling *= 1.5
        return own(self, *args, **kwargs)

    Bench("Llama", model=bench.model).handle(prove=False).detach()
    meddling.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    with bench.handle(prove=False) as cache:
        cache.server.proof.wanted = True
        monkeypatch.setattr(type(bench.model), "forward", meddling)
        bench.warm(cache)
        bench.warm(cache)
        attention.scaling *= 2
        assert is_stock(bench, cache, 1) and "weights changed" in reason(cache)


# -- keys and values that somebody takes out --------------------------------------------------------------------------


def layer_of(module: Any, kwargs: Any) -> Any:
    """The cache layer of an attention that is called with these keywords."""
    return next(kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None).layers[module.layer_idx]


def prune(module: Any, args: Any, kwargs: Any, output: Any) -> None:
    held = layer_of(module, kwargs)
    if kwargs["hidden_states"].shape[1] > 1:
        held.keys, held.values = held.keys[:, :, ::2], held.values[:, :, ::2]


def attentions(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "k_proj")]


@pytest.mark.parametrize("family", ["Jamba", "Llama", "Gemma3"])
def test_pruned_keys(family: str) -> None:
    bench = Bench(family, model=build(family))
    with bench.handle() as cache:
        bench.warm(cache)
        handles = [each.register_forward_hook(prune, with_kwargs=True) for each in attentions(bench.model)]
        with bench.handle(store=cache.store) as made_then:
            for handle in (cache, made_then):
                expected = bench.generate(bench.prompt(1), None, max_new_tokens=1)
                found = bench.generate(bench.prompt(1), handle, max_new_tokens=1)
                assert found.equals(expected) and "takes some out" in reason(handle), reason(handle)
        for each in handles:
            each.remove()
        assert is_stock(bench, cache, 2) and reason(cache) == "resumed"


@pytest.mark.parametrize("options", [{}, {"policy": "none"}], ids=["kept", "nothing kept"])
def test_keys_taken_out_only_of_long_prompts(options: dict[str, Any]) -> None:
    """What the proof's short prompt does not show is noticed while a prompt is computed; nothing of it is kept."""
    bench = Bench("Jamba", model=build("Jamba"))

    def prune_long(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if layer_of(module, kwargs).keys.shape[-2] > 100:
            prune(module, args, kwargs, output)

    for each in attentions(bench.model):
        each.register_forward_hook(prune_long, with_kwargs=True)
    ids = random_ids(300, seed=5)
    with bench.handle(**options) as cache:
        expected = bench.generate(ids, None, max_new_tokens=1)
        for _ in range(2):
            found = bench.generate(ids, cache, max_new_tokens=1)
            assert found.equals(expected) and "takes some out" in reason(cache)


# -- what prepares the inputs -----------------------------------------------------------------------------------------


def test_inputs_that_somebody_prepares(bench: Bench) -> None:
    model, own = bench.model, bench.model.prepare_inputs_for_generation
    seen: list[int] = []

    def logging(*args: Any, **kwargs: Any) -> Any:
        inputs = own(*args, **kwargs)
        seen.append(inputs["input_ids"].shape[1])
        return inputs

    def other_tokens(*args: Any, **kwargs: Any) -> Any:
        inputs = own(*args, **kwargs)
        inputs["input_ids"] = inputs["input_ids"].clamp(max=60)
        return inputs

    def one_more(*args: Any, **kwargs: Any) -> Any:
        inputs = own(*args, **kwargs)
        if kwargs.get("is_first_iteration"):
            inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (1, 0), value=5)
        return inputs

    with bench.handle() as cache:
        bench.warm(cache)
        model.prepare_inputs_for_generation = logging
        assert is_stock(bench, cache, 1) and reason(cache) == "resumed" and seen
        model.prepare_inputs_for_generation = other_tokens
        assert is_stock(bench, cache, 2) and "changes input_ids" in reason(cache)
        if bench.label == "Mamba2":
            model.prepare_inputs_for_generation = one_more
            assert is_stock(bench, cache, 3) and "changes input_ids" in reason(cache)
        del model.prepare_inputs_for_generation
        assert is_stock(bench, cache, 4) and reason(cache) == "resumed"


def test_a_forward_in_the_place_of_the_models_own(bench: Bench) -> None:
    """One that hides what it takes; and one that computes something else than before."""
    own, scale = bench.model.forward, {"by": 1.0}

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits * scale["by"]
        return output

    with bench.handle() as cache:
        bench.warm(cache)
        name = str(identity(bench.model))
        bench.model.forward = forward
        assert str(identity(bench.model)) != name
        assert is_stock(bench, cache, 1) and "weights changed" in reason(cache)
        assert is_stock(bench, cache, 2) and reason(cache) == "resumed"
        scale["by"] = 3.0
        assert is_stock(bench, cache, 2) and "weights changed" in reason(cache)
        del bench.model.forward
        assert is_stock(bench, cache, 3) and reason(cache) == "resumed" and str(identity(bench.model)) == name


@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "FalconMamba", "Jamba"])
def test_a_live_cache_that_is_handed_back(family: str) -> None:
    """For the next turn: nothing in the cache of a purely recurrent model says which tokens it holds."""
    bench = Bench(family, model=build(family))
    model, name = bench.model, cache_name_of(bench.model)
    given = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    with bench.handle() as cache:
        first = model.generate(bench.prompt(1), past_key_values=cache, **given)
        live = next(value for value in first.values() if isinstance(value, LiveCache))
        for ids in (torch.cat([first.sequences, random_ids(9, seed=5)], 1), bench.prompt(2)):
            if family == "Jamba" and ids is not None and ids.shape[1] < first.sequences.shape[1]:
                continue  # another text on keys and values of this one is what was asked for
            stock = bench.generate(ids, None)
            assert bench.generate(ids, None, **{name: live}).distance(stock) <= 1e-4
        if family != "Jamba":
            assert cache.stats().requests == 3 and cache.last_request.resumed_tokens > 0
    if family == "Mamba":
        with bench.handle():  # the one that it came from is gone
            assert bench.generate(bench.prompt(2), None, **{name: live}).distance(stock) <= 1e-4


# -- settings of modules ----------------------------------------------------------------------------------------------


def epsilon(model: Any) -> None:
    norm = next(module for module in model.modules() if hasattr(module, "variance_epsilon"))
    norm.variance_epsilon = 0.5


def scaling(model: Any) -> None:
    attentions(model)[0].scaling = 3.0


def nested_implementation(model: Any) -> None:
    """One layer with an attention of its own."""
    attention = attentions(model)[0]
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "eager"


def setting_of_the_config(model: Any) -> None:
    attentions(model)[0].config.some_new_switch = True


@pytest.mark.parametrize("change", [epsilon, scaling, setting_of_the_config])
def test_settings_are_noticed(change: Callable[[Any], None]) -> None:
    bench = Bench("Llama", model=build("Llama"))
    with bench.handle() as cache:
        bench.warm(cache)
        change(bench.model)
        assert is_stock(bench, cache, 1) and "weights changed" in reason(cache)
        assert is_stock(bench, cache, 2) and reason(cache) == "resumed"


def test_an_attention_that_sees_what_comes_after() -> None:
    """One layer that is not made for the masks of the others attends to every token of a segment, in stock as well."""
    bench = Bench("Llama", model=build("Llama"))
    with bench.handle() as cache:
        bench.warm(cache)
        nested_implementation(bench.model)
        assert is_stock(bench, cache, 1) and "after two pieces" in reason(cache)


# -- RoPE by length ---------------------------------------------------------------------------------------------------

ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [float(i + 1) for i in range(8)],
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ROPES)
def test_rope_by_length(kind: str) -> None:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_parameters=ROPES[kind], eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip

    def fresh() -> Any:
        model = LlamaForCausalLM(config).eval()
        draw_weights(model, 0)
        return model

    model = fresh()
    bench = Bench("Llama", model=model)
    with SparsePrefixCache(model, grid=16, policy="balanced", exactness="bitwise") as cache:
        for length in (100, 300, 100, 127, 128, 129, 200, 127, 300, 128, 100):
            ids = random_ids(length, seed=3)
            expected = Bench("Llama", model=fresh()).generate(ids, None, max_new_tokens=2)
            found = bench.generate(ids, cache, max_new_tokens=2)
            assert found.distance(expected) <= 1e-4, (length, reason(cache))
            assert "weights" not in reason(cache)
        assert cache.stats().resumed_tokens > 0
        bench.generate(random_ids(300, seed=3), cache)
        assert "depend on the length of a prompt" in reason(cache)


# -- adapters of PEFT -------------------------------------------------------------------------------------------------


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def options(length: int = 300) -> dict[str, Any]:
    ids = random_ids(length).clamp(min=10)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False,
        "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip


def apart(one: Any, other: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one.logits, other.logits, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("Llama", "PromptTuningConfig"),
        ("Llama", "PrefixTuningConfig"),
        ("Llama", "PromptEncoderConfig"),
        # On some releases peft puts its prompt before every decoded token, of which a Mamba-1 scan forgets the state.
        ("Jamba", "PromptTuningConfig"),
        ("Jamba", "PromptEncoderConfig"),
    ],
)
def test_prompts_that_are_learned(peft: Any, family: str, method: str) -> None:
    torch.manual_seed(0)
    kind = getattr(peft, method)
    extra = {"encoder_hidden_size": 16} if method == "PromptEncoderConfig" else {}
    model = peft.get_peft_model(build(family), kind(task_type="CAUSAL_LM", num_virtual_tokens=8, **extra)).eval()
    given = options()
    stock = model.generate(**given)
    with SparsePrefixCache(model, grid=64, exactness="bitwise") as cache:
        for _ in range(2):
            assert apart(model.generate(**given, past_key_values=cache), stock) <= 1e-4
            assert "call not supported" in reason(cache)


@pytest.mark.filterwarnings("ignore")
def test_a_lora_that_wakes_up_in_the_prompt(peft: Any) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        alora_invocation_tokens=[7, 8, 9],
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(build("Jamba"), config).eval()
    given = options()
    given["input_ids"][0, -8:-5] = torch.tensor([7, 8, 9])
    stock = model.generate(**given)
    with SparsePrefixCache(model, grid=64, exactness="bitwise") as cache:
        for _ in range(2):
            assert apart(model.generate(**given, past_key_values=cache), stock) <= 1e-4
            assert "activated LoRA" in reason(cache)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "LoHaConfig"])
def test_adapters_in_turn(peft: Any, method: str) -> None:
    """Each finds its own states again; an adapter that changes, or is scaled, does not find those of before."""

    def config() -> Any:
        extra = {"feedforward_modules": []} if method == "IA3Config" else {"r": 4}
        return getattr(peft, method)(target_modules=["q_proj", "v_proj"], **extra)

    torch.manual_seed(0)
    model = peft.get_peft_model(build("Jamba"), config(), adapter_name="first")
    model.add_adapter("second", config())
    for name, parameter in model.named_parameters():
        if "first" in name or "second" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.eval()
    shared, resumed = random_ids(260), []

    def ask(turn: int) -> None:
        ids = torch.cat([shared, random_ids(40, seed=turn)], 1)
        given = {**options(), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        stock = model.generate(**given)
        assert apart(model.generate(**given, past_key_values=cache), stock) <= 1e-4
        resumed.append(cache.last_request.resumed_tokens)

    with SparsePrefixCache(model, grid=64, exactness="bitwise") as cache:
        for turn in range(6):
            model.set_adapter(("first", "second")[turn % 2])
            ask(turn)
        assert resumed[2:] == [256] * 4, resumed
        with model.disable_adapter():
            ask(7)
        ask(8)
        assert resumed[6:] == [0, 256]
        with torch.no_grad():
            next(each for name, each in model.named_parameters() if "second" in name).mul_(1.5)
        ask(9)
        assert resumed[-1] == 0
        model.set_adapter("first")
        ask(10)
        assert resumed[-1] == 256  # another adapter's training is none of its business
        if method == "LoraConfig":
            tuned = next(module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict))
            tuned.scaling["second"] = 9.0
            ask(11)
            assert resumed[-1] == 256
            before = tuned.scaling["first"]
            tuned.scaling["first"] = 5.0
            ask(12)
            assert resumed[-1] == 0
            tuned.scaling["first"] = before
            ask(13)
            assert resumed[-1] == 256
