"""Values told as text, so that code and settings found on a model can be compared by what they are, not by address.

Two functions are told alike when their code, defaults, closures, the globals they read, their attributes and the
object they are bound to are; two classes when what they and their bases hold is; two objects when their classes and
attributes are. What cannot be looked into (a handle of a C library, say) is told by its address, and what libraries
keep for themselves (locks, loggers, their own functions and classes) by its name.
"""

import array
import contextvars
import enum
import functools
import hashlib
import operator
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_GETTERS = (operator.itemgetter, operator.attrgetter, operator.methodcaller)
# Tensors up to this many values are told by their bits.
_SMALL = 1 << 16
_MOST_PARTS = 20_000
# Code that does not change by itself, and objects that say nothing about arithmetic.
_LIBRARIES = frozenset(
    {"torch", "transformers", "accelerate", "numpy", "builtins", "threading", "_thread", "logging", "io", "_io",
     "math", "functools", "collections", "typing", "abc", "os", "sys", "re", "random", "time", "asyncio",
     "concurrent", "queue", "_queue", "contextlib", "warnings", "itertools", "operator", "pytest", "_pytest"}
)  # fmt: skip
# Those whose objects may hold settings all the same.
_NAMED = _LIBRARIES | {
    "hf_sparse_cache", "transformers_modules", "peft", "bitsandbytes", "torchao", "huggingface_hub", "tokenizers",
    "safetensors", "datasets", "evaluate",
}  # fmt: skip
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
        self._told: dict[int, tuple[Any, str]] = {}  # of functions and classes, which many others refer to
        self.opaque = False

    def tell(self, value: Any) -> str:
        """One value as text."""
        self._left -= 1
        if value is None or isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, (type, types.ModuleType)) and is_named(value):
            return str(value)
        if self._left < 0:
            return self._by_address(value)
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
        if str(kind.__module__).partition(".")[0] in _LIBRARIES:
            return _name(kind)
        held = _attributes(value)
        return f"{_name(kind)}{self.tell(held)}" if held is not None else self._by_address(value)

    def _once(self, value: Any, tell: Callable[[Any], str]) -> str:
        """What is told of something that is told often, by a digest."""
        if id(value) not in self._told:
            digest = hashlib.blake2b(tell(value).encode(errors="surrogatepass"), digest_size=16).hexdigest()
            self._told[id(value)] = value, f"{_name(value)} {digest}"  # it stays, and with it its address
        return self._told[id(value)][1]

    def _kind(self, kind: type) -> str:
        """A class: what it and its bases hold, as far as they are no library's."""
        return self.tell(_of_class(kind))

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
        if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
            return _name(function)
        return self._once(function, self._code_of)

    def _code_of(self, function: types.FunctionType) -> str:
        code, read = function.__code__, frozenset(_names(function.__code__))
        given = [function.__defaults__, function.__kwdefaults__, *map(_content, function.__closure__ or ())]
        held = [_read(value, read) for value in _flat(given)]
        return f"{_code(code)}{self.tell([held, _read_in(function.__globals__, read), vars(function)])}"

    def _method(self, method: types.MethodType) -> str:
        return f"{self.tell(method.__self__)}.{self.tell(method.__func__)}"

    def _partial(self, partial: functools.partial[Any]) -> str:
        return f"partial{self.tell([partial.func, list(partial.args), partial.keywords])}"

    def _module(self, module: torch.nn.Module) -> str:
        held = {name: value for name, value in vars(module).items() if name not in STANDARD}
        tensors = [dict(module._parameters), dict(module._buffers), dict(module._modules)]
        return f"{self.tell(type(module))}{self.tell([held, *tensors])}"

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
    (type, lambda teller, value: teller._once(value, teller._kind)),
    (types.BuiltinFunctionType, lambda teller, value: value.__qualname__),
    (enum.Enum, lambda teller, value: f"{value}{teller.tell(value.value)}"),
    (torch.Tensor, Teller._tensor),
    (np.ndarray, Teller._array),
    (np.generic, lambda teller, value: repr(value)),
    (PreTrainedConfig, Teller._config),
    (torch.nn.Module, Teller._module),
    (torch.ScriptObject, Teller._by_address),
    (types.FunctionType, Teller._function),
    (types.MethodType, Teller._method),
    (functools.partial, Teller._partial),
    (property, lambda teller, value: teller.tell([value.fget, value.fset])),
    ((staticmethod, classmethod), lambda teller, value: f"{type(value).__name__}{teller.tell(value.__func__)}"),
    (functools.cached_property, lambda teller, value: teller.tell(value.func)),
    (type(functools.lru_cache(len)), lambda teller, value: teller.tell(value.__wrapped__)),
    (_GETTERS, lambda teller, value: f"{type(value).__name__}{value.__reduce__()[1:]}"),
    ((bytearray, memoryview, array.array), lambda teller, value: f"{type(value).__name__}{bytes(value)!r}"),
    ((range, slice), lambda teller, value: repr(value)),
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


def is_named(value: Any) -> bool:
    """Whether a class, a function or a module is a library's, and told by its name."""
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return str(name).partition(".")[0] in _NAMED


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _attributes(value: Any) -> dict[str, Any] | None:
    """An object's attributes and methods, wherever it has them from; None where it cannot be looked into."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    if not slots and not hasattr(value, "__dict__"):
        return None
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return _of_class(type(value)) | held | getattr(value, "__dict__", {})


def _of_class(kind: type) -> dict[str, Any]:
    """What objects of a class have from it and its bases, as far as these are no library's."""
    found: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        if not is_named(each):
            found.update({name: held for name, held in vars(each).items() if _counts(name, held)})
    return found


def _counts(name: str, value: Any) -> bool:
    """Whether what a class holds under a name may matter to what its objects do."""
    return isinstance(value, types.FunctionType) or not (name.startswith("__") or name == "_abc_impl")


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if not name.startswith("__"))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _flat(values: list[Any]) -> Iterator[Any]:
    """Defaults one by one, as modules may be among them."""
    for value in values:
        yield from value if isinstance(value, tuple) else value.values() if type(value) is dict else (value,)


def _read(value: Any, names: frozenset[str], around: frozenset[int] = frozenset()) -> Any:
    """What a function sees of a value of which it reads these names: of a module, what has one of them."""
    if not isinstance(value, types.ModuleType) or is_named(value):
        return value
    return None if id(value) in around else _read_in(vars(value), names, around | {id(value)})


def _read_in(values: Mapping[str, Any], names: frozenset[str], around: frozenset[int] = frozenset()) -> dict[str, Any]:
    return {name: _read(values[name], names, around) for name in sorted(names & values.keys())}


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _code(code: types.CodeType) -> str:
    told = repr((code.co_code, code.co_names, [_constant(each) for each in code.co_consts]))
    return hashlib.blake2b(told.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _constant(value: Any) -> str:
    """A constant of a function: a set of them has another order in each process."""
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, (tuple, frozenset)):
        inside = map(_constant, value)
        return f"{type(value).__name__}{sorted(inside) if isinstance(value, frozenset) else list(inside)}"
    return repr(value)
