"""Values told as text: what changes what code does gives another text, in every process the same one."""

from __future__ import annotations

import array
import contextvars
import enum
import functools
import os
import subprocess
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter, itemgetter, methodcaller
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from hf_sparse_cache.models import telling
from hf_sparse_cache.models.telling import Teller


def tell(value: Any) -> str:
    return Teller().tell(value)


class Holder:
    """Whatever a function may read."""

    scale: Any = 1.0

    def __call__(self) -> Any:
        return self.scale

    @property
    def half(self) -> Any:
        return self.scale / 2

    @staticmethod
    def fixed() -> int:
        return 1

    @classmethod
    def of_class(cls) -> Any:
        return cls.scale


class Heir(Holder):
    """One whose base holds what is read."""


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


@dataclass
class Settings:
    scale: float = 1.0


class Kind(enum.Enum):
    ONE = [1.0]  # noqa: RUF012


class Scaled(torch.nn.Module):
    scale: Any = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.ones(2))
        self.inner = torch.nn.Linear(2, 2)
        self.told = 3


HOLDER, SLOTTED, MAPPING, ROWS, NUMBERS = Holder(), Slotted(), {"a": 1.0}, [1.0], np.ones(3)
SETTINGS = Settings()
WEIGHT = torch.ones(3)
DEEP = types.ModuleType("somebody.deep")
DEEP.scale = 1.0  # type: ignore[attr-defined]
FILE = types.ModuleType("somebody")
FILE.scale, FILE.deep, FILE.itself, FILE.unread = 1.0, DEEP, FILE, 1.0  # type: ignore[attr-defined]
LOCAL = threading.local()
LOCAL.scale = 1.0
CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("scale", default=1.0)
BYTES, ARRAY = bytearray(b"abc"), array.array("d", [1.0])
MODULE = Scaled()


def counting() -> Any:
    return counting.scale  # type: ignore[attr-defined]


counting.scale = 1.0  # type: ignore[attr-defined]


@functools.lru_cache
def kept() -> Any:
    return HOLDER.scale


def given(scale: Any = HOLDER, *, other: Any = SETTINGS) -> Any:
    return scale.scale * other.scale


def around(value: Any) -> Callable[[], Any]:
    return lambda: value.scale


# What is told, and where what it reads can be set: of an object, its name and another value.
Case = tuple[Callable[[], Any], Any, Any, Any]
CASES: dict[str, Case] = {
    "an attribute of an object": (lambda: HOLDER.scale, HOLDER, "scale", 2.0),
    "an attribute of a class": (lambda: Holder.scale, Holder, "scale", 2.0),
    "an attribute of the class of an object": (lambda: HOLDER(), Holder, "scale", 2.0),
    "an attribute of a base": (lambda: Heir.scale, Holder, "scale", 2.0),
    "a method of a class": (lambda: HOLDER(), Holder, "__call__", lambda self: 2.0),
    "a property": (lambda: HOLDER.half, Holder, "half", property(lambda self: 2.0)),
    "a static method": (lambda: Holder.fixed(), Holder, "fixed", staticmethod(lambda: 2)),
    "a class method": (lambda: Holder.of_class(), Holder, "of_class", classmethod(lambda cls: 2)),
    "a class in a closure": (around(Holder), Holder, "scale", 2.0),
    "an object in a closure": (around(HOLDER), HOLDER, "scale", 2.0),
    "a module in a closure": (around(FILE), FILE, "scale", 2.0),
    "a default": (given, HOLDER, "scale", 2.0),
    "a default by keyword": (given, SETTINGS, "scale", 2.0),
    "a slot": (lambda: SLOTTED.scale, SLOTTED, "scale", 2.0),
    "a dictionary": (lambda: MAPPING["a"], MAPPING, "a", 2.0),
    "a list": (lambda: ROWS[0], ROWS, 0, 2.0),
    "a global": (lambda: SETTINGS, sys.modules[__name__], "SETTINGS", Settings(2.0)),
    "a module": (lambda: FILE.scale, FILE, "scale", 2.0),
    "a module in a module": (lambda: FILE.deep.scale, DEEP, "scale", 2.0),
    "an attribute of the function": (counting, counting, "scale", 2.0),
    "a cached function": (kept, HOLDER, "scale", 2.0),
    "a value of an enumeration": (lambda: Kind.ONE.value[0], Kind.ONE.value, 0, 2.0),
    "an array": (lambda: NUMBERS.sum(), NUMBERS, 1, 2.0),
    "a tensor": (lambda: WEIGHT.sum(), WEIGHT, 1, 2.0),
    "a value of a thread": (lambda: LOCAL.scale, LOCAL, "scale", 2.0),
    "bytes": (lambda: BYTES[0], BYTES, 0, 7),
    "numbers": (lambda: ARRAY[0], ARRAY, 0, 2.0),
    "an attribute of a module of torch": (lambda: MODULE.told, MODULE, "told", 4),
    "an attribute of the class of a module": (lambda: MODULE.told, Scaled, "scale", 2.0),
    "a weight of a module": (lambda: MODULE.told, MODULE.weight.data, 0, 2.0),
    "a buffer of a module": (lambda: MODULE.told, MODULE.mean, 0, 2.0),
    "a module of a module": (lambda: MODULE.told, MODULE.inner.weight.data, (0, 0), 2.0),
    "a bound method": (HOLDER.__call__, HOLDER, "scale", 2.0),
    "a partial": (functools.partial(given, HOLDER), HOLDER, "scale", 2.0),
    "a weak reference": (functools.partial(given, weakref.ref(HOLDER)), HOLDER, "scale", 2.0),
}


def put(place: Any, name: Any, value: Any) -> Any:
    """Sets something, by attribute or by index; gives what was there, or None."""
    if isinstance(name, str) and not isinstance(place, dict):
        before = vars(place).get(name) if hasattr(place, "__dict__") else getattr(place, name)
        if value is None:
            delattr(place, name)
        else:
            setattr(place, name, value)
        return before
    before = place[name].clone() if torch.is_tensor(place) else place[name]
    place[name] = value
    return before


@pytest.mark.parametrize("case", CASES)
def test_what_a_function_reads_is_told(case: str) -> None:
    """Another value gives another text, and the value before the text before."""
    function, place, name, other = CASES[case]
    first = tell(function)
    assert tell(function) == first
    before = put(place, name, other)
    try:
        changed = tell(function)
    finally:
        put(place, name, before)
    assert changed != first == tell(function)


def test_what_a_function_does_not_read_is_not_told() -> None:
    """The twin: neither another global, nor another name of a module, nor what a library keeps."""

    def reads() -> Any:
        return FILE.scale, np.float64

    first = tell(reads)
    for place, name, other in ((FILE, "unread", 2.0), (HOLDER, "scale", 2.0), (MAPPING, "a", 2.0)):
        before = put(place, name, other)
        try:
            assert tell(reads) == first
        finally:
            put(place, name, before)


def test_a_value_of_a_context_is_told() -> None:
    token = CONTEXT.set(2.0)
    changed = tell(CONTEXT)
    CONTEXT.reset(token)
    assert changed != tell(CONTEXT)


ALIKE: list[tuple[Any, Any]] = [
    ({"a": 1, "b": {2, 3, 1}}, {"a": 1, "b": {3, 1, 2}}),
    (Settings(2.0), Settings(2.0)),
    (SimpleNamespace(a=[1]), SimpleNamespace(a=[1])),
    (LlamaConfig(hidden_size=64), LlamaConfig(hidden_size=64, use_cache=False, output_attentions=True)),
    (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous()),
    (lambda x: x in {"a", "b", "c"}, lambda x: x in {"c", "b", "a"}),
]
UNLIKE: list[tuple[Any, Any]] = [
    (1, 1.0), (1, True), (0.0, -0.0), ("1", 1), (b"a", "a"), (None, "None"), ([1], (1,)), ([1, 2], [2, 1]),
    ({1}, frozenset({1})),
    (deque([1]), [1]), (range(3), range(4)), (slice(1), slice(2)), (torch.float32, torch.float64), (len, max),
    (itemgetter(0), itemgetter(1)), (itemgetter(0), itemgetter(0, 1)), (attrgetter("a"), attrgetter("b")),
    (methodcaller("a", 1), methodcaller("a", 2)), (itemgetter(0), attrgetter("a")),
    (Settings(1.0), Settings(2.0)), (Holder, Heir), (Holder(), Heir()), (Kind, Holder), (torch.nn.ReLU, torch.nn.GELU),
    (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)), (LlamaConfig(hidden_size=64), LlamaConfig(hidden_size=32)),
    (torch.zeros(2), torch.zeros(2, dtype=torch.float64)), (torch.zeros(2), torch.zeros(1, 2)),
    (torch.zeros(2), torch.ones(2)),
    (np.zeros(2), np.zeros(2, np.float32)), (np.zeros(2), np.zeros((1, 2))), (np.float32(1), np.float64(1)),
    (lambda x: x + 1, lambda x: x + 2), (lambda x: x + 1, lambda x: x - 1), (lambda x: x.real, lambda x: x.imag),
    (lambda x: x in {"a", "b"}, lambda x: x in {"a", "c"}), (lambda x: x in ("a", 1), lambda x: x in ("a", 2)),
    (lambda x: (lambda: x + 1), lambda x: (lambda: x + 2)), (bytearray(b"a"), b"a"),
    (functools.partial(given, 1), functools.partial(given, 2)), (staticmethod(len), classmethod(len)),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_what_is_equal_is_told_alike(one: Any, other: Any) -> None:
    told = [tell(value).replace("<lambda>", "") for value in (one, other)]
    assert told[0].split(" ")[-1] == told[1].split(" ")[-1]


@pytest.mark.parametrize(("one", "other"), UNLIKE)
def test_what_is_different_is_told_otherwise(one: Any, other: Any) -> None:
    assert tell(one) != tell(other)


def test_what_cannot_be_looked_into_is_told_by_its_address() -> None:
    class Closed:
        __slots__ = ()

    one, other = Closed(), Closed()
    teller = Teller()
    assert teller.tell(one) != teller.tell(other) and teller.opaque
    big = torch.zeros(telling._SMALL + 1)
    teller = Teller()
    first = teller.tell(big)
    assert teller.opaque and tell(big) == first
    big.add_(1)
    assert tell(big) != first
    teller = Teller()
    teller.tell([torch.zeros(telling._SMALL), Settings(), given, Heir, np.zeros(9), HOLDER.__call__])
    assert not teller.opaque


def test_what_is_told_elsewhere_or_holds_itself_ends() -> None:
    rows: list[Any] = [1]
    rows.append(rows)
    assert tell(rows) == "list[1,known]" and Teller(frozenset([id(rows)])).tell(rows) == "known"
    wide = [[number] for number in range(telling._MOST_PARTS)]
    teller = Teller()
    teller.tell(wide)
    assert teller.opaque  # and it says so where it gave up


def test_a_function_is_told_once_however_often_it_is_read() -> None:
    """Each reads the two below it twice: what is told grows with the functions, not with the ways to them."""
    space: dict[str, Any] = {}
    for number in range(40):
        below = f"f{number - 1}() + f{number - 1}() + g{number - 1}()" if number else "1"
        exec(f"def f{number}(): return {below}\ndef g{number}(): return f{number}()", space)
    teller = Teller()
    assert teller.tell(space["f39"]) == tell(space["f39"]) and not teller.opaque
    first = tell(space["f39"])
    exec("def f0(): return 2", space)
    assert tell(space["f39"]) != first


TOLD = """
import sys
from hf_sparse_cache.models.telling import Teller
import torch

WORDS = {"alpha", "beta", "gamma", "delta"}

class Steering:
    names = frozenset(WORDS)
    def __init__(self): self.scale = torch.ones(3)
    def __call__(self, module, inputs, output):
        there = module.name in {"alpha", "beta", "gamma"} or module.name in self.names
        return output * self.scale if there else output

teller = Teller()
print(teller.tell(Steering()), teller.opaque)
"""


def test_it_is_told_alike_in_every_process() -> None:
    """Whatever the order of sets is there."""
    said = set()
    for seed in ("1", "2", "3"):
        run = subprocess.run(
            [sys.executable, "-c", TOLD],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        said.add(run.stdout)
    (told,) = said
    assert told.endswith("False\n") and "Steering" in told


@pytest.mark.parametrize(("most", "opaque"), [(1, True), (2, True), (3, False)])
def test_it_gives_up_behind_so_many_parts_and_says_so(
    most: int, opaque: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "_MOST_PARTS", most)
    teller = Teller()
    told = teller.tell([[], (), 1, "a", None])
    assert teller.opaque is opaque and told.endswith("1,'a',None]")


def nobodys() -> None: ...


nobodys.__module__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (threading.Lock(), "_thread.lock"), (functools.wraps, "functools.wraps"), (len, "len"),
        (torch.nn.Linear, None),
        (None, "None"), (np.float32(1), None), (range(1, 3), "range(1, 3)"), (slice(1, None), "slice(1, None, None)"),
        ({1, 2}, "set[1,2]"), ((1,), "tuple[1]"), (deque([1, 2]), "deque[1,2]"), ({"a": [1]}, "{'a':list[1]}"),
        (bytearray(b"a"), "bytearray b'a'"), (itemgetter(1), None), (types.CellType(), "None"),
        (types.CellType(3), "3"),
    ],
)  # fmt: skip
def test_what_libraries_bring_is_told_by_its_name(value: Any, told: str | None) -> None:
    teller = Teller()
    found = teller.tell(value)
    assert not teller.opaque and (told is None or found.replace("bytearrayb", "bytearray b") == told)


def test_functions_of_libraries_and_of_nobody() -> None:
    teller = Teller()
    assert teller.tell(torch.nn.functional.softplus) and teller.tell(nobodys).startswith("None.nobodys ")
    assert teller.tell(functools.reduce) == "reduce" and not teller.opaque


@pytest.mark.parametrize(
    ("value", "opaque"),
    [
        (torch.ones(2), False), (torch.ones(2, device="meta"), True), (torch.ones(2).to_sparse(), True),
        (torch.ones(telling._SMALL), False), (torch.ones(telling._SMALL + 1), True), (np.ones(telling._SMALL), False),
        (np.ones(telling._SMALL + 1), True), (np.array([None]), True), (np.array([1]), False),
    ],
)  # fmt: skip
def test_tensors_and_arrays_are_told_by_their_bits_as_far_as_they_are_small(value: Any, opaque: bool) -> None:
    teller = Teller()
    assert teller.tell(value) == tell(value) and teller.opaque is opaque


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_tensor_without_plain_bits_is_told_by_its_address() -> None:
    one, other = (torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8) for _ in range(2))
    teller = Teller()
    assert teller.tell(one) == tell(one) != tell(other) and teller.opaque


def test_a_large_tensor_of_inference_has_no_version() -> None:
    with torch.inference_mode():
        value = torch.zeros(telling._SMALL + 1)
    assert tell(value).endswith("version 0") and tell(torch.zeros(telling._SMALL + 1).add_(1)).endswith("version 1")


def test_of_a_configuration_what_may_change_states_is_told_in_order() -> None:
    settings = {
        "b": 1,
        "a": 2,
        "use_cache": 1,
        "output_x": 1,
        "id2label_": 1,
        "architectures": 1,
        "tokenizer_class": 1,
    }
    assert list(telling.loud(settings).items()) == [("a", 2), ("b", 1)]


def test_names_of_functions_and_of_what_is_called_like_one() -> None:
    name = f"{__name__}.given"
    assert telling.name_of(given) == name == telling.name_of(functools.partial(given, 1))
    assert telling.name_of(Holder()) == f"{__name__}.Holder"
    for value, named in ((np, True), (torch.nn.Linear, True), (FILE, False), (Holder, False), (given, False)):
        assert telling.is_named(value) is named


class Both:
    """A slot as one word, one that has no value, and attributes besides."""

    __slots__ = "one"


class Further(Both):
    __slots__ = ("__dict__", "none")


def test_attributes_are_found_in_slots_and_elsewhere() -> None:
    value = Further()
    value.one, value.other = 1, 2  # type: ignore[attr-defined]
    held = telling._attributes(value)
    assert held is not None and held["one"] == 1 and held["other"] == 2
    assert telling._slots(Both) == ("one",) and telling._slots(Further) == ("none",)
    assert telling._attributes(object()) is None
    assert telling._counts("__call__", given) and not telling._counts("__doc__", "a")
    assert telling._counts("scale", 1) and not telling._counts("_abc_impl", 1)


def test_what_is_told_often_is_told_once_and_by_a_digest() -> None:
    teller, calls = Teller(), []

    def long(value: Any) -> str:
        calls.append(value)
        return "a" * 1000

    first = teller._once(given, long)
    assert teller._once(given, long) == first and calls == [given] and len(first) < 100
    assert first.startswith(f"{__name__}.given ")


def test_a_file_that_reads_itself_ends_and_one_that_is_a_librarys_is_named() -> None:
    names = frozenset({"itself", "scale", "np"})
    assert telling._read(FILE, names) == {"itself": None, "scale": 1.0}
    assert telling._read(np, names) is np and telling._read(3, names) == 3
    assert telling._read_in({"scale": 1, "np": np, "other": 2}, names) == {"np": np, "scale": 1}
    assert list(telling._flat([(1, 2), {"a": 3}, [4], None])) == [1, 2, 3, [4], None]
