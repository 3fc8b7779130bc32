"""What the store holds of a model: tensors of every layer, how they move between tiers and become a file."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from ..checks import shown
from ..errors import DamagedFileError
from ..planning.cuts import Tokens
from ..store.headers import Header, Plain, is_count, parse_json
from ..store.slabs import Bytes
from ..store.tree import Payload
from . import streams
from .slotted import Blocked, Place, Slotted, TensorViews, blocked, slotted, taken_by, tensors_of
from .slotted import Tensors as Tensors  # by which it is known above
from .streams import Behind


_INDEX = re.compile("0|[1-9][0-9]{0,5}")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class LayerTensors:
    """Tensors of every layer, in layer order, and the bytes they hold.

    Attributes:
        layers: one dict a layer; values that are not tensors are small integers. Those whose tensors lie in a slot are
            made anew whenever they are read.
        devices: where each layer's tensors were captured, while they are somewhere else; empty when they are there.
        behind: what was queued on accelerators and gives them their values, one a device.
        pinned_bytes: of the blocks of pinned memory that they lie in; 0 where each has memory of its own.
        pledge: waits until they are proved, where they were handed on before; raises UnprovedError where they are not.
    """

    layers: Sequence[Tensors]
    devices: tuple[str, ...] = ()
    behind: tuple[Behind, ...] = field(default=(), compare=False)
    pinned_bytes: int = field(default=0, compare=False)
    pledge: Callable[[], None] | None = field(default=None, compare=False)

    @classmethod
    def captured(cls, layers: Iterable[Tensors], before: Sequence[Tensors] = ()) -> LayerTensors:
        """Dense copies of the tensors of every layer, which the current stream of their device has been told to make.

        Args:
            layers: as they are to be kept; nothing is shared with them.
            before: what was captured of the layers before them, which is taken as it is.
        """
        given = tuple(layers)
        made: Sequence[Tensors] | None = slotted(given, before)
        if made is None:
            device = streams.shared(tensors_of(given))
            made = (*before, *map(_copied, given)) if device is None else blocked(given, before, device)
        queued = () if isinstance(before, Slotted) else before  # in host memory nobody waits
        return cls(made, behind=streams.queued(tensors_of((*queued, *given))))

    def tensors(self) -> Iterable[torch.Tensor]:
        """All of them."""
        return tensors_of(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes where it lies: whole pages of host memory, or blocks of what is pinned, or tensors."""
        return self.pinned_bytes or taken_by(self.layers)

    def reached(self) -> LayerTensors:
        """Itself, for whoever reads it on another stream than the one that made it, which waits without the host.

        Raises:
            UnprovedError: it is not what was written; what is still being proved is waited for.
        """
        if self.pledge is not None:
            self.pledge()
        for work in self.behind:
            work.reached(self.tensors())
        return self

    def pledged(self, pledge: Callable[[], None]) -> LayerTensors:
        """The same tensors, whose values nobody reads before `pledge` has returned."""
        return replace(self, pledge=pledge)

    def moved_to(self, place: str) -> LayerTensors:
        """A copy in "host" memory, on any other device that torch knows by a name such as "cuda:1", or back on the
        "device" of its capture; itself where it lives there already.

        Copies from and to an accelerator run on a stream of their own, from and to pinned memory.

        Raises:
            ValueError: torch knows no device of this name.
        """
        if place == "device":
            return self._moved(list(self.devices), ()) if self.devices else self
        target = str(_device("cpu" if place == "host" else place))
        if all(device_of(layer, target) == target for layer in self.layers):
            return self
        homes = self.devices or tuple(device_of(layer) for layer in self.layers)
        return self._moved([target] * len(homes), homes)

    def _moved(self, targets: list[str], homes: tuple[str, ...]) -> LayerTensors:
        """A copy with each layer on its target, of what was captured at home."""
        if self.pledge is not None:
            self.pledge()
        asked: dict[tuple[torch.device, torch.device], list[tuple[int, str]]] = defaultdict(list)
        layers = tuple(dict(layer) for layer in self.layers)
        for index, (layer, target) in enumerate(zip(layers, targets, strict=True)):
            for name, value in layer.items():
                if torch.is_tensor(value):
                    asked[value.device, torch.device(target)].append((index, name))
        behind: list[Behind] = []
        pinned = 0
        for (_, place), names in asked.items():
            values = [layers[index][name] for index, name in names]
            moved = streams.move(values, place, self.behind, self.pinned_bytes)
            behind += moved.behind
            pinned += moved.pinned_bytes
            for (index, name), value in zip(names, moved.tensors, strict=True):
                layers[index][name] = value
        lie = Blocked.of(layers) if not pinned and streams.shared(tensors_of(layers)) is not None else layers
        return LayerTensors(lie, homes, tuple(behind), pinned)

    def to_bytes(self, record: str, tokens: Tokens) -> bytes:
        """One safetensors file: the tensors, the prompt's `tokens`, and `record` as its metadata."""
        if self.pledge is not None:
            self.pledge()
        for work in self.behind:
            work.wait()
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
    def from_bytes(cls, data: Plain) -> LayerTensors:
        """Reads `to_bytes` back, into host memory; `moved_to("device")` brings it where it was captured.

        Of what was unpacked into memory of its own, the tensors are views.
        What it holds is as its file says, which may be anything: see `Layout`.

        Raises:
            DamagedFileError: the bytes are not such a file.
        """
        header = Header.parse(data, len(data))
        payload = parse_json(header.metadata.get("payload", ""))
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
            places, reader = _places(data, header), TensorViews(np.frombuffer(data, np.uint8))
            for place in places.values():
                reader.tensor(place)
            tensors: Tensors = dict(places or safetensors.torch.load(bytes(data)))
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
        found = _read_slot(np.frombuffer(data, np.uint8), layers) if places else slotted(layers)
        return cls(found or layers, tuple(devices) if any(device != "cpu" for device in devices) else ())


def _places(data: Plain, header: Header) -> dict[str, Place]:
    """Where the tensors of an unpacked file lie in it; none of any where one is odd, which the library then judges."""
    found: dict[str, Place] = {}
    for name, entry in header.entries.items() if isinstance(data, memoryview) else ():
        if name == "tokens":  # which nobody asks of the payload
            continue
        dtype, shape, (begin, end) = _DTYPES.get(str(entry.get("dtype"))), entry.get("shape"), entry["data_offsets"]
        if dtype is None or not isinstance(shape, list) or not all(map(is_count, shape)):
            return {}
        place = found[name] = Place.at(header.start + begin, dtype, shape)
        if not place.nbytes or place.nbytes != end - begin or (header.start + begin) % dtype.itemsize:
            return {}
    return found


def _read_slot(held: Bytes, layers: Sequence[Tensors]) -> Slotted:
    """Layers whose tensors are told by their places in memory."""
    layout = tuple(tuple((name, v) for name, v in layer.items() if isinstance(v, Place)) for layer in layers)
    plain = {
        index: {name: value for name, value in layer.items() if not isinstance(value, Place)}
        for index, layer in enumerate(layers)
    }
    return Slotted(held, layout, {index: values for index, values in plain.items() if values})


def _copied(layer: Tensors) -> Tensors:
    """A layer with tensors of its own; those with a colon in their name are such already (see `Rounding.kept`)."""
    return {name: own(v) if torch.is_tensor(v) and ":" not in name else v for name, v in layer.items()}


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy that shares nothing, so that its bytes are exactly what it holds."""
    plain = tensor.detach() if tensor.requires_grad else tensor
    return plain.clone(memory_format=torch.contiguous_format)


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
