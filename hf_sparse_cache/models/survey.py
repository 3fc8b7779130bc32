"""All that decides what a model computes, looked up module by module: its weights, its settings, its code.

Weights are parameters, buffers, tensors and packed weights that are plain attributes. Settings are the modules' own
numbers and words, configurations, and the adapters that are active, by content. Code is classes, replaced forwards and
hooks; of these the ones that transformers, accelerate and PEFT put there themselves are not foreign.
"""

from __future__ import annotations

import functools
import hashlib
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from .attachment import Override
from .definitions import Definitions
from .rope import set_by_forward
from .samples import checksum
from .telling import STANDARD, Teller, is_named, loud, name_of


# Components of a path that a library puts there when it wraps a module whose weights stay what they are.
_WRAPPED = frozenset({"base_layer", "original_module"})
# Module containers that hold one entry for each adapter.
_CONTAINERS = ("ModuleDict", "ParameterDict", "BufferDict")
# What whole models keep besides what `PreTrainedModel` names, of no consequence to a prefill.
_ABOUT_MODELS = frozenset(
    {"generation_config", "warnings_issued", "name_or_path", "hf_device_map", "peft_config", "all_tied_weights_keys",
     "_is_hf_initialized", "_hf_peft_config_loaded", "hf_quantizer", "_output_capturing_hooks_installed"}
)  # fmt: skip
# What accelerate keeps for the modules that it moves between devices.
_ACCELERATE = frozenset({"_hf_hook", "_old_forward", "forward"})
# Whose hooks these are.
_LOOKS = ("transformers.", "hf_sparse_cache.")
_FIXED = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, types.BuiltinFunctionType
)  # fmt: skip
# By module, the attributes that its own forward was seen to write.
_written: weakref.WeakKeyDictionary[torch.nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()


@dataclass
class Survey:
    """What was found.

    Attributes:
        definitions: what others put on classes and in files, which `code` tells as well.
        weights: by path, everything that no adapter brings; wrappers leave no trace in a path.
        adapters: by path, tensors of the adapters that are active.
        settings, adapted, code: told as text; `adapted` is what adapters bring, with the settings of their layers.
        attached: of the code what others put there, without the values that it depends on.
        foreign: in words, code that neither transformers nor accelerate put there.
        by_call: why the call that is being made cannot be cut, when something was put on the model for it alone.
        of_call: what was put there. Whoever tells hooks apart by their address has to keep them.
        opaque: whether some of it means nothing in another process.
        mutable: how to reach values that can change without being replaced.
    """

    definitions: Definitions
    weights: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    by_call: str = ""
    of_call: list[Callable[..., Any]] = field(default_factory=list)
    opaque: bool = False
    mutable: list[Any] = field(default_factory=list)


def survey(model: torch.nn.Module) -> Survey:
    """Look at everything."""
    found = Survey(definitions=Definitions(model))
    teller = Teller(frozenset(map(id, model.modules())))
    configs: dict[int, Any] = {}
    for place in _places(model):
        module = place.module
        kind = type(module)
        found.code.append(f"{kind.__module__}.{kind.__qualname__}")
        _add_tensors(found, place)
        _add_code(found, place, teller, at_top=module is model)
        settings = found.adapted if place.adapters else found.settings
        settings.append(str(module.training))
        for name, value in _own_attributes(module):
            if isinstance(value, PreTrainedConfig):
                configs[id(value)] = value
            elif torch.is_tensor(value) or isinstance(value, torch.ScriptObject):
                found.weights[f"{place.path}{name}"] = value
            else:
                settings.append(f"{name}={teller.tell(place.active_part(value))}")
                if not _is_fixed(value):
                    found.mutable.append((weakref.ref(module), name))
    found.settings.extend(teller.tell(config) for config in configs.values())
    found.mutable.extend(configs.values())
    for path, tensor in sorted(found.adapters.items()):
        found.adapted.append(f"{path}{'away' if tensor.is_meta else checksum(tensor)}")
    found.code += found.definitions.told
    found.attached += [f"{place} {name}" for place, name in found.definitions.put.items()]
    found.foreign += [f"the code put in the place of {place}" for place in found.definitions.put]
    found.opaque = teller.opaque or found.definitions.opaque
    return found


def _own_attributes(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module keeps besides what every module has, and besides what its own forward writes."""
    written = _written.get(module, ())
    for name, value in vars(module).items():
        if name in STANDARD or name in _ACCELERATE or name in written:
            continue
        if not _is_silent(module, name, value) and not set_by_forward(module, name):
            yield name, value


# By module and name, an attribute: as text, or a tensor with its version.
Noted = dict[torch.nn.Module, dict[str, Any]]


def noted(model: torch.nn.Module) -> Noted:
    """What modules keep, at one moment, for `note_written`."""
    teller = Teller(frozenset(map(id, model.modules())))

    def note(value: Any) -> Any:
        if torch.is_tensor(value):
            return value, 0 if value.is_inference() else value._version
        return value if isinstance(value, (torch.ScriptObject, PreTrainedConfig)) else teller.tell(value)

    return {module: {name: note(value) for name, value in _own_attributes(module)} for module in model.modules()}


def note_written(moments: tuple[Noted, Noted, Noted]) -> bool:
    """Remember what forwards write on modules: it is no setting. Whether there was anything.

    Args:
        moments: noted before some forwards, between them and others, and behind those. What changed only once may be
            somebody else's doing.
    """
    found = False
    for module, last in moments[2].items():
        steps = [moment.get(module, {}) for moment in moments[:2]]
        written = _changed(*steps) & _changed(steps[1], last)
        if written:
            found = True
            _written[module] = _written.get(module, frozenset()) | written
    return found


def differ(then: Noted, now: Noted) -> bool:
    """Whether anything has changed between two moments."""
    return then.keys() != now.keys() or any(_changed(then[module], now[module]) for module in now)


def _changed(then: dict[str, Any], now: dict[str, Any]) -> set[str]:
    return {name for name in now.keys() | then.keys() if not _alike(now.get(name), then.get(name))}


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[0] is other[0] and bool(one[1] == other[1])
    return one is other or (isinstance(one, str) and one == other)


def _is_fixed(value: Any) -> bool:
    """Whether a value cannot change without being replaced."""
    if isinstance(value, type):
        return is_named(value)
    return isinstance(value, _FIXED) or (isinstance(value, tuple) and all(map(_is_fixed, value)))


def _is_silent(module: torch.nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute of a whole model is there for loading, saving and `generate()` alone."""
    if not isinstance(module, PreTrainedModel):
        return False
    known = name in _ABOUT_MODELS or any(hasattr(kind, name) for kind in (PreTrainedModel, GenerationMixin))
    return known or isinstance(value, (types.MethodType, Override))


# -- modules ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A module of the model.

    Attributes:
        path: from the top, with a dot at the end, without wrappers.
        adapters: names of the adapters that the nearest adapter layer knows; empty elsewhere.
        active: of these the ones in use.
        of_adapter: whether the module belongs to an adapter.
    """

    module: torch.nn.Module
    path: str = ""
    adapters: frozenset[str] = frozenset()
    active: frozenset[str] = frozenset()
    of_adapter: bool = False

    def is_container(self, value: Any) -> bool:
        """Whether something holds one entry an adapter."""
        return bool(self.adapters) and bool(len(value)) and self.adapters.issuperset(value)

    def active_part(self, value: Any) -> Any:
        """Of a dictionary with one entry an adapter, those in use; anything else as it is."""
        if isinstance(value, dict) and self.is_container(value):
            return {name: value[name] for name in value if name in self.active}
        return value


def _places(model: torch.nn.Module) -> Iterator[_Place]:
    stack = [_Place(model)]
    while stack:
        place = stack.pop()
        container = type(place.module).__name__ in _CONTAINERS and place.of_adapter
        if not container:
            place = _with_adapters(place)
        yield place
        for name, child in vars(place.module)["_modules"].items():
            if child is None or (container and name in place.adapters and name not in place.active):
                continue
            path = place.path if name in _WRAPPED else f"{place.path}{name}."
            of_adapter = place.of_adapter or _holds_adapters(place, child)
            known = (place.adapters, place.active) if of_adapter else (frozenset[str](), frozenset[str]())
            stack.append(_Place(child, path, *known, of_adapter))


def _with_adapters(place: _Place) -> _Place:
    """A place with what its module says about adapters, if it is such a layer."""
    module = place.module
    held = vars(module)
    if "_active_adapter" not in held and "merged_adapters" not in held:
        return place
    children = [child for child in held["_modules"].values() if type(child).__name__ in _CONTAINERS]
    names = frozenset(key for child in children for key in _keys(child))
    given = getattr(module, "_active_adapter", ())
    active = {given} if isinstance(given, str) else set(given or ())
    if getattr(module, "_disable_adapters", False):
        active = set()
    return _Place(module, place.path, names, frozenset(active & names), place.of_adapter)


def _holds_adapters(place: _Place, child: torch.nn.Module) -> bool:
    return type(child).__name__ in _CONTAINERS and place.is_container(_keys(child))


def _keys(container: Any) -> list[str]:
    held = vars(container)
    keys = [*held["_modules"], *held["_parameters"], *held["_buffers"]]
    return keys or list(held.get("_keys", ()))


def _add_tensors(found: Survey, place: _Place) -> None:
    held = vars(place.module)
    container = type(place.module).__name__ in _CONTAINERS and place.of_adapter
    for tensors in (held["_parameters"], held["_buffers"]):
        for name, tensor in tensors.items():
            if tensor is None or set_by_forward(place.module, name):
                continue
            if not place.of_adapter:
                found.weights[f"{place.path}{name}"] = tensor
            elif not container or name in place.active:
                found.adapters[f"{place.path}{name}"] = tensor


# -- code -------------------------------------------------------------------------------------------------------------


def _add_code(found: Survey, place: _Place, teller: Teller, *, at_top: bool) -> None:
    module, held = place.module, vars(place.module)
    where = f"{type(module).__name__} {place.path.rstrip('.')}".strip()
    if "forward" in held and not (at_top and _only_compiled(module)):
        if _moves_devices(module):
            found.code.append("accelerate")
        else:
            found.code.append(teller.tell(held["forward"]))
            found.attached.append(f"{where} {name_of(held['forward'])}")
            found.foreign.append(f"the forward put in the place of that of {where}")
            found.mutable.append((weakref.ref(module), "forward"))
    hooks = [*foreign_hooks(module), *(_global_hooks() if at_top else ())]
    if any(map(_counts_from_the_end, hooks)):
        found.by_call = "an activated LoRA begins at a token that it counts from the end of the prompt"
    elif any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks):
        found.by_call = "adapter_names gives each row an adapter of its own"
    found.of_call += filter(_of_one_call, hooks)
    hooks = [hook for hook in hooks if not _of_one_call(hook)]
    if hooks:
        found.code.extend(teller.tell(hook) for hook in hooks)
        found.attached.extend(f"{where} {name_of(hook)}" for hook in hooks)
        found.foreign.append(f"the hook on {where}")
        found.mutable.append((weakref.ref(module), ""))


def foreign_hooks(module: torch.nn.Module) -> list[Callable[..., Any]]:
    """The hooks that may change values; those of transformers, and ours, only look."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if not (getattr(hook, "__module__", None) or "").startswith(_LOOKS)]


def _of_one_call(hook: Any) -> bool:
    """Whether PEFT put a hook on the model for one call, to say which adapter is for which row, and from where on."""
    module = getattr(getattr(hook, "func", None), "__module__", None) or ""
    return isinstance(hook, functools.partial) and module.startswith("peft.")


def _counts_from_the_end(hook: Any) -> bool:
    offsets = getattr(hook, "keywords", {}).get("alora_offsets") if _of_one_call(hook) else None
    return any(offset is not None for offset in offsets or ())


def _global_hooks() -> list[Callable[..., Any]]:
    held = torch.nn.modules.module
    return [*held._global_forward_hooks.values(), *held._global_forward_pre_hooks.values()]


def _only_compiled(model: torch.nn.Module) -> bool:
    """Whether `model.forward` is its own forward, compiled: prefills do not use that (see `prefill`)."""
    original = getattr(vars(model)["forward"], "_torchdynamo_orig_callable", None)
    return getattr(original, "__func__", None) is type(model).forward


def _moves_devices(module: torch.nn.Module) -> bool:
    """Whether a forward was replaced by accelerate alone, which moves tensors between devices and changes no value."""
    held = vars(module)
    original = getattr(held.get("_old_forward"), "__func__", None)
    ours = type(held.get("_hf_hook")).__module__.startswith("accelerate.")
    return ours and original is type(module).forward


class Kept:
    """Values that can change without being replaced, as they are when this is made.

    Args:
        mutable: how to reach each (`Survey.mutable`).
        own: as for `Teller`.
    """

    def __init__(self, mutable: list[Any], own: frozenset[int]) -> None:
        self._own = own
        self._others = [(place, self._tell(place)) for place in mutable if isinstance(place, tuple)]
        self._configs = [_Settings(config, own) for config in mutable if not isinstance(config, tuple)]

    def unchanged(self) -> bool:
        """Whether they are what they were."""
        alike = all(config.unchanged() for config in self._configs)
        return alike and all(self._tell(place) == told for place, told in self._others)

    def _tell(self, place: Any) -> str:
        return Teller(self._own).tell(_current(*place))


class _Settings:
    """A configuration. Most of its values can only be replaced, and to see that they were not is cheap."""

    def __init__(self, config: Any, own: frozenset[int]) -> None:
        self._config, self._own = config, own
        self._look()
        self._told = self._tell(config)

    def unchanged(self) -> bool:
        """Whether it says what it said."""
        held = vars(self._config)
        if list(held) == self._names and all(map(is_, held.values(), self._values)):
            return all(self._tell(value) == told for value, told in self._inside)
        # Written anew, or in another order, which need not be another value.
        same = self._tell(self._config) == self._told
        if same:
            self._look()
        return same

    def _look(self) -> None:
        held = vars(self._config)
        self._names, self._values = list(held), list(held.values())
        self._inside = [(value, self._tell(value)) for value in loud(held).values() if not _is_fixed(value)]

    def _tell(self, value: Any) -> str:
        return Teller(self._own).tell(value)


def _current(place: weakref.ref[torch.nn.Module], name: str) -> Any:
    """What a module has now under a name, or the hooks on it."""
    module = place()
    if module is None:
        return None
    return vars(module).get(name) if name else [*foreign_hooks(module), *_global_hooks()]


def digest(words: list[str]) -> str:
    """A short name for what was told."""
    return hashlib.blake2b("\n".join(words).encode(errors="surrogatepass"), digest_size=8).hexdigest()
