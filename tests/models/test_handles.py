"""A handle by itself, which one a call uses unasked, and what is told of functions: without a model."""

from __future__ import annotations

import contextvars
import copy
import functools
import pickle
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from guarded import GuardedWeakly, Held
from transformers import PreTrainedModel

from hf_sparse_cache.models import ambient, definitions
from hf_sparse_cache.models.families import CACHE_NAMES
from hf_sparse_cache.models.handle import Handle, refuse_class


class Model:
    """Any object will do."""


class AlikeModel:
    """Equal to every other object."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__


MODEL = Model()


def handle(model: Any = MODEL, alive: bool = True) -> Any:
    server: Any = SimpleNamespace(binding=SimpleNamespace(model=model))
    attachment: Any = SimpleNamespace(alive=alive)
    return Handle(server, attachment)


# -- a handle ---------------------------------------------------------------------------------------------------------


def test_a_handle_serves_its_model_for_as_long_as_it_is_attached() -> None:
    other = Model()
    assert handle().serves(MODEL) and not handle().serves(other)
    assert not handle(alive=False).serves(MODEL) and not handle(alive=False).serves(other)
    handle().check_call(MODEL, "cache")
    with pytest.raises(ValueError, match=r"^cache is a SparsePrefixCache that was detached\. Make a new one"):
        handle(alive=False).check_call(MODEL, "cache")
    for alive in (True, False):
        with pytest.raises(
            ValueError, match=rf"^x is .* made for another model \(Model object {id(MODEL):#x}, not Model"
        ):
            handle(alive=alive).check_call(other, "x")


def test_an_empty_handle_says_that_it_is_one_and_that_it_is_true() -> None:
    one = handle()
    assert bool(one) is True and len(one) == 0 and one.layers == []
    assert one.get_seq_length() == one.get_seq_length(3) == 0
    assert one.is_compileable is False and one._is_user_defined is True


REFUSED = (
    "update", "update_conv_state", "update_recurrent_state", "update_indexer", "get_mask_sizes", "has_previous_state",
    "get_conv_state", "get_recurrent_state",
)  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_would_do_with_an_ordinary_cache_is_refused(name: str) -> None:
    for alive, state in ((True, "is attached to"), (False, "was detached from")):
        with pytest.raises(ValueError, match=f"^past_key_values is a SparsePrefixCache that {state} a Model object"):
            getattr(handle(alive=alive), name)(1, key=2)
    for call in (lambda: getattr(Handle, name)(), lambda: getattr(Handle, name)(3, 4)):
        with pytest.raises(ValueError, match="^past_key_values is the class SparsePrefixCache, not an object of it"):
            call()


def test_a_model_that_takes_a_handle_for_its_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="is attached to a Model object"):
        handle()._is_user_defined = True
    with pytest.raises(ValueError, match="^past_key_values is the class"):
        Handle.get_seq_length()
    with pytest.raises(ValueError, match="^past_key_values is the class"):
        Handle.get_seq_length(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^past_key_values is the class"):
        Handle._is_user_defined = True  # type: ignore[assignment,method-assign]
    with pytest.raises(ValueError, match="^x is the class SparsePrefixCache"):
        refuse_class("x")

    class Mine(Handle):
        pass

    Mine.note = 3  # type: ignore[attr-defined]
    assert Mine.note == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_cannot_be_copied_or_pickled(way: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="A SparsePrefixCache cannot be copied or pickled"):
        way(handle())


# -- unasked ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """No model has a handle, and the handles are looked at and changed under a lock that says so."""
    lock = Held()
    monkeypatch.setattr(ambient, "_lock", lock)
    monkeypatch.setattr(ambient, "_handles", type(ambient._handles)())
    yield lock
    assert lock.depth == 0


def test_a_model_has_one_handle_that_calls_use_unasked(nobody: Held) -> None:
    model, one = Model(), handle()
    assert ambient.handle_for(model, {}) is None
    one, two = handle(model), handle(model)
    ambient.claim(model, one)
    ambient.claim(model, one)  # once more is harmless
    assert ambient.handle_for(model, {}) is one and ambient.handle_for(Model(), {}) is None
    with pytest.raises(ValueError, match="ambient=True: calls of this Model already use another SparsePrefixCache"):
        ambient.claim(model, two)
    assert ambient.handle_for(model, {}) is one
    assert not two.serves(AlikeModel()) and not one.serves(AlikeModel())
    one._attachment.alive = False
    assert ambient.handle_for(model, {}) is None
    ambient.claim(model, two)
    assert ambient.handle_for(model, {}) is two
    other = Model()
    ambient.claim(other, handle(other))  # and nobody has it
    assert ambient.handle_for(other, {}) is None


def test_a_call_that_brings_a_cache_or_assists_uses_none(nobody: Held) -> None:
    model = Model()
    one = handle(model)
    ambient.claim(model, one)
    for name in CACHE_NAMES:
        assert ambient.handle_for(model, {name: "a cache"}) is None and ambient.handle_for(model, {name: None}) is one
    for settings, used in ((None, one), (SimpleNamespace(), one), (SimpleNamespace(is_assistant=False), one),
                           (SimpleNamespace(is_assistant=True), None)):  # fmt: skip
        assert ambient.handle_for(model, {"generation_config": settings}) is used


def test_blocks_in_which_none_is_used_may_be_nested_and_are_of_one_thread(nobody: Held) -> None:
    model = Model()
    one = handle(model)
    ambient.claim(model, one)

    def used() -> Any:
        return ambient.handle_for(model, {})

    seen: list[Any] = []
    with ambient.off():
        with ambient.off():
            assert used() is None
        assert used() is None
        thread = threading.Thread(target=lambda: seen.append(contextvars.Context().run(used)))
        thread.start()
        thread.join()
    assert used() is one and seen == [one]
    with pytest.raises(KeyError), ambient.off():
        raise KeyError
    assert used() is one


def test_handles_are_claimed_under_the_lock(nobody: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ambient, "_handles", GuardedWeakly(nobody))
    model = Model()
    ambient.claim(model, handle(model))
    assert nobody.taken == 1


@pytest.mark.parametrize(
    ("kwargs", "own", "asked"),
    [
        ({}, None, None),
        ({}, "static", "static"),
        ({"cache_implementation": "dynamic"}, "static", "dynamic"),
        ({"generation_config": SimpleNamespace(cache_implementation="hybrid")}, "static", "hybrid"),
        ({"generation_config": SimpleNamespace()}, "static", None),
        ({"generation_config": None, "cache_implementation": None}, "static", "static"),
    ],
)
def test_the_kind_of_cache_that_a_call_asks_for(kwargs: dict[str, Any], own: str | None, asked: str | None) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(cache_implementation=own))
    assert ambient.implementation(model, kwargs) == asked
    assert ambient.implementation(SimpleNamespace(), {}) is None


# -- what is told of functions ----------------------------------------------------------------------------------------


def test_a_place_that_changes_while_it_is_copied_is_copied_again() -> None:
    tries: list[int] = []

    class Changing(dict[str, int]):
        def keys(self) -> Any:  # which a copy asks for
            tries.append(1)
            if len(tries) < 3:
                raise RuntimeError("dictionary changed size during iteration")
            return super().keys()

        def __iter__(self) -> Any:
            raise AssertionError("nobody looks at it directly")

    place = Changing(a=1)
    found = definitions._held(vars(SimpleNamespace(b=2)))
    assert found == {"b": 2} and definitions._held([1, 2]) == [1, 2]
    assert definitions._held(place) == {"a": 1} and len(tries) == 3


def test_places_are_alike_where_all_values_are_the_very_same() -> None:
    one, two = object(), object()
    assert definitions._alike({"a": one, "b": two}, [one, two]) and definitions._alike([one], [one])
    for place in ({"a": one}, {"a": one, "b": two, "c": two}, {"a": two, "b": one}, [one, object()], []):
        assert not definitions._alike(place, [one, two])
    equal = [1.5]
    assert not definitions._alike([[1.5]], [equal])  # equal is not the same


class Classic:
    @property
    def both(self) -> int:
        return 1

    @both.setter
    def both(self, value: int) -> None: ...

    @classmethod
    def of_class(cls) -> None: ...

    @staticmethod
    def static() -> None: ...

    def plain(self) -> None: ...

    number = 3


class Heir(Classic):
    plain = Classic.plain
    other = Classic.plain

    def own(self) -> None: ...


def test_what_something_on_a_class_runs() -> None:
    held = vars(Classic)
    assert [function.__name__ for function in definitions._functions(held["both"])] == ["both", "both"]
    assert definitions._functions(held["plain"]) == [Classic.plain]
    assert [function.__name__ for function in definitions._functions(held["of_class"])] == ["of_class"]
    assert [function.__name__ for function in definitions._functions(held["static"])] == ["static"]
    assert definitions._functions(3) == definitions._functions(len) == definitions._functions(property(len)) == []


def test_a_method_of_another_class_is_known_by_its_name() -> None:
    assert definitions._is_of_another(Classic.plain, Heir) and not definitions._is_of_another(Classic.plain, Classic)
    assert not definitions._is_of_another(Heir.own, Heir)

    def renamed(name: str, module: str = __name__) -> FunctionType:
        made = FunctionType(Classic.plain.__code__, {"__name__": module})
        made.__qualname__, made.__module__ = name, module
        return made

    assert definitions._is_of_another(renamed("Classic.plain", "elsewhere"), Classic)
    assert not definitions._is_of_another(renamed("wraps.inner"), Classic)  # a decorator's
    assert not definitions._is_of_another(renamed("far.Classic.plain"), Heir)  # inside of a function
    assert definitions._is_of_another(renamed("plain"), Classic)


def test_functions_that_a_library_may_have() -> None:
    assert definitions._is_known(torch.nn.functional.softmax) and definitions._is_known(functools.wraps)
    assert not definitions._is_known(test_functions_that_a_library_may_have)
    assert "functools" in sys.stdlib_module_names

    def nobodys() -> None: ...

    nobodys.__module__ = "json.decoder"  # where the standard library has none of its name
    assert definitions._is_known(nobodys)  # type: ignore[arg-type]
    nobodys.__module__ = None  # type: ignore[assignment]
    assert not definitions._is_known(nobodys)  # type: ignore[arg-type]


def test_functions_of_installed_packages_have_names_with_versions() -> None:
    file = Path(sysconfig.get_path("purelib"), "some", "norms.py")

    def of(file: Path, module: Any) -> FunctionType:
        code = compile("def forward(x): return x", str(file), "exec").co_consts[0]
        made = FunctionType(code, {"__name__": module}, "forward")
        made.__module__ = module
        return made

    assert definitions._by_name(of(file, "pytest.norms")) == f"pytest.norms.forward {pytest.__version__}"
    assert definitions._by_name(of(file, "no_such_package.norms")) == "no_such_package.norms.forward "
    assert definitions._by_name(of(file, None)) == "None.forward "
    assert definitions._by_name(of(Path("somewhere", "norms.py"), "pytest.norms")) == ""


def test_what_a_configuration_names_is_looked_up_by_what_it_says(jamba: PreTrainedModel) -> None:
    found = definitions.Definitions(jamba)
    known = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS  # type: ignore[attr-defined]
    assert known["sdpa"] in found._looked_up()
    found._configs = [SimpleNamespace(), SimpleNamespace(_attn_implementation=3)]  # type: ignore[list-item]
    assert found._looked_up() == []
    found._configs = [SimpleNamespace(_attn_implementation="of nobody")]  # type: ignore[list-item]
    assert set(found._looked_up()) == {None}
