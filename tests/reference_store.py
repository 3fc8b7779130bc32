"""A naive list in place of the store: obviously correct, slow, used as the oracle of the property tests."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy


LIVE: weakref.WeakSet[Blob] = weakref.WeakSet()
Prefix = tuple[str, tuple[int, ...]]  # space, tokens


class Blob:
    """A payload that only has a size; every living one is counted."""

    def __init__(self, nbytes: int, label: object = None, on_host: bool = False) -> None:
        self.nbytes, self.label, self.on_host = nbytes, label, on_host
        LIVE.add(self)

    def moved_to(self, tier: str) -> Blob:
        return self if self.on_host == (tier == "host") else Blob(self.nbytes, self.label, tier == "host")

    def to_bytes(self, record: str, tokens: np.ndarray) -> bytes:
        drawn = np.random.default_rng(0).integers(0, 256, self.nbytes, np.uint8)  # which no file makes smaller
        tensors = {"tokens": tokens, "data": drawn}
        return safetensors.numpy.save(tensors, {"unit": record, "label": json.dumps(self.label)})

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Blob:
        data = bytes(data)
        size = int.from_bytes(data[:8], "little")
        label = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["label"])
        return cls(len(safetensors.numpy.load(data)["data"]), tuples(label))


class PledgedBlob(Blob):
    """A payload that is handed on before it is proved; whoever reads what it holds asks for its pledge first."""

    pledge: Callable[[], None] | None = None
    shy = True  # whether its label is among what it holds

    def pledged(self, pledge: Callable[[], None]) -> PledgedBlob:
        made = type(self)(self.nbytes, self.held)
        made.pledge = pledge
        return made

    def to_bytes(self, record: str, tokens: np.ndarray) -> bytes:
        if self.pledge is not None:
            self.pledge()
        return super().to_bytes(record, tokens)

    @property
    def label(self) -> object:
        if self.shy and self.pledge is not None:
            self.pledge()
        return self.held

    @label.setter
    def label(self, label: object) -> None:
        self.held = label


def tuples(value: Any) -> Any:
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class NaiveStore:
    """Checkpoints as a list in eviction order; KV bytes recounted from scratch; `below` is the next tier."""

    def __init__(
        self, max_memory: float, lru: bool, state_bytes: int, kv_bytes: int, below: NaiveStore | None = None
    ) -> None:
        self.max_memory, self.lru = max_memory, lru
        self.state_bytes, self.kv_bytes = state_bytes, kv_bytes
        self.below = below
        self.seen: list[Prefix] = []
        self.entries: list[Prefix] = []  # first to go first
        self.spans: dict[Prefix, list[tuple[int, int]]] = {}
        self.pins: list[Prefix] = []
        self.held: list[Prefix] = []

    def overlap(self, key: Prefix) -> int:
        return max((common(key[1], ids) for space, ids in self.seen if space == key[0]), default=0)

    def deepest(self, key: Prefix) -> int:
        usable = [ids for space, ids in self.entries if space == key[0] and len(ids) <= len(key[1]) - 2]
        return max((len(ids) for ids in usable if key[1][: len(ids)] == ids), default=0)

    def bytes_of(self, states: list[Prefix], chains: list[Prefix]) -> int:
        segments = {(key[0], key[1][:end], start) for key in states + chains for start, end in self.spans[key]}
        return len(states) * self.state_bytes + sum((len(ids) - start) * self.kv_bytes for _, ids, start in segments)

    def used(self) -> int:
        return self.bytes_of(self.entries, self.held)

    def use(self, key: Prefix) -> None:
        if self.lru:
            self.entries.remove(key)
            self.entries.append(key)

    def send_off(self, chains: list[Prefix], need: int) -> None:
        """The first that may go, to the tier below if there is one."""
        victim = next(entry for entry in self.entries if entry not in self.pins)
        if self.below is not None:
            self.below.accept(victim, self.spans[victim])
        self.entries.remove(victim)

    def shrink(self, chains: list[Prefix], need: int) -> bool:
        if self.bytes_of(list(dict.fromkeys(self.pins)), chains) + need > self.max_memory:
            return False
        while self.bytes_of(self.entries, chains) + need > self.max_memory:
            self.send_off(chains, need)
        return True

    def add(self, key: Prefix, whole: Prefix, spans: list[tuple[int, int]], hold: bool = True) -> bool:
        self.seen.append(whole)
        if key not in self.entries:
            self.spans[key] = spans
            if not self.shrink([*self.held, key], self.state_bytes):
                return False
            self.entries.append(key)
        if hold:
            self.held.append(key)
        return True

    def accept(self, key: Prefix, spans: list[tuple[int, int]]) -> None:
        if not self.add(key, key, spans, hold=False) and self.below is not None:
            self.below.accept(key, spans)

    def promote(self, key: Prefix) -> None:
        """Moves up the deepest usable checkpoint of the lower tiers if deeper than its own; disk keeps a copy."""
        best, depth, overlap, tier = None, self.deepest(key), self.overlap(key), self.below
        while tier is not None:
            overlap = max([overlap, *(common(key[1], ids) for space, ids in tier.entries if space == key[0])])
            if tier.deepest(key) > depth:
                best, depth = tier, tier.deepest(key)
            tier = tier.below
        if best is None:
            return
        prefix = (key[0], key[1][:depth])
        best.use(prefix)
        best.pins.append(prefix)
        best.held.append(prefix)
        stored = self.add(prefix, (key[0], key[1][:overlap]), best.spans[prefix], hold=False)
        best.pins.remove(prefix)
        best.held.remove(prefix)
        if stored and not math.isinf(best.max_memory):  # the disk keeps its copy
            best.entries.remove(prefix)
