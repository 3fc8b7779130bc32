"""What comes free, and what is lost, if one checkpoint after another goes. Nothing goes yet.

Checkpoints of one path share keys and values, which come free only when all of them have gone; and whoever resumed at
one that goes resumes at the one above it. So the bytes and the value of a set are not the sums over its members: they
are counted here while the set grows.
"""

from __future__ import annotations

from .tree import Checkpoint, KVSegment


LEAST_STOPPING = 1e-6  # of the prompts that enter its edge: none at all would make all such checkpoints alike


class Leaving:
    """A set of checkpoints that are to go, in the order in which they were added.

    Attributes:
        gone: the set.
        freed: bytes that come free when all of it has gone.
    """

    __slots__ = ("_above", "_given", "_references", "freed", "gone")

    def __init__(self) -> None:
        self.gone: dict[Checkpoint, None] = {}
        self.freed = 0
        self._references: dict[KVSegment, int] = {}  # those that are left, where some are gone
        self._given: dict[Checkpoint, float] = {}
        self._above: dict[Checkpoint, Checkpoint | None] = {}  # as last looked up, whether or not it is gone by now

    def bytes_of(self, checkpoint: Checkpoint) -> int:
        """What comes free if it goes as well: its state, and the keys and values that nothing else needs then."""
        total, segment, fewer = checkpoint.nbytes, checkpoint.kv, self._references
        while segment is not None and not segment.holds:
            references = segment.refs
            if references > 1 and fewer.get(segment, references) > 1:
                break
            total += segment.nbytes
            segment = segment.parent
        return total

    def above(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The nearest one nearer to the start of the prompt that stays."""
        known, gone = self._above, self.gone
        found = known[checkpoint] if checkpoint in known else checkpoint.above()
        while found is not None and found in gone:
            found = known[found] if found in known else found.above()
        known[checkpoint] = found
        return found

    def worth(self, checkpoint: Checkpoint, above: Checkpoint | None, rate: float) -> tuple[float, float]:
        """Tokens that a checkpoint saves over the one above while others leave, and the same for each byte.

        Args:
            checkpoint: one that stays so far.
            above: the nearest above it that stays.
            rate: of its passes.
        """
        share = checkpoint.share
        rate *= (share if share > LEAST_STOPPING else LEAST_STOPPING) + self._given.get(checkpoint, 0.0)
        worth = rate * (checkpoint.position - (above.position if above is not None else 0))
        return worth, worth / (self.bytes_of(checkpoint) or 1)

    def given(self, checkpoint: Checkpoint) -> float:
        """Of the prompts that enter its edge, those that resume here as what they would have resumed at is gone."""
        return self._given.get(checkpoint, 0.0)

    def give(self, checkpoint: Checkpoint, share: float) -> None:
        """From now on so many more of them resume here."""
        self._given[checkpoint] = self._given.get(checkpoint, 0.0) + share

    def add(self, checkpoint: Checkpoint) -> None:
        """Lets one go."""
        freed, segment, fewer = checkpoint.nbytes, checkpoint.kv, self._references
        while segment is not None:
            left = fewer[segment] = fewer.get(segment, segment.refs) - 1
            if left or segment.holds:
                break
            freed += segment.nbytes
            segment = segment.parent
        self.freed += freed
        self.gone[checkpoint] = None
