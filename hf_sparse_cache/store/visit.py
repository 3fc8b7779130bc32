"""One prompt's stay in the store: matched, looked at by a policy, built on, remembered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..planning.compiled import edges_of
from ..planning.cuts import Positions, Tokens, message_start
from ..planning.lineage import Lineage, Span
from ..planning.policy import Prompt, Terms
from ..planning.segments import Segmenting
from .chains import Footing
from .forest import Trail
from .ledger import Ledger
from .tree import Checkpoint, KVSegment, Match


PRICED_SHARE = 0.05  # of the budget: memory is priced by what so much of it holds, as single values are noise
LEAST_NEED = 1.0  # bytes


class Before(NamedTuple):
    """The visit of a prompt, for the visit of a text that begins with it.

    Attributes:
        tree: number of the tree in which it was remembered.
        tokens: how many it has; they were counted then.
        resumed: where it resumed.
    """

    tree: int
    tokens: int
    resumed: int


@dataclass(eq=False)
class Visit:
    """From `CheckpointStore.open` to `CheckpointStore.leave`.

    Attributes:
        footing: its text and the chain that its checkpoints build on; walked once, reused by every `put`.
        match: what the tree knew of the prompt.
        checkpoint: where it resumes, pinned meanwhile; None when cold.
        marked: lengths of announced prefixes, at whose ends a checkpoint is to be kept.
        expected: how the prompt itself would be cut; None where it may resume from any lineage.
        prompt: what a policy may look at.
        counted: tokens of the text that were counted as a prompt before.
        batched: whether what it computed ran in one forward with other prompts.
        chain: the KV segments below `checkpoint`, from 0 upwards, which are kept until it ends whatever becomes of it.
    """

    ledger: Ledger
    space: str
    footing: Footing
    match: Match
    checkpoint: Checkpoint | None
    marked: set[int]
    expected: Lineage | None
    prompt: Prompt
    counted: int = 0
    batched: bool = False
    chain: Sequence[KVSegment] = ()

    @classmethod
    def begin(cls, ledger: Ledger, ids: Tokens, segmenting: Segmenting, space: str) -> Visit:
        """Matches a prompt, pins the deepest checkpoint it may resume from, and says what a policy may look at."""
        with ledger.lock:
            ledger.clock += 1
            while ledger.orphans:
                _leave(ledger, *ledger.orphans.popleft())
            footing = ledger.chains.begin(Trail(ledger.forest, ids, space))
            with _standing(ledger, footing) as taken:
                match = Match(*footing.trail.known(), space in ledger.forest.trees)
                marked = ledger.marks.lengths(ids, space)
                cuts = segmenting.cuts(ids, marked)
                expected = segmenting.expected(cuts, len(ids))
                checkpoint = next(match.fitting(len(ids), expected, tail=segmenting.tail), None)
                chain: Sequence[KVSegment] = ()
                if checkpoint is not None:
                    ledger.take(checkpoint)
                    taken.append(checkpoint)
                    checkpoint.hits += 1
                    checkpoint.last_used = ledger.clock
                    if checkpoint.kv is not None:
                        chain = checkpoint.chain()
                        ledger.chains.stand(footing, [*chain])
                for item in match.fitting(len(ids), expected) if marked else ():
                    if item.position in marked:  # a tier below may have brought it after it was announced
                        ledger.keep(item, space)
                ledger.passed(match, checkpoint, space)
                cuts = segmenting.joined(cuts, match.overlap, len(ids))
                prompt = _prompt(ledger, ids, cuts, match, checkpoint)
                prompt.terms = _terms(ledger, match, checkpoint, _wanted(prompt, bool(segmenting.junctions)))
                prompt.cut_tokens, prompt.seconds = segmenting.cut_tokens, ledger.seconds()
                prompt.message_start = message_start(ids, segmenting.rule.cut_ids)
                return cls(ledger, space, footing, match, checkpoint, set(marked), expected, prompt, chain=chain)

    @classmethod
    def again(cls, ledger: Ledger, prompt: Prompt, space: str, before: Before) -> Visit | None:
        """Visits a text that begins with a prompt of an earlier visit; None where that was cleared since.

        No age grows, and nothing counts as used; what the prompt resumed from is pinned as it was then.
        """
        with ledger.lock:
            known = ledger.forest.trees.get(space)
            if known is None or known.serial != before.tree:
                return None
            footing = ledger.chains.begin(Trail(ledger.forest, prompt.ids, space))
            with _standing(ledger, footing) as taken:
                match = Match(*footing.trail.known(), True)
                prompt.terms = replace(prompt.terms, price=_terms(ledger, match, None, _wanted(prompt, True)).price)
                prompt.seconds = ledger.seconds()
                stored = match.checkpoints(before.resumed)[-1:]
                below = next((item for item in stored if item.position == before.resumed), None)
                if below is not None:
                    ledger.take(below)
                    taken.append(below)
                    if below.kv is not None:
                        ledger.chains.stand(footing, below.chain())
                return cls(ledger, space, footing, match, below, set(), None, prompt, before.tokens)

    @property
    def tree(self) -> int:
        """The number of the tree that its text is remembered in; 0 for none."""
        tree = self.ledger.forest.trees.get(self.space)
        return 0 if tree is None else tree.serial

    def missing(self, spans: Sequence[Span]) -> Sequence[Span]:
        """The part of its KV spans that is not stored yet; the rest stays stored until it ends."""
        return self.ledger.missing_spans(self.footing, spans)

    def settle(self) -> bool:
        """The request went well: counts its prompt in the tree, and lets the eviction learn from it.

        Returns:
            False if nothing may be remembered of it, as its space was cleared.
        """
        ledger = self.ledger
        with ledger.lock:
            if self.footing.ended or self.footing not in ledger.chains.footings:  # not there after a fork
                return False
            path = ledger.remember(self.footing.trail, self.counted)
            for node in path:
                if node.end > max(self.counted, self.prompt.resumed):
                    node.batched = self.batched and (node.batched or node.passes == 1)
            ledger.forest.describe(path, self.prompt.shape)
            ledger.eviction.settled(path, self.prompt.forecast, ledger.clock)
            ledger.trim()  # once more, as the description counts as well
            return True

    def __del__(self) -> None:
        # An interrupt can come before any line of those that would have ended it. No lock is taken here: whoever comes
        # next does it, as this may run in the middle of anything.
        if self.footing in self.ledger.chains.footings:
            self.ledger.orphans.append((self.footing, [] if self.checkpoint is None else [self.checkpoint]))

    def end(self) -> None:
        """Takes back what it pins and holds."""
        with self.ledger.lock:
            if self.footing in self.ledger.chains.footings:
                _leave(self.ledger, self.footing, [] if self.checkpoint is None else [self.checkpoint])


@contextmanager
def _standing(ledger: Ledger, footing: Footing) -> Iterator[list[Checkpoint]]:
    """Takes back a footing, and the pins of what is put on the list, where a visit fails to begin.

    A prompt is cut by what a user's tokenizer says, and priced by an eviction of his own: either may fail.
    """
    taken: list[Checkpoint] = []
    try:
        yield taken
    except BaseException:
        _leave(ledger, footing, taken)
        raise


def _leave(ledger: Ledger, footing: Footing | None, taken: Sequence[Checkpoint]) -> None:
    if footing is not None:
        ledger.chains.end(footing)
    for checkpoint in taken:
        ledger.done_with(checkpoint)


def _prompt(ledger: Ledger, ids: Tokens, cuts: Positions, match: Match, checkpoint: Checkpoint | None) -> Prompt:
    """What a policy may look at."""
    state_bytes = ledger.checkpoint_bytes / max(ledger.checkpoint_count, 1)
    kv_bytes = ledger.kv_bytes / max(ledger.chains.tokens, 1)
    resumed = checkpoint.position if checkpoint is not None else 0
    path_ends, path_passes = edges_of(match.path)
    return Prompt(
        ids,
        cuts,
        match.overlap,
        resumed,
        path_ends=path_ends,
        path_passes=path_passes,
        latest=match.path[-1].latest if match.path else None,
        state_bytes=state_bytes,
        kv_bytes_per_token=kv_bytes,
        resumed_bytes=checkpoint.nbytes if checkpoint is not None else 0,
    )


class _Wanted(NamedTuple):
    """Bytes of a checkpoint at the end of a prompt, and whether any of its cuts is left to place one at."""

    nbytes: float
    placing: bool


def _wanted(prompt: Prompt, placing: bool) -> _Wanted:
    """What a prompt may want; `placing` where cuts are still to come."""
    nbytes = prompt.state_bytes + prompt.kv_bytes_per_token * (len(prompt.ids) - prompt.resumed)
    return _Wanted(nbytes, placing or bool(len(prompt.cuts) and prompt.cuts[-1] > prompt.resumed))


def _terms(ledger: Ledger, match: Match, checkpoint: Checkpoint | None, wanted: _Wanted) -> Terms:
    """What new checkpoints of a prompt would earn and cost."""
    need = 0.0
    if ledger.max_memory is not None:
        need = wanted.nbytes + ledger.used_bytes - ledger.max_memory
        if need > 0.0:  # without a cut, all that counts is whether memory is full: the first to go has a price as well
            need = max(need, PRICED_SHARE * ledger.max_memory) if wanted.placing else LEAST_NEED
    return ledger.eviction.terms(match.path, match.overlap, max(need, 0.0), checkpoint)
