"""Edits that leave no trace, such as writing through `.data`: noticed by looking at values, a few at every look.

Every row of every tensor in main memory has at least one value in the sample, at a column that differs from row to
row, and small tensors have all of theirs. A look compares a share of the sample, the next one at the next look, so
that all of it comes by in turn: at once where the weights fit into a processor's cache, in three looks or more
elsewhere, where each value is a wait for memory. `checksum` reads everything, for the moments at which a turn is too
long to wait.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Values of a tensor that are in the sample, at least, and at most in one portion; portions compared at one look.
_LEAST, _PORTION, _PORTIONS = 2048, 8192, 128
_CACHED_BYTES, _LOOKS = 16 << 20, 3  # of weights that are compared at once; and looks of a turn, at least, for others
_GOLDEN = 0x9E3779B1
_WORDS = 1 << 17  # summed in one step: what they are mixed in stays in a processor's cache


class Samples:
    """The sampled values of some tensors, as they are when this is made."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._portions: list[tuple[Any, Any, bytes]] = []
        nbytes = 0
        for tensor in tensors:
            flat = _flat(tensor)
            if flat is not None:
                nbytes += flat.nbytes
                where = _places(tensor.numel(), tensor.shape[-1] if tensor.dim() > 1 else 1)
                for start in range(0, len(where), _PORTION):
                    portion = where[start : start + _PORTION]
                    self._portions.append((flat, portion, flat.take(portion).tobytes()))
        looks = 1 if nbytes <= _CACHED_BYTES else _LOOKS
        self._share = min(_PORTIONS, -(-len(self._portions) // looks))
        self._next = 0

    def hold(self) -> bool:
        """Whether the next share of the sample is as it was."""
        count = len(self._portions)
        if not count:
            return True
        start, self._next = self._next, (self._next + self._share) % count
        turn = range(start, start + self._share)
        return all(self._holds(index % count) for index in turn)

    def all_hold(self) -> bool:
        """Whether all of the sample is as it was."""
        return all(map(self._holds, range(len(self._portions))))

    def _holds(self, index: int) -> bool:
        flat, portion, values = self._portions[index]
        return bool(flat.take(portion).tobytes() == values)


def _flat(tensor: torch.Tensor) -> Any:
    """The bits of a tensor in main memory as one line of numbers, without a copy; None where there is no such view."""
    size = tensor.element_size()
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized or size not in _BITS:
        return None
    if not tensor.is_contiguous() or not tensor.numel():
        return None
    return tensor.detach().view(-1).view(_BITS[size]).numpy()


def _places(count: int, width: int) -> Any:
    """Where the sample of a tensor of `count` values in rows of `width` lies: one place in each of equal stretches."""
    if count <= _LEAST:
        return np.arange(count)
    rows = count // width
    each = max(1, min(width, -(-_LEAST // rows)))  # values of a row
    ends = np.arange(each + 1) * width // each
    starts, lengths = ends[:-1], np.diff(ends)
    serial = np.arange(rows * each, dtype=np.int64).reshape(rows, each)
    columns = starts + (serial * _GOLDEN >> 7) % lengths
    return (np.arange(rows, dtype=np.int64)[:, None] * width + columns).reshape(-1)


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> str:
    """Digits that any edit changes, from every bit of a tensor, at the speed of memory.

    The sum of all its words, each weighed by its place, mixed, and weighed again. Unmixed, the top bit of a word would
    count 2^63 whatever its weight, as weights are odd, and two of them nothing.
    """
    bits = tensor.detach()
    if bits.is_quantized:
        bits = bits.int_repr()
    bits = bits.contiguous().reshape(-1).view(torch.uint8)
    whole = bits.numel() // 8 * 8
    words = bits[:whole].view(torch.int64)
    weights = torch.arange(1, 2 * min(len(words), _WORDS) + 1, 2, device=words.device) * _GOLDEN
    sums: list[torch.Tensor] = []
    for part in words.split(_WORDS):
        mixed = part * weights[: len(part)]
        mixed ^= mixed >> 32
        sums.append(mixed.mul_(weights[: len(part)]).sum())
    found = torch.stack(sums).cpu().numpy().tobytes() if sums else b""
    rest = bits[whole:].cpu().numpy().tobytes()
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.blake2b(found + rest, digest_size=8).hexdigest()}"
