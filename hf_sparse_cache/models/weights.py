"""Notice that a model is no longer the one whose states are stored, cheaply enough to look before every match.

Seen are in-place updates (an optimizer step, `load_state_dict`), replaced tensors and modules (adapters, casts,
moves), adapters that are switched, scaled or merged, hooks, and the choice of attention and expert implementations.
Tensors are told apart by identity, address and version counter. Writing through `.data` leaves all three as they are,
so a few values of every tensor in main memory are compared as well; an edit that misses them all is not seen.
"""

import itertools
import weakref
from collections.abc import Iterator
from operator import is_
from typing import Any

import numpy as np
import torch

from ..forks import ForkSafeLock


_lock = ForkSafeLock()
_serial = itertools.count()
_known: weakref.WeakKeyDictionary[torch.nn.Module, "_Watch"] = weakref.WeakKeyDictionary()
# What PEFT keeps on its layers besides tensors.
_ADAPTER_TRAITS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
_SAMPLES = 8
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def identity(model: torch.nn.Module) -> str:
    """A name for this model object with these weights, in this process; a change of weights gives a new name."""
    with _lock:
        watch = _known.get(model)
        if watch is not None and watch.still_holds(model):
            return watch.name
        fresh = _Watch(model)
        # Offloaded weights come and go as other objects and stay the same model.
        fresh.name = watch.name if watch is not None and watch.same_as(fresh) else f"model-{next(_serial)}"
        _known[model] = fresh
        return fresh.name


class _Watch:
    """The tensors of a model at one moment. It keeps them alive until the next look, or the end of the model."""

    name = ""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors, self._traits = parts_of(model)
        self._plain = [plain for tensor in self._tensors for plain in plain_parts(tensor)]
        self._versioned = [tensor for tensor in self._plain if not tensor.is_inference()]
        self._versions, self._addresses = _counters(self._versioned), _pointers(self._plain)
        self._views = _samples(self._plain)
        self._values = _read(self._views)

    def still_holds(self, model: torch.nn.Module) -> bool:
        """Whether the model has the very same tensor objects, unchanged."""
        tensors, traits = parts_of(model)
        return (
            len(tensors) == len(self._tensors)
            and all(map(is_, tensors, self._tensors))
            and traits == self._traits
            and _counters(self._versioned) == self._versions
            and _pointers(self._plain) == self._addresses
            and _read(self._views) == self._values
        )

    def same_as(self, later: "_Watch") -> bool:
        """Whether nothing but tensors that hold no data came or went."""
        return (
            len(self._plain) == len(later._plain)
            and all(map(is_, self._plain, later._plain))
            and self._traits == later._traits
            and self._versions == later._versions
            and self._addresses == later._addresses
            and self._values == later._values
        )


def parts_of(model: torch.nn.Module) -> tuple[list[Any], list[Any]]:
    """Every parameter and buffer (some None), and all else that changes what the model computes."""
    tensors: list[Any] = []
    config: Any = getattr(model, "config", None)
    traits: list[Any] = [getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation")]
    stack: list[torch.nn.Module] = [model]
    while stack:
        module = stack.pop()
        held = module.__dict__
        traits.append(type(module))
        stack.extend(child for child in held["_modules"].values() if child is not None)
        tensors.extend(held["_parameters"].values())
        tensors.extend(held["_buffers"].values())
        if "_active_adapter" in held or "merged_adapters" in held:
            traits.append(repr([held.get(name) for name in _ADAPTER_TRAITS]))
        if "forward" in held and not (module is model and _only_compiled(module)):
            traits.append(id(held["forward"]))  # itself it would keep the model alive
        if held["_forward_hooks"] or held["_forward_pre_hooks"]:
            traits.extend(_foreign_hooks(module))
    return tensors, traits


def _only_compiled(model: torch.nn.Module) -> bool:
    """Whether `model.forward` is its own forward, compiled: prefills do not use that (see `prefill`)."""
    original = getattr(model.__dict__["forward"], "_torchdynamo_orig_callable", None)
    return getattr(original, "__func__", None) is type(model).forward


def _foreign_hooks(module: torch.nn.Module) -> tuple[int, ...]:
    """Numbers of the hooks that may change values; those of transformers only look."""
    hooks = [*module._forward_hooks.items(), *module._forward_pre_hooks.items()]
    return tuple(key for key, hook in hooks if not getattr(hook, "__module__", "").startswith("transformers."))


def plain_parts(tensor: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The tensors with data in a parameter: itself, or the parts of a quantised one; none while offloaded."""
    if tensor is None or tensor.is_meta:
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor


def _counters(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def _pointers(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _samples(tensors: list[torch.Tensor]) -> list[list[Any]]:
    """The bits of a few values of every tensor in main memory, as views, in one list for each size of value."""
    views: dict[int, list[Any]] = {size: [] for size in _BITS}
    for tensor in tensors:
        size = tensor.element_size()
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() and size in views:
            values = tensor.detach().view(-1).view(_BITS[size]).numpy()
            views[size].append(values[:: -(-len(values) // _SAMPLES)])
    return [same_size for same_size in views.values() if same_size]


def _read(views: list[list[Any]]) -> list[bytes]:
    return [np.concatenate(same_size).tobytes() for same_size in views]
