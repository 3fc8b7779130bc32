"""What a stored state depends on besides its tokens, by content, so that another process can tell if it may use it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers

from ..checks import printable
from ..forks import ForkSafeLock
from .binding import Binding
from .inputs import input_device
from .weights import identity, parts_of, plain_parts


# Packages whose kernels replace torch's own in these models; another version may round differently.
KERNEL_PACKAGES = (
    "mamba-ssm", "causal-conv1d", "flash-linear-attention", "fla-core", "kernels", "flash-attn", "triton", "xformers",
)  # fmt: skip
_FORMAT = 1  # of what a space is named by; with another number nothing stored before is matched
_SHOWN = 200  # characters of a value in a message
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "_commit_hash")
_HASHED = {"modules": "modules, adapters or hooks"}
_THIS_PROCESS = uuid.uuid4().hex  # stands for code attached to a model, which no other process can know
_lock = ForkSafeLock()
_digests: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()
_spaces: weakref.WeakKeyDictionary[Binding, tuple[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def space_of(binding: Binding, weights: str, durable: bool) -> str:
    """Where a model's prompts live in a store, which is `durable` when it outlives the process.

    In a store that dies with the process the weights are named by `weights`, at no cost; in one with a disk tier, and
    for a saved cache, by their content. The namespace follows the first unit separator, which JSON never contains.
    """
    if not durable:
        segmentation = f"grid {binding.grid}, cut ids {binding.cut_ids}, {binding.config.exactness}"
        return f"{weights}, {segmentation}, {_modes(binding.model)}\x1f{binding.config.namespace}"
    key = (weights, torch.get_num_threads(), _modes(binding.model))
    known = _spaces.get(binding)
    if known is None or known[0] != key:
        known = _spaces[binding] = (key, durable_space(describe(binding), binding.config.namespace))
    return known[1]


def durable_space(description: dict[str, Any], namespace: str) -> str:
    """The name of a space that means the same in every process."""
    return json.dumps(description, sort_keys=True, separators=(",", ":")) + "\x1f" + namespace


def describe(binding: Binding) -> dict[str, Any]:
    """Everything that decides whether a state can be continued bit for bit, as JSON values.

    Raises:
        ValueError: weights are offloaded and cannot be read.
    """
    model, config = binding.model, binding.model.config
    return {
        "format": _FORMAT,
        "model": type(model).__name__,
        "weights": weights_digest(model),
        "modules": _modules_digest(model),
        "config": _digest(json.dumps(config_values(config), sort_keys=True, default=str)),
        "dtype": sorted({str(tensor.dtype) for tensor in model.parameters()}),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "experts": str(getattr(config, "_experts_implementation", None)),
        "devices": sorted({_device(tensor.device) for tensor in model.parameters()}),
        "modes": _modes(model),
        "threads": torch.get_num_threads(),
        "kernels": {name: version for name in KERNEL_PACKAGES if (version := _version(name))},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "grid": binding.grid,
        "cut ids": list(binding.cut_ids),
        "min distance": max(2, binding.grid // 4),
        "exactness": binding.config.exactness,
    }


def _modes(model: Any) -> str:
    """Switches of the process under which the same weights compute something else."""
    kind = input_device(model).type  # offloaded weights say "meta"
    autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"
    return f"autocast {autocast}, matmul precision {torch.get_float32_matmul_precision()}"


def config_values(config: Any) -> dict[str, Any]:
    """A model's configuration without what says nothing about its arithmetic."""
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict(), sort_keys=True, default=str))
    return {name: value for name, value in values.items() if name not in _VOLATILE}


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What two descriptions disagree on, one phrase each, saved value first; the class of the model leads."""
    found = []
    for name in different(saved, current):
        before, now = (str(side.get(name, "absent")) for side in (saved, current))
        if before == now:  # as a number and as its text
            before, now = (json.dumps(side.get(name, "absent"), default=str) for side in (saved, current))
        hashed = name in ("weights", "config", "modules")
        phrase = (
            f"other {_HASHED.get(name, name)}" if hashed else f"{name} {before[:_SHOWN]} instead of {now[:_SHOWN]}"
        )
        found.append(printable(phrase))
    return found


def different(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The names of what two descriptions disagree on, by value and type, as far as it matters to the current one."""
    names = [name for name in {*saved, *current} if _text(saved, name) != _text(current, name)]
    if "grid" in names:
        names = [name for name in names if name != "min distance"]  # which follows from it
    if not threads_matter(current):
        names = [name for name in names if name != "threads"]
    return sorted(names, key=lambda name: (name != "model", name))


def threads_matter(description: dict[str, Any]) -> bool:
    """Whether states of another number of threads are other states: on a CPU, where more than rounding is promised."""
    on_cpu = any(str(device).startswith("cpu") for device in description.get("devices", ["cpu"]))
    return on_cpu and description.get("exactness") != "numerical"


def _text(description: dict[str, Any], name: str) -> str:
    return json.dumps(description.get(name, "absent"), sort_keys=True, default=str)


def weights_digest(model: torch.nn.Module) -> str:
    """BLAKE2b over every parameter and buffer: name, dtype, shape and all bytes. Cached until the weights change.

    It reads everything once, at about 1 GB/s a core. A sample would be cheaper, and blind to a small edit of a few
    weights, which is exactly what an adapter or a merge may be.

    Raises:
        ValueError: weights are offloaded and cannot be read.
    """
    name = identity(model)
    with _lock:
        known = _digests.get(model)
        if known is not None and known[0] == name:
            return known[1]
    named = sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0])
    tensors = [(key, part) for key, tensor in named if not tensor.is_meta for part in plain_parts(tensor)]
    offloaded = [key for key, tensor in named if tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"The model's weights are offloaded ({offloaded[0]} and {len(offloaded) - 1} more), so states cannot be "
            "tied to them beyond this process. Load the whole model into memory, or use a store without a disk tier."
        )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(lambda item: _tensor_digest(*item), tensors))
    digest = _digest("".join(parts))
    with _lock:
        _digests[model] = (name, digest)
    return digest


def _modules_digest(model: torch.nn.Module) -> str:
    """The classes of all modules, the adapters that are active and how, and the hooks and replaced forwards."""
    words = []
    for trait in parts_of(model)[1]:
        if isinstance(trait, type):
            words.append(f"{trait.__module__}.{trait.__qualname__}")
        elif isinstance(trait, str) or trait is None or trait == ():
            words.append(str(trait or ""))
        else:
            words.append(f"{_THIS_PROCESS} {trait!r}")
    return _digest("\n".join(words))


@torch.no_grad()
def _tensor_digest(name: str, tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    found = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    found.update(flat.numpy().data)
    return found.hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
