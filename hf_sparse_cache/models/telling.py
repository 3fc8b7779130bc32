"""Values told as text, so that code and settings found on a model can be compared by what they are, not by address.

Two functions are told alike when their code, defaults, closures, the globals they read and the object they are bound
to are; two objects when their classes and attributes are. What cannot be looked into (a handle of a C library, say) is
told by its address, and what libraries keep for themselves (locks, loggers, their own functions) by its name.
"""

import contextvars
import enum
import functools
import hashlib
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig


# Tensors up to this many values are told by their bits.
_SMALL = 1 << 16
_MOST_PARTS = 20_000
# Code that does not change by itself, and objects that say nothing about arithmetic.
_LIBRARIES = frozenset(
    {"torch", "transformers", "accelerate", "numpy", "builtins", "threading", "_thread", "logging", "io", "_io",
     "math", "functools", "collections", "typing", "abc", "os", "sys", "re", "random", "time", "asyncio",
     "concurrent", "queue", "_queue", "contextlib", "warnings", "itertools", "operator", "pytest", "_pytest"}
)  # fmt: skip
# Settings of a configuration that say what comes out besides the states, or nothing about arithmetic at all.
_SILENT = ("use_cache", "return_dict", "_name_or_path", "name_or_path", "transformers_version", "architectures")
_SILENT_STARTS = ("output_", "_output_", "id2label", "label2id", "_commit_hash", "_auto_class", "tokenizer_")


class Teller:
    """Tells values one after another.

    Args:
        own: ids of objects that are told elsewhere, such as the modules of the model.

    Attributes:
        opaque: whether anything was told by its address, so that the text means nothing in another process.
    """

    def __init__(self, own: frozenset[int] = frozenset()) -> None:
        self._own, self._seen, self._left = own, set[int](), _MOST_PARTS
        self.opaque = False

    def tell(self, value: Any) -> str:
        """One value as text."""
        self._left -= 1
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
            return repr(value)
        if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType, torch.Size)) or self._left < 0:
            return str(value) if not isinstance(value, types.BuiltinFunctionType) else value.__qualname__
        if id(value) in self._own or id(value) in self._seen:
            return "known"
        self._seen.add(id(value))
        try:
            return self._tell(value)
        finally:
            self._seen.discard(id(value))

    def _tell(self, value: Any) -> str:
        for kinds, tell in _TELLERS:
            if isinstance(value, kinds):
                return tell(self, value)
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind.__module__.partition(".")[0] in _LIBRARIES:
            return name
        parts = _attributes(value)
        return f"{name}{self.tell(parts)}" if parts is not None else self._by_address(value)

    def _by_address(self, value: Any) -> str:
        self.opaque = True
        return f"{type(value).__qualname__} at {id(value):#x}"

    def _items(self, values: Any) -> str:
        return f"{type(values).__name__}[{','.join(map(self.tell, values))}]"

    def _unordered(self, values: Any) -> str:
        return f"{type(values).__name__}[{','.join(sorted(map(self.tell, values)))}]"

    def _mapping(self, values: Mapping[Any, Any]) -> str:
        return "{" + ",".join(f"{self.tell(key)}:{self.tell(value)}" for key, value in list(values.items())) + "}"

    def _tensor(self, tensor: torch.Tensor) -> str:
        shape = f"{tensor.dtype}{tuple(tensor.shape)}"
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if tensor.device.type == "cpu" and plain and tensor.numel() <= _SMALL:
            bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            return f"{shape}{hashlib.blake2b(bits.numpy().tobytes(), digest_size=16).hexdigest()}"
        self.opaque = True
        version = 0 if tensor.is_inference() else tensor._version
        return f"{shape} at {id(tensor):#x} version {version}"

    def _array(self, array: Any) -> str:
        if array.dtype.hasobject or array.size > _SMALL:
            return f"{array.dtype}{array.shape}{self._by_address(array)}"
        return f"{array.dtype}{array.shape}{hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()}"

    def _function(self, function: types.FunctionType) -> str:
        name = f"{function.__module__}.{function.__qualname__}"
        if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
            return name
        code = function.__code__
        cells = [_content(cell) for cell in function.__closure__ or ()]
        read = self._read(function, code)
        return f"{name}{_code(code)}{self.tell([function.__defaults__, function.__kwdefaults__, cells, read])}"

    def _read(self, function: types.FunctionType, code: types.CodeType) -> dict[str, Any]:
        """The globals that a function reads, and of modules among them what it reads there."""
        names = set(_names(code))
        found: dict[str, Any] = {}
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            if not isinstance(value, types.ModuleType):
                found[name] = value
            elif value.__name__.partition(".")[0] not in _LIBRARIES:
                found.update({f"{name}.{inner}": vars(value)[inner] for inner in sorted(names & vars(value).keys())})
        return found

    def _method(self, method: types.MethodType) -> str:
        return f"{self.tell(method.__self__)}.{self.tell(method.__func__)}"

    def _partial(self, partial: functools.partial[Any]) -> str:
        return f"partial{self.tell([partial.func, list(partial.args), partial.keywords])}"

    def _module(self, module: torch.nn.Module) -> str:
        held = {name: value for name, value in vars(module).items() if name not in STANDARD}
        tensors = [dict(module._parameters), dict(module._buffers), dict(module._modules)]
        return f"{type(module).__qualname__}{self.tell([held, *tensors])}"

    def _config(self, config: Any) -> str:
        return f"{type(config).__name__}{self.tell(loud(vars(config)))}"


def loud(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration's settings those that may change states, in order."""
    return {
        name: settings[name]
        for name in sorted(settings)
        if name not in _SILENT and not name.startswith(_SILENT_STARTS)
    }


# What every module has, looked at on its own or of no consequence.
STANDARD = frozenset(vars(torch.nn.Module()))
_TELLERS: list[tuple[Any, Callable[[Teller, Any], str]]] = [
    (enum.Enum, lambda teller, value: str(value)),
    (torch.Tensor, Teller._tensor),
    (np.ndarray, Teller._array),
    (np.generic, lambda teller, value: repr(value)),
    (PreTrainedConfig, Teller._config),
    (torch.nn.Module, Teller._module),
    (torch.ScriptObject, Teller._by_address),
    (types.FunctionType, Teller._function),
    (types.MethodType, Teller._method),
    (functools.partial, Teller._partial),
    (Mapping, Teller._mapping),
    ((set, frozenset), Teller._unordered),
    ((list, tuple, deque), Teller._items),
    (threading.local, lambda teller, value: teller.tell(vars(value))),
    (contextvars.ContextVar, lambda teller, value: teller.tell(value.get(None))),
    (weakref.ReferenceType, lambda teller, value: teller.tell(value())),
    (types.CellType, lambda teller, value: teller.tell(_content(value))),
]


def name_of(function: Any) -> str:
    """A function's name, or that of its class, without what it depends on."""
    function = getattr(function, "func", function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _attributes(value: Any) -> dict[str, Any] | None:
    """An object's attributes and methods, wherever it has them from; None where it cannot be looked into."""
    kinds = [kind for kind in type(value).__mro__ if kind.__module__.partition(".")[0] not in _LIBRARIES]
    slots = [name for kind in kinds for name in _slots(kind)]
    if not slots and not hasattr(value, "__dict__"):
        return None
    found: dict[str, Any] = {}
    for kind in reversed(kinds):
        found.update({name: inner for name, inner in vars(kind).items() if _counts(name, inner)})
    found.update({name: getattr(value, name) for name in slots if hasattr(value, name)})
    return found | getattr(value, "__dict__", {})


def _counts(name: str, value: Any) -> bool:
    """Whether what a class holds under a name may matter to what its objects do."""
    return isinstance(value, types.FunctionType) or not name.startswith("__")


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if not name.startswith("__"))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _code(code: types.CodeType) -> str:
    constants = [_code(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return hashlib.blake2b(repr((code.co_code, code.co_names, constants)).encode(), digest_size=16).hexdigest()
