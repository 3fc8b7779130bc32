"""Tensors of layers that lie together in one piece of host memory, and become tensors only while they are read.

A tensor takes a few hundred bytes of the heap besides its numbers, and a checkpoint has some hundred tensors. Made
between the short-lived tensors of a prefill, and kept, they are cut from the gaps that those leave, so that the next
one of the same size finds no gap that is large enough, and the heap grows: on one model by half of what was stored. So
what is kept are no tensors, but a piece of memory apart from the heap (see `store.slabs`), and where in it everything
lies, which checkpoints of one model share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch

from ..store.slabs import Bytes, memory, taken


Tensors = dict[str, Any]
BLOCK_BYTES = 256  # of which each tensor in an allocation of a device takes a multiple, for copies of wide numbers


class Place(NamedTuple):
    """Where a dense tensor lies.

    Attributes:
        start: in numbers of its type, from the first byte of the memory.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    @classmethod
    def at(cls, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Place:
        """The place of a tensor from a byte on, at which numbers of its type can begin."""
        strides = [*accumulate(shape[:0:-1], mul, initial=1)][::-1] if shape else []
        return cls(dtype, tuple(shape), tuple(strides), start // dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorViews(dict[torch.dtype, torch.Tensor]):
    """Reads tensors in a piece of memory: views, which hold it for as long as they or views of them live.

    Attributes:
        address: where the memory begins, for whoever reads it without a tensor while this one lives.
    """

    def __init__(self, held: Bytes, address: int = 0) -> None:
        self._held, self.address = held, address

    def __missing__(self, dtype: torch.dtype) -> torch.Tensor:
        """All of the memory that makes whole numbers of one type."""
        count = len(self._held) // dtype.itemsize
        found = torch.frombuffer(self._held, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
        self[dtype] = found
        return found

    def tensor(self, place: Place) -> torch.Tensor:
        """The one at a place."""
        return self[place.dtype].as_strided(place.shape, place.strides, place.start)


Places = tuple[tuple[tuple[str, Place], ...], ...]  # of each layer, the names of its tensors and where they lie


class Laid:
    """What lies in a piece of memory, one object for many pieces.

    Attributes:
        places: of all tensors.
        pairs: what `rounding` has found in them; None before it has looked.
    """

    __slots__ = ("pairs", "places")

    def __init__(self, places: Places) -> None:
        self.places = places
        self.pairs: Any = None


class Lying(NamedTuple):
    """A layer of which no tensor has been made.

    Attributes:
        number: of the layer in the layout.
        plain: what is no tensor.
    """

    reader: TensorViews
    layout: Laid
    number: int
    plain: Tensors


class Slotted(Sequence[Tensors]):
    """Layers, made anew whenever they are read: a layer's tensors are views of the same memory each time.

    Attributes:
        nbytes: what the memory takes, which is of whole pages, and what all tensors of layers that lie elsewhere do.
    """

    __slots__ = ("_address", "_before", "_held", "_layout", "_plain", "nbytes")

    def __init__(self, held: Bytes, layout: Places, plain: dict[int, Tensors], before: Sequence[Tensors] = ()) -> None:
        """Takes the memory as it is.

        Args:
            held: the memory.
            layout: what lies in it.
            plain: what is no tensor, by number of the layer in the layout.
            before: layers that lie elsewhere, the first ones.
        """
        self._held, self._plain, self._before = held, plain, before
        self._layout, self._address = _known(layout), held.ctypes.data
        self.nbytes: int = taken(len(held)) + taken_by(before)

    def __len__(self) -> int:
        return len(self._before) + len(self._layout.places)

    def __iter__(self) -> Iterator[Tensors]:
        yield from self._before
        reader = TensorViews(self._held)
        yield from (self._layer(index, reader) for index in range(len(self._layout.places)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        index = range(len(self))[index] - len(self._before)
        return self._before[index] if index < 0 else self._layer(index, TensorViews(self._held))

    def lying(self) -> tuple[Lying | Tensors, ...]:
        """The layers, those that lie in memory of this kind without tensors."""
        before = self._before.lying() if isinstance(self._before, Slotted) else self._before
        reader, layout, plain = TensorViews(self._held, self._address), self._layout, self._plain
        return (*before, *(Lying(reader, layout, index, plain.get(index, {})) for index in range(len(layout.places))))

    def _layer(self, index: int, reader: TensorViews) -> Tensors:
        found = {name: reader.tensor(place) for name, place in self._layout.places[index]}
        return found | self._plain[index] if index in self._plain else found


def slotted(layers: Sequence[Tensors], before: Sequence[Tensors] = ()) -> Slotted | None:
    """Dense copies of the tensors of layers, in one piece of memory; None where it holds none, or cannot hold one.

    Args:
        layers: with plain tensors in host memory.
        before: layers to be put before them, as they are.
    """
    values = [value for layer in layers for value in layer.values() if torch.is_tensor(value)]
    if not values or not all(type(value) is torch.Tensor and value.device.type == "cpu" for value in values):
        return None
    layout, nbytes = _laid_out(_wanted(layers))
    held = memory(nbytes)
    reader = TensorViews(held)
    for layer, places in zip(layers, layout, strict=True):
        for name, place in places:
            value = layer[name]
            reader.tensor(place).copy_(value.detach() if value.requires_grad else value)
    plain = {
        index: {name: value for name, value in layer.items() if not torch.is_tensor(value)}
        for index, layer in enumerate(layers)
        if not all(map(torch.is_tensor, layer.values()))
    }
    return Slotted(held, layout, plain, before)


class Blocked(tuple[Tensors, ...]):
    """Layers whose tensors are views of one allocation of a device, or of few.

    Attributes:
        nbytes: of all their places.
    """

    nbytes: int

    @classmethod
    def of(cls, layers: Iterable[Tensors]) -> Blocked:
        """Layers that lie so."""
        found = cls(layers)
        found.nbytes = sum(-(-value.nbytes // BLOCK_BYTES) * BLOCK_BYTES for value in tensors_of(found))
        return found


def blocked(layers: Sequence[Tensors], before: Sequence[Tensors], device: torch.device) -> Blocked:
    """Dense copies of the tensors of layers in one allocation, made by the current stream of the device.

    Torch's allocator there gives equal blocks to equal payloads, and takes a block back when the last view of it is
    gone. One for each tensor would be rounded up, and cut from the gaps between others.

    Args:
        layers: with at least one tensor, all of them on the device.
        before: layers to be put before them, as they are.
    """
    layout, nbytes = _laid_out(_wanted(layers), BLOCK_BYTES)
    block = torch.empty(nbytes, dtype=torch.uint8, device=device)
    typed = {dtype: block.view(dtype) for dtype in {place.dtype for layer in layout for _, place in layer}}
    made = []
    for layer, places in zip(layers, layout, strict=True):
        copies = dict(layer)
        for name, (dtype, shape, strides, start) in places:
            copies[name] = typed[dtype].as_strided(shape, strides, start).copy_(layer[name].detach())
        made.append(copies)
    return Blocked.of((*before, *made))


def taken_by(layers: Sequence[Tensors]) -> int:
    """Bytes that all their tensors take where they lie."""
    if isinstance(layers, (Slotted, Blocked)):
        return layers.nbytes
    return sum(value.nbytes for value in tensors_of(layers))


def tensors_of(layers: Iterable[Tensors]) -> Iterable[torch.Tensor]:
    """All their tensors, in order."""
    return (value for layer in layers for value in layer.values() if torch.is_tensor(value))


_Wanted = tuple[tuple[tuple[str, torch.dtype, torch.Size], ...], ...]


def _wanted(layers: Sequence[Tensors]) -> _Wanted:
    """Of each layer, the tensors by name, with type and shape."""
    return tuple(
        tuple((name, v.dtype, v.shape) for name, v in layer.items() if torch.is_tensor(v)) for layer in layers
    )


@lru_cache(maxsize=64)
def _laid_out(wanted: _Wanted, step: int = 1) -> tuple[Places, int]:
    """Where tensors lie one behind the other, those of the widest numbers first, so that each is aligned; their bytes.

    Args:
        step: bytes of which each takes a multiple.
    """
    places: dict[tuple[int, str], Place] = {}
    start = 0
    all_ = ((index, *tensor) for index, layer in enumerate(wanted) for tensor in layer)
    for index, name, dtype, shape in sorted(all_, key=lambda tensor: -tensor[2].itemsize):
        place = places[index, name] = Place.at(start, dtype, shape)
        start += -(-place.nbytes // step) * step
    layout = tuple(tuple((name, places[index, name]) for name, _, _ in layer) for index, layer in enumerate(wanted))
    return layout, start


@lru_cache(maxsize=64)
def _known(places: Places) -> Laid:
    """The layout of these places, the same object for all that are alike and were used lately."""
    return Laid(places)
