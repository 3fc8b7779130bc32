"""What the states of one model must look like: measured on the model, and held against every file before it is used.

A file may be whole, well named and still hold anything: another model's states, a layer too few, a tensor of a shape
that broadcasts. What is restored is therefore of exactly the names, types, shapes and devices that a forward of this
model leaves in its own cache layers, and finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..errors import DamagedFileError
from . import states
from .rounding import EXACT, Rounding, plain_name, sound
from .tensors import LayerTensors, Tensors, device_of


class Layout:
    """Names, types, shapes and devices of every layer's states. Measured by one short forward when first asked for.

    Args:
        probe: gives a fresh cache that two tokens of the model have filled, and the model's output.
        rounding: how its states are kept.
    """

    def __init__(self, probe: Callable[[], tuple[Any, Any]], rounding: Rounding = EXACT) -> None:
        self._probe, self._rounding = probe, rounding
        self._measured = False
        self._windows: tuple[int, ...] = ()
        self._state = self._kv = self._final = _Shapes((), ())

    @property
    def has_kv(self) -> bool:
        """Whether any layer keeps keys and values of every token."""
        self._measure()
        return any(self._kv.layers)

    def state_bytes(self, position: int, final: bool = False) -> int:
        """Bytes of the tensors of a state after `position` tokens, with logits where it is that of a whole prompt."""
        self._measure()
        layers = self._final.layers if final else self._state.layers
        tensors = [
            (math.prod(self._shape(index, name, value, position)), value.element_size())
            for index, layer in enumerate(layers)
            for name, value in layer.items()
            if torch.is_tensor(value)
        ]
        return sum(count * size for count, size in tensors)

    def kv_bytes(self, start: int, end: int) -> int:
        """Bytes of the tensors of a span of keys and values."""
        self._measure()
        held: int = sum(value.nbytes for layer in self._kv.layers for value in layer.values())
        return held // states.PROBE_TOKENS * (end - start)

    def check_state(self, payload: LayerTensors, position: int, final: bool = False) -> None:
        """Holds a state against the model's own.

        Raises:
            DamagedFileError: it cannot be the model's state after `position` tokens; says in which layer and tensor.
        """
        self._measure()
        for index, name, value, like in (self._final if final else self._state).check(payload):
            place = f"{name!r} of layer {index}"
            if torch.is_tensor(like):
                _check_tensor(place, value, like, self._shape(index, name, like, position))
                _check_sound(place, name, payload.layers[index])
            elif type(value) is not int or value != position:  # all that is no tensor counts the tokens seen
                raise DamagedFileError(f"{place} is {str(value)[:40]!r}, and must be {position}")

    def check_kv(self, payload: LayerTensors, start: int, end: int) -> None:
        """Holds the keys and values of the tokens from `start` to `end` against the model's own.

        Raises:
            DamagedFileError: they cannot be the model's; says in which layer and tensor.
        """
        self._measure()
        for index, name, value, like in self._kv.check(payload):
            place, shape = (
                f"{name!r} of layer {index}",
                _resized(like, states.TOKEN_DIMS[plain_name(name)], end - start),
            )
            _check_tensor(place, value, like, shape)
            _check_sound(place, name, payload.layers[index])

    def _measure(self) -> None:
        if self._measured:
            return
        cache, output = self._probe()
        self._windows = tuple(getattr(layer, "sliding_window", 1) - 1 for layer in cache.layers)
        state = states.capture_state(cache, self._rounding)
        self._state, self._final = _Shapes.of(state), _Shapes.of(states.with_logits(state, output.logits))
        self._kv = _Shapes.of(states.capture_kv(cache, 0, states.PROBE_TOKENS, self._rounding))
        self._measured = True

    def _shape(self, index: int, name: str, like: torch.Tensor, position: int) -> list[int]:
        name = plain_name(name)
        if name not in states.TOKEN_DIMS:
            return list(like.shape)
        return _resized(like, states.TOKEN_DIMS[name], min(position, self._windows[index]))


class _Shapes(NamedTuple):
    """What was captured, without its values."""

    layers: tuple[Tensors, ...]
    devices: tuple[str, ...]

    @classmethod
    def of(cls, captured: LayerTensors) -> _Shapes:
        layers = tuple(
            {name: value.to("meta") if torch.is_tensor(value) else value for name, value in layer.items()}
            for layer in captured.layers
        )
        return cls(layers, tuple(map(device_of, captured.layers)))

    def check(self, payload: LayerTensors) -> Iterator[tuple[int, str, Any, Any]]:
        """Layer, name, value and what it should be like, of everything in a payload that has just these names.

        Raises:
            DamagedFileError: it has not.
        """
        if len(payload.layers) != len(self.layers):
            raise DamagedFileError(f"it has {len(payload.layers)} layers, the model has {len(self.layers)}")
        if (payload.devices or ("cpu",) * len(self.layers)) != self.devices:
            raise DamagedFileError(f"its layers are not from where the model's are, which is {self.devices}")
        for index, (layer, wanted) in enumerate(zip(payload.layers, self.layers, strict=True)):
            if set(layer) != set(wanted):
                odd = sorted(set(layer) ^ set(wanted))[0]
                raise DamagedFileError(
                    f"layer {index} lacks {odd!r}" if odd in wanted else f"layer {index} has {odd!r}"
                )
            yield from ((index, name, layer[name], like) for name, like in wanted.items())


def _resized(like: torch.Tensor, dim: int, length: int) -> list[int]:
    shape = list(like.shape)
    shape[dim] = length
    return shape


def _check_sound(place: str, name: str, layer: Tensors) -> None:
    if not sound(name, layer):
        raise DamagedFileError(f"{place} stands for values that are not finite")


def _check_tensor(place: str, value: Any, like: torch.Tensor, shape: list[int]) -> None:
    if not torch.is_tensor(value):
        raise DamagedFileError(f"{place} is no tensor")
    if value.dtype != like.dtype or list(value.shape) != shape:
        raise DamagedFileError(
            f"{place} is {value.dtype} of shape {tuple(value.shape)}, and must be {like.dtype} of {tuple(shape)}"
        )
    if value.dtype.is_floating_point and not _finite(value):
        raise DamagedFileError(f"{place} has values that are not finite")


def _finite(value: torch.Tensor) -> bool:
    """Whether all numbers are: the least and the greatest are NaN where any is, and are found in one pass."""
    if not value.numel():
        return True
    least, greatest = torch.aminmax(value)
    return math.isfinite(least.item()) and math.isfinite(greatest.item())
