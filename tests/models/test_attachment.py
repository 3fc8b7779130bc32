"""What is replaced on a model object: shared by its attachments, taken off by the last, and what was there before."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guarded import Guarded, Held

from hf_sparse_cache.models import attachment
from hf_sparse_cache.models.attachment import Attachment, Hooks, Override


class Body(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Net(torch.nn.Module):
    """A model with a body, as far as an attachment looks at one."""

    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(model_type="llama"))

    def __init__(self, bodiless: bool = False) -> None:
        super().__init__()
        self.inner = Body()
        self.bodiless = bodiless

    @property
    def base_model(self) -> torch.nn.Module:
        return self if self.bodiless else self.inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2

    def speak(self, word: str, loud: bool = False) -> str:
        return f"own {word} {loud}"

    def walk(self) -> str:
        return "own walk"


TOLD: list[Any] = []
HOOKS = Hooks(
    before_forward=lambda module, args, kwargs: TOLD.append(("forward", type(module).__name__, sorted(kwargs))),
    before_body=lambda module, args, kwargs: TOLD.append(("body", type(module).__name__, sorted(kwargs))),
    after_body=lambda module, args, kwargs, output: TOLD.append(("behind", type(module).__name__, sorted(kwargs))),
)
REPLACED: dict[str, Any] = {
    "speak": lambda model, own, *args, **kwargs: f"{type(model).__name__} instead of {own(*args, **kwargs)}",
    "walk": lambda model, own: own().upper(),
}


@pytest.fixture(autouse=True)
def nothing_told() -> Iterator[None]:
    TOLD.clear()
    before = dict(attachment._patches)
    yield
    assert attachment._patches == before


def attach(model: Any) -> Attachment:
    return Attachment(model, REPLACED, HOOKS)


def hooks_of(model: Net) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in (model, model.inner)]


def test_methods_are_replaced_until_the_last_attachment_ends() -> None:
    model = Net()
    one, two = attach(model), attach(model)
    assert not one.alive and model.speak("word") == "own word False"
    one.make()
    assert one.alive and not two.alive and attachment._patches[id(model)].users == 1
    speaking = model.speak
    assert model.speak("word", loud=True) == "Net instead of own word True" and model.walk() == "OWN WALK"
    two.make()
    assert model.speak is speaking and attachment._patches[id(model)].users == 2 and hooks_of(model) == [1, 3]
    one.end()
    assert not one.alive and two.alive and model.walk() == "OWN WALK" and hooks_of(model) == [1, 3]
    one.end()  # twice is harmless
    assert model.walk() == "OWN WALK"
    two.end()
    assert model.walk() == "own walk" and "walk" not in vars(model) and hooks_of(model) == [0, 0]
    again = attach(model)
    again.make()
    assert model.walk() == "OWN WALK"
    again.end()


def test_hooks_are_called_around_the_model_and_its_body_with_keywords() -> None:
    model = Net()
    one = attach(model)
    one.make()
    model(x=torch.zeros(1))
    assert TOLD == [("forward", "Net", ["x"]), ("forward", "Body", []), ("body", "Body", []), ("behind", "Body", [])]
    TOLD.clear()
    model.inner(x=torch.zeros(1))
    assert TOLD == [("forward", "Body", ["x"]), ("body", "Body", ["x"]), ("behind", "Body", ["x"])]
    one.end()
    TOLD.clear()
    model(x=torch.zeros(1))
    assert not TOLD


def test_a_model_that_is_its_own_body_is_hooked_once() -> None:
    model = Net(bodiless=True)
    one = attach(model)
    one.make()
    assert hooks_of(model) == [3, 0]
    one.end()


def test_what_somebody_else_put_there_is_called_and_comes_back() -> None:
    model = Net()
    model.walk = lambda: "their walk"  # type: ignore[method-assign]
    theirs = model.walk
    one = attach(model)
    one.make()
    assert model.walk() == "THEIR WALK"
    one.end()
    assert vars(model)["walk"] is theirs


def test_what_somebody_else_put_there_since_stays() -> None:
    model = Net()
    one = attach(model)
    one.make()
    model.walk = lambda: "their walk"  # type: ignore[method-assign]
    one.end()
    assert model.walk() == "their walk" and "speak" not in vars(model)


def test_a_replaced_method_knows_the_models_own() -> None:
    model = Net()
    one = attach(model)
    one.make()
    assert model.speak.__wrapped__("word") == "own word False"  # type: ignore[attr-defined]
    one.end()


def test_a_copy_of_an_attached_model_is_bound_to_itself_and_can_be_attached() -> None:
    model = Net()
    one = attach(model)
    one.make()
    twin = copy.deepcopy(model)
    twin.inner.name = "twin"  # type: ignore[assignment]
    seen: list[Any] = []
    override = vars(twin)["walk"]
    assert override is not vars(model)["walk"] and override._model() is twin
    override._replacement = lambda model, own: seen.append((model, own.__self__)) or "seen"
    assert twin.walk() == "seen" and seen == [(twin, twin)] and model.walk() == "OWN WALK"
    other = attach(twin)
    other.make()
    assert twin.walk() == "OWN WALK"  # not the copied override around its own
    other.end()
    assert "walk" not in vars(twin)
    assert copy.deepcopy(vars(model)["walk"])._model() is model  # by itself, it stays the model's
    one.end()


def test_an_attached_model_cannot_be_pickled() -> None:
    model = Net()
    one = attach(model)
    one.make()
    with pytest.raises(TypeError, match=r"call cache\.detach\(\) before pickling it or torch\.save"):
        pickle.dumps(vars(model)["walk"])
    one.end()


def test_an_override_keeps_no_model() -> None:
    model = Net()
    override = Override(model, "walk", REPLACED["walk"])
    del model
    gc.collect()
    assert override._model() is None
    override.give_back()  # of a model that is gone there is nothing to give back


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_attachment_that_cannot_be_made_leaves_nothing(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    one = attach(model)

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(model.inner, "register_forward_hook", fails)
    held: list[str] = []
    monkeypatch.setattr(one._scan, "hold", lambda: held.append("hold"))
    monkeypatch.setattr(one._scan, "release", lambda: held.append("release"))
    with pytest.raises(error):
        one.make()
    assert not one.alive and "walk" not in vars(model) and hooks_of(model) == [0, 0] and held == ["hold", "release"]
    monkeypatch.undo()
    one.make()
    assert one.alive and model.walk() == "OWN WALK"
    one.end()


def test_a_scan_is_held_for_as_long_as_an_attachment_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = Net(), []
    one = attach(model)
    monkeypatch.setattr(one._scan, "hold", lambda: held.append("hold"))
    monkeypatch.setattr(one._scan, "release", lambda: held.append("release"))
    one.make()
    assert held == ["hold"]
    one.end()
    one.end()
    assert held == ["hold", "release"]


def test_what_models_share_of_their_attachments_changes_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Held()
    monkeypatch.setattr(attachment, "_lock", lock)
    monkeypatch.setattr(attachment, "_patches", Guarded(lock))
    one = attach(Net())
    one.make()
    taken = lock.taken
    assert taken == 1 and lock.depth == 0 and len(attachment._patches) == 1
    one.end()
    assert lock.taken == 2 and lock.depth == 0 and not len(attachment._patches)
