"""What the store holds of a model: tensors of every layer, how they move between tiers and become a file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..checks import shown
from ..errors import DamagedFileError
from ..planning.cuts import Tokens
from ..store.headers import Header, is_count, parse_json
from ..store.tree import Payload


Tensors = dict[str, Any]
_INDEX = re.compile("0|[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class LayerTensors:
    """Tensors of every layer, in layer order, and the bytes they hold.

    Attributes:
        layers: one dict a layer; values that are not tensors are small integers.
        devices: where each layer's tensors were captured, while they are somewhere else; empty when they are there.
        copied: events of copies that may still be under way, one a device.
    """

    layers: tuple[Tensors, ...]
    devices: tuple[str, ...] = ()
    copied: tuple[Any, ...] = field(default=(), compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for layer in self.layers for value in layer.values() if torch.is_tensor(value))

    def moved_to(self, place: str) -> LayerTensors:
        """A copy in "host" memory, on any other device that torch knows by a name such as "cuda:1", or back on the
        "device" of its capture; itself where it lives there already.

        Copies from and to an accelerator run on a stream of their own, from and to pinned memory.

        Raises:
            ValueError: torch knows no device of this name.
        """
        if place == "device":
            if not self.devices:
                return self
            layers, events = _copied(self, list(self.devices))
            for event in events:
                torch.cuda.current_stream(event.device).wait_event(event)
            return LayerTensors(layers)
        target = str(_device("cpu" if place == "host" else place))
        if all(device_of(layer, target) == target for layer in self.layers):
            return self
        homes = self.devices or tuple(device_of(layer) for layer in self.layers)
        layers, events = _copied(self, [target] * len(homes))
        return LayerTensors(layers, homes, events)

    def to_bytes(self, record: str, tokens: Tokens) -> bytes:
        """One safetensors file: the tensors, the prompt's `tokens`, and `record` as its metadata."""
        for event in self.copied:
            event.synchronize()
        found: dict[str, torch.Tensor] = {"tokens": torch.from_numpy(tokens.copy())}
        plain: dict[str, Any] = {}
        for index, layer in enumerate(self.layers):
            for name, value in layer.items():
                (found if torch.is_tensor(value) else plain)[f"{index}.{name}"] = value
        devices = self.devices or tuple(device_of(layer) for layer in self.layers)
        payload = json.dumps({"layers": len(self.layers), "devices": devices, "plain": plain})
        tensors = {name: tensor.cpu() for name, tensor in found.items()}
        data: bytes = safetensors.torch.save(tensors, metadata={"unit": record, "payload": payload})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> LayerTensors:
        """Reads `to_bytes` back, into host memory; `moved_to("device")` brings it where it was captured.

        What it holds is as its file says, which may be anything: see `Layout`.

        Raises:
            DamagedFileError: the bytes are not such a file.
        """
        payload = parse_json(Header.parse(data, len(data)).metadata.get("payload", ""))
        if not isinstance(payload, dict):
            raise DamagedFileError("it does not say what its states are")
        count, devices, plain = payload.get("layers"), payload.get("devices"), payload.get("plain")
        if (
            not is_count(count)
            or not isinstance(devices, list)
            or len(devices) != count
            or not isinstance(plain, dict)
        ):
            raise DamagedFileError("it does not say how many layers it has, or where they were")
        try:
            tensors = safetensors.torch.load(data)
        # torch and safetensors say all of these of shapes and types that do not go together
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            raise DamagedFileError(f"it holds no states: {error}") from error
        tensors.pop("tokens", None)
        layers: tuple[Tensors, ...] = tuple({} for _ in devices)
        for key, value in [*plain.items(), *tensors.items()]:
            index, _, name = key.partition(".")
            if not _INDEX.fullmatch(index) or int(index) >= len(layers):
                raise DamagedFileError(f"it names {key[:40]!r}, which is in none of its {len(layers)} layers")
            if name in layers[int(index)]:
                raise DamagedFileError(f"it names {key[:40]!r} twice")
            layers[int(index)][name] = value
        return cls(layers, tuple(devices) if any(device != "cpu" for device in devices) else ())


def layer_tensors(payload: Payload) -> LayerTensors:
    """What a store gave back, as what a model gave it.

    Raises:
        TypeError: something else was stored in the model's space.
    """
    if not isinstance(payload, LayerTensors):
        raise TypeError(f"a {type(payload).__name__} is stored where this model's states are: give the handle a store")
    return payload


def device_of(layer: Tensors, otherwise: str = "cpu") -> str:
    """Where a layer's tensors are; what is said otherwise of a layer without any."""
    return next((str(value.device) for value in layer.values() if torch.is_tensor(value)), otherwise)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"place is {shown(name)}: give 'host', 'device', or a device that torch knows, such as 'cuda:1'"
        ) from error
    indexed = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if indexed else device


def _copied(source: LayerTensors, targets: list[str]) -> tuple[tuple[Tensors, ...], tuple[Any, ...]]:
    """Copies layer by layer; where one side is an accelerator, on a side stream with an event at its end."""
    layers: list[Tensors] = []
    streams: dict[torch.device, Any] = {}
    for layer, target in zip(source.layers, targets, strict=True):
        copies: Tensors = {}
        for name, value in layer.items():
            copies[name] = _copy(value, torch.device(target), streams, source) if torch.is_tensor(value) else value
        layers.append(copies)
    return tuple(layers), tuple(stream.record_event() for stream in streams.values())


def _copy(
    value: torch.Tensor, target: torch.device, streams: dict[torch.device, Any], source: LayerTensors
) -> torch.Tensor:
    device = value.device if value.is_cuda else target
    if device.type != "cuda":
        return value.to(target, copy=True)
    if device not in streams:
        stream = streams[device] = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        for event in source.copied:
            stream.wait_event(event)
    stream = streams[device]
    with torch.cuda.stream(stream):
        if target.type == "cpu":
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            copy.copy_(value, non_blocking=True)
            value.record_stream(stream)  # the source may be freed as soon as we return
        else:
            copy = value.to(target, non_blocking=True)
            copy.record_stream(torch.cuda.current_stream(target))
            if value.is_cuda:
                value.record_stream(stream)
    return copy


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    """One stream a device for copies, so that they overlap with compute."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
