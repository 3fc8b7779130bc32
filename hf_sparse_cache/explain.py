"""Why a prompt resumes where it does, and what would let it resume deeper.

The causes are a closed set, `Cause`; their wording is part of the interface. The handle adds that weights changed and
that a call is not supported.

What other namespaces hold is no cause, since a tenant must not see whether they hold anything. A prompt that would
resume there is told `nothing stored`, in the very words that it would be told if nobody had ever sent it; the remedy
names the namespace that was looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .planning.cuts import MESSAGE_TOKENS, MIN_SUFFIX_TOKENS, Positions, Tokens
from .planning.lineage import Lineage
from .planning.segments import Segmenting
from .stats import Cause, Reason, format_bytes, html_table
from .store.bounds import Bound
from .store.slabs import taken
from .store.tree import Checkpoint, Departure, Match, nearest
from .store.unit import namespace_of


if TYPE_CHECKING:
    from .store.store import CheckpointStore


# Tokens decoded on either side of the place where a prompt leaves what is known.
_CONTEXT_TOKENS = 8
_HALF = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a letter are decoded to
_IN_ANSWER = {  # by whether both go on with the same text
    True: "decoded, it was tokenised differently",
    False: "the prompt has another text there, as where a template rewrites answers",
    None: "decoded, it was tokenised differently, or it was rewritten",
}
_KEEP_IDS = (
    "Keep the ids of answers and put the next message behind them, or call cache.prefill(conversation) while the user "
    "is reading"
)
TRAINING_MODE = "the model is in training mode"
_REMEDIES = {
    Cause.RESUMED: "",
    Cause.NOTHING_STORED: "The first prompt of a kind is always computed; a later one that starts alike resumes. Only "
    "prompts{namespace} count, with the same weights and settings.",
    Cause.DIVERGES: "That is before the first cut: put what changes behind what stays.{grid}",
    Cause.BEFORE_FIRST: "Call cache.mark() on the shared part: a checkpoint is then kept at its end.",
    Cause.CUT_OTHERWISE: "Give this handle the grid, cut_after and marks that they were made with, or use "
    "exactness='replayable', which resumes from any.",
    Cause.EVICTED: (
        "A larger max_memory, or cache.mark() on the shared part, would have kept its checkpoint; so may "
        "storage='bf16' or 'int8', which takes a half or a quarter of what 'exact' does."
    ),
    Cause.TOO_SHORT: "So short a prompt is always computed.{grid}",
    Cause.NO_ROOM: (
        "Raise max_memory, or the namespace's share in namespace_memory; or keep more in it, by storage='bf16' or "
        "'int8'."
    ),
    Cause.BATCHED: "What ran so is not stored: a prompt that comes back runs by itself and is kept from then on; "
    "cache.mark() keeps what is announced at once, and exactness='bitwise' runs every row by itself.",
    Cause.NOT_PLACED: "Call cache.mark() on the shared part, or raise max_checkpoints, or choose another policy.",
    Cause.WEIGHTS_CHANGED: "States belong to weights: this prompt and those after it are stored anew.",
    Cause.TRAINING: "Call model.eval() first.",
    Cause.NOT_SUPPORTED: "Call generate() without what the reason names; such a call runs as if there were no cache.",
}
_MARK = "{:,} shared tokens lie behind the last checkpoint: cache.mark() on them would keep one there."
_BEHIND_CUT = (
    "{:,} shared tokens lie {} and are computed again. cache.mark() on the shared part, cut_after= the string that "
    "ends it,{} or exactness='replayable' saves them."
)
_RESUMED = Reason(Cause.RESUMED)  # most requests have it
_LAST_CUT, _FIRST_CUT = "behind the last cut before the prompts part", "before the first cut"


@dataclass(frozen=True)
class Difference:
    """The first token that a prompt has otherwise than what is stored; `str()` of it reads as a sentence.

    Attributes:
        position: tokens before it, which are shared.
        token: the prompt's.
        stored_token: the one that stands there in the latest text that is stored.
        text, stored_text: the two decoded, where a tokenizer is known.
        in_answer: whether the stored one was generated, in an answer that is kept.
        same_text: of an answer, whether both go on with the same text, in other tokens; None where nobody can tell.
    """

    position: int
    token: int
    stored_token: int
    text: str = ""
    stored_text: str = ""
    in_answer: bool = False
    same_text: bool | None = None

    @classmethod
    def of(cls, ids: Tokens, departure: Departure, decode: Callable[[list[int]], str] | None) -> Difference | None:
        """Of a prompt that leaves what is stored; None where it only goes on, or ends before."""
        at, stored = departure.position, departure.stored
        if not len(stored):
            return None
        own, other = int(ids[at]), int(stored[0])
        if decode is None:
            return cls(at, own, other, in_answer=departure.generated)
        same = None
        if departure.generated:  # decoded with what stands before, as a first token may read otherwise
            before = ids[max(0, at - _CONTEXT_TOKENS) : at].tolist()
            shared = decode(before).rstrip(_HALF)
            texts = [decode(before + part.tolist()).rstrip(_HALF) for part in (ids[at : at + _CONTEXT_TOKENS], stored)]
            length = min(map(len, texts))
            same = texts[0][:length] == texts[1][:length] if length > len(shared) else None
        return cls(at, own, other, decode([own]), decode([other]), departure.generated, same)

    def __str__(self) -> str:
        own, other = (
            f"{text!r} ({token})" if text else f"{token}"
            for text, token in ((self.text, self.token), (self.stored_text, self.stored_token))
        )
        said = f"Token {self.position:,} is {own}, and {other} in what is stored"
        return f"{said}, in an answer: {_IN_ANSWER[self.same_text]}. {_KEEP_IDS}" if self.in_answer else said


@dataclass(frozen=True)
class Explanation:
    """What one prompt would reuse; `str()` of it reads as a sentence.

    Attributes:
        prompt_tokens: tokens of the prompt.
        overlap_tokens: tokens it shares with earlier prompts, whether or not states are still stored.
        resumed_tokens: tokens that it would skip.
        reason: the cause, from a closed set.
        remedy: what would have helped; empty when nothing is lost.
        context: the decoded text around the divergence, where a tokenizer is known.
        shared: what the store's shared store has for it, or why not; empty without one.
        difference: the first token that is otherwise than in what is stored; None where the prompt only goes on.
    """

    prompt_tokens: int
    overlap_tokens: int
    resumed_tokens: int
    reason: Reason
    remedy: str = ""
    context: str = ""
    shared: str = ""
    difference: Difference | None = None

    @property
    def recomputed_tokens(self) -> int:
        """Shared tokens that it would run again."""
        return max(0, self.overlap_tokens - self.resumed_tokens)

    def __str__(self) -> str:
        start = (
            f"Of {self.prompt_tokens:,} tokens, {self.overlap_tokens:,} are shared with earlier prompts and "
            f"{self.resumed_tokens:,} would be skipped: {self.reason}"
        )
        where = f" (at {self.context!r})" if self.context else ""
        parts = f"{self.difference}." if self.difference is not None else ""
        return " ".join(filter(None, (f"{start}{where}.", parts, self.remedy, self.shared)))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = [
            ("tokens of the prompt", f"{self.prompt_tokens:,}"),
            ("shared with earlier prompts", f"{self.overlap_tokens:,}"),
            ("would be resumed", f"{self.resumed_tokens:,}"),
            ("shared, and computed again", f"{self.recomputed_tokens:,}"),
            ("why not more", str(self.reason)),
            *((("at", repr(self.context)),) if self.context else ()),
            *((("first difference", str(self.difference)),) if self.difference is not None else ()),
            *((("shared store", self.shared),) if self.shared else ()),
        ]
        return html_table((), rows, title="What this prompt would reuse", note=self.remedy)


@dataclass(frozen=True)
class ModelFacts:
    """What a handle knows of its model, for advice in figures and words.

    Attributes:
        state_bytes, kv_bytes_per_token: of a checkpoint.
        smaller_grid: the largest grid that suits the model and cuts a prefix of so many tokens; 0 where none does.
        decode: turns token ids into text; None without a tokenizer.
        page_bytes: of which what is stored takes multiples, see `slabs.taken`.
    """

    state_bytes: int
    kv_bytes_per_token: int
    smaller_grid: Callable[[int], int]
    decode: Callable[[list[int]], str] | None = None
    page_bytes: int = 1

    def bytes_of(self, position: int, resumed: int = 0) -> int:
        """That a checkpoint takes with its keys and values, those up to `resumed` left out, the others in one span."""
        held = self.state_bytes, self.kv_bytes_per_token * (position - resumed)
        return sum(taken(nbytes, self.page_bytes) for nbytes in held)


@dataclass(frozen=True)
class _Gap:
    """Shared tokens behind the last checkpoint, up to the deepest cut before the prompts part.

    Attributes:
        marked: whether an announced prefix ends there.
        gone: whether a checkpoint there was evicted, or found no room.
    """

    start: int
    end: int
    marked: bool
    gone: bool

    @classmethod
    def between(cls, start: int, end: int, match: Match, marked: Iterable[int]) -> _Gap:
        """What the tree and the marks know of these tokens."""
        gone = (position for node in match.path for position in (node.refused, node.lost))
        return cls(start, end, *(any(start < position <= end for position in found) for found in (marked, gone)))

    def about_room(self, bound: Bound | None, model: ModelFacts) -> str:
        """The remedy where memory or a mark decides."""
        need = model.bytes_of(self.end)
        if bound is not None and bound.kept + need > bound.limit:
            return f"{too_small(bound, self.end, need)}."
        if self.marked:
            return "It is marked: the next prompt that begins with it brings its checkpoint back."
        beside = 0 if bound is None else bound.used + model.bytes_of(self.end, self.start)
        if bound is None or not self.gone or beside <= bound.limit:
            return ""
        return (
            f"There was no room for the checkpoint at {self.end:,}: {bound.name} of at least {beside:,} bytes holds "
            "it beside what is stored; cache.mark() on these tokens keeps it in place of others."
        )


def explain(store: CheckpointStore, ids: Tokens, segmenting: Segmenting, space: str, model: ModelFacts) -> Explanation:
    """What a prompt would reuse now, without running or changing anything.

    Args:
        store: what is stored.
        ids: the prompt, int32 of shape `(N,)`.
        segmenting: where it may be cut, and what it may resume from.
        space: where to look.
        model: what its checkpoints take, and how its tokens read.
    """
    with store.lock:
        match, marked = store.match(ids, space), store.marks.lengths(ids, space)
        cuts = segmenting.cuts(ids, marked)
        expected = segmenting.expected(cuts, len(ids))
        cuts = segmenting.joined(cuts, match.overlap, len(ids))
        usable = min(match.overlap, len(ids) - MIN_SUFFIX_TOKENS)
        checkpoint = next(match.fitting(len(ids), expected), None)
        reason = cause(match, checkpoint, usable, cuts)
    if checkpoint is None:
        reason = with_lower_tiers(reason, store, ids, expected, space)
    resumed, overlap = checkpoint.position if checkpoint else 0, match.overlap
    deeper, known = store.reach(ids, expected, space)
    if deeper > resumed:
        resumed, overlap, reason = deeper, max(overlap, known), Reason(Cause.RESUMED)
    there, told = (0, "") if store.shared is None else store.shared.reach(ids, expected, space, resumed)
    if there > resumed:
        resumed, overlap, reason = there, max(overlap, there), Reason(Cause.RESUMED)
    wanted = int(cuts[cuts <= usable][-1]) if len(cuts) and cuts[0] <= usable else 0
    context = ""
    if model.decode is not None and match.known and match.overlap < len(ids):
        around = ids[max(0, match.overlap - _CONTEXT_TOKENS) : match.overlap + _CONTEXT_TOKENS]
        context = model.decode(around.tolist())
    advice = remedy(reason, namespace_of(space), model.smaller_grid(usable))
    if wanted > resumed:
        gap = _Gap.between(resumed, wanted, match, marked)
        room = gap.about_room(store.bound(ids, wanted, space), model)
        advice = room or advice or _MARK.format(wanted - resumed)
    behind = usable - max(wanted, resumed)
    parts = expected is not None and match.overlap < len(ids)
    if parts and behind > MESSAGE_TOKENS:  # fewer agree by chance
        advice = _with_ways(advice, behind, max(wanted, resumed), segmenting)
    departures = [tier.departure(ids, space, _CONTEXT_TOKENS) for tier in store.tiers]
    furthest = max(departures, key=lambda one: one.position)
    difference = Difference.of(ids, furthest, model.decode) if furthest.position >= overlap else None
    return Explanation(len(ids), overlap, resumed, reason, advice, context, told, difference)


def _with_ways(advice: str, behind: int, cut: int, segmenting: Segmenting) -> str:
    """Advice with what saves the shared tokens behind a cut, or before the first one where `cut` is 0."""
    special = " a special token there," if behind >= segmenting.rule.special_distance else ""
    saved = _BEHIND_CUT.format(behind, _LAST_CUT if cut else _FIRST_CUT, special)
    return " ".join(filter(None, (advice, saved) if cut else (saved, advice)))


def too_small(bound: Bound, position: int, need: int) -> str:
    """That one checkpoint does not fit a budget, and what would do; without a full stop."""
    others = f", beside {format_bytes(bound.kept)} that other marks or its own request keep" if bound.kept else ""
    return (
        f"A checkpoint at {position:,} takes {format_bytes(need)}{others}, and {bound.name} is "
        f"{format_bytes(bound.limit)}: give at least {bound.kept + need:,} bytes"
    )


def cause(match: Match, checkpoint: Checkpoint | None, usable: int, cuts: Positions) -> Reason:
    """The cause for one prompt.

    Args:
        match: what the tree knows of the prompt.
        checkpoint: the one it resumes from, if any.
        usable: the deepest position at which it may resume.
        cuts: the prompt's cuts.
    """
    if checkpoint is not None:
        return _RESUMED
    if not match.known:
        return Reason(Cause.NOTHING_STORED)
    if not len(cuts) or (cuts[0] > usable and match.overlap > usable):  # its end comes first, not where it leaves
        return Reason(Cause.TOO_SHORT)
    if cuts[0] > usable:
        return Reason(Cause.DIVERGES, token=match.overlap)
    if match.checkpoints(usable):
        return Reason(Cause.CUT_OTHERWISE, tokens=usable)
    if any(0 < node.lost <= usable for node in match.path):
        return Reason(Cause.EVICTED)
    if any(0 < node.refused <= usable for node in match.path):
        return Reason(Cause.NO_ROOM, tokens=usable)
    ahead = nearest(match.path[-1:])
    if ahead:
        first = min(checkpoint.position for checkpoint in ahead)
        return Reason(Cause.BEFORE_FIRST, tokens=match.overlap, position=first)
    together = any(node.batched for node in match.path if node.start < usable)
    return Reason(Cause.BATCHED if together else Cause.NOT_PLACED, tokens=usable)


def with_lower_tiers(
    reason: Reason, store: CheckpointStore, ids: Tokens, expected: Lineage | None, space: str
) -> Reason:
    """The reason of a prompt that resumes nothing, where tiers below the fastest hold states that do not fit."""
    if len(store.tiers) == 1 or reason.cause in (Cause.TOO_SHORT, Cause.CUT_OTHERWISE):
        return reason
    deepest = store.cut_otherwise(ids, expected, space)
    return Reason(Cause.CUT_OTHERWISE, tokens=deepest) if deepest else reason


def not_supported(why: str) -> Reason:
    """The reason for a call that runs as if there were no handle; `why` is what `why_uncached` says."""
    return Reason(Cause.TRAINING) if why == TRAINING_MODE else Reason(Cause.NOT_SUPPORTED, why=why)


def remedy(reason: Reason, namespace: str = "", grid: int | None = None) -> str:
    """What helps against a cause; empty where nothing is lost. `grid` is a smaller one that helps, 0 if none does."""
    smaller = "" if grid == 0 else " A smaller grid cuts earlier" + (f": grid={grid}." if grid else ".")
    tenant = f" under namespace {namespace!r}" if namespace else " of this handle, or of handles on the same store,"
    return _REMEDIES[reason.cause].format(namespace=tenant, grid=smaller)


def frequent(reasons: Sequence[Reason]) -> tuple[Reason, int]:
    """The most frequent cause, as it was worded last, and how often it came; the figures in it may differ."""
    kind, count = Counter(reason.kind for reason in reasons).most_common(1)[0]
    return next(reason for reason in reversed(reasons) if reason.kind == kind), count
