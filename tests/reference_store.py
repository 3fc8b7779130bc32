"""A naive list in place of the store: obviously correct, slow, used as the oracle of the property tests."""

from __future__ import annotations

import weakref

LIVE: weakref.WeakSet[Blob] = weakref.WeakSet()
Prefix = tuple[str, tuple[int, ...]]  # space, tokens


class Blob:
    """A payload that only has a size; every living one is counted."""

    def __init__(self, nbytes: int, label: object = None) -> None:
        self.nbytes, self.label = nbytes, label
        LIVE.add(self)


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class NaiveStore:
    """Checkpoints as a list in eviction order; KV bytes recounted from scratch."""

    def __init__(self, max_memory: int, lru: bool, state_bytes: int, kv_bytes: int) -> None:
        self.max_memory, self.lru = max_memory, lru
        self.state_bytes, self.kv_bytes = state_bytes, kv_bytes
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

    def add(self, key: Prefix, whole: Prefix, spans: list[tuple[int, int]]) -> bool:
        self.seen.append(whole)
        if key not in self.entries:
            self.spans[key] = spans
            chains = [*self.held, key]
            if self.bytes_of(list(dict.fromkeys(self.pins)), chains) + self.state_bytes > self.max_memory:
                return False
            while self.bytes_of(self.entries, chains) + self.state_bytes > self.max_memory:
                self.entries.remove(next(entry for entry in self.entries if entry not in self.pins))
            self.entries.append(key)
        self.held.append(key)
        return True
