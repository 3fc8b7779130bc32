"""How states, keys and values are kept: as they are, or rounded to 16 or to 8 bits with a scale for a few channels.

What is rounded becomes whole numbers, one scale for each group of neighbours along the last dimension (of keys and
values; of states of fixed size along all of them). A scale belongs to one token and one head, or to one state, so that
no rounding depends on where a span begins or ends. Scales have few bits and are chosen such that to round what is
rounded changes nothing, to the bit. Therefore a live cache may be rounded wherever its prompt is cut, and what is kept
of it later is still the very value that it went on from.

Numbers that are no floats, such as token ids, are never rounded. Casts to bfloat16 would be simpler, and moved the
logits of a third of the tiny models by more than 5e-3; whole numbers of as many bits move them 40 times less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from .tensors import Tensors


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
        """What is kept of one layer: tensors that share nothing with those that they are given.

        Args:
            layer: tensors of a batch of one row, by name; and whole numbers, which are kept as they are.
        """
        return {name: own(value) if torch.is_tensor(value) else value for name, value in layer.items()}

    def read(self, layer: Tensors) -> Tensors:
        """The tensors of one layer from what `kept` gave; not to be changed."""
        return layer

    def restored(self, layer: Tensors) -> Tensors:
        """The tensors of one layer from what `kept` gave, to be changed at will."""
        return {name: own(value) if torch.is_tensor(value) else value for name, value in self.read(layer).items()}


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
        """What is kept of one layer: whole numbers `NAME:DTYPE` in the shape of the tensor, and bytes `NAME:scale`.

        Raises:
            NotRoundableError: it holds values that no scale fits.
        """
        found: Tensors = {}
        fits: list[tuple[str, torch.Tensor]] = []
        for name, value in layer.items():
            width = _EIGHT if part_of(name) in self.eight else _SIXTEEN
            if not torch.is_tensor(value) or not _rounds(value, width):
                found[name] = own(value) if torch.is_tensor(value) else value
                continue
            numbers, codes, fit = _encoded(name, value.detach(), width)
            found[f"{name}:{_word(value.dtype)}"], found[f"{name}:{_SCALE}"] = numbers, codes
            fits.append((name, fit))
        if fits and not bool(torch.stack([fit for _, fit in fits]).all()):  # one wait for an accelerator
            name = next(name for name, fit in fits if not bool(fit))
            raise NotRoundableError(f"{name} holds values that are not finite, or beyond 1e8, which cannot be rounded")
        return found

    def read(self, layer: Tensors) -> Tensors:
        found: Tensors = {}
        for key, value in layer.items():
            name, _, word = key.partition(":")
            if not word:
                found[name] = value
            elif word != _SCALE:
                found[name] = _decoded(value, layer[f"{name}:{_SCALE}"], getattr(torch, word))
        return found

    def restored(self, layer: Tensors) -> Tensors:
        read = self.read(layer)
        return {
            name: own(value) if value is layer.get(name) and torch.is_tensor(value) else value
            for name, value in read.items()
        }


def _rounds(value: torch.Tensor, width: _Width) -> bool:
    return value.is_floating_point() and value.element_size() >= width.least_bytes and value.numel() > 0


def _encoded(name: str, value: torch.Tensor, width: _Width) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers, codes of scales, and whether these hold the values, a tensor of one."""
    by_token = name in _BY_TOKEN
    wide = value.dtype in _WIDE
    group = _group(value.shape[-1] if by_token else value[0].numel(), width.group if wide else 2 * width.group)
    groups = value.float().reshape(-1, group)
    largest = torch.linalg.vector_norm(groups, math.inf, dim=-1)
    grid = _grid(width.whole, width.fine and wide, value.dtype, value.device)
    codes = grid.codes(largest)
    numbers = groups.mul(_table(value.device, True)[codes][:, None]).round_().clamp_(-grid.most, grid.most)
    shape = (*value.shape[:-1], -1) if by_token else (len(value), -1)
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
    return _Grid(most, torch.tensor(borders, device=device), every, lowest, highest, limit)


@cache
def _table(device: torch.device, inverse: bool) -> torch.Tensor:
    scales = [_scale(code) for code in range(_CODES)]
    return torch.tensor([1 / scale for scale in scales] if inverse else scales, device=device)


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


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy that shares nothing, so that its bytes are exactly what it holds."""
    plain = tensor.detach() if tensor.requires_grad else tensor
    return plain.clone(memory_format=torch.contiguous_format)


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
