"""What is known of all replicas: which of them hold, or have just been sent, how much of a prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

from ..planning.cuts import MIN_SUFFIX_TOKENS
from .digest import Digest
from .names import Names


# Stale entries are swept out when there are so many, or as many as others.
_MOST_STALE = 4096


class Masks:
    """For each name, the replicas that have it, as the bits of a number."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._masks)

    def get(self, name: int) -> int:
        return self._masks.get(name, 0)

    def add(self, name: int, bit: int) -> None:
        self._masks[name] = self._masks.get(name, 0) | bit

    def discard(self, name: int, bit: int) -> None:
        left = self._masks.get(name, 0) & ~bit
        if left:
            self._masks[name] = left
        else:
            self._masks.pop(name, None)

    def forget(self, bit: int) -> None:
        """Takes one replica out of everything."""
        self._masks = {name: left for name, mask in self._masks.items() if (left := mask & ~bit)}


class Known:
    """One replica, as far as it is known.

    Attributes:
        bit: its place in the masks.
        digest: what it said last.
        sent: anchors of the prompts that went there since then, and between that and what it said before.
    """

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.digest = Digest()
        self.sent: tuple[set[int], set[int]] = (set(), set())


class Index:
    """The prefixes of all replicas. What was sent to one counts as stored there until it has published twice.

    Args:
        most_seen: anchors remembered of prompts that went somewhere, whatever became of their states.
    """

    def __init__(self, most_seen: int = 2**18) -> None:
        self._replicas: dict[str, Known] = {}
        self._stored, self._sent = Masks(), Masks()
        self._tails: dict[int, int] = {}  # of each anchor, the lengths of tails behind it, as bits
        self._stale = 0  # tails that may be gone
        self._seen: OrderedDict[int, int] = OrderedDict()  # masks by anchor, the last used one last
        self._most_seen = most_seen

    def __contains__(self, replica: str) -> bool:
        return replica in self._replicas

    def __len__(self) -> int:
        return len(self._stored)

    # -- what becomes known -------------------------------------------------------------------------------------------

    def keep(self, replicas: Collection[str]) -> None:
        """These are all there are: others are forgotten, new ones hold nothing yet."""
        for gone in [name for name in self._replicas if name not in replicas]:
            self._drop(gone)
        for name in replicas:
            self._known(name)

    def published(self, replica: str, digest: Digest) -> None:
        """A replica says what it stores now."""
        known = self._known(replica)
        old, known.digest = known.digest, digest
        for entry in old.without(digest):
            self._stored.discard(entry.name, known.bit)
            self._stale += bool(entry.tail)
        for entry in digest.without(old):
            self._stored.add(entry.name, known.bit)
            self._add_tail(entry.anchor, entry.tail)
        now, before = known.sent
        known.sent = (set(), now)
        for name in before - now:
            self._sent.discard(name, known.bit)
        self._sweep()

    def routed(self, names: Names, replica: str) -> None:
        """A prompt went to a replica."""
        known = self._known(replica)
        for name in names.anchors[1:]:
            known.sent[0].add(name)
            self._sent.add(name, known.bit)
            self._seen[name] = self._seen.pop(name, 0) | known.bit
        while len(self._seen) > self._most_seen:
            self._seen.popitem(last=False)

    # -- what is asked ------------------------------------------------------------------------------------------------

    def longest(self, names: Names, among: Collection[str]) -> tuple[int, list[str]]:
        """The longest prefix that any of these replicas holds, in tokens, and who holds it; 0 and all if none does."""
        for position, mask in self._prefixes(names):
            found = [name for name in among if self._bit(name) & mask]
            if found:
                return position, found
        return 0, list(among)

    def lengths(self, names: Names, among: Collection[str]) -> dict[str, int]:
        """The longest prefix that each of these replicas holds, in tokens."""
        found = dict.fromkeys(among, 0)
        for position, mask in self._prefixes(names):
            for name in among:
                if not found[name] and self._bit(name) & mask:
                    found[name] = position
            if all(found.values()):
                break
        return found

    def seen(self, names: Names, among: Collection[str]) -> tuple[int, list[str]]:
        """How much of a prompt any of these was sent, in tokens up to an anchor, and which were; as `longest`."""
        for block in range(len(names.anchors) - 1, 0, -1):
            mask = self._seen.get(names.anchors[block], 0)
            found = [name for name in among if self._bit(name) & mask] if mask else []
            if found:
                return block * names.block, found
        return 0, list(among)

    def _prefixes(self, names: Names) -> Iterator[tuple[int, int]]:
        """Positions from which the prompt may be resumed somewhere, deep to shallow, and where."""
        most = names.length - MIN_SUFFIX_TOKENS
        for block in range(len(names.anchors) - 1, -1, -1):
            anchor, start = names.anchors[block], block * names.block
            tails = self._tails.get(anchor, 0)
            while tails:
                tail = tails.bit_length() - 1
                tails ^= 1 << tail
                position = start + tail
                if position <= most or position == names.length:
                    mask = self._stored.get(names.behind(block, tail))
                    if mask:
                        yield position, mask
            mask = self._stored.get(anchor) | self._sent.get(anchor)
            if mask and block and (start <= most or start == names.length):
                yield start, mask

    # -- inside -------------------------------------------------------------------------------------------------------

    def _bit(self, replica: str) -> int:
        known = self._replicas.get(replica)
        return 0 if known is None else known.bit

    def _known(self, replica: str) -> Known:
        if replica not in self._replicas:
            taken = 0
            for known in self._replicas.values():
                taken |= known.bit
            self._replicas[replica] = Known(~taken & (taken + 1))  # the lowest bit that is free
        return self._replicas[replica]

    def _drop(self, replica: str) -> None:
        """Forgets a replica; its bit may be another's from now on."""
        known = self._replicas.pop(replica)
        for entry in known.digest:
            self._stored.discard(entry.name, known.bit)
            self._stale += bool(entry.tail)
        for name in known.sent[0] | known.sent[1]:
            self._sent.discard(name, known.bit)
        self._seen = OrderedDict((name, left) for name, mask in self._seen.items() if (left := mask & ~known.bit))
        self._sweep()

    def _add_tail(self, anchor: int, tail: int) -> None:
        if tail:
            self._tails[anchor] = self._tails.get(anchor, 0) | 1 << tail

    def _sweep(self) -> None:
        if self._stale > max(_MOST_STALE, len(self._stored)):
            self._tails, self._stale = {}, 0
            for known in self._replicas.values():
                for entry in known.digest:
                    self._add_tail(entry.anchor, entry.tail)
