"""What comes free, and what is lost, if one checkpoint after another goes. Nothing goes yet.

Checkpoints of one path share keys and values, which come free only when all of them have gone; and whoever resumed at
one that goes resumes at the one above it. So the bytes and the value of a set are not the sums over its members: they
are counted here while the set grows.
"""

from __future__ import annotations

from .tree import Checkpoint, KVSegment


class Leaving:
    """A set of checkpoints that are to go, in the order in which they were added.

    Attributes:
        gone: the set.
        freed: bytes that come free when all of it has gone.
    """

    def __init__(self) -> None:
        self.gone: dict[Checkpoint, None] = {}
        self.freed = 0
        self._references: dict[KVSegment, int] = {}  # those that are left, where some are gone
        self._given: dict[Checkpoint, float] = {}

    def bytes_of(self, checkpoint: Checkpoint) -> int:
        """What comes free if it goes as well: its state, and the keys and values that nothing else needs then."""
        total, segment, fewer = checkpoint.nbytes, checkpoint.kv, self._references
        while segment is not None and not segment.holds:
            if segment.refs > 1 and fewer.get(segment, segment.refs) > 1:
                break
            total += segment.nbytes
            segment = segment.parent
        return total

    def above(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The nearest one nearer to the start of the prompt that stays."""
        found = checkpoint.above()
        while found is not None and found in self.gone:
            found = found.above()
        return found

    def given(self, checkpoint: Checkpoint) -> float:
        """Of the prompts that enter its edge, those that resume here as what they would have resumed at is gone."""
        return self._given.get(checkpoint, 0.0)

    def give(self, checkpoint: Checkpoint, share: float) -> None:
        """From now on so many more of them resume here."""
        self._given[checkpoint] = self.given(checkpoint) + share

    def add(self, checkpoint: Checkpoint) -> None:
        """Lets one go."""
        self.freed += checkpoint.nbytes
        segment = checkpoint.kv
        while segment is not None:
            left = self._references[segment] = self._references.get(segment, segment.refs) - 1
            if left or segment.holds:
                break
            self.freed += segment.nbytes
            segment = segment.parent
        self.gone[checkpoint] = None
