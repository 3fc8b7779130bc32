"""What a replica says of its tree: the names of the prefixes behind which it has a checkpoint, and no token."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..store.store import CheckpointStore
from ..store.tier import Tier
from ..store.tree import Checkpoint
from ..store.unit import namespace_of
from .names import Keys


# Of so many checkpoints at most, those used last: 17 bytes each.
MOST_ENTRIES = 16_384
_ROW = np.dtype([("name", "<u8"), ("anchor", "<u8"), ("tail", "u1")])


class DigestEntry(NamedTuple):
    """One checkpoint: the name of its prefix, that of the anchor before it, and the tokens between the two."""

    name: int
    anchor: int
    tail: int


class Digest:
    """The checkpoints of a replica as far as a router has to know them: one entry for all checkpoints of one prefix.

    Args:
        entries: in any order.
    """

    def __init__(self, entries: Iterable[DigestEntry] = ()) -> None:
        rows = np.asarray(list(entries), dtype=_ROW)
        _, first = np.unique(rows["name"], return_index=True)  # sorted: equal trees give equal bytes
        self._rows: NDArray[np.void] = rows[first]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[DigestEntry]:
        return map(DigestEntry._make, self._rows.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def without(self, other: Digest) -> Iterator[DigestEntry]:
        """The entries that another digest does not have."""
        new = ~np.isin(self._rows["name"], other._rows["name"], assume_unique=True)
        return map(DigestEntry._make, self._rows[new].tolist())

    def to_bytes(self) -> bytes:
        """17 bytes for each entry."""
        return self._rows.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Digest:
        """What `to_bytes` gave.

        Raises:
            ValueError: it is no digest.
        """
        if len(data) % _ROW.itemsize:
            raise ValueError(f"a digest of {len(data)} bytes is no multiple of {_ROW.itemsize}: another version's?")
        found = cls()
        found._rows = np.frombuffer(data, dtype=_ROW)
        return found


class Publisher:
    """Names the checkpoints of a store, each once: what was named before is only looked up.

    Args:
        store: its tiers are looked at, the shared store is not: all replicas have that.
        keys: name the prefixes.
        most: entries of a digest.
    """

    def __init__(self, store: CheckpointStore, keys: Keys, most: int = MOST_ENTRIES) -> None:
        self._store, self._keys, self._most = store, keys, most
        self._named: weakref.WeakKeyDictionary[Checkpoint, DigestEntry] = weakref.WeakKeyDictionary()

    def digest(self) -> Digest:
        """What is stored now. Requests run meanwhile, and wait for one checkpoint to be found at most."""
        found = [(checkpoint, tier) for tier in self._store.tiers for checkpoint in _stored(tier)]
        if len(found) > self._most:
            found.sort(key=lambda item: -item[0].last_used)
        return Digest(entry for one in found[: self._most] if (entry := self._entry(*one)) is not None)

    def _entry(self, checkpoint: Checkpoint, tier: Tier) -> DigestEntry | None:
        entry = self._named.get(checkpoint)
        if entry is not None:
            return entry
        with tier.lock:
            if not checkpoint.stored:  # it went meanwhile
                return None
            ids, space = checkpoint.node.path_tokens()[: checkpoint.position], checkpoint.node.tree.space
        names = self._keys.names(namespace_of(space), ids)
        block, tail = divmod(checkpoint.position, self._keys.block)
        entry = self._named[checkpoint] = DigestEntry(names.at(checkpoint.position), names.anchors[block], tail)
        return entry


def _stored(tier: Tier) -> list[Checkpoint]:
    """Every checkpoint of a tier: out of the books of its eviction, as its trees remember much more than is stored."""
    with tier.lock:
        known = tier.eviction.known()
        return tier.stored() if known is None else known
