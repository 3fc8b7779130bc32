"""The places of a shared store: found on the way of a prompt, and left by a unit (see `addresses`)."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from ..planning.lineage import Lineage
from .addresses import BLOCK, Filed, PlaceContents, Text, read_place, traces
from .storage import Storage


MOST_LOOKS = 10  # for a prompt of up to 131,071 tokens; one more each time it is twice as long
MOST_UNITS = 256  # in one place: what more would save is less than a block
MOST_ABOVE = 3  # blocks that a place names
_MOST_SURVEYED = 256  # places that one survey looks at
_MOST_KNOWN = 4096
_SURVEYED_SECONDS = 600.0
_THERE_SECONDS = 30.0


class Shelf:
    """Looks, files and mends on one storage.

    Attributes:
        looks: how often a place was looked at so far.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.looks = 0
        self._lock = threading.Lock()
        self._surveyed: OrderedDict[str, float] = OrderedDict()
        self._there: OrderedDict[str, tuple[float, PlaceContents]] = OrderedDict()

    def look(self, text: Text, block: int) -> PlaceContents:
        """What lies at one place."""
        self.looks += 1
        folder = text.folder(block)
        found = read_place(block, {entry.name: entry.nbytes for entry in self._storage.list(folder)})
        with self._lock:
            self._there.pop(folder, None)
            if found.names:
                self._there[folder] = time.monotonic(), found
                while len(self._there) > _MOST_KNOWN:
                    self._there.popitem(last=False)
        return found

    def way(self, text: Text) -> list[PlaceContents]:
        """The places that a search for the end of a text passes, shallow to deep; those that are there.

        One that was there a moment ago is passed without a look, unless the way ends there.
        """
        found: list[PlaceContents] = []
        reached, remembered = 0, False
        for step in text.steps():
            if reached + step <= text.blocks:
                when, known = self._there.get(text.folder(reached + step), (float("-inf"), None))
                fresh = known is not None and time.monotonic() - when < _THERE_SECONDS
                place = known if known is not None and fresh else self.look(text, reached + step)
                if place.names:
                    found.append(place)
                    reached, remembered = reached + step, fresh
        return [*found[:-1], self.look(text, reached)] if remembered else found

    def find(
        self, text: Text, fits: Callable[[Filed], bool], above: int, bad: Callable[[str], bool]
    ) -> tuple[list[Filed], bool]:
        """The units that a prompt may resume from, the deepest first; and whether a survey may find deeper ones.

        Args:
            text: the prompt.
            fits: whether one is of this text and lineage.
            above: a unit must lie deeper than this position.
            bad: whether a file is known to be of no use.
        """
        began = self.looks
        way = self.way(text)
        most = max(MOST_LOOKS, text.blocks.bit_length() + 1)
        seen = {place.block: place for place in way}
        blocks = {0, *seen, *(block for place in way for block in place.above if block <= text.blocks)}
        found: list[Filed] = []
        for block in sorted(blocks, reverse=True):
            if (block + 1) * BLOCK - 1 <= above or (found and block not in seen):
                continue
            if block not in seen and self.looks - began >= most:
                continue
            place = seen[block] if block in seen else self.look(text, block)
            found += [unit for unit in place.units if unit.position > above and not bad(unit.state) and fits(unit)]
        found.sort(key=lambda unit: (unit.position, unit.final), reverse=True)
        last = way[-1] if way else None
        named = max((unit.position // BLOCK for unit in found), default=-1)
        return found, last is not None and named < last.block

    def post(self, text: Text, lineage: Lineage, already: list[PlaceContents]) -> int:
        """Leaves the traces of a unit that was filed; returns how many files that took."""
        block = lineage.end // BLOCK
        places = {place.block: place for place in already}
        with_units = {place.block for place in already if place.units} | {block}
        with_units |= {item for place in already for item in place.above}
        made = 0
        for at in sorted({*traces(block), *(item for item in places if item > block)}):
            place = places[at] if at in places else self.look(text, at)
            with_units |= {at} if place.units else set()
            with_units |= place.above
            wanted = [] if at == block else [text.note(at)]
            wanted += [text.note(at, item) for item in sorted(item for item in with_units if item < at)[-MOST_ABOVE:]]
            for note in wanted:
                if note not in place.names:
                    self._storage.put(note, b"")
                    made += 1
        return made

    def survey(self, text: Text) -> None:
        """Looks at every place on a text that the way may have led past, and notes at its end what lies above it."""
        way = self.way(text)
        if not way:
            return
        last = way[-1]
        with self._lock:
            key, now = text.folder(last.block), time.monotonic()
            if now - self._surveyed.get(key, -_SURVEYED_SECONDS) < _SURVEYED_SECONDS:
                return
            self._surveyed[key] = now
            while len(self._surveyed) > _MOST_KNOWN:
                self._surveyed.popitem(last=False)
        left = [_MOST_SURVEYED]
        blocks = sorted(self._below(text, 0, 1 << last.block.bit_length(), last.block, left), reverse=True)
        for block in [item for item in blocks if item < last.block][:MOST_ABOVE]:
            if text.note(last.block, block) not in last.names:
                self._storage.put(text.note(last.block, block), b"")

    def _below(self, text: Text, reached: int, step: int, most: int, left: list[int]) -> set[int]:
        """Blocks with units among those that a search may reach from one place by steps smaller than `step`."""
        found: set[int] = set()
        while (step := step // 2) >= 1:
            if reached + step > most or left[0] <= 0:
                continue
            left[0] -= 1
            place = self.look(text, reached + step)
            if place.names:
                found |= ({place.block} if place.units else set()) | set(place.above)
                found |= self._below(text, reached + step, step, most, left)
        return found
