"""Notice that a model is no longer the one whose states are stored, cheaply enough to look before every match.

Seen are in-place updates (an optimizer step, `load_state_dict`), replaced tensors and modules (casts, moves), adapters
that are attached, switched, scaled or merged, hooks and what they depend on, modules' own settings, configurations.
Tensors are told apart by identity, address and version counter. Writing through `.data` leaves all three as they are,
so values of every tensor in main memory are compared as well, a share of them at every look (see `samples`).

A request looks twice. The first look, before anything is matched, is `identity`. The second, behind the forward whose
results are kept, is `unchanged`, which leaves the values to the next first look: what comes to light there gives the
weights another name, under which nothing stored before is found.

A model's name has three parts. The first stands for its weights, numbered in this process: it changes for good. The
other two are settings (with the active adapters) and code, by content: who switches back finds the old name again.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any, NamedTuple

import torch

from ..forks import ForkSafeLock
from . import survey as surveys
from .rope import length_limit
from .samples import Samples, checksum


_lock = ForkSafeLock()
_serial = itertools.count()
_known: weakref.WeakKeyDictionary[torch.nn.Module, _Watch] = weakref.WeakKeyDictionary()
_STANDARD = vars(torch.nn.Module())
# Values that cannot change in place, kept so that their addresses are not used again.
_PLAIN = (int, float, complex, str, bytes, tuple, torch.Tensor, torch.ScriptObject)


class Identity(NamedTuple):
    """A name for a model object as it is, in this process.

    Attributes:
        weights, settings, code: what it is made of.
        proved_by: what a proof is good for: code, and settings that no adapter brings.
        attached: the code that others put there, without the values that it depends on.
        foreign: in words, code attached to it that is not transformers'; "" when there is none.
        by_call: why the call that is being made cannot be cut; "" when it can.
        packed: whether weights are packed, so that each piece rounds its activations by a scale of its own.
        length_limit: the first prompt length on which the frequencies of RoPE depend; 0 where they never do.
    """

    weights: str
    settings: str
    code: str
    proved_by: str = ""
    attached: str = ""
    foreign: str = ""
    by_call: str = ""
    packed: bool = False
    length_limit: int = 0

    def __str__(self) -> str:
        return f"{self.weights}, settings {self.settings}, code {self.code}"


def identity(model: torch.nn.Module) -> Identity:
    """A model's name; whatever changes what it computes gives another."""
    with _lock:
        watch = _known.get(model)
        if watch is None or not watch.still_holds(model):
            watch = _known[model] = _Watch(model, watch)
        return watch.identity


def unchanged(model: torch.nn.Module, found: Identity) -> bool:
    """Whether a model is what it was when it was given a name, as far as shows without reading values."""
    with _lock:
        watch = _known.get(model)
        if watch is not None and str(watch.identity) == str(found) and watch.looks_alike(model):
            return True
    return str(identity(model)) == str(found)


def forget(model: torch.nn.Module) -> None:
    """Look at a model as if for the first time."""
    with _lock:
        _known.pop(model, None)


def verified(model: torch.nn.Module) -> Identity:
    """A model's name after all its weights were read, so that an edit which left no trace has given it another."""
    with _lock:
        before = _known.get(model)
        watch = _known[model] = _Watch(model, before)
        found = watch.checksum()
        if watch.known_sum not in (found, None) or (watch.known_sum is None and watch.inherited):
            watch.renew()
        watch.known_sum = found
        return watch.identity


class _Watch:
    """A model at one moment. It keeps the weights alive until the next look, or the end of the model."""

    identity: Identity

    def __init__(self, model: torch.nn.Module, before: _Watch | None) -> None:
        found = surveys.survey(model)
        self._weights = found.weights
        self._own_from = _own_from(model)
        self._tensors, self._marks = _glance(model, self._own_from)
        attributes = (value for module in model.modules() for value in vars(module).values())
        self._kept = [*(value for value in attributes if isinstance(value, _PLAIN)), *found.of_call]
        self._definitions = found.definitions
        self._settings = surveys.Kept(found.mutable, frozenset(map(id, model.modules())))
        self._base = _Values(found.weights.values())
        self._adapters = _Values(found.adapters.values())
        # Offloaded weights come and go as other objects and stay the same model.
        self.inherited = before is not None and before._same_weights(self)
        self.known_sum: str | None = before.known_sum if before is not None and self.inherited else None
        weights = before.identity.weights if before is not None and self.inherited else f"model-{next(_serial)}"
        settings, code = surveys.digest([*found.settings, "", *found.adapted]), surveys.digest(found.code)
        proved_by = surveys.digest([*found.code, "", *found.settings])
        foreign = found.foreign[0] if found.foreign else ""
        packed = any(isinstance(weight, torch.ScriptObject) for weight in found.weights.values())
        attached = surveys.digest(found.attached)
        limit = length_limit(model)
        self.identity = Identity(weights, settings, code, proved_by, attached, foreign, found.by_call, packed, limit)

    def renew(self) -> None:
        """Give the weights another name."""
        self.identity = self.identity._replace(weights=f"model-{next(_serial)}")

    def checksum(self) -> str:
        """Of all weights that no adapter brings, and that are in memory."""
        words = (f"{path}{checksum(part)}" for path, each in self._weights.items() for part in contents(each))
        return surveys.digest(sorted(words))

    def still_holds(self, model: torch.nn.Module) -> bool:
        """Whether the model has the very same tensors, settings and code, unchanged."""
        return self.looks_alike(model) and self._base.samples_hold() and self._adapters.samples_hold()

    def looks_alike(self, model: torch.nn.Module) -> bool:
        """The same, but for values that were changed without a trace."""
        tensors, marks = _glance(model, self._own_from)
        return (
            len(tensors) == len(self._tensors)
            and all(map(is_, tensors, self._tensors))
            and marks == self._marks
            and self._base.untouched()
            and self._adapters.untouched()
            and self._settings.unchanged()
            and self._definitions.unchanged()
        )

    def _same_weights(self, later: _Watch) -> bool:
        """Whether a later look finds the same weights, wherever they hold data."""
        if self._weights.keys() != later._weights.keys():
            return False
        pairs = ((one, later._weights[path]) for path, one in self._weights.items())
        if not all(one is other or (_away(one) or _away(other)) for one, other in pairs):
            return False
        return self._base.agree(later._base)


class _Values:
    """The tensors with data in some weights, and how to tell that they are as they were."""

    def __init__(self, weights: Iterable[Any]) -> None:
        self._tensors = [part for each in weights for part in plain_parts(each)]
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions, self._addresses = _counters(self._versioned), _pointers(self._tensors)
        self._samples = Samples(self._tensors)

    def untouched(self) -> bool:
        """Whether nobody has changed them in a way that leaves a trace."""
        return _counters(self._versioned) == self._versions and _pointers(self._tensors) == self._addresses

    def samples_hold(self) -> bool:
        """Whether the next share of their values is as it was."""
        return self._samples.hold()

    def agree(self, later: _Values) -> bool:
        """Whether those that hold data then and now are as they were, as far as a look shows."""
        addresses = dict(zip(map(id, later._tensors), later._addresses, strict=True))
        versions = dict(zip(map(id, later._versioned), later._versions, strict=True))
        unmoved = all(addresses.get(id(t), at) == at for t, at in zip(self._tensors, self._addresses, strict=True))
        untouched = all(versions.get(id(t), at) == at for t, at in zip(self._versioned, self._versions, strict=True))
        return unmoved and untouched and self._samples.all_hold()


def _away(weight: Any) -> bool:
    return torch.is_tensor(weight) and weight.is_meta


def _own_from(model: torch.nn.Module) -> int:
    """How many attributes torch gives every module, where they come first in all of them; else 0."""
    first = list(_STANDARD)
    return len(first) if all(list(vars(module))[: len(first)] == first for module in model.modules()) else 0


def _glance(model: torch.nn.Module, own_from: int) -> tuple[list[Any], list[Any]]:
    """Every parameter and buffer (some None), and the addresses of modules, and of all else that they hold.

    Of what torch gives every module, that is looked into which a forward uses, and the rest is passed over.
    """
    tensors: list[Any] = []
    held = torch.nn.modules.module
    hooks = (*held._global_forward_hooks.values(), *held._global_forward_pre_hooks.values())
    marks: list[Any] = list(map(id, hooks))
    stack: list[torch.nn.Module] = [model]
    while stack:
        module = stack.pop()
        attributes = module.__dict__
        marks += (id(module), module.__class__, len(attributes), attributes["training"])
        if len(attributes) > own_from:
            marks.extend(map(id, itertools.islice(attributes.values(), own_from, None)))
        if attributes["_modules"]:
            stack.extend(child for child in attributes["_modules"].values() if child is not None)
        tensors.extend(attributes["_parameters"].values())
        tensors.extend(attributes["_buffers"].values())
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
            marks.extend(map(id, surveys.foreign_hooks(module)))
    return tensors, marks


def plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors with data in a weight: itself, or the parts of a quantised one, and what it carries."""
    if not torch.is_tensor(tensor) or tensor.is_meta:
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor
    for carried in vars(tensor).values():  # such as the scales of packed 4-bit weights
        values = vars(carried).values() if hasattr(carried, "__dict__") and not torch.is_tensor(carried) else [carried]
        for value in values:
            yield from plain_parts(value)


def contents(weight: Any) -> Iterator[torch.Tensor]:
    """The tensors with data in a weight, packed ones unpacked, which copies them."""
    if isinstance(weight, torch.ScriptObject):
        yield from _tensors_in(weight.__getstate__())
    else:
        yield from plain_parts(weight)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors_in(inner)


def _counters(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def _pointers(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
