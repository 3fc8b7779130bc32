"""How states, keys and values are kept: as they are, or rounded to 16 or to 8 bits with a scale for a few channels.

What is rounded becomes whole numbers, one scale for each group of neighbours along the last dimension (of keys and
values; of states of fixed size along all of them). A scale belongs to one token and one head, or to one state, so that
no rounding depends on where a span begins or ends. Scales have few bits and are chosen such that to round what is
rounded changes nothing, to the bit. Therefore a live cache may be rounded wherever its prompt is cut, and what is kept
of it later is still the very value that it went on from.

In host memory `_codec.pyx` makes whole numbers of floats, and floats of those, in one pass each. Torch does the same
elsewhere, for other types of floats, and where that has not been compiled: with the same bits.

Numbers that are no floats, such as token ids, are never rounded. Casts to bfloat16 would be simpler, and moved the
logits of a third of the tiny models by more than 5e-3; whole numbers of as many bits move them 40 times less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from .slotted import Laid, Lying, Place, Slotted, TensorViews
from .tensors import Tensors, own


try:
    from .._codec import Codec
except ImportError:  # the same bits, some ten times slower
    Codec = None  # type: ignore[assignment, misc]


# A scale is one byte: (4 + its two lowest bits) / 4 * 2 ** (the other six - _BIAS).
_BIAS, _CODES = 44, 256
_SCALE = "scale"
# What is kept for each token: groups lie within the last dimension.
_BY_TOKEN = ("keys", "values", "indexer_keys")
_WIDE = (torch.float32, torch.float64)


class NotRoundableError(ValueError):
    """A state holds values that no scale fits: infinite, not a number, or beyond 10^8."""


@dataclass(frozen=True)
class Rounding:
    """What is kept of a tensor. This one keeps everything, exactly.

    Attributes:
        name: as of `SparseCacheConfig.storage`.
    """

    name: str = "exact"

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded."""
        return False

    @property
    def scheme(self) -> str:
        """What tells this way of keeping tensors from any other; files of another one are not read."""
        return self.name

    def kept(self, layer: Tensors) -> Tensors:
        """What is to be kept of one layer; what is not rounded are still the tensors that it is given.

        Args:
            layer: tensors of a batch of one row, by name; and whole numbers, which are kept as they are.
        """
        return layer

    def read(self, layer: Tensors) -> Tensors:
        """The tensors of one layer from what `kept` gave; not to be changed."""
        return layer

    def unread(self, layers: Sequence[Tensors]) -> Sequence[Tensors | Lying]:
        """The layers from what `kept` gave of each, for `restored` and `packed`, which read what is wanted of them."""
        return tuple(layers)

    def restored(self, layer: Any) -> Tensors:
        """The tensors of one layer from what `kept` gave, to be changed at will."""
        return {name: own(value) if torch.is_tensor(value) else value for name, value in self.read(layer).items()}

    def packed(self, layer: Any) -> dict[str, Any]:
        """As `read`, with each rounded tensor as it is kept, for `chained`."""
        return self.read(layer)

    def write_back(self, kept: Tensors, held: Tensors) -> None:
        """Write what `kept` gave into the floats that it was given."""


@dataclass(frozen=True)
class _Width:
    """What becomes of floats.

    Attributes:
        whole: the type of the whole numbers.
        group: neighbours that share a scale, about as many.
        fine: whether scales between the powers of two are taken, where the result can hold them.
        least_bytes: of a float that becomes smaller by it.
    """

    whole: torch.dtype
    group: int
    fine: bool
    least_bytes: int


_EIGHT, _SIXTEEN = _Width(torch.int8, 16, True, 2), _Width(torch.int16, 32, False, 4)
PARTS = ("attention", "conv", "recurrent")  # keys and values, those of windows too; and the two kinds of states


def part_of(name: str) -> str:
    """Which of `PARTS` a tensor of a layer belongs to."""
    return "attention" if name in _BY_TOKEN else name.partition(".")[0]


@dataclass(frozen=True)
class Rounded(Rounding):
    """Keeps floats as whole numbers with scales.

    Attributes:
        eight: the parts that are kept in 8 bits, the others in 16.
    """

    eight: frozenset[str] = frozenset()

    @property
    def rounds(self) -> bool:
        return True

    @property
    def scheme(self) -> str:
        narrow = ", ".join(sorted(self.eight)) or "nothing"
        return f"16 bits in groups of {_SIXTEEN.group}, {narrow} in 8 bits in groups of {_EIGHT.group}"

    def kept(self, layer: Tensors) -> Tensors:
        """What is to be kept of one layer: whole numbers `NAME:DTYPE` in the shape of the tensor, bytes `NAME:scale`.

        What is not rounded are still the tensors that it is given.

        Raises:
            NotRoundableError: it holds values that no scale fits.
        """
        found: Tensors = {}
        fits: list[tuple[str, torch.Tensor | bool]] = []
        for name, value in layer.items():
            width = _EIGHT if part_of(name) in self.eight else _SIXTEEN
            if not torch.is_tensor(value) or not _rounds(value, width):
                found[name] = value
                continue
            numbers, codes, fit = _encoded(name, value.detach(), width)
            found[f"{name}:{_word(value.dtype)}"], found[f"{name}:{_SCALE}"] = numbers, codes
            fits.append((name, fit))
        asked = [fit for _, fit in fits if torch.is_tensor(fit)]
        # One wait for an accelerator.
        if any(fit is False for _, fit in fits) or (asked and not bool(torch.stack(asked).all())):
            name = next(name for name, fit in fits if not bool(fit))
            raise NotRoundableError(f"{name} holds values that are not finite, or beyond 1e8, which cannot be rounded")
        return found

    def read(self, layer: Tensors) -> Tensors:
        return {
            name: value.read() if isinstance(value, Packed) else value for name, value in self.packed(layer).items()
        }

    def unread(self, layers: Sequence[Tensors]) -> Sequence[Tensors | Lying]:
        return layers.lying() if isinstance(layers, Slotted) else tuple(layers)

    def restored(self, layer: Any) -> Tensors:
        found = self.packed(layer)
        for name, value in found.items():
            if isinstance(value, Packed):
                found[name] = value.read()
            elif torch.is_tensor(value):
                found[name] = own(value)
        return found

    def packed(self, layer: Any) -> dict[str, Any]:
        if type(layer) is Lying:
            return _lying(layer)
        found: dict[str, Any] = {}
        for key, value in layer.items():
            name, dtype, scales = _told(key)
            if dtype is not None:
                found[name] = Packed(value, layer[scales], dtype)
            elif key != scales:
                found[name] = value
        return found

    def write_back(self, kept: Tensors, held: Tensors) -> None:
        for name, value in self.packed(kept).items():
            if isinstance(value, Packed):
                value.write(held[name])


@dataclass(slots=True)  # made anew in every restore: frozen ones take three times as long
class Packed:
    """One rounded tensor.

    Attributes:
        numbers: whole ones, in the shape of the tensor.
        codes: of the scales.
        dtype: of the tensor.
    """

    numbers: torch.Tensor
    codes: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.numbers.shape

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.numbers.device

    def read(self) -> torch.Tensor:
        """The tensor, dense."""
        if (codec := self.codec()) is not None:
            target = torch.empty(self.shape, dtype=self.dtype)
            if self.put(codec, target.data_ptr(), 1, 0):
                return target
        return _decoded(self.numbers, self.codes, self.dtype)

    def write(self, target: torch.Tensor) -> None:
        """Write the tensor over another one of its shape, which may have gaps."""
        codec, runs = self.codec(), None
        if target.dtype == self.dtype and target.shape == self.numbers.shape and _plain(target):
            runs = _runs(target, target.numel() // (self.codes.numel() or 1))
        if codec is None or runs is None or not self.put(codec, target.data_ptr(), runs[0], runs[2]):
            target.copy_(_decoded(self.numbers, self.codes, self.dtype))

    def put(self, codec: Codec, address: int, outer: int, step: int) -> bool:
        """Write the tensor to memory of the host, in `outer` parts that begin `step` elements after each other.

        Returns:
            Whether the scales divide such a part; nothing has been written otherwise.
        """
        numbers, codes = self.numbers, self.codes
        count, scales = numbers.numel(), codes.numel()
        if not scales or count % scales or count % outer:
            return False
        inner, group = count // outer, count // scales
        if not group or inner % group:
            return False
        addresses = (numbers.data_ptr(), codes.data_ptr(), address)
        wide, half = numbers.dtype is torch.int16, self.dtype is torch.bfloat16
        codec.decode(addresses, (outer, inner, step, group), wide, half)
        return True

    def codec(self) -> Codec | None:
        """What decodes it, if it lies in memory of the host and without gaps."""
        numbers, codes = self.numbers, self.codes
        if (
            type(numbers) is type(codes) is torch.Tensor
            and numbers.is_cpu
            and codes.is_cpu
            and numbers.is_contiguous()
            and codes.is_contiguous()
            and codes.dtype is torch.uint8
        ):
            return _codec(numbers.dtype, self.dtype)
        return None


class _Pair(NamedTuple):
    """Where a rounded tensor lies.

    Attributes:
        first, second: bytes before its numbers and its codes.
        group: numbers that share a scale; 0 where scales do not divide them.
    """

    numbers: Place
    codes: Place
    dtype: torch.dtype
    shape: torch.Size
    first: int
    second: int
    length: int
    group: int
    wide: bool
    half: bool

    @classmethod
    def of(cls, numbers: Place, codes: Place, dtype: torch.dtype) -> _Pair:
        """The two places of a tensor of a type."""
        count, scales = math.prod(numbers.shape), math.prod(codes.shape)
        group = count // scales if scales and codes.dtype is torch.uint8 and not count % scales else 0
        first, second = (place.start * place.dtype.itemsize for place in (numbers, codes))
        wide, half = numbers.dtype is torch.int16, dtype is torch.bfloat16
        return cls(numbers, codes, dtype, torch.Size(numbers.shape), first, second, count, group, wide, half)


class _Unread(Packed):
    """A rounded tensor in a piece of memory, read without a view of it: a state has some hundred of these."""

    __slots__ = ("_pair", "_reader")

    def __init__(self, pair: _Pair, reader: TensorViews) -> None:
        self._pair, self._reader, self.dtype = pair, reader, pair.dtype

    @property
    def numbers(self) -> torch.Tensor:  # type: ignore[override]
        return self._reader.tensor(self._pair.numbers)

    @property
    def codes(self) -> torch.Tensor:  # type: ignore[override]
        return self._reader.tensor(self._pair.codes)

    @property
    def shape(self) -> torch.Size:
        return self._pair.shape

    @property
    def device(self) -> torch.device:
        return _HOST

    def codec(self) -> Codec | None:
        return _codec(self._pair.numbers.dtype, self.dtype)

    def put(self, codec: Codec, address: int, outer: int, step: int) -> bool:
        _, _, _, _, first, second, count, group, wide, half = self._pair
        inner = count // outer
        if not group or inner * outer != count or inner % group:
            return False
        begin = self._reader.address
        codec.decode((begin + first, begin + second, address), (outer, inner, step, group), wide, half)
        return True


def _lying(layer: Lying) -> dict[str, Any]:
    """As `Rounded.packed` gives it."""
    reader, layout, number, plain = layer
    if layout.pairs is None:
        layout.pairs = _pairs(layout)
    found = {
        name: _Unread(place, reader) if type(place) is _Pair else reader.tensor(place)
        for name, place in layout.pairs[number]
    }
    return found | plain if plain else found


def _pairs(layout: Laid) -> tuple[tuple[tuple[str, Place | _Pair], ...], ...]:
    """Of each layer, the tensors by name, and where what is kept of each lies."""
    found = []
    for layer in layout.places:
        told = [(*_told(key), key, place) for key, place in layer]
        lie = dict(layer)
        found.append(
            tuple(
                (name, place if dtype is None else _Pair.of(place, lie[scales], dtype))
                for name, dtype, scales, key, place in told
                if dtype is not None or key != scales
            )
        )
    return tuple(found)


def chained(parts: Sequence[torch.Tensor | Packed], dim: int) -> torch.Tensor:
    """Tensors as one, behind each other in a dimension; what is packed goes straight to its place."""
    if not any(isinstance(part, Packed) for part in parts):
        return torch.cat([*parts], dim=dim)  # type: ignore[list-item]
    shape, dtype = parts[0].shape, parts[0].dtype
    dim %= len(shape)
    before, after = shape[:dim], shape[dim + 1 :]
    length = sum(part.shape[dim] for part in parts)
    target = torch.empty((*before, length, *after), dtype=dtype, device=parts[0].device)
    outer, each, at = math.prod(before), math.prod(after), 0
    begin = target.data_ptr() if target.is_cpu and target.numel() else 0
    for part in parts:
        along, codec = part.shape[dim], part.codec() if isinstance(part, Packed) and begin else None
        if not (
            codec is not None
            and isinstance(part, Packed)
            and part.dtype is dtype
            and (part.shape == shape or part.shape == (*before, along, *after))
            and part.put(codec, begin + at * each * dtype.itemsize, outer, length * each)
        ):
            place = target.narrow(dim, at, along)
            part.write(place) if isinstance(part, Packed) else place.copy_(part)
        at += along
    return target


_HOST = torch.device("cpu")
_WIDTHS = {torch.int8: _EIGHT, torch.int16: _SIXTEEN}


def _plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is memory of the host that nothing watches."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def _runs(tensor: torch.Tensor, group: int) -> tuple[int, int, int, int] | None:
    """How groups lie in a tensor: (outer, inner, step, group) as `Codec` takes it; nothing where they do not so."""
    inner = 1
    shape, strides = tensor.shape, tensor.stride()
    dim = len(shape) - 1
    while dim >= 0 and (strides[dim] == inner or shape[dim] == 1):
        inner *= shape[dim]
        dim -= 1
    outer, step = 1, inner
    if dim >= 0:
        step = strides[dim]
        for left in range(dim, -1, -1):
            if shape[left] != 1 and strides[left] != step * outer:
                return None
            outer *= shape[left]
    if not group or inner % group or step < inner:
        return None
    return outer, inner, step, group


@cache
def _codec(whole: torch.dtype, dtype: torch.dtype) -> Codec | None:
    """For these whole numbers and these floats, if there is one."""
    if Codec is None or whole not in _WIDTHS or dtype not in (torch.float32, torch.bfloat16):
        return None
    host = torch.device("cpu")
    grid = _grid(whole, _WIDTHS[whole].fine and dtype in _WIDE, dtype, host)
    tables = (grid.borders, _table(host, False), _table(host, True))
    borders, scales, inverse = (table.numpy() for table in tables)
    return Codec(borders, scales, inverse, grid.every, grid.lowest, grid.highest, grid.limit)


def _rounds(value: torch.Tensor, width: _Width) -> bool:
    return value.is_floating_point() and value.element_size() >= width.least_bytes and value.numel() > 0


def _encoded(name: str, value: torch.Tensor, width: _Width) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | bool]:
    """Whole numbers, codes of scales, and whether these hold the values, which may be a tensor of one to wait for."""
    by_token = name in _BY_TOKEN
    wide = value.dtype in _WIDE
    group = _group(value.shape[-1] if by_token else value[0].numel(), width.group if wide else 2 * width.group)
    shape = (*value.shape[:-1], -1) if by_token else (len(value), -1)
    codec, runs = _codec(width.whole, value.dtype), _runs(value, group) if _plain(value) else None
    if codec is not None and runs is not None:
        numbers = torch.empty(value.shape, dtype=width.whole, device=value.device)
        codes = torch.empty(value.numel() // group, dtype=torch.uint8, device=value.device)
        addresses = (value.data_ptr(), numbers.data_ptr(), codes.data_ptr())
        half = value.dtype == torch.bfloat16
        fits = codec.encode(addresses, runs, width.whole == torch.int16, half)
        return numbers, codes.reshape(shape), fits
    groups = value.float().reshape(-1, group)
    largest = torch.linalg.vector_norm(groups, math.inf, dim=-1)
    grid = _grid(width.whole, width.fine and wide, value.dtype, value.device)
    codes = grid.codes(largest)
    numbers = groups.mul(_table(value.device, True)[codes][:, None]).round_().clamp_(-grid.most, grid.most)
    codes = codes.to(torch.uint8).reshape(shape)
    return numbers.to(width.whole).reshape(value.shape), codes, (largest <= grid.limit).all()


@dataclass(frozen=True)
class _Grid:
    """The scales for one type of numbers and one type of results.

    Attributes:
        most: the largest whole number.
        borders: between the scales that are used, ascending; a value at a border has the lower one.
        every: every how many-th scale is used.
        lowest, highest: codes of the smallest and the largest scale.
        limit: what no scale holds any more.
    """

    most: int
    borders: torch.Tensor
    every: int
    lowest: int
    highest: int
    limit: float

    def codes(self, largest: torch.Tensor) -> torch.Tensor:
        """The scales for groups whose largest values these are."""
        found = torch.bucketize(largest, self.borders, out_int32=True)
        found = found if self.every == 1 else found.mul_(self.every)
        return found.clamp_(self.lowest, self.highest)


def _scale(code: int) -> float:
    return (4 + code % 4) / 4 * 2.0 ** (code // 4 - _BIAS)


@cache
def _grid(whole: torch.dtype, fine: bool, result: torch.dtype, device: torch.device) -> _Grid:
    most, every = torch.iinfo(whole).max, 1 if fine else 4
    borders = []
    for code in range(every, _CODES, every):
        below, scale = _scale(code - every), _scale(code)
        # What is rounded with the scale below never lies above the border, what is rounded with this one never below.
        number = math.ceil(most * below / scale + 0.5)
        borders.append((number - 0.5) * scale)
    lowest, highest = 0, _CODES - every
    if result == torch.float16:  # multiples of its least number, below its largest
        lowest, highest = 4 * (_BIAS - 24), 4 * (_BIAS + 16 - most.bit_length())
    limit = most * _scale(highest) if result != torch.float16 else torch.finfo(torch.float16).max
    return _Grid(most, torch.tensor(borders, dtype=torch.float32, device=device), every, lowest, highest, limit)


@cache
def _table(device: torch.device, inverse: bool) -> torch.Tensor:
    scales = [_scale(code) for code in range(_CODES)]
    values = [1 / scale for scale in scales] if inverse else scales
    return torch.tensor(values, dtype=torch.float32, device=device)


def _decoded(numbers: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scales = _table(numbers.device, False).index_select(0, codes.reshape(-1).int())
    values = numbers.reshape(len(scales), -1).to(torch.float32).mul_(scales[:, None])
    return values.reshape(numbers.shape).to(dtype)


@cache
def _group(length: int, wanted: int) -> int:
    """How many neighbours share a scale: the most that divide a length, up to `wanted`, or else a few more."""
    divisors = [size for size in range(1, length + 1) if length % size == 0]
    fitting = [size for size in divisors if wanted // 2 < size <= wanted]
    return fitting[-1] if fitting else min((size for size in divisors if size > wanted), default=length)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=256)
def _told(key: str) -> tuple[str, torch.dtype | None, str]:
    """The name of a tensor by that of what is kept of it; its type, if that is numbers; and the name of its scales."""
    name, _, word = key.partition(":")
    return name, getattr(torch, word) if word and word != _SCALE else None, f"{name}:{_SCALE}"


def plain_name(name: str) -> str:
    """The name of the tensor of which something is kept under a name."""
    return name.partition(":")[0]


def sound(name: str, layer: Tensors) -> bool:
    """Whether whole numbers and scales that somebody wrote down are numbers that the result can hold."""
    base, _, word = name.partition(":")
    if word != "float16":
        return True
    return bool(_decoded(layer[name], layer[f"{base}:{_SCALE}"], torch.float16).isfinite().all())


EXACT = Rounding()


def rounding_of(storage: str, eight: Iterable[str] = PARTS) -> Rounding:
    """How tensors are kept under a setting of `SparseCacheConfig.storage`.

    Args:
        storage: the setting.
        eight: the parts of a family's state that may be kept in 8 bits under "int8"; others are kept in 16.
    """
    if storage == "exact":
        return EXACT
    return Rounded(storage, frozenset(eight if storage == "int8" else ()))
