"""Planning for a call that knows its whole future: a trie of all its texts, and a state exactly where they part.

Sorted, each text follows the one that it shares most with. A state is kept where a later text will leave the path, and
only until the last such text has come by, so that at any time those of one path are enough, however many texts there
are. Where states sit is then no guess: the handle's policy only says which of them it would like to see stay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from .cuts import MIN_SUFFIX_TOKENS, Positions, Tokens
from .lineage import Lineage
from .policy import Policy, Prompt, placed
from .segments import Segmenting


@dataclass
class TextInTurn:
    """One text of a call, in its turn.

    Attributes:
        index: which of the texts it is, as they were given.
        place: in the order of the call.
        tokens: the text, int32 `(N,)`.
        first: the first token whose logits are wanted, of this text or of a later one that shares it.
        shared: tokens that it shares with the text before it; the most that it shares with any earlier one.
        keep: where it or later texts leave the path, and the place of the last that does.
    """

    index: int
    place: int
    tokens: Tokens
    first: int
    shared: int = 0
    keep: dict[int, int] = field(default_factory=dict)


def turns(texts: Sequence[Tokens], firsts: Sequence[int], share: bool = True) -> list[TextInTurn]:
    """The order in which shared prefixes are computed once, with what to keep on the way.

    Args:
        texts: int32 `(N,)` each, N at least 1.
        firsts: of each text, the index of the first token whose logits are wanted.
        share: whether logits of a shared prefix serve every text that shares it.
    """
    order = sorted(range(len(texts)), key=lambda index: (texts[index].astype(">i4").tobytes(), firsts[index]))
    found = [TextInTurn(index, place, texts[index], firsts[index]) for place, index in enumerate(order)]
    for before, turn in pairwise(found):
        turn.shared = common(before.tokens, turn.tokens)
    if share:
        for turn, after in zip(reversed(found[:-1]), reversed(found[1:]), strict=True):
            if after.first < after.shared:
                turn.first = min(turn.first, after.first)
    _keep(found)
    return found


def common(one: Tokens, other: Tokens) -> int:
    """Tokens that two texts have in common from their beginning on."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


def _keep(found: list[TextInTurn]) -> None:
    """Notes at each text where later ones will leave it, as far as they resume there."""
    # Texts at which the path grew beyond what they share with the text before, nearest to the root first.
    grew, depths = [0], [-1]
    for place, turn in enumerate(found):
        if not place:
            continue
        while depths[-1] >= turn.shared:
            grew.pop(), depths.pop()
        grew.append(place)
        depths.append(turn.shared)
        position = min(turn.shared, len(turn.tokens) - MIN_SUFFIX_TOKENS)
        if turn.first < turn.shared:  # what followed the last shared token there is another token here
            position = min(position, turn.shared - 1)
        while position >= MIN_SUFFIX_TOKENS:
            owner = found[grew[bisect_left(depths, position) - 1]]
            if len(owner.tokens) - position not in range(1, MIN_SUFFIX_TOKENS):
                owner.keep[position] = place
                break
            position -= 1
    # Every text on the way may have to make up for one that did not pass there, because it resumed deeper.
    open_: dict[int, int] = {}
    for place, turn in enumerate(found):
        open_ = {position: last for position, last in (open_ | turn.keep).items() if last >= place}
        turn.keep = dict(open_)


@dataclass(frozen=True)
class Foreseen(Segmenting):
    """How one text of such a call becomes segments: as the handle has it, but for where checkpoints may sit.

    Attributes:
        base: how the handle's prompts become segments.
        positions: where later texts leave this one.
        first: index of the first token whose logits are wanted.
        most: of such tokens, at most so many a forward: their logits are in memory together.
    """

    base: Segmenting
    positions: tuple[int, ...] = ()
    first: int = 0
    most: int = 2**31

    @property
    def mode(self) -> str:  # type: ignore[override]
        return self.base.mode

    @property
    def cut_tokens(self) -> float:
        return self.base.cut_tokens

    def cuts(self, ids: Tokens, marked: Sequence[int] = ()) -> Positions:
        """Those of the handle, or where nothing but the caller's wishes decides, the positions."""
        return self.base.foreseen(ids, self.positions, marked)

    def joined(self, cuts: Positions, overlap: int, length: int) -> Positions:
        """The same: what earlier prompts were is nothing to a call that knows the later ones."""
        return cuts

    def expected(self, cuts: Positions, length: int) -> Lineage | None:
        if self.base.expected(cuts, length) is None:
            return None
        return self.behind(Lineage(), self.segments(0, [], cuts, length), ())

    def rounded(self, ends: Sequence[int], stops: Collection[int]) -> set[int]:
        return self.base.rounded(ends, stops)

    def segments(self, start: int, planned: list[int], cuts: Positions, length: int) -> Positions:
        ends: list[int] = []
        for end in self.base.segments(start, planned, cuts, length).tolist():
            scored = max(start, self.first)
            ends += range(scored + self.most, end - MIN_SUFFIX_TOKENS + 1, self.most)
            ends.append(end)
            start = end
        return np.asarray(ends, dtype=np.int64)

    def kv_ends(self, lineage: Lineage, captured: Sequence[int]) -> list[int]:
        return self.base.kv_ends(lineage, captured)

    def foreseen(self, ids: Tokens, positions: Sequence[int], marked: Sequence[int] = ()) -> Positions:
        return self.base.foreseen(ids, positions, marked)

    def answered(self, ids: Tokens, start: int, lineage: Lineage) -> tuple[Positions, Lineage]:
        return self.base.answered(ids, start, lineage)

    def meeting(self, shared: int, cuts: Positions, length: int, other_cuts: Positions, other_length: int) -> int:
        return self.base.meeting(shared, cuts, length, other_cuts, other_length)


class Foresight(Policy):
    """Places checkpoints where later texts of the call will leave this one, and at its end where `policy` would.

    Args:
        policy: the handle's own, which is asked and learns as in any other request.
        keep: where the text or later ones leave the path, and the place of the last that does (see `TextInTurn`).
        turn: the place of the text.
        staying: of the position that the prompt resumes at, where it would resume if nothing were kept for the call.

    Attributes:
        needed: of its last answer, the positions that later texts need, each with the place of the last.
        wanted: the positions that the handle's policy wants.
    """

    def __init__(
        self,
        policy: Policy,
        keep: Mapping[int, int],
        turn: int,
        staying: Callable[[int], int] = lambda position: position,
    ) -> None:
        super().__init__()
        self.lock = policy.lock
        self._policy, self._staying = policy, staying
        self._keep = {position: last for position, last in keep.items() if last > turn}
        self.needed: dict[int, int] = {}
        self.wanted: set[int] = set()

    def place(self, prompt: Prompt) -> list[int]:
        resumed = prompt.resumed
        prompt.resumed = self._staying(resumed)
        wishes = sorted(set(placed(self._policy, prompt)))
        allowed = len(wishes) if prompt.limit is None else prompt.limit
        prompt.resumed, prompt.limit = resumed, None
        self.wanted = set(wishes[max(0, len(wishes) - allowed) :])
        self.needed = {}
        for position, last in self._keep.items():
            for cut in prompt.cuts[prompt.cuts <= position][-1:].tolist():
                if cut >= prompt.resumed:
                    self.needed[cut] = max(last, self.needed.get(cut, 0))
        ahead = {cut for cut in self.needed if cut > prompt.resumed}
        return sorted(ahead | (self.wanted & {len(prompt.ids)}))

    def observe(self, prompt: Prompt) -> None:
        self._policy.observe(prompt)
