"""Notice that a model is no longer the one whose states are stored."""

import itertools
import weakref
from typing import Any

import torch

from .forks import ForkSafeLock


_lock = ForkSafeLock()
_serial = itertools.count()
_known: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def identity(model: torch.nn.Module) -> str:
    """A name for this model object with these weights, in this process; a change of weights gives a new name."""
    now = snapshot(model)
    with _lock:
        before, name = _known.get(model, (None, ""))
        if before != now:
            name = f"model-{next(_serial)}"
            _known[model] = (now, name)
        return name


def snapshot(model: torch.nn.Module) -> tuple[Any, ...]:
    """What must stay the same for a stored state to stay valid, cheap enough to take before every match.

    Covers in-place updates (an optimizer step, `load_state_dict`), replaced tensors and modules (adapters, casts, moves)
    and the choice of attention and expert implementations. Tensors are told apart by identity, address and version
    counter, never read.
    """
    seen: list[Any] = [
        getattr(model.config, "_attn_implementation", None),
        getattr(model.config, "_experts_implementation", None),
    ]
    stack: list[torch.nn.Module] = [model]
    while stack:
        module = stack.pop()
        stack.extend(child for child in module._modules.values() if child is not None)
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                # Offloaded weights stay on "meta" between calls, in new tensors every time.
                if tensor is not None and not tensor.is_meta:
                    version = 0 if tensor.is_inference() else tensor._version
                    seen.append((id(tensor), tensor.data_ptr(), version))
    return tuple(seen)
