"""What others put on classes, in files and among attentions changes all models of a kind: it is noticed in time."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from matrix import Bench
from tiny_models import available_families, build
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.jamba import modeling_jamba
from transformers.models.llama import modeling_llama

from hf_sparse_cache.models import definitions, mamba1
from hf_sparse_cache.models.definitions import Definitions
from hf_sparse_cache.models.weights import identity


FACTOR: Any = [1.0]


class Activation(torch.nn.Module):
    """Of a user: its class says how strong it is."""

    strength = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * self.strength * FACTOR[0]


@pytest.fixture
def bench() -> Iterator[Bench]:
    found = Bench("Jamba", model=build("Jamba"))
    for layer in found.model.model.layers:
        if hasattr(layer.feed_forward, "act_fn"):
            layer.feed_forward.act_fn = Activation()
    yield found


def stronger(own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: own(*args, **kwargs) * 1.3


def attention(*args: Any, **kwargs: Any) -> Any:
    output, weights = OWN_ATTENTION(*args, **kwargs)
    return output * 1.3, weights


OWN_ATTENTION = ALL_ATTENTION_FUNCTIONS["sdpa"]
MLP, NORM, LLAMA_NORM = modeling_jamba.JambaMLP, modeling_jamba.JambaRMSNorm, modeling_llama.LlamaRMSNorm
CHANGES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "a method of a class": (MLP, "forward", stronger),
    "a method of a class under the norm": (NORM, "forward", stronger),
    "a function of the file": (modeling_jamba, "repeat_kv", stronger),
    "a function of torch": (torch.nn.functional, "softplus", stronger),
    "an attribute of a user's class": (Activation, "strength", lambda own: 1.3),
    "a method of a user's class": (Activation, "forward", stronger),
    "what a method of a user's class reads": (sys.modules[__name__], "FACTOR", lambda own: [1.3]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_noticed_and_known_again(bench: Bench, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, other = CHANGES[change]
    model = bench.model
    with bench.handle() as cache:
        bench.warm(cache)
        before = identity(model)
        bench.generate(bench.prompt(1), cache)
        assert cache.last_request.reason == "resumed"
        own = vars(place)[name]
        monkeypatch.setattr(place, name, other(own))
        assert identity(model) != before
        expected = bench.generate(bench.prompt(2), None)
        assert bench.generate(bench.prompt(2), cache).distance(expected) <= 1e-4
        assert cache.last_request.resumed_tokens == 0 and "weights changed" in cache.last_request.reason
        assert bench.generate(bench.prompt(3), cache) and cache.last_request.reason == "resumed"
        monkeypatch.undo()
        assert str(identity(model)) == str(before)


def test_an_attention_that_is_registered_anew_is_noticed(bench: Bench) -> None:
    model = bench.model
    before = identity(model)
    assert model.config._attn_implementation == "sdpa"
    try:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)
        assert identity(model) != before
        ALL_ATTENTION_FUNCTIONS.register("sdpa_of_nobody", stronger(attention))
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", OWN_ATTENTION)
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("sdpa_of_nobody", None)
    assert str(identity(model)) == str(before)


def test_the_method_of_another_class_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Jamba")
    before = identity(model)
    monkeypatch.setattr(NORM, "forward", LLAMA_NORM.forward)
    assert identity(model) != before and "LlamaRMSNorm.forward" in "".join(Definitions(model).told)


@pytest.mark.parametrize("family", available_families())
def test_nothing_is_told_of_what_libraries_define(family: str) -> None:
    """The twin of all of these, also while another thread's prefill holds a scan."""
    model = build(family)
    found = Definitions(model)
    assert found.told == [] and not found.opaque and found.unchanged()
    with mamba1.held(model):
        assert found.unchanged() and Definitions(model).told == []
    assert found.unchanged()


def test_a_function_of_an_installed_package_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As packages of faster kernels bring theirs: whatever that holds, its name means the same in every process."""
    model, file = build("Jamba"), Path(sysconfig.get_path("purelib"), "pytest", "norms.py")
    code = compile("def forward(self, x): return x * handle", str(file), "exec").co_consts[0]

    def installed(handle: Any) -> FunctionType:
        function = FunctionType(code, {"handle": handle, "__name__": "pytest.norms"}, "forward")
        function.__qualname__ = "Norm.forward"
        return function

    monkeypatch.setattr(NORM, "forward", installed(object()))
    found = Definitions(model)
    monkeypatch.setattr(NORM, "forward", installed(object()))
    assert found.unchanged() and not found.opaque
    (told,) = found.told
    assert told == f"JambaRMSNorm.forward=pytest.norms.Norm.forward {pytest.__version__}"


def test_a_file_that_changes_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread imports something there: it is looked at again, and what it holds counts."""
    found = Definitions(build("Mamba"))

    def changing(place: Any, values: Any) -> bool:
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(definitions, "_alike", changing)
    assert found.unchanged()
    monkeypatch.setattr(torch.nn.functional, "silu", stronger(torch.nn.functional.silu))
    assert not found.unchanged()


def test_code_that_is_another_after_every_forward(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever counts on a class: nothing fits twice, which is said; the twin keeps its count where nobody reads it."""
    seen: list[int] = []
    own = MLP.forward

    def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return own(self, x)

    for forward, said in ((counting, "JambaMLP.forward is another after every forward"), (stronger(own), "resumed")):
        monkeypatch.setattr(MLP, "forward", forward)
        with bench.handle() as cache:
            bench.warm(cache)
            assert bench.generate(bench.prompt(1), cache).distance(bench.generate(bench.prompt(1), None)) <= 1e-4
            assert said in cache.last_request.reason


def test_what_a_patch_reads_is_looked_at_each_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    strength, own = [1.0], MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: own(self, x) * strength[0])
    with bench.handle() as cache:
        bench.warm(cache)
        bench.generate(bench.prompt(1), cache)
        assert cache.last_request.reason == "resumed"
        strength[0] = 1.3
        expected = bench.generate(bench.prompt(2), None)
        assert bench.generate(bench.prompt(2), cache).distance(expected) <= 1e-4
        assert cache.last_request.resumed_tokens == 0
        strength[0] = 1.0
        assert bench.generate(bench.prompt(3), cache) and cache.last_request.reason == "resumed"


def test_code_on_a_class_that_takes_no_segments_is_not_cut(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with hooks: calls run uncached and say why for as long as it is there, and not when it is gone."""
    own = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: own(self, x) * (1 + x.shape[1] / 50))
    with bench.handle() as cache:
        expected = bench.generate(bench.prompt(1), None)
        assert bench.generate(bench.prompt(1), cache).equals(expected)
        assert "call not supported" in cache.last_request.reason and not cache.store.stored()
        monkeypatch.undo()
        bench.warm(cache)
        assert bench.generate(bench.prompt(2), cache) and cache.last_request.reason == "resumed"
