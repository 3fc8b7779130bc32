"""The two modes of exactness: where a prompt may be cut, which checkpoints it may resume from, and what is then run.

*Bitwise*: every cut of the handle's rule is a cut, captured or not, so that what is stored never shows in a result.
*Replayable*: a prompt is cut where a checkpoint is taken or resumed, and where pieces are faster; a result depends on
that, in its last bits, and names the segments behind it so that they can be run again from nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .compiled import segment_ends
from .cuts import MIN_SUFFIX_TOKENS, CutRule, Positions, Tokens, cut_positions
from .lineage import Lineage


SHORT_FORWARDS = 4  # a prompt is short when its tokens cost at most so many times what its forward costs besides
MOST_SHORT_TOKENS = 1024  # of longer ones something can be kept, whatever the forward costs
_NOTHING = Lineage()


@dataclass(frozen=True)
class Segmenting(ABC):
    """How the prompts of one handle become segments; `Bitwise` and `Replayable` say it each in their way.

    Attributes:
        rule: the cuts that follow from a prompt and the handle's settings alone.
        cut_tokens: what a cut costs besides the checkpoint, in tokens of prefill.
        forward_tokens: what a forward costs besides its tokens, in tokens of prefill.
        tail: of how many of the last tokens of this prompt the logits are wanted, so that they are computed, whatever
            is stored.
        junctions: positions of this prompt at which other prompts want to take over (see `planning.batch`).
        rounds: whether what is kept is rounded, and with it what is computed from there on.
        afresh: whether this prompt resumes from nothing, so that what lies in the tiers below memory stays there.
    """

    mode: ClassVar[str]

    rule: CutRule
    tail: int = field(default=1, kw_only=True)
    junctions: tuple[int, ...] = field(default=(), kw_only=True)
    rounds: bool = field(default=False, kw_only=True)
    afresh: bool = field(default=False, kw_only=True)

    @property
    def cut_tokens(self) -> float:
        return 0.0

    @property
    def forward_tokens(self) -> float:
        return 0.0

    @abstractmethod
    def cuts(self, ids: Tokens, marked: Sequence[int] = ()) -> Positions:
        """Where checkpoints of a prompt may sit, whatever earlier prompts were.

        Args:
            ids: its tokens.
            marked: lengths of the announced prefixes that it begins with.
        """

    @abstractmethod
    def joined(self, cuts: Positions, overlap: int, length: int) -> Positions:
        """These cuts, and those that follow from the tokens that the prompt shares with earlier ones."""

    @abstractmethod
    def foreseen(self, ids: Tokens, positions: Sequence[int], marked: Sequence[int] = ()) -> Positions:
        """Where checkpoints of a prompt may sit for a caller who knows where later ones will leave it.

        Args:
            ids: its tokens.
            positions: where they will leave, ascending.
            marked: lengths of the announced prefixes that it begins with.
        """

    @abstractmethod
    def expected(self, cuts: Positions, length: int) -> Lineage | None:
        """What a prompt may resume from: the first segments of this lineage; None where any lineage will do."""

    @abstractmethod
    def segments(self, start: int, planned: list[int], cuts: Positions, length: int) -> Positions:
        """Ends of the segments that a prefill runs from `start` to the end of the prompt, `length`.

        Args:
            start: where it resumes.
            planned: positions to capture at, each of them one of `cuts`, or the end; one that is too close to
                `start` is left out.
            cuts: those of the prompt.
            length: tokens of the prompt.

        Returns:
            Ascending positions behind `start`, the last one `length`; no segment has fewer than two tokens.
        """

    def behind(self, made: Lineage, ends: Positions, stops: Collection[int]) -> Lineage:
        """The lineage of a prefill to the end of the prompt.

        Args:
            made: that of where it resumes.
            ends: of its segments, as `segments` gives them.
            stops: those at which something is kept for others.
        """
        if not self.rounds:
            return made.then(ends)
        rounded = self.rounded(ends.tolist(), stops)
        return made.then([item for end in ends.tolist() for item in ((end, end) if end in rounded else (end,))])

    @abstractmethod
    def rounded(self, ends: Sequence[int], stops: Collection[int]) -> set[int]:
        """Where such a prefill goes on from rounded values, if it rounds; arguments as of `behind`."""

    def kept(self, lineage: Lineage) -> Lineage:
        """Of what is kept of a state of some lineage: a rounded copy, or the very same."""
        return lineage.rounded() if self.rounds else lineage

    @abstractmethod
    def answered(self, ids: Tokens, start: int, lineage: Lineage) -> tuple[Positions, Lineage]:
        """Where the states of what was generated behind a prompt may be captured, and how they are made.

        Args:
            ids: the whole text.
            start: tokens of the prompt.
            lineage: of the prompt.

        Returns:
            Ascending positions, none before `start`, and the lineage of the last of them.
        """

    @abstractmethod
    def meeting(self, shared: int, cuts: Positions, length: int, other_cuts: Positions, other_length: int) -> int:
        """The deepest position at which a prompt may take over from another one that is being computed.

        Args:
            shared: tokens that the two share.
            cuts, length: of the prompt.
            other_cuts, other_length: of the one that it takes over from.

        Returns:
            The position; 0 where there is none.
        """

    def together(self, tokens: int, loses: bool) -> bool:
        """Whether prompts may run in one forward with others, from which nothing can be kept.

        Args:
            tokens: what is left of each to compute.
            loses: whether a checkpoint is wanted on the way.
        """
        return False

    @abstractmethod
    def kv_ends(self, lineage: Lineage, captured: Sequence[int]) -> list[int]:
        """Where keys and values are cut into spans.

        Args:
            lineage: of the prefill.
            captured: positions of its checkpoints.
        """


class Bitwise(Segmenting):
    """Cuts are a function of the tokens and of the settings. Warm equals cold bit for bit, whatever is stored."""

    mode = "bitwise"

    def cuts(self, ids: Tokens, marked: Sequence[int] = ()) -> Positions:
        """Those of the rule."""
        return self.rule.cuts(ids, marked)

    def joined(self, cuts: Positions, overlap: int, length: int) -> Positions:
        """The same: nothing but the prompt and the settings may decide."""
        return cuts

    def foreseen(self, ids: Tokens, positions: Sequence[int], marked: Sequence[int] = ()) -> Positions:
        """Those of the rule: nothing but the prompt and the settings may decide."""
        return self.cuts(ids, marked)

    def expected(self, cuts: Positions, length: int) -> Lineage:
        """What this very prompt runs from nothing."""
        return self.behind(_NOTHING, self.segments(0, [], cuts, length), ())

    def rounded(self, ends: Sequence[int], stops: Collection[int]) -> set[int]:
        """Everywhere, the end of the prompt included: whatever is kept, a cold run sees what a warm one does."""
        return set(ends)

    def segments(self, start: int, planned: list[int], cuts: Positions, length: int) -> Positions:
        """From cut to cut."""
        found: Positions = segment_ends(cuts, start, length)
        return found

    def answered(self, ids: Tokens, start: int, lineage: Lineage) -> tuple[Positions, Lineage]:
        """At its cuts, by segments: by one who reads the whole text once more. Decoding does not pass there."""
        cuts = self.cuts(ids)
        return cuts[np.searchsorted(cuts, start) :], self.expected(cuts, len(ids))

    def meeting(self, shared: int, cuts: Positions, length: int, other_cuts: Positions, other_length: int) -> int:
        """The last cut that both have."""
        common = np.intersect1d(cuts[cuts <= shared], other_cuts)
        return int(common[-1]) if len(common) else 0

    def kv_ends(self, lineage: Lineage, captured: Sequence[int]) -> list[int]:
        """At every cut: whoever shares a prompt up to a cut shares these."""
        return lineage.positions


@dataclass(frozen=True)
class Replayable(Segmenting):
    """Cut only for a reason. Warm equals, bit for bit, a cold run over the same segments.

    Attributes:
        step: distance in tokens of the positions at which checkpoints may be planned.
        piece: most tokens a forward, where pieces are faster or memory is short; None for no limit.
        price: what a cut costs besides the checkpoint, in tokens of prefill.
        overhead: what a forward costs besides its tokens, in tokens.
        gathers: whether also long prompts run no slower in one forward than each by itself.
    """

    mode = "replayable"

    step: int = 64
    piece: int | None = None
    price: float = 0.0
    overhead: float = 0.0
    gathers: bool = False

    def together(self, tokens: int, loses: bool) -> bool:
        """Those that cost little beside their forward, and any of which nothing is to be kept, on an accelerator."""
        within = self.piece is None or tokens <= self.piece
        short = tokens <= min(SHORT_FORWARDS * self.overhead, MOST_SHORT_TOKENS)
        return within and (short or (self.gathers and not loses))

    @property
    def cut_tokens(self) -> float:
        return self.price

    @property
    def forward_tokens(self) -> float:
        return self.overhead

    def cuts(self, ids: Tokens, marked: Sequence[int] = ()) -> Positions:
        """Multiples of the step, ends of messages and strings, announced ends, and the end of the prompt."""
        strings = () if self.rule.cut_after is None else self.rule.cut_after.positions(ids).tolist()
        regular = cut_positions(ids, self.step, self.rule.cut_ids, MIN_SUFFIX_TOKENS)
        if not len(marked) and not len(strings) and self.step >= MIN_SUFFIX_TOKENS:
            apart: Positions = segment_ends(regular, 0, len(ids))  # as they are
            return apart
        return _spaced(((len(ids),), marked, strings, regular.tolist()), len(ids))

    def joined(self, cuts: Positions, overlap: int, length: int) -> Positions:
        """With the exact junction, in place of a cut one token beside it."""
        if not MIN_SUFFIX_TOKENS <= overlap <= length - MIN_SUFFIX_TOKENS:
            return cuts
        low, high = cuts.searchsorted((overlap - MIN_SUFFIX_TOKENS + 1, overlap + MIN_SUFFIX_TOKENS)).tolist()
        found: Positions = np.concatenate((cuts[:low], (overlap,), cuts[high:]))
        return found

    def foreseen(self, ids: Tokens, positions: Sequence[int], marked: Sequence[int] = ()) -> Positions:
        """Just there, and at announced ends."""
        return _spaced(((len(ids),), marked, positions), len(ids))

    def expected(self, cuts: Positions, length: int) -> None:
        """Any: whoever resumes from a state says what made it."""

    def segments(self, start: int, planned: list[int], cuts: Positions, length: int) -> Positions:
        """From checkpoint to checkpoint, in pieces where there is a limit."""
        size = length if self.piece is None else self.piece
        ends: list[int] = []
        behind = (position for position in planned if start + MIN_SUFFIX_TOKENS <= position < length)
        for end in sorted({*behind, length}):
            ends += range(start + size, end - MIN_SUFFIX_TOKENS + 1, size)
            ends.append(end)
            start = end
        return np.asarray(ends, dtype=np.int64)

    def rounded(self, ends: Sequence[int], stops: Collection[int]) -> set[int]:
        """Where something is kept inside of the prompt. At its end the copy is rounded, and not what answers it."""
        return {*stops} - {*ends[-1:]}

    def answered(self, ids: Tokens, start: int, lineage: Lineage) -> tuple[Positions, Lineage]:
        """Behind the last token that was read, one by one; the one after it was chosen and never read."""
        end = len(ids) - 1
        return np.arange(end, end + (end > start), dtype=np.int64), lineage.decoded(end)

    def meeting(self, shared: int, cuts: Positions, length: int, other_cuts: Positions, other_length: int) -> int:
        """Where they part, or just before, so that no segment of either is too short."""
        found = min(shared, length - MIN_SUFFIX_TOKENS)
        if 0 < other_length - found < MIN_SUFFIX_TOKENS:
            found = other_length - MIN_SUFFIX_TOKENS
        return found if found >= MIN_SUFFIX_TOKENS else 0

    def kv_ends(self, lineage: Lineage, captured: Sequence[int]) -> list[int]:
        """At checkpoints: nobody else can build on what lies between."""
        return list(captured)


def _spaced(wishes: Sequence[Sequence[int]], length: int) -> Positions:
    """Positions of which no two, nor one and an end of the prompt, lie closer than a segment may be short.

    Args:
        wishes: groups of positions, the most important group first: it is the later ones that give way.
        length: tokens of the prompt; a position at `length` itself is allowed.
    """
    taken: set[int] = set()
    for group in wishes:
        for position in group:
            inside = MIN_SUFFIX_TOKENS <= position <= length - MIN_SUFFIX_TOKENS or position == length
            near = range(position - MIN_SUFFIX_TOKENS + 1, position + MIN_SUFFIX_TOKENS)
            if inside and taken.isdisjoint(near):
                taken.add(position)
    return np.asarray(sorted(taken), dtype=np.int64)
