"""Where the units of a shared store are filed, so that a prompt finds the deepest one with a few looks.

A unit lies in a **place**, named by a hash of its tokens up to the last multiple of 256 at or below its position. A
search goes down the binary digits of a prompt's length, from the largest: it steps on where the place that many blocks
further is there. Therefore a unit leaves a trace at the places that such a search passes on its way, which are as many
as there are ones among the binary digits of its block: at most 9 up to 131,071 tokens. Each place also says at which
blocks above it on the same text units lie, as the search may be led past them by a text that goes on otherwise.

Hashes are keyed where the store has a key, and begin with the space: no name tells what it stands for.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..planning.cuts import Tokens
from ..planning.lineage import Lineage
from . import files
from .seal import Seal


BLOCK = 256
_DIGITS = 16
_UNIT = re.compile(r"([0-9]{3})([fc])-([0-9a-f]{16})-([0-9a-f]{16})-(state-[0-9a-f]{12}-[0-9a-f]{32}\.safetensors)")
_NOTE = re.compile(r"(here|above-([0-9]{1,6}))-([0-9a-f]{12})")


@dataclass(frozen=True)
class Filed:
    """What the name of a unit in its place says.

    Attributes:
        name: from the root of the storage.
        position: of the state.
        final: whether it keeps the logits of the last token of a prompt.
        tokens, lineage: 16 hexadecimal digits of the hashes of both.
    """

    name: str
    position: int
    final: bool
    tokens: str
    lineage: str
    nbytes: int = 0

    @property
    def state(self) -> str:
        """The name of the file of the state, as other files name it."""
        return file_of(self.name)


@dataclass(frozen=True)
class PlaceContents:
    """What lies in one place: units, and the blocks above it at which others lie."""

    block: int
    units: tuple[Filed, ...]
    above: frozenset[int]
    names: frozenset[str]


class Text:
    """One text in one space: the places along it.

    Args:
        root: the folder of the space.
    """

    def __init__(self, seal: Seal, space: str, tokens: Tokens) -> None:
        first = space_hash(seal, space)
        self.root, self.tokens = first.hexdigest(), tokens
        self._start = seal.hasher(b"tokens")
        self._start.update(first.digest())
        self._hashes: dict[int, Any] = {0: self._start}
        self._hashed = [0]  # its keys, ascending

    @property
    def blocks(self) -> int:
        """Whole blocks of the text."""
        return len(self.tokens) // BLOCK

    def digest(self, position: int) -> str:
        """What names the text up to a position."""
        if position not in self._hashes:
            self._hash(position)
        return str(self._hashes[position].hexdigest())

    def _hash(self, position: int) -> None:
        """Hashes up to a position, and keeps what it passes at half of the way, at a quarter, and so on.

        A search that finds nothing there steps back to these, and hashes no token twice.
        """
        index = bisect_right(self._hashed, position)
        start = self._hashed[index - 1]
        found = self._hashes[start].copy()
        blocks = (position - start) // BLOCK
        ends = [start + (blocks >> bit) * BLOCK for bit in range(blocks.bit_length() - 1, 0, -1)]
        for end in [*ends, position]:
            found.update(self.tokens[start:end])
            self._hashes[end] = found.copy()
            start = end
        self._hashed[index:index] = [*ends, position]

    def folder(self, block: int) -> str:
        """The place at a block."""
        return f"{self.root}/at/{self.digest(block * BLOCK)}"

    def name(self, lineage: Lineage, final: bool, state: str) -> str:
        """Where a state's file is filed."""
        position = lineage.end
        block, offset = divmod(position, BLOCK)
        about = f"{offset:03d}{'f' if final else 'c'}-{self.digest(position)[:_DIGITS]}-{self.lineage(lineage)}"
        return f"{self.folder(block)}/{about}-{state}"

    def lineage(self, lineage: Lineage) -> str:
        """What names a lineage on this text."""
        found = self._start.copy()
        found.update(repr(lineage.to_json()).encode())
        return str(found.hexdigest()[:_DIGITS])

    def kv(self, name: str) -> str:
        """Where a file of keys and values lies."""
        return f"{self.root}/kv/{name}"

    def note(self, block: int, above: int | None = None) -> str:
        """The empty file that says that there is something at a place, or above it on the same text."""
        folder, what = self.folder(block), "here" if above is None else f"above-{above}"
        return f"{folder}/{what}-{files.own_tag(f'{folder}/{what}')[:12]}"

    def steps(self) -> Iterator[int]:
        """What a search tries to step on by, in blocks: the powers of two up to the text's length, descending."""
        for bit in range(self.blocks.bit_length() - 1, -1, -1):
            yield 1 << bit


def traces(block: int) -> list[int]:
    """The blocks at which a unit filed at `block` leaves a trace: those that a search for it passes, itself last."""
    found, reached = [], 0
    for bit in range(block.bit_length() - 1, -1, -1):
        if block >> bit & 1:
            reached += 1 << bit
            found.append(reached)
    return found


def space_hash(seal: Seal, space: str) -> Any:
    """What names a space."""
    found = seal.hasher(b"space")
    found.update(space.encode("utf-8", "surrogatepass"))
    return found


def namespace_folder(seal: Seal, namespace: str) -> str:
    """Where it is said which spaces a namespace has."""
    found = seal.hasher(b"namespace")
    found.update(namespace.encode("utf-8", "surrogatepass"))
    return f"about/{found.hexdigest()}"


def read_place(block: int, names: dict[str, int]) -> PlaceContents:
    """What the names in a place say, and their sizes; all that is not ours is left out."""
    units, above = [], set[int]()
    for name, nbytes in names.items():
        own = name.rpartition("/")[2]
        if (unit := _UNIT.fullmatch(own)) is not None and files.proves_itself(unit[5]) and int(unit[1]) < BLOCK:
            position = block * BLOCK + int(unit[1])
            units.append(Filed(name, position, unit[2] == "f", unit[3], unit[4], nbytes))
        elif (note := _NOTE.fullmatch(own)) is not None and is_note(name) and note[2] is not None:
            above.add(int(note[2]))
    return PlaceContents(block, tuple(units), frozenset(above), frozenset(names))


def is_note(name: str) -> bool:
    """Whether a name is that of a note, in its own place."""
    folder, _, own = name.rpartition("/")
    what, _, tag = own.rpartition("-")
    return _NOTE.fullmatch(own) is not None and tag == files.own_tag(f"{folder}/{what}")[:12]


def is_unit(name: str) -> bool:
    """Whether a name is that of a filed state."""
    unit = _UNIT.fullmatch(name.rpartition("/")[2])
    return unit is not None and files.proves_itself(unit[5])


def file_of(name: str) -> str:
    """The name of a unit's file, as other files name it: what stands before it in its place goes."""
    own = name.rpartition("/")[2]
    unit = _UNIT.fullmatch(own)
    return own if unit is None else unit[5]
