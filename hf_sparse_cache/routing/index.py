"""What is known of all replicas: which of them hold, or have just been sent, how much of a prompt."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

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

    def __contains__(self, name: int) -> bool:
        return name in self._masks

    def get(self, name: int) -> int:
        return self._masks.get(name, 0)

    def add(self, name: int, bit: int) -> None:
        self._masks[name] = self._masks.get(name, 0) | bit

    def add_all(self, names: Iterable[int], bit: int) -> None:
        """Most of these are there already, as prompts of a conversation share all but their ends."""
        masks = self._masks
        known = masks.get
        for name in [name for name in names if not known(name, 0) & bit]:
            masks[name] = known(name, 0) | bit

    def drop(self, names: Iterable[int]) -> None:
        """Forgets these for all replicas."""
        for name in names:
            self._masks.pop(name, None)

    def discard(self, name: int, bit: int) -> None:
        left = self._masks.get(name, 0) & ~bit
        if left:
            self._masks[name] = left
        else:
            self._masks.pop(name, None)

    def forget(self, bit: int) -> None:
        """Takes one replica out of everything."""
        self._masks = {name: left for name, mask in self._masks.items() if (left := mask & ~bit)}


class Seen:
    """The anchors of prompts that went somewhere, and where, as many as fit: those of the last prompts.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._masks = Masks()
        self._latest: dict[int, int] = {}  # the number of the last prompt that had it, by anchor
        self._prompts: deque[tuple[int, list[int]]] = deque()  # number and anchors of each, the last one last
        self._listed = self._number = 0

    def __len__(self) -> int:
        return len(self._masks)

    def get(self, anchor: int) -> int:
        return self._masks.get(anchor)

    def add(self, anchors: list[int], bit: int) -> None:
        """A prompt went to a replica."""
        self._number += 1
        self._masks.add_all(anchors, bit)
        self._latest.update(dict.fromkeys(anchors, self._number))
        self._list(self._number, anchors)
        while len(self._latest) > self._most:
            self._drop_some(len(self._latest) - self._most)
        if self._listed > 2 * max(self._most, len(self._latest)):
            self._tidy()

    def forget(self, bit: int) -> None:
        """Takes one replica out of everything."""
        self._masks.forget(bit)
        self._latest = {anchor: number for anchor, number in self._latest.items() if anchor in self._masks}
        self._tidy()

    def _list(self, number: int, anchors: list[int]) -> None:
        self._prompts.append((number, anchors))
        self._listed += len(anchors)

    def _drop_some(self, most: int) -> None:
        """Drops what the oldest prompt has to itself, from its beginning, but no more than `most`."""
        number, anchors = self._prompts.popleft()
        self._listed -= len(anchors)
        latest = self._latest
        oldest = list(islice((anchor for anchor in anchors if latest.get(anchor) == number), most))
        for anchor in oldest:
            del latest[anchor]
        self._masks.drop(oldest)
        if len(oldest) == most:
            left = [anchor for anchor in anchors if latest.get(anchor) == number]
            self._prompts.appendleft((number, left))
            self._listed += len(left)

    def _tidy(self) -> None:
        """Lists each anchor once."""
        prompts, self._prompts, self._listed = self._prompts, deque(), 0
        for number, anchors in prompts:
            left = [anchor for anchor in anchors if self._latest.get(anchor) == number]
            if left:
                self._list(number, left)


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
        self._seen = Seen(most_seen)
        self._by_bit: dict[int, str] = {}

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
        known, anchors = self._known(replica), names.anchors[1:]
        sent = known.sent[0]
        # Where one anchor was sent, so were all above it.
        new = anchors[bisect_left(anchors, True, key=lambda name: name not in sent) :]
        sent.update(new)
        self._sent.add_all(new, known.bit)
        self._seen.add(anchors, known.bit)

    # -- what is asked ------------------------------------------------------------------------------------------------

    def longest(self, names: Names, among: Collection[str]) -> tuple[int, list[str]]:
        """The longest prefix that any of these replicas holds, in tokens, and who holds it; 0 and all if none does."""
        for position, mask in self._prefixes(names):
            found = self._holders(mask, among)
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
            found = self._holders(self._seen.get(names.anchors[block]), among)
            if found:
                return block * names.block, found
        return 0, list(among)

    def _prefixes(self, names: Names) -> Iterator[tuple[int, int]]:
        """Positions from which the prompt may be resumed somewhere, deep to shallow, and where."""
        most = names.length - MIN_SUFFIX_TOKENS
        for block in range(len(names.anchors) - 1, -1, -1):
            anchor, start = names.anchors[block], block * names.block
            tails = self._tails.get(anchor, 0) if self._tails else 0
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

    def _holders(self, mask: int, among: Collection[str]) -> list[str]:
        """Those of some replicas that a mask has, in their order."""
        named = []
        while mask:
            bit = mask & -mask
            mask ^= bit
            named.append(self._by_bit[bit])
        if len(named) < 2:
            return [name for name in named if name in among]
        holders = set(named)
        return [name for name in among if name in holders]

    def _bit(self, replica: str) -> int:
        known = self._replicas.get(replica)
        return 0 if known is None else known.bit

    def _known(self, replica: str) -> Known:
        if replica not in self._replicas:
            taken = 0
            for known in self._replicas.values():
                taken |= known.bit
            bit = ~taken & (taken + 1)  # the lowest one that is free
            self._replicas[replica], self._by_bit[bit] = Known(bit), replica
        return self._replicas[replica]

    def _drop(self, replica: str) -> None:
        """Forgets a replica; its bit may be another's from now on."""
        known = self._replicas.pop(replica)
        del self._by_bit[known.bit]
        for entry in known.digest:
            self._stored.discard(entry.name, known.bit)
            self._stale += bool(entry.tail)
        for name in known.sent[0] | known.sent[1]:
            self._sent.discard(name, known.bit)
        self._seen.forget(known.bit)
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
