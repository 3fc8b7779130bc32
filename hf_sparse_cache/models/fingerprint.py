"""What a stored state depends on besides its tokens, by content, so that another process can tell if it may use it."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from ..checks import printable
from ..forks import ForkSafeLock
from . import arithmetic
from . import survey as surveys
from .binding import Binding
from .inputs import input_device
from .weights import Identity, contents, identity, plain_parts, verified


_FORMAT = 1  # of what a space is named by; with another number nothing stored before is matched
_SHOWN = 200  # characters of a value in a message
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "_commit_hash")
_HASHED = {
    "weights": "weights",
    "config": "config",
    "modules": "modules, adapters or hooks",
    "settings": "settings of modules, or adapters",
}
_THIS_PROCESS = uuid.uuid4().hex  # stands for code attached to a model, which no other process can know
_lock = ForkSafeLock()
_digests: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()
_spaces: weakref.WeakKeyDictionary[Binding, tuple[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def space_of(binding: Binding, weights: Identity, durable: bool) -> str:
    """Where a model's prompts live in a store, which is `durable` when it outlives the process.

    In a store that dies with the process the weights are named by `weights`, at no cost; in one with a disk tier, and
    for a saved cache, by their content. The namespace follows the first unit separator, which JSON never contains.
    """
    if not durable:
        threads = torch.get_num_threads() if input_device(binding.model).type == "cpu" else "any"
        kept = f", kept as {binding.rounding.scheme}" if binding.rounding.rounds else ""
        return f"{weights}, threads {threads}, {_modes(binding.model)}{kept}\x1f{binding.config.namespace}"
    key = (weights, torch.get_num_threads(), _modes(binding.model))
    known = _spaces.get(binding)
    if known is None or known[0] != key:
        described = describe(binding)
        # Processors of one capability may still sum in another order, as their caches decide how matrices are split.
        described |= {"cpu": _processor()} if threads_matter(described) else {}
        known = _spaces[binding] = (key, durable_space(described, binding.config.namespace))
    return known[1]


def durable_space(description: dict[str, Any], namespace: str) -> str:
    """The name of a space that means the same in every process."""
    return json.dumps(description, sort_keys=True, separators=(",", ":")) + "\x1f" + namespace


def describe(binding: Binding) -> dict[str, Any]:
    """Everything that decides whether a state can be continued bit for bit, as JSON values; it reads all weights.

    Raises:
        ValueError: weights are offloaded and cannot be read.
    """
    model, config = binding.model, binding.model.config
    verified(model)
    found = surveys.survey(model)
    return {
        "format": _FORMAT,
        "model": type(model).__name__,
        "weights": weights_digest(model),
        "modules": _modules_digest(config, found),
        **({} if _follows_from_config(model, found) else {"settings": _settings_digest(found)}),
        "config": _digest(json.dumps(config_values(config), sort_keys=True, default=str)),
        "dtype": sorted({str(tensor.dtype) for tensor in model.parameters()}),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "experts": str(getattr(config, "_experts_implementation", None)),
        "devices": sorted({arithmetic.device_name(tensor.device) for tensor in model.parameters()}),
        "modes": _modes(model),
        "threads": torch.get_num_threads(),
        "kernels": arithmetic.kernels(),
        **({"libraries": arithmetic.libraries()} if _on_cuda(model) else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"storage": binding.rounding.scheme} if binding.rounding.rounds else {}),
    }


def _on_cuda(model: Any) -> bool:
    return any(tensor.is_cuda for tensor in model.parameters()) or input_device(model).type == "cuda"


def _modes(model: Any) -> str:
    return arithmetic.modes(input_device(model).type)  # offloaded weights say "meta"


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
        phrase = f"other {_HASHED[name]}" if name in _HASHED else f"{name} {before[:_SHOWN]} instead of {now[:_SHOWN]}"
        found.append(printable(phrase))
    return found


def unlike(space: str, others: list[str]) -> str:
    """What keeps a process from using what others stored of this namespace; empty where nobody did.

    Args:
        space: its own space, durable.
        others: those of others.
    """
    own = json.loads(space.partition("\x1f")[0]) if others else {}
    said = []
    for other in others:
        try:
            described = json.loads(other.partition("\x1f")[0])
        except ValueError:
            continue
        if isinstance(described, dict) and described.get("weights") == own.get("weights"):
            said.append(", ".join(differences(described, own)))
    if not said:
        return ""
    return f"What others stored of this model does not fit: it was made with {'; or with '.join(dict.fromkeys(said))}."


def different(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The names of what two descriptions disagree on, by value and type, as far as it matters to the current one."""
    names = [name for name in {*saved, *current} if _text(saved, name) != _text(current, name)]
    if not threads_matter(current):
        names = [name for name in names if name != "threads"]
    return sorted(names, key=lambda name: (name != "model", name))


def threads_matter(description: dict[str, Any]) -> bool:
    """Whether states of another number of threads are other states: on a CPU."""
    return any(str(device).startswith("cpu") for device in description.get("devices", ["cpu"]))


def _text(description: dict[str, Any], name: str) -> str:
    return json.dumps(description.get(name, "absent"), sort_keys=True, default=str)


def weights_digest(model: torch.nn.Module) -> str:
    """BLAKE2b over every weight that no adapter brings: name, dtype, shape and all bytes. Cached until one changes.

    It reads everything once, at about 1 GB/s a core. A sample would be cheaper, and blind to a small edit of a few
    weights, which is exactly what an adapter or a merge may be.

    Raises:
        ValueError: weights are offloaded, or packed, and cannot be read.
    """
    name = identity(model).weights
    with _lock:
        known = _digests.get(model)
        if known is not None and known[0] == name:
            return known[1]
    tensors = _readable(model)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(lambda item: _tensor_digest(*item), tensors))
    digest = _digest("".join(parts))
    with _lock:
        _digests[model] = (name, digest)
    return digest


def _readable(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, then what modules keep as plain attributes, packed weights unpacked."""
    weights = surveys.survey(model).weights
    known = {id(weight) for weight in weights.values()}
    named = sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0])
    named = [(key, tensor) for key, tensor in named if id(tensor) in known]
    offloaded = [key for key, tensor in named if tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"The model's weights are offloaded ({offloaded[0]} and {len(offloaded) - 1} more), so states cannot be "
            "tied to them beyond this process. Load the whole model into memory, or use a store without a disk tier."
        )
    tensors = [(key, part) for key, tensor in named for part in plain_parts(tensor)]
    listed = {id(tensor) for _, tensor in named}
    for path, weight in sorted(weights.items()):
        if id(weight) not in listed:
            parts = list(contents(weight))
            if not parts:
                raise ValueError(
                    f"The weights packed in {path} cannot be read, so states cannot be tied to them beyond this "
                    "process. Use a store without a disk tier."
                )
            tensors.extend((path, part) for part in parts)
    return tensors


def _modules_digest(config: Any, found: surveys.Survey) -> str:
    """The classes of all modules, and the hooks and replaced forwards, which no other process can know."""
    implementations = (getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation"))
    words = [*(str(name or "") for name in implementations), *found.code]
    return _digest("\n".join([*words, *([_THIS_PROCESS] if found.foreign else [])]))


def _follows_from_config(model: Any, found: surveys.Survey) -> bool:
    """Whether a model has the settings that its configuration gives to a new one, so that they need no words."""
    if found.opaque or found.adapted:
        return False
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            fresh = surveys.survey(type(model)(copy.deepcopy(model.config)).eval())
    except Exception:  # a class that cannot be built without data: its settings are named
        return False
    return fresh.settings == found.settings


def _settings_digest(found: surveys.Survey) -> str:
    """The modules' own settings, configurations, and the active adapters by content."""
    return _digest("\n".join([*found.settings, *found.adapted, *([_THIS_PROCESS] if found.opaque else [])]))


@torch.no_grad()
def _tensor_digest(name: str, tensor: torch.Tensor) -> str:
    plain = tensor.detach().int_repr() if tensor.is_quantized else tensor.detach()
    flat = plain.contiguous().reshape(-1).view(torch.uint8).cpu()
    found = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    found.update(flat.numpy().data)
    return found.hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@functools.cache
def _processor() -> str:
    """The processor's name, as far as the system says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
