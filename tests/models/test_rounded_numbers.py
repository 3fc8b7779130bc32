"""Rounding against a plain second way of it, number by number; where groups lie; and what reads what lies oddly."""

from __future__ import annotations

import itertools
import math
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_sparse_cache.models import rounding
from hf_sparse_cache.models.rounding import EXACT, PARTS, NotRoundableError, Packed, chained, rounding_of
from hf_sparse_cache.models.slotted import Place, TensorViews
from hf_sparse_cache.models.tensors import LayerTensors


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 2, 3, 16), (1, 3, 64), (1, 3, 7, 37), (1, 16, 3), (1, 40), (1, 2, 48), (1, 2, 2, 24), (2, 3, 32)]
SHAPES += [(1, 97)]


@pytest.fixture(params=[True, False], ids=["compiled", "by torch"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(rounding, "_codec", lambda *_: None)


# -- a plain second way -----------------------------------------------------------------------------------------------


def scale_of(code: int) -> float:
    """The four fractions 1, 1.25, 1.5 and 1.75 of the powers of two from 2 ** -44 on."""
    return [1.0, 1.25, 1.5, 1.75][code % 4] * math.ldexp(1.0, code // 4 - 44)


def neighbours(length: int, wanted: int) -> int:
    """How many share a scale: of all that divide a length the most from over half of what is wanted to all of it."""
    divisors = [size for size in range(1, length + 1) if length % size == 0]
    near = [size for size in divisors if wanted < 2 * size <= 2 * wanted]
    return max(near) if near else min([size for size in divisors if size >= wanted], default=length)


@cache
def borders_of(most: int, every: int) -> list[float]:
    """Where one scale ends and the next one begins: halfway between two whole numbers of the next one."""
    scales = [scale_of(code) for code in range(0, 256, every)]
    ends = [math.ceil(most * below / above + 0.5) - 0.5 for below, above in pairwise(scales)]
    return [float(np.float32(end * above)) for end, above in zip(ends, scales[1:], strict=True)]


def code_of(largest: float, bits: int, dtype: torch.dtype) -> int:
    """The first scale at whose upper border a group of this size is not beyond it."""
    most, every = 2 ** (bits - 1) - 1, 1 if bits == 8 and dtype.itemsize > 2 else 4
    low, high = (80, 4 * (60 - (bits - 1))) if dtype is torch.float16 else (0, 256 - every)
    beyond = sum(border < largest for border in borders_of(most, every))
    return min(max(beyond * every, low), high)


def rounded_plainly(name: str, value: torch.Tensor, bits: int) -> tuple[list[int], list[int]]:
    """Whole numbers and codes, in order."""
    wanted = {8: 16, 16: 32}[bits] * (1 if value.dtype.itemsize > 2 else 2)
    length = value.shape[-1] if name in ("keys", "values", "indexer_keys") else value[0].numel()
    flat, group = value.float().flatten().tolist(), neighbours(length, wanted)
    numbers, codes, most = [], [], 2 ** (bits - 1) - 1
    for start in range(0, len(flat), group):
        codes.append(code_of(max(map(abs, flat[start : start + group])), bits, value.dtype))
        inverse = np.float32(1 / scale_of(codes[-1]))
        products = [float(np.float32(x) * inverse) for x in flat[start : start + group]]
        numbers += [min(max(round(x), -most), most) for x in products]  # to the nearest, to even where there are two
    return numbers, codes


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Groups of very different sizes, some of them zero, some larger than any border of float16 scales."""
    draw = np.random.RandomState(seed)
    sizes = 2.0 ** draw.choice([-50, -30, -26, -21, -9, -1, 3, 9, 15, 24], size=(*shape[:-1], 1))
    wide = draw.randn(*shape) * sizes * (draw.rand(*shape[:-1], 1) > 0.1)
    return torch.from_numpy(wide).clamp(-6e4 if dtype is torch.float16 else -9e7, 6e4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_and_scales_are_those_of_a_plain_way(dtype: torch.dtype, either_way: None) -> None:
    names = ["keys", "values", "indexer_keys", "conv.0", "recurrent.1"]
    for seed, (shape, storage) in enumerate(itertools.product(SHAPES * 2, ["bf16", "int8"])):
        name = names[seed % len(names)]
        value, bits = spread(shape, dtype, seed), 8 if storage == "int8" else 16
        found = rounding_of(storage).kept({name: value})
        if bits == 16 and dtype.itemsize == 2:
            assert found == {name: value} and found[name] is value  # it would become no smaller
            continue
        word = str(dtype).removeprefix("torch.")
        assert list(found) == [f"{name}:{word}", f"{name}:scale"]
        whole, scales = found.values()
        assert whole.dtype == {8: torch.int8, 16: torch.int16}[bits] and scales.dtype == torch.uint8
        numbers, codes = rounded_plainly(name, value, bits)
        assert scales.flatten().tolist() == codes and whole.flatten().tolist() == numbers, (name, shape, storage)
        assert whole.shape == shape and scales.shape[:-1] == (shape[:-1] if "." not in name else shape[:1])
        group = value.numel() // len(codes)
        read = torch.tensor(numbers, dtype=torch.float32).view(-1, group)
        read = (read * torch.tensor([[scale_of(code)] for code in codes], dtype=torch.float32)).to(dtype).view(shape)
        for again in (rounding_of(storage).read(found), rounding_of(storage).restored(found)):
            assert list(again) == [name] and torch.equal(again[name], read) and again[name].dtype is dtype


def test_groups_are_as_many_neighbours_as_wanted_or_about() -> None:
    for length in range(1, 200):
        for wanted in (16, 32, 64):
            assert rounding._group(length, wanted) == neighbours(length, wanted), (length, wanted)
    assert rounding._group(37, 16) == 37 and rounding._group(48, 16) == 16 and rounding._group(24, 16) == 12


LARGEST = {
    ("bf16", torch.float32): 32767 * 2.0**19,
    ("bf16", torch.float64): 32767 * 2.0**19,
    ("int8", torch.float32): 127 * 1.75 * 2.0**19,
    ("int8", torch.float64): 127 * 1.75 * 2.0**19,
    ("int8", torch.bfloat16): 127 * 2.0**19,
    ("int8", torch.float16): 65504.0,
}


@pytest.mark.parametrize(("storage", "dtype"), LARGEST, ids=str)
def test_the_largest_that_may_be_rounded_is_and_the_next_is_not(storage: str, dtype: Any, either_way: None) -> None:
    kept, most = rounding_of(storage), LARGEST[storage, dtype]
    value = torch.zeros(1, 4, 64, dtype=dtype)
    for sign in (1, -1):
        value[0, 2, 5] = sign * most
        read = kept.read(kept.kept({"conv.0": value}))["conv.0"][0, 2, 5]
        assert read == sign * (127 * 512 if dtype is torch.float16 else most)
        beyond = value.clone()
        larger = torch.tensor(sign * most, dtype=torch.float32 if dtype is torch.float64 else dtype)
        beyond[0, 2, 5] = torch.nextafter(larger, larger * math.inf)
        with pytest.raises(NotRoundableError, match=r"^conv\.0 holds"):
            kept.kept({"conv.0": beyond})


def test_the_tensor_that_cannot_be_rounded_is_the_one_that_is_named(either_way: None) -> None:
    """Wherever it stands among others, of types that are looked at by the codec or by torch."""
    for order in itertools.permutations([torch.float32, torch.float64, torch.bfloat16]):
        for wrong in range(3):
            layer = {f"conv.{i}": torch.ones(1, 32, dtype=dtype) for i, dtype in enumerate(order)}
            assert rounding_of("int8").kept(layer)
            layer[f"conv.{wrong}"][0, 7] = float("nan")
            with pytest.raises(NotRoundableError, match=rf"^conv\.{wrong} holds values that are not finite"):
                rounding_of("int8").kept({"ids": torch.arange(3), **layer})


# -- which ways of keeping there are ----------------------------------------------------------------------------------


def test_what_is_kept_exactly_is_handed_on_as_it_is() -> None:
    layers = [{"keys": torch.ones(1, 2), "seen": 3}, {}]
    assert rounding_of("exact") is EXACT and EXACT.rounds is False and (EXACT.name, EXACT.scheme) == ("exact", "exact")
    assert EXACT.kept(layers[0]) is layers[0] and EXACT.packed(layers[0]) is layers[0] is EXACT.read(layers[0])
    assert EXACT.unread(layers) == tuple(layers) == rounding_of("int8").unread(layers)
    restored = EXACT.restored(layers[0])
    assert restored["seen"] == 3 and restored["keys"] is not layers[0]["keys"]
    held = {"keys": torch.zeros(1, 2)}
    EXACT.write_back(layers[0], held)
    assert not held["keys"].any()


def test_what_8_bits_are_for_is_in_the_name_of_the_way() -> None:
    """Files that were written in another way are not read, so these names are part of their format."""
    ways = {
        rounding_of("bf16"): "16 bits in groups of 32, nothing in 8 bits in groups of 16",
        rounding_of("int8"): "16 bits in groups of 32, attention, conv, recurrent in 8 bits in groups of 16",
        rounding_of("int8", ["conv"]): "16 bits in groups of 32, conv in 8 bits in groups of 16",
        rounding_of("bf16", ["conv"]): "16 bits in groups of 32, nothing in 8 bits in groups of 16",
    }
    assert all(way.scheme == said and way.rounds for way, said in ways.items()) and len(ways) == 3
    assert {way.name for way in ways} == {"bf16", "int8"}


@pytest.mark.parametrize("part", PARTS)
def test_8_bits_are_for_the_parts_that_are_named(part: str) -> None:
    names = {"attention": ["keys", "values", "indexer_keys"], "conv": ["conv.0"], "recurrent": ["recurrent.2"]}
    layer = {name: torch.ones(1, 2, 32) for name in itertools.chain(*names.values())}
    kept = rounding_of("int8", [part]).kept(layer)
    narrow = [name.partition(":")[0] for name, value in kept.items() if value.dtype is torch.int8]
    assert narrow == names[part] == [name for name in layer if rounding.part_of(name) == part]
    assert sum(value.dtype is torch.int16 for value in kept.values()) == 5 - len(narrow)


def test_names_of_what_is_kept_lead_to_the_tensor() -> None:
    assert [*map(rounding.plain_name, ("conv.0:float32", "conv.0:scale", "keys"))] == ["conv.0", "conv.0", "keys"]


def test_only_what_stands_for_halves_can_be_too_large() -> None:
    numbers = torch.full((1, 32), 127, dtype=torch.int8)
    for dtype, sound in (("float16", False), ("bfloat16", True), ("float32", True), ("float64", True)):
        layer = {f"keys:{dtype}": numbers, "keys:scale": torch.full((1, 2), 252, dtype=torch.uint8)}
        assert rounding.sound(f"keys:{dtype}", layer) is sound and rounding.sound("keys:scale", layer)
    layer = {"keys:float16": numbers, "keys:scale": torch.full((1, 2), 176, dtype=torch.uint8)}
    assert rounding.sound("keys:float16", layer)
    layer["keys:scale"][0, 1] = 252
    assert not rounding.sound("keys:float16", layer)


def test_the_codec_is_for_floats_of_the_two_widths_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = rounding._codec.__wrapped__
    for whole, dtype in itertools.product((torch.int8, torch.int16, torch.int32), [*DTYPES, torch.int8]):
        there = whole is not torch.int32 and dtype in (torch.float32, torch.bfloat16)
        assert (asked(whole, dtype) is not None) is there
    monkeypatch.setattr(rounding, "Codec", None)
    assert asked(torch.int8, torch.float32) is None


# -- where groups lie -------------------------------------------------------------------------------------------------


def places_of(tensor: torch.Tensor) -> list[int]:
    """How many elements behind its first each element of a tensor lies, in order."""
    ranges = [
        [index * stride for index in range(size)] for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return [sum(where) for where in itertools.product(*ranges)]


def runs_plainly(tensor: torch.Tensor, group: int) -> set[tuple[int, int, int]]:
    """Every way to see a tensor as runs of whole groups, at equal distances that are no less than their length."""
    places, found = places_of(tensor), set()
    for inner in (size for size in range(1, len(places) + 1) if len(places) % size == 0 and size % group == 0):
        outer = len(places) // inner
        step = places[inner] if outer > 1 else inner
        if step >= inner and places == [o * step + i for o in range(outer) for i in range(inner)]:
            found.add((outer, inner, step))
    return found


def test_runs_lead_to_every_number_of_a_tensor_in_order() -> None:
    draw, count = np.random.RandomState(0), [0, 0]
    memory = torch.zeros(5000)
    for _ in range(700):
        dims = draw.randint(1, 5)
        shape = [int(draw.choice([1, 2, 3, 4])) for _ in range(dims)]
        strides, step = [0] * dims, 1
        for dim in reversed(range(dims)):
            strides[dim] = step if draw.rand() < 0.8 else int(step + draw.choice([-1, 1, 2, 5]))
            step = max(strides[dim], 1) * shape[dim] + int(draw.choice([0, 0, 0, 2]))
        tensor, group = (
            memory.as_strided(shape, strides),
            int(draw.choice([1, 2, 3, 4])),
        )
        found, ways = rounding._runs(tensor, group), runs_plainly(tensor, group)
        count[bool(ways)] += 1
        if found is None:
            assert not ways, (tensor.shape, tensor.stride(), group)
        else:
            assert found[:3] in ways and found[3] == group, (tensor.shape, tensor.stride(), found, ways)
    assert min(count) > 150
    assert rounding._runs(torch.zeros(4), 0) is None
    assert rounding._runs(torch.zeros(4, 1, 6)[:, :, :4], 2) == (4, 4, 6, 2)


def test_only_memory_of_the_host_that_nothing_watches_is_written_past_torch() -> None:
    class Other(torch.Tensor):
        pass

    assert rounding._plain(torch.zeros(3)) and not rounding._plain(torch.zeros(3, device="meta"))
    assert not rounding._plain(torch.zeros(3).as_subclass(Other)) and not rounding._plain(torch.zeros(3).to_sparse())
    watched = torch.zeros(3, requires_grad=True)
    assert not rounding._plain(watched)
    with torch.no_grad():
        assert rounding._plain(watched)


# -- what is packed ---------------------------------------------------------------------------------------------------


def packed_of(count: int, scales: int, dtype: torch.dtype, seed: int = 0) -> Packed:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-127, 128, (1, count), generator=draw).to(torch.int8)
    return Packed(numbers, torch.randint(150, 200, (1, scales), generator=draw).to(torch.uint8), dtype)


def lying_of(packed: Packed) -> Any:
    """The same, in one piece of memory behind a byte of something else, read without a view of it."""
    memory = np.zeros(packed.numbers.numel() + packed.codes.numel() + 1, np.uint8)
    memory[1 : 1 + packed.numbers.numel()] = packed.numbers.view(torch.uint8).numpy()[0]
    memory[1 + packed.numbers.numel() :] = packed.codes.numpy()[0]
    numbers = Place.at(1, torch.int8, packed.numbers.shape)
    codes = Place.at(1 + packed.numbers.numel(), torch.uint8, packed.codes.shape)
    pair = rounding._Pair.of(numbers, codes, packed.dtype)
    return rounding._Unread(pair, TensorViews(memory, memory.ctypes.data))


def read_plainly(packed: Packed) -> torch.Tensor:
    group = packed.numbers.numel() // packed.codes.numel()
    scales = torch.tensor([scale_of(code) for code in packed.codes.flatten().tolist()], dtype=torch.float32)
    values = packed.numbers.reshape(-1).float() * scales.repeat_interleave(group)
    return values.view(packed.numbers.shape).to(packed.dtype)


@pytest.mark.parametrize("lying", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_are_written_where_scales_divide_them_and_nothing_elsewhere(dtype: torch.dtype, lying: bool) -> None:
    for count, scales, outer in itertools.product((6, 12, 16, 24), (1, 2, 3, 4, 5, 12, 0), (1, 2, 3, 4, 5, 8)):
        packed = packed_of(count, scales, dtype)
        fits = bool(scales) and not count % scales and not count % outer and not (count // outer) % (count // scales)
        step = count // outer + 3
        target = torch.full((outer * step + 40,), 7.0, dtype=dtype)
        read: Any = lying_of(packed) if lying else packed
        assert read.put(read.codec(), target.data_ptr(), outer, step) is fits, (count, scales, outer)
        expected = torch.full_like(target, 7.0)
        if fits:
            part = read_plainly(packed).view(outer, -1)
            expected[: outer * step].view(outer, step)[:, : part.shape[1]] = part
        assert torch.equal(target, expected), (count, scales, outer)


@pytest.mark.parametrize("lying", [False, True])
def test_scales_that_do_not_divide_the_numbers_are_no_values(lying: bool) -> None:
    packed: Any = packed_of(6, 4, torch.float32)
    packed = lying_of(packed) if lying else packed
    with pytest.raises(RuntimeError):
        packed.read()


def test_what_lies_oddly_is_read_all_the_same() -> None:
    """Numbers with gaps, scales with gaps or of another type: none of this is for the codec."""
    numbers = torch.randint(-100, 100, (1, 4, 32), dtype=torch.int8)
    codes = torch.randint(150, 200, (1, 8), dtype=torch.uint8)
    gaps = torch.zeros(1, 4, 64, dtype=torch.int8)[..., ::2].copy_(numbers)
    odd = torch.zeros(1, 16, dtype=torch.uint8)[:, ::2].copy_(codes)

    class Other(torch.Tensor):
        pass

    expected = read_plainly(Packed(numbers, codes, torch.float32))
    packed = [(gaps, codes), (numbers, odd), (numbers, codes.int()), (numbers.as_subclass(Other), codes)]
    packed += [(numbers, codes.as_subclass(Other)), (numbers.int(), codes), (numbers, codes)]
    for index, pair in enumerate(packed):
        found = Packed(*pair, torch.float32)
        assert (found.codec() is not None) == (index == 6), index
        assert torch.equal(found.read(), expected) and found.shape == (1, 4, 32)
    meta = Packed(numbers.to("meta"), codes.to("meta"), torch.float32)
    assert meta.codec() is None and meta.device.type == "meta"
    assert Packed(numbers, codes.to("meta"), torch.float32).codec() is None


def test_scales_of_another_type_in_a_slot_are_read_all_the_same() -> None:
    layer = {
        "conv.0:float32": torch.randint(-100, 100, (1, 4, 32), dtype=torch.int8),
        "conv.0:scale": torch.randint(150, 200, (1, 8)).to(torch.int16),
    }
    (lying,) = rounding_of("int8").unread(LayerTensors.captured([layer]).layers)
    expected = read_plainly(Packed(*layer.values(), torch.float32))
    assert torch.equal(rounding_of("int8").restored(lying)["conv.0"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_is_written_over_tensors_of_other_types_and_shapes(dtype: torch.dtype, either_way: None) -> None:
    packed = packed_of(64, 4, dtype)
    packed.numbers = packed.numbers.view(1, 4, 16)
    expected = read_plainly(packed)
    targets = [torch.zeros(1, 4, 16, dtype=other) for other in DTYPES]
    targets += [torch.zeros(3, 4, 16, dtype=dtype), torch.zeros(1, 4, 20, dtype=dtype)[..., 2:18]]
    targets += [torch.zeros(1, 16, 4, dtype=dtype).transpose(1, 2), torch.zeros(1, 4, 32, dtype=dtype)[..., ::2]]
    targets += [torch.nn.Parameter(torch.zeros(1, 4, 16, dtype=dtype), requires_grad=False)]
    for target in targets:
        packed.write(target)
        assert torch.equal(target, expected.to(target.dtype).expand(target.shape)), (target.shape, target.dtype)
    watched = torch.zeros(1, 4, 16, dtype=dtype, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        packed.write(watched)
    assert not watched.any()


def test_tensors_are_chained_as_torch_joins_what_they_stand_for(either_way: None) -> None:
    """Packed and plain ones, of several types and lengths, in any dimension, a few of them in a slot."""
    draw, kept = np.random.RandomState(1), rounding_of("int8")
    for case in range(80):
        dtypes = [DTYPES[draw.choice([0, 0, 0, 2, 1])] for _ in range(3)]
        rows, heads, dim = draw.choice([1, 2]), draw.choice([1, 3]), int(draw.choice([-3, -2, -1, 1, 2]))
        parts, plain = [], []
        for dtype in dtypes:
            shape = [int(rows), int(heads), int(draw.choice([2, 5])), 16]
            shape[dim] = int(draw.choice([1, 4, 8, 16]))
            shape = shape if dim == -2 else [*shape[:2], shape[2] if dim in (2, -2) else 5, shape[3]]
            value = torch.randn(shape, generator=torch.Generator().manual_seed(case)).to(dtype)
            layer = kept.kept({"keys": value})
            if draw.rand() < 0.4:
                (lying,) = kept.unread(LayerTensors.captured([layer]).layers)
                parts.append(kept.packed(lying)["keys"])
            else:
                parts.append(kept.packed(layer)["keys"] if draw.rand() < 0.7 else value)
            plain.append(parts[-1].read() if isinstance(parts[-1], Packed) else value)
        found = chained(parts, dim)
        if any(isinstance(part, Packed) for part in parts):  # of the type of the first one
            plain = [part.to(dtypes[0]) for part in plain]
        assert torch.equal(found, torch.cat(plain, dim=dim)) and found.is_contiguous(), (case, dtypes, dim)
        assert all(found.data_ptr() != part.data_ptr() for part in plain)


def test_nothing_before_or_behind_it_changes_what_is_chained(either_way: None) -> None:
    packed, nothing = packed_of(64, 4, torch.float32), torch.empty(1, 2, 0, 16)
    packed.numbers = packed.numbers.view(1, 2, 2, 16)
    for parts in ([nothing, packed], [packed, nothing]):
        assert torch.equal(chained(parts, -2), read_plainly(packed))
    assert chained([nothing, nothing], -2).shape == nothing.shape


def test_parts_that_do_not_fit_together_are_not_chained(either_way: None) -> None:
    for heads in (2, 4):
        parts = [packed_of(count * 64, count, torch.float32) for count in (3, heads)]
        for part, count in zip(parts, (3, heads), strict=True):
            part.numbers = part.numbers.view(1, count, 4, 16)
        with pytest.raises(RuntimeError):
            chained(parts, -2)
        assert chained(parts, 1).shape == (1, 3 + heads, 4, 16)


def test_what_was_not_rounded_is_read_as_it_was_kept() -> None:
    kept, layer = rounding_of("bf16"), {"ids": torch.arange(3), "seen": 7, "conv.0": torch.ones(1, 4).half()}
    assert kept.read(kept.kept(layer)) == layer == kept.packed(layer)
    assert list(kept.restored(layer)) == list(layer) and kept.restored(layer)["ids"] is not layer["ids"]


def test_nothing_but_what_is_rounded_is_written_back(either_way: None) -> None:
    kept, counts = rounding_of("bf16"), torch.arange(5)
    given = {"conv.0": torch.randn(1, 4, 32), "recurrent.0": torch.randn(1, 32).half(), "ids": counts, "seen": 3}
    held = {**given, "recurrent.0": None, "ids": None, "seen": None, "conv.0": torch.zeros(1, 4, 32)}
    numbers = kept.kept(given)
    kept.write_back(numbers, held)
    assert torch.equal(held["conv.0"], kept.read(numbers)["conv.0"]) and held["seen"] is None


def test_a_layer_of_which_something_is_plain_is_read_whole() -> None:
    layout = SimpleNamespace(pairs=None, places=((("ids", Place.at(0, torch.int64, (2,))),), ()))
    memory = TensorViews(np.arange(1, 17, dtype=np.uint8))
    for number, plain, names in ((0, {"seen": 7}, ["ids", "seen"]), (0, {}, ["ids"]), (1, {"seen": 1}, ["seen"])):
        found = rounding._lying(rounding.Lying(memory, layout, number, plain))  # type: ignore[arg-type]
        assert list(found) == names and found.get("seen") == plain.get("seen")
    layout.pairs = ((), ())  # it is looked at once
    assert rounding._lying(rounding.Lying(memory, layout, 0, {})) == {}  # type: ignore[arg-type]
