"""Copies between main memory and an accelerator, and the order in which its streams see them.

Copies run on a stream of their own, so that they overlap with what is computed. What they read is written before, what
reads them waits on the device and never on the host, and memory that one stream allocated and another uses is given to
nobody else before both are done with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


# Tensors in one block begin at multiples of this many bytes.
_ALIGNED = 256
# Share of a block that may be lost to torch's rounding before another block is opened; and what is never split.
_LOST, _SMALL_BYTES = 0.125, 64 << 10


@dataclass(frozen=True)
class Behind:
    """Work that was queued on an accelerator, behind which some tensors hold their values.

    Attributes:
        device: the accelerator.
        stream: the one that need not wait for it: it did the work, or has waited.
        event: at the end of it.
    """

    device: torch.device
    stream: Any
    event: Any

    def reached(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the current stream wait for it, and keep the memory of these tensors until that stream has read them."""
        current = _streaming(self.device).current_stream(self.device)
        if current == self.stream:
            return
        current.wait_event(self.event)
        for tensor in tensors:
            if tensor.device == self.device:
                tensor.record_stream(current)

    def wait(self) -> None:
        """Wait for it, on the host."""
        self.event.synchronize()


@dataclass(frozen=True)
class Moved:
    """Copies of tensors on another device, what gives them their values, and the pinned memory that they take."""

    tensors: list[torch.Tensor]
    behind: tuple[Behind, ...] = ()
    pinned_bytes: int = 0


def queued(tensors: Iterable[torch.Tensor]) -> tuple[Behind, ...]:
    """What the current streams of the tensors' devices have been told to do so far."""
    found = []
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        if _streaming(device) is not None:
            stream = _streaming(device).current_stream(device)
            found.append(Behind(device, stream, stream.record_event()))
    return tuple(found)


def shared(tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """The device with streams that all tensors lie on; None where there is none, or no tensor."""
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 and _streaming(next(iter(devices))) is not None else None


def move(
    tensors: Sequence[torch.Tensor], target: torch.device, behind: Sequence[Behind], pinned_bytes: int = 0
) -> Moved:
    """Copies of tensors of one device on another one.

    Args:
        tensors: at least one.
        target: where the copies are to be.
        behind: what gives the tensors their values.
        pinned_bytes: of the blocks that they lie in, as an earlier `move` has left them; 0 where they lie in none.
    """
    source = tensors[0].device
    if target.type == "cpu" and _streaming(source) is not None:
        return _to_host(tensors, source, behind)
    if source.type == "cpu" and _streaming(target) is not None:
        return _to_device(tensors, target, behind, bool(pinned_bytes))
    for work in behind:
        work.reached(tensors)
    copies = [tensor.to(target, copy=True) for tensor in tensors]
    return Moved(copies, queued(copies))


def _to_host(tensors: Sequence[torch.Tensor], source: torch.device, behind: Sequence[Behind]) -> Moved:
    module, stream = _streaming(source), _side_stream(source)
    stream.wait_stream(module.current_stream(source))
    for work in behind:
        stream.wait_event(work.event)
    copies: dict[int, torch.Tensor] = {}
    pinned = 0
    for block in blocks_of([_aligned(tensor.nbytes) for tensor in tensors]):
        size = sum(_aligned(tensors[index].nbytes) for index in block)
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        pinned += _rounded(size)
        start = 0
        for index in block:
            copies[index] = _cut(memory, start, tensors[index])
            start += _aligned(tensors[index].nbytes)
    with module.stream(stream):
        for index, tensor in enumerate(tensors):
            copies[index].copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # the source may be freed as soon as we return
    made = Behind(source, stream, stream.record_event())
    return Moved([copies[index] for index in range(len(tensors))], (made,), pinned)


def _to_device(tensors: Sequence[torch.Tensor], target: torch.device, behind: Sequence[Behind], packed: bool) -> Moved:
    module, stream = _streaming(target), _side_stream(target)
    current = module.current_stream(target)
    # Allocated where they will be used, and freed, so that no other stream gets them.
    copies, sources = (_as_blocks if packed else _as_one)(tensors, target)
    stream.wait_stream(current)  # their memory may still be read by what was freed before
    for work in behind:
        stream.wait_event(work.event)
    with module.stream(stream):
        for place, memory in sources:
            place.copy_(memory, non_blocking=True)
            place.record_stream(stream)
    event = stream.record_event()
    current.wait_event(event)
    return Moved([copies[index] for index in range(len(tensors))], (Behind(target, current, event),))


_Places = tuple[dict[int, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]


def _as_blocks(tensors: Sequence[torch.Tensor], target: torch.device) -> _Places:
    """Places for copies of tensors in blocks, by number; and what is to be copied where: whole blocks."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.untyped_storage().data_ptr()].append(index)
    copies: dict[int, torch.Tensor] = {}
    sources = []
    for group in groups.values():
        memory = torch.empty(0, dtype=torch.uint8).set_(tensors[group[0]].untyped_storage())
        place = torch.empty_like(memory, device=target)
        sources.append((place, memory))
        for index in group:
            tensor = tensors[index]
            copies[index] = _cut(place, int(tensor.storage_offset()) * tensor.element_size(), tensor)
    return copies, sources


def _as_one(tensors: Sequence[torch.Tensor], target: torch.device) -> _Places:
    """As `_as_blocks`, of tensors that lie apart: their places are in one allocation."""
    starts = [0, *accumulate(_aligned(tensor.nbytes) for tensor in tensors)]
    block = torch.empty(starts[-1], dtype=torch.uint8, device=target)
    copies = {index: _cut(block, starts[index], tensor) for index, tensor in enumerate(tensors)}
    return copies, [(copies[index], tensor) for index, tensor in enumerate(tensors)]


def _cut(memory: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """The part of a block of bytes, from `start` on, that holds a tensor."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def blocks_of(sizes: Sequence[int]) -> list[list[int]]:
    """Which tensors of these bytes share a block of pinned memory, so that little is lost.

    torch rounds a block up to a power of two: 76 MiB in one block would pin 128, and in three 64 + 8 + 4. Never is
    more pinned than if each tensor had a block of its own, or all had one.
    """
    by_size = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    ways = ([by_size], _doubled(sizes, by_size), _filled(sizes, by_size))
    return min(ways, key=lambda blocks: (sum(_rounded(_total(sizes, block)) for block in blocks), len(blocks)))


def _filled(sizes: Sequence[int], by_size: list[int]) -> list[list[int]]:
    """Blocks that are filled one after the other, each of the largest size that loses little: for many alike."""
    rest = by_size
    blocks = []
    while rest:
        total = _total(sizes, rest)
        room = _rounded(total)
        if room - total > _LOST * total and total > _SMALL_BYTES:
            room //= 2
        block: list[int] = []
        held = 0
        for index in rest:
            if held + sizes[index] <= room:
                block.append(index)
                held += sizes[index]
        block = block if held > room // 2 else rest[:1]  # one that fits into no smaller block has its own
        blocks.append(block)
        rest = [index for index in rest if index not in set(block)]
    return blocks


def _doubled(sizes: Sequence[int], by_size: list[int]) -> list[list[int]]:
    """Blocks of which no two are rounded to the same size: such two fit into one of twice that size, at no cost."""
    blocks: dict[int, list[int]] = {}
    for index in by_size:
        block = [index]
        while other := blocks.pop(_rounded(_total(sizes, block)), None):
            block = other + block
        blocks[_rounded(_total(sizes, block))] = block
    return list(blocks.values())


def _total(sizes: Sequence[int], block: Iterable[int]) -> int:
    return sum(sizes[index] for index in block)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _rounded(size: int) -> int:
    """The bytes that torch pins for a block of so many."""
    return 1 << max(size - 1, 0).bit_length()


def _streaming(device: torch.device) -> Any:
    """torch's module for a device that has streams; None for others, where everything happens in order."""
    if device.type in ("cpu", "meta"):
        return None
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return None
    return module if all(hasattr(module, name) for name in ("Stream", "current_stream", "stream")) else None


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    """One stream a device for copies, so that they overlap with compute."""
    if device not in _streams:
        _streams[device] = _streaming(device).Stream(device)
    return _streams[device]
