"""The classes of a model's modules, the files that define them and what they look up: what others put there.

A method set on a class, a function set in the file of a model, an attention registered under a known name change what
every model of that class computes, and leave no trace on any of its modules. What libraries brought themselves is
known by their names and versions; what came from elsewhere is told by what it does.
"""

from __future__ import annotations

import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from operator import is_
from types import FunctionType
from typing import Any

import torch
from transformers import PreTrainedModel

from .telling import Teller, is_named, name_of


# What every model has, of which `generate()` and loading use far more than a forward does.
_BASES = frozenset(PreTrainedModel.__mro__)
# Where functions are looked up by a name that a configuration has, and under which setting.
_REGISTERED = (
    ("_attn_implementation", "transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    ("_attn_implementation", "transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ("_experts_implementation", "transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),
)
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})


class Definitions:
    """What defines a model, as it is when this is made.

    Attributes:
        told: what no library brought, as text; nothing where there is none.
        put: by place, the names of functions that others put there and no package brought.
        opaque: whether some of it means nothing in another process.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._own = frozenset(map(id, model.modules()))
        kinds = dict.fromkeys(
            base for module in model.modules() for base in type(module).__mro__ if base not in _BASES
        )
        self._classes = [kind for kind in kinds if is_named(kind) and issubclass(kind, torch.nn.Module)]
        self._others = [kind for kind in kinds if not is_named(kind)]
        files = dict.fromkeys(sys.modules.get(kind.__module__) for kind in self._classes)
        self._files = [vars(file) for file in (*files, torch.nn.functional) if file is not None]
        self._configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        self._look()
        own = [
            (place, function) for place, function in self._found if not _is_known(function) and not _by_name(function)
        ]
        self.put = {place: name_of(function) for place, function in own}
        self.told, self.opaque = self._tell()

    def unchanged(self) -> bool:
        """Whether all of it is what it was: what libraries brought by address, and the rest by what it says."""
        try:
            alike = all(map(_alike, self._places(), self._values))
        except RuntimeError:  # another thread changes one of them: it holds a scan, say
            alike = False
        if not alike:
            self._look()
        return self._tell()[0] == self.told

    def _places(self) -> Iterator[Any]:
        """Dictionaries as they are, or lists."""
        yield from map(vars, self._classes)
        yield from self._files
        yield self._looked_up()

    def _look(self) -> None:
        held = map(_held, self._places())
        self._values = [list(place.values()) if isinstance(place, Mapping) else place for place in held]
        self._found = [*self._on_classes(), *self._in_files()]

    def _looked_up(self) -> list[Any]:
        """The functions that the configurations choose by name."""
        found = []
        for setting, module, registry in _REGISTERED:
            known = getattr(sys.modules.get(module), registry, {})
            names = (getattr(config, setting, None) for config in self._configs)
            found += [known.get(name) for name in names if isinstance(name, str)]
        return found

    def _on_classes(self) -> Iterator[tuple[str, FunctionType]]:
        for kind in self._classes:
            for name, held in _held(vars(kind)).items():
                for function in _functions(held):
                    if not _is_known(function) or _is_of_another(function, kind):
                        yield f"{kind.__qualname__}.{name}", function

    def _in_files(self) -> Iterator[tuple[str, FunctionType]]:
        for file in self._files:
            for name, held in sorted(_held(file).items()):
                if isinstance(held, FunctionType) and not _is_known(held):
                    yield f"{file.get('__name__')}.{name}", held
        for held in self._looked_up():
            if isinstance(held, FunctionType) and not _is_known(held):
                yield "what a configuration names", held

    def _tell(self) -> tuple[list[str], bool]:
        teller = Teller(self._own)
        told = [f"{place}={_by_name(function) or teller.tell(function)}" for place, function in self._found]
        return [*told, *(teller.tell(kind) for kind in self._others)], teller.opaque


def _held(place: Any) -> Any:
    """A copy, which no other thread changes."""
    while isinstance(place, Mapping):
        with suppress(RuntimeError):
            return dict(place)
    return place


def _alike(place: Any, values: list[Any]) -> bool:
    now = place.values() if isinstance(place, Mapping) else place
    return len(now) == len(values) and all(map(is_, now, values))


def _functions(held: Any) -> list[Any]:
    """The functions that something on a class runs."""
    inner = [held.fget, held.fset] if isinstance(held, property) else [getattr(held, "__func__", held)]
    return [function for function in inner if isinstance(function, FunctionType)]


def _is_of_another(function: FunctionType, kind: type) -> bool:
    """Whether a function is a method of another class, as far as its name says; decorators have names of their own."""
    owner, _, name = function.__qualname__.rpartition(".")
    return name in vars(kind) and "." not in owner and (function.__module__, owner) != (kind.__module__, kind.__name__)


def _is_known(function: FunctionType) -> bool:
    """Whether a file of a library may have it by itself."""
    top = (function.__module__ or "").partition(".")[0]
    return is_named(function) or top in sys.stdlib_module_names


def _by_name(function: FunctionType) -> str:
    """The name of a function of an installed package, with its version; "" of any other."""
    if not function.__code__.co_filename.startswith(_INSTALLED):
        return ""
    return f"{function.__module__}.{function.__qualname__} {_version((function.__module__ or '').partition('.')[0])}"


@lru_cache
def _version(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError, ValueError):
        return importlib.metadata.version(package)
    return ""
