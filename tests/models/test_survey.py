"""What a look at a model finds: weights, settings, adapters and code by their places, on modules of a few numbers."""

from __future__ import annotations

import functools
import weakref
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse_cache.models import survey as surveys
from hf_sparse_cache.models.attachment import Override
from hf_sparse_cache.models.fingerprint import _readable
from hf_sparse_cache.models.survey import Kept, survey
from hf_sparse_cache.models.weights import identity


class Part(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.absent = torch.nn.Parameter(torch.ones(2)), None
        self.register_buffer("mean", torch.ones(2))
        self.register_buffer("none", None)
        self.register_parameter("no_bias", None)
        self.rate, self.table, self.kept = 0.5, {"a": 1}, torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Layer(torch.nn.Module):
    """As a layer with adapters is."""

    def __init__(self, active: Any = "first") -> None:
        super().__init__()
        self.base_layer = torch.nn.Linear(2, 2)
        self._active_adapter, self.merged_adapters = active, list[str]()
        self.lora_A = torch.nn.ModuleDict({name: Part() for name in ("first", "second")})
        self.lora_B = torch.nn.ParameterDict({name: torch.ones(1) for name in ("first", "second")})
        self.lora_C = torch.nn.ModuleDict()
        self.scaling, self.sizes, self.empty = {"first": 1.0, "second": 2.0}, {"first": 1, "width": 3}, {}  # type: ignore[var-annotated]


def test_weights_are_found_by_their_paths_and_wrappers_leave_no_trace() -> None:
    model = torch.nn.Sequential(Part(), torch.nn.ModuleDict({"base_layer": Part(), "inner": Part()}))
    names = ("weight", "mean", "kept")
    weights = survey(model).weights
    assert weights.keys() == {f"{path}{name}" for path in ("0.", "1.", "1.inner.") for name in names}
    assert weights["0.kept"] is model[0].kept and weights["1.mean"] is model[1]["base_layer"].mean
    assert not survey(model).adapters
    part = Part()
    part._parameters, part._buffers = ({"none": None, **held} for held in (part._parameters, part._buffers))
    assert survey(part).weights.keys() == {"weight", "mean", "kept"}  # whatever is missing before them


def test_settings_are_told_and_those_that_may_change_are_kept_at_hand() -> None:
    part = Part()
    found = survey(part)
    assert found.settings == ["True", "absent=None", "rate=0.5", "table={'a':1}"] and not found.adapted
    assert [(place(), name) for place, name in found.mutable] == [(part, "table")]
    assert found.code[0] == f"{__name__}.Part" and not found.opaque and not found.foreign
    assert survey(part.eval()).settings[0] == "False"
    part.config = PreTrainedConfig(some_switch=1)  # type: ignore[assignment]
    other = torch.nn.ModuleList([part, Part()])
    other[1].config = part.config  # type: ignore[assignment]
    found = survey(other)
    assert found.mutable[-1] is part.config and found.mutable.count(part.config) == 1
    assert sum(word.startswith("PreTrainedConfig") for word in found.settings) == 1
    part.lock = type("Closed", (), {"__slots__": ()})()  # type: ignore[assignment]
    assert survey(other).opaque


@pytest.mark.parametrize(
    ("active", "expected"),
    [("first", {"first"}), (["second"], {"second"}), (["first", "second"], {"first", "second"}), ("third", set()),
     ([], set()), (None, set())],
)  # fmt: skip
def test_of_adapters_those_in_use_count(active: Any, expected: set[str]) -> None:
    model = torch.nn.ModuleDict({"q": Layer(active)})
    found = survey(model)
    assert found.weights.keys() == {"q.weight", "q.bias", *(f"q.lora_A.{name}.kept" for name in expected)}
    parts = {f"q.lora_A.{name}.{part}" for name in expected for part in ("weight", "mean")}
    assert found.adapters.keys() == parts | {f"q.lora_B.{name}" for name in expected}
    told = "".join(f"'{name}':{value}," for name, value in (("first", 1.0), ("second", 2.0)) if name in expected)
    assert f"scaling={{{told.rstrip(',')}}}" in found.adapted and "sizes={'first':1,'width':3}" in found.adapted
    assert "empty={}" in found.adapted and not any("scaling" in word for word in found.settings)
    assert sum("sha" in word or word.startswith("q.lora") for word in found.adapted) == len(found.adapters)


def test_a_proof_is_good_for_every_adapter_and_their_values_are_looked_at() -> None:
    layer = Layer()
    first = identity(layer)
    layer._active_adapter = "second"
    second = identity(layer)
    assert (second.proved_by, second.code) == (first.proved_by, first.code) and second.settings != first.settings
    assert second.weights != first.weights  # of plain tensors beside them
    for edit in (lambda value: value.add_(1), lambda value: value.data.add_(1)):
        before = identity(layer)
        with torch.no_grad():
            edit(layer.lora_A["second"].weight)
        after = identity(layer)
        assert after.settings != before.settings and after.weights == before.weights
    assert [name for name, _ in _readable(layer)] == ["base_layer.bias", "base_layer.weight", "lora_A.second.kept"]


def test_adapters_that_are_switched_off_or_merged() -> None:
    layer = Layer()
    layer._disable_adapters = True
    assert not survey(layer).adapters
    layer._disable_adapters = False
    assert survey(layer).adapters
    del layer._active_adapter
    assert not survey(layer).adapters and "lora_A.first.weight" not in survey(layer).weights
    del layer.merged_adapters
    assert "lora_A.first.weight" in survey(layer).weights  # nothing says that these are adapters


def test_within_an_adapter_names_are_those_of_its_own_modules() -> None:
    """Whatever adapters there are besides; one may have adapters of its own."""
    layer = Layer()
    inner = layer.lora_A["first"]
    inner.second, inner.own = Part(), Layer("second")
    found = survey(layer)
    assert found.adapters["lora_A.first.second.weight"] is inner.second.weight
    own = {name.removeprefix("lora_A.first.own.") for name in found.adapters if ".own." in name}
    assert own == {"weight", "bias", "lora_A.second.weight", "lora_A.second.mean", "lora_B.second"}


def test_what_an_adapter_holds_is_told_by_its_values() -> None:
    layer = Layer()
    before = survey(layer)
    with torch.no_grad():
        layer.lora_A["second"].weight += 1
    assert survey(layer).adapted == before.adapted
    with torch.no_grad():
        layer.lora_A["first"].weight += 1
    found = survey(layer)
    assert found.adapted != before.adapted and found.settings == before.settings
    assert found.adapters.keys() == before.adapters.keys()
    layer.lora_A["first"].to("meta")
    assert any(word == "lora_A.first.weightaway" for word in survey(layer).adapted)


@pytest.mark.parametrize(
    ("value", "fixed"),
    [(1, True), (1.5, True), ("a", True), (b"a", True), (None, True), (True, True), (1j, True), (torch.float32, True),
     (torch.device("cpu"), True), (len, True), ((1, ("a", None)), True), ((1, [2]), False), ([1], False), ({}, False),
     (torch.nn.Linear, True), (Part, False), (test_of_adapters_those_in_use_count, False), ((), True)],
)  # fmt: skip
def test_what_cannot_change_without_being_replaced(value: Any, fixed: bool) -> None:
    assert surveys._is_fixed(value) is fixed


class Whole(PreTrainedModel):
    config_class = PreTrainedConfig


def test_what_a_whole_model_keeps_for_loading_and_generating_is_no_setting() -> None:
    model = Whole(PreTrainedConfig())
    for name, value, silent in (
        ("hf_quantizer", 1, True), ("dtype", 1, True), ("generate", 1, True), ("some_rate", 1, False),
        ("some_method", MethodType(len, []), True), ("some_override", Override(model, "generate", len), True),
        ("some_function", len, False),
    ):  # fmt: skip
        assert surveys._is_silent(model, name, value) is silent, name
        assert surveys._is_silent(Part(), name, value) is False
    model.some_rate, model.hf_quantizer = 3, 4  # type: ignore[assignment]
    found = survey(model)
    assert "some_rate=3" in found.settings and not any("hf_quantizer" in word for word in found.settings)


# -- what forwards write ----------------------------------------------------------------------------------------------


def test_what_is_noted_of_modules() -> None:
    part = Part()
    with torch.inference_mode():
        part.given = torch.ones(2)
    part.config = PreTrainedConfig()  # type: ignore[assignment]
    (noted,) = surveys.noted(part).values()
    assert noted["rate"] == "0.5" and noted["table"] == "{'a':1}" and noted["config"] is part.config
    assert noted["kept"] == (part.kept, 0) and noted["given"] == (part.given, 0)
    part.kept.add_(1)
    assert surveys.noted(part)[part]["kept"][1] == 1
    assert list(surveys.noted(torch.nn.Sequential(part))) != [part]


def moments(part: torch.nn.Module, change: Any) -> tuple[Any, Any, Any]:
    found = []
    for moment in range(3):
        change(moment)
        found.append(surveys.noted(part))
    return tuple(found)  # type: ignore[return-value]


def test_what_changes_with_every_forward_is_no_setting_and_what_changed_once_is() -> None:
    part, inner = Part(), Part()
    part.inner = inner

    def change(moment: int) -> None:
        part.calls = moment
        part.once = min(moment, 1)
        part.late = max(moment, 1)
        part.kept.add_(1)
        part.fresh = torch.ones(2)
        inner.rate = moment

    found = moments(part, change)
    assert surveys.differ(found[0], found[1]) and surveys.note_written(found)
    told = "".join(survey(part).settings)
    assert not any(f"{name}=" in told for name in ("calls", "fresh")) and told.count("rate=") == 1
    assert "once=1" in told and "late=2" in told and survey(part).weights.keys() == {
        "weight", "mean", "inner.weight", "inner.mean", "inner.kept"
    }  # fmt: skip

    def further(moment: int) -> None:
        part.once = moment

    assert surveys.note_written(moments(part, further))
    told = "".join(survey(part).settings)
    assert "once=" not in told and "calls=" not in told and "late=2" in told
    assert not surveys.note_written(moments(part, lambda moment: None))


def test_a_setting_that_comes_or_goes_has_changed() -> None:
    part = Part()
    before = surveys.noted(part)
    assert not surveys.differ(before, surveys.noted(part))
    part.more = 1  # type: ignore[assignment]
    with_more = surveys.noted(part)
    assert surveys.differ(before, with_more) and surveys.differ(with_more, before)
    part.inner = Part()
    assert surveys.differ(with_more, surveys.noted(part)) and surveys.differ(surveys.noted(part), with_more)
    later = surveys.noted(part)
    assert not surveys.differ(later, surveys.noted(part))
    part.inner.rate = 2.0
    assert surveys.differ(later, surveys.noted(part))


def test_a_module_that_is_new_has_written_all_that_it_keeps_at_most_once() -> None:
    part = Part()
    first = surveys.noted(part)
    part.inner = Part()
    second = surveys.noted(part)
    assert not surveys.note_written((first, second, surveys.noted(part)))


def test_values_are_alike_by_identity_and_version_or_as_text() -> None:
    tensor, config = torch.ones(2), PreTrainedConfig()
    for one, other, alike in (
        ((tensor, 0), (tensor, 0), True), ((tensor, 0), (tensor, 1), False), ((tensor, 0), (torch.ones(2), 0), False),
        ("a1", "a" + str(1), True), ("a", "b", False), (config, config, True), (config, PreTrainedConfig(), False),
        (None, None, True), ("a", None, False), ((tensor, 0), "a", False), ("a", (tensor, 0), False),
    ):  # fmt: skip
        assert surveys._alike(one, other) is alike


# -- code -------------------------------------------------------------------------------------------------------------


def somebody(module: Any, *args: Any) -> None:
    return None


def of_the_library(module: Any, *args: Any) -> None:
    return None


of_the_library.__module__ = "transformers.utils"


def nameless(module: Any, *args: Any) -> None:
    return None


nameless.__module__ = None  # type: ignore[assignment]


def test_hooks_that_may_change_values_are_code() -> None:
    model = torch.nn.Sequential(Part())
    plain = survey(model)
    model[0].register_forward_hook(of_the_library)
    found = survey(model)
    assert found.code == plain.code and not found.foreign and not found.attached and not found.of_call
    model[0].register_forward_hook(somebody)
    after = survey(model)
    assert after.foreign == ["the hook on Part 0"] and after.attached == [f"Part 0 {__name__}.somebody"]
    assert len(after.code) == len(plain.code) + 1 and (after.mutable[0][0](), after.mutable[0][1]) == (model[0], "")
    model.register_forward_pre_hook(nameless)
    both = survey(model)
    assert sorted(both.foreign) == ["the hook on Part 0", "the hook on Sequential"] and not both.by_call
    assert surveys.foreign_hooks(model[0]) == [somebody]


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_on_all_modules_are_found_once(register: str) -> None:
    model = torch.nn.Sequential(Part())
    handle = getattr(torch.nn.modules.module, register)(somebody)
    try:
        found = survey(model)
        assert found.foreign == ["the hook on Sequential"]
        place, name = found.mutable[0]
        assert surveys._current(place, name) == [somebody]
    finally:
        handle.remove()
    assert not survey(model).foreign


def of_peft(**keywords: Any) -> Any:
    function = type("Function", (), {"__module__": "peft.helpers", "__call__": lambda self, *args, **given: None})()
    return functools.partial(function, **keywords)


@pytest.mark.parametrize(
    ("hooks", "said"),
    [
        ([{}], ""), ([{"alora_offsets": [None, None]}], ""), ([{"alora_offsets": None}], ""),
        ([{"alora_offsets": [None, 3]}], "an activated LoRA"), ([{"alora_offsets": [0]}], "an activated LoRA"),
        ([{"adapter_names": ["a"]}], "adapter_names"), ([{"adapter_names": 1}, {"alora_offsets": [3]}], "an act"),
        ([{}, {"adapter_names": ["a"]}], "adapter_names"), ([{"alora_offsets": [3]}, {}], "an activated LoRA"),
    ],
)  # fmt: skip
def test_what_was_put_on_a_model_for_one_call(hooks: list[dict[str, Any]], said: str) -> None:
    part, put = Part(), [of_peft(**keywords) for keywords in hooks]
    for hook in put:
        part.register_forward_pre_hook(hook)
    found = survey(part)
    assert found.by_call.startswith(said) and bool(found.by_call) is bool(said)
    assert found.of_call == put and not found.foreign and len(found.code) == len(survey(Part()).code)
    part.register_forward_hook(somebody)
    found = survey(part)
    assert found.of_call == put and found.attached == [f"Part {__name__}.somebody"]


def test_a_partial_of_somebody_else_stays() -> None:
    part = Part()
    part.register_forward_hook(functools.partial(somebody, alora_offsets=[3]))
    found = survey(part)
    assert found.by_call == "" and not found.of_call and found.foreign == ["the hook on Part"]


def test_a_forward_in_the_place_of_the_modules_own() -> None:
    model = torch.nn.Sequential(Part())
    plain = survey(model)
    model[0].forward = somebody  # type: ignore[method-assign]
    found = survey(model)
    assert found.foreign == ["the forward put in the place of that of Part 0"]
    assert found.attached == [f"Part 0 {__name__}.somebody"] and len(found.code) == len(plain.code) + 1
    place, name = found.mutable[0]
    assert surveys._current(place, name) is somebody and place() is model[0]


def test_what_others_put_on_a_class_of_a_library_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = survey(model)
    assert not before.foreign and not before.attached
    monkeypatch.setattr(torch.nn.Linear, "forward", somebody)
    found = survey(model)
    assert found.foreign == ["the code put in the place of Linear.forward"] and found.code != before.code
    assert found.attached == [f"Linear.forward {__name__}.somebody"]


class Hook:
    """Of accelerate, by its module."""

    __module__ = "accelerate.hooks"


def test_a_forward_that_accelerate_put_there_changes_no_value() -> None:
    for hook, own, harmless in (
        (Hook(), True, True), (Hook(), False, False), (SimpleNamespace(), True, False), (None, True, False),
    ):  # fmt: skip
        part = Part()
        if hook is not None:
            part._hf_hook = hook  # type: ignore[assignment]
        part._old_forward = MethodType(Part.forward, part) if own else somebody  # type: ignore[assignment]
        part.forward = somebody  # type: ignore[method-assign]
        found = survey(part)
        assert (found.foreign == []) is harmless and ("accelerate" in found.code) is harmless
        assert not any("_hf_hook" in word or "_old_forward" in word for word in found.settings)


def test_a_model_that_is_compiled_is_the_model_itself() -> None:
    def compiled_of(of: Any) -> Any:
        def compiled(*args: Any) -> None: ...

        compiled._torchdynamo_orig_callable = of  # type: ignore[attr-defined]
        return compiled

    for at_top in (True, False):
        for of, own in ((Part.forward, True), (somebody, False)):
            part = Part()
            part.forward = compiled_of(MethodType(of, part))  # type: ignore[method-assign]
            found = survey(part if at_top else torch.nn.Sequential(part))
            assert (found.foreign == []) is (at_top and own)


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_kept_values_are_compared_by_what_they_say() -> None:
    part, config = Part(), PreTrainedConfig(some={"deep": [1]}, plain=1)
    part.config = config  # type: ignore[assignment]
    part.register_forward_hook(somebody)
    found = survey(part)
    kept = Kept(found.mutable, frozenset(map(id, part.modules())))
    assert len(found.mutable) == 3 and kept.unchanged()
    for change, back in (
        (lambda: part.table.update(a=2), lambda: part.table.update(a=1)),
        (lambda: config.some["deep"].append(2), lambda: config.some["deep"].pop()),
        (lambda: setattr(config, "plain", 2), lambda: setattr(config, "plain", 1)),
        (lambda: setattr(config, "more", 2), lambda: delattr(config, "more")),
        (lambda: setattr(somebody, "strength", 2), lambda: delattr(somebody, "strength")),
    ):
        change()
        assert not kept.unchanged()
        back()
        assert kept.unchanged() and kept.unchanged()


def test_a_configuration_in_another_order_says_the_same() -> None:
    config = PreTrainedConfig(one=1, two={"deep": [1]})
    settings = surveys._Settings(config, frozenset())
    del config.one
    config.one = 1
    assert settings.unchanged()
    config.two["deep"].append(2)
    assert not settings.unchanged() and not settings.unchanged()
    config.one = 2
    assert not settings.unchanged() and not settings.unchanged()  # also when it has been looked at
    config.one, config.two = 1, {"deep": [1]}
    assert settings.unchanged()
    config.two["deep"].append(2)  # of the value that took the place of the first
    assert not settings.unchanged()


def test_a_value_that_says_nothing_about_states_may_change() -> None:
    config = PreTrainedConfig(one=1)
    config.use_cache = [1]
    settings = surveys._Settings(config, frozenset())
    config.use_cache.append(2)
    assert settings.unchanged()


def test_a_module_that_is_gone_has_nothing() -> None:
    part = Part()
    place = weakref.ref(part)
    assert surveys._current(place, "rate") == 0.5 and surveys._current(place, "absent_name") is None
    assert surveys._current(place, "") == []
    del part
    assert surveys._current(place, "rate") is None and surveys._current(place, "") is None


def test_what_was_told_has_a_short_name() -> None:
    assert surveys.digest(["a", "b"]) == surveys.digest(["a", "b"]) != surveys.digest(["ab"])
    assert len(surveys.digest([])) == 16 and surveys.digest(["\udc80"]) != surveys.digest(["\udc81"])
