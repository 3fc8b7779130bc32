"""One request against the store, start to end: match, plan, capture, remember.

The live cache and the simulator both go through `open_request`, so they cannot differ:

```python
with open_request(store, policy, ids, Bitwise(CutRule(grid)), space=fingerprint) as request:
    if request.checkpoint is not None:               # pinned until the request closes
        restore(request.checkpoint.state, request.kv_payloads())
    for end in request.steps():                      # ascending; nothing is left where the prompt is known to its end
        state = prefill_up_to(end)                   # the store holds no lock meanwhile
        if end in request.planned:
            request.add(end, state, kv)              # kv(start, end) is asked for each span not stored yet
```

Closing counts the prompt in the tree and lets the policy observe it; leaving the block by an exception only unpins,
and everything added before stays valid. `add` may be called for the end of any segment, planned or not. What the model
generates from there on is kept by `store.answer`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np

from .explain import cause, with_lower_tiers
from .planning.cuts import MIN_SUFFIX_TOKENS, Tokens
from .planning.lineage import Lineage, Span
from .planning.policies import Policy
from .planning.policy import placed
from .planning.segments import Segmenting
from .stats import Cause, Reason, RequestInfo
from .store.answer import KVCapture, Read, spans_of, unit_for
from .store.holding import Holding
from .store.mending import mended
from .store.promises import Promise
from .store.store import CheckpointStore
from .store.tree import Checkpoint, KVSegment, Payload
from .store.visit import Visit


@dataclass(frozen=True, eq=False)
class Link:
    """Keys and values of one span, on their way from one prompt to another."""

    span: Span
    payload: Payload


@dataclass(frozen=True, eq=False)
class Handover:
    """What one prompt computed on its way, for others of the same call that go on from there.

    It is a checkpoint that no store has: it takes no room from any, and is gone with the call.

    Attributes:
        lineage: of the state.
        state: the fixed-size payload.
        links: its keys and values from 0 upwards; empty without full attention.
    """

    lineage: Lineage
    state: Payload
    links: tuple[Link, ...]

    @property
    def position(self) -> int:
        """The position of the state."""
        return self.lineage.end

    def chain(self) -> tuple[Link, ...]:
        """What a checkpoint calls it."""
        return self.links


class Request:
    """What one prompt reuses and adds. Open it with `open_request`, close it by leaving the `with` block.

    Attributes:
        prompt_tokens: length of the prompt.
        overlap_tokens: tokens shared with earlier prompts of the space, remembered or stored.
        resumed_tokens: position of `checkpoint`, 0 when cold.
        checkpoint: deepest stored checkpoint on the path that leaves at least 2 tokens to compute, or none where it is
            `final`, or what it takes over from another prompt; None when cold.
        planned: positions to capture, ascending.
        junctions: positions, behind the resumed one, at which other prompts want to take over.
        segments: ends of the segments to run from `resumed_tokens` on, ascending; empty where nothing is left.
        lineage: the segments behind the result, from 0.
        captured: positions stored so far by this request.
        handovers: what was computed at its junctions, by position.
        promise: what other threads know of it meanwhile (see `store.promises`); None where they know nothing.
        rows_together: prompts that run in one forward with it, itself among them.
        read: once it has closed, what its answer goes on from; None where nothing of the prompt may be remembered.
        reason: why it resumed where it did.
        match_seconds: time spent finding what is stored.
        plan_seconds: time spent deciding what to capture.
    """

    def __init__(
        self,
        store: CheckpointStore,
        policy: Policy,
        segmenting: Segmenting,
        visit: Visit,
        reason: Reason,
    ) -> None:
        self._holding: Holding | None = None
        self._store, self._policy, self._segmenting, self._visit = store, policy, segmenting, visit
        self._prompt = visit.prompt
        self._marked: set[int] = set()
        self._closed = False
        self.reason = reason
        self.match_seconds = self.plan_seconds = 0.0
        self.prompt_tokens, self.overlap_tokens = len(visit.prompt.ids), visit.prompt.overlap
        self.resumed_tokens = visit.prompt.resumed
        self.checkpoint: Checkpoint | Handover | None = visit.checkpoint
        self.junctions = [position for position in segmenting.junctions if position > self.resumed_tokens]
        self.lineage = Lineage() if visit.checkpoint is None else visit.checkpoint.lineage
        self.planned: list[int] = []
        self.segments: list[int] = []
        self.captured: list[int] = []
        self.handovers: dict[int, Handover] = {}
        self.rows_together = 1
        self.promise: Promise | None = None
        self.read: Read | None = None
        self._kept: list[Span] | None = None  # spans of the deepest checkpoint that it stored

    def plan(self) -> None:
        """Asks the policy where to capture, marks come on top of it, and cuts the rest of the prompt accordingly."""
        with self._policy.lock:
            wanted = placed(self._policy, self._prompt)
        length, resumed = self.prompt_tokens, self.resumed_tokens
        if resumed == length:
            return
        reached = {length, *self._prompt.open_cuts.tolist()}
        fresh = _among(reached, wanted, self._prompt.limit)
        self._marked = {position for position in self._visit.marked if position in reached}
        self.planned = sorted({*fresh, *self._marked})
        self._cut_behind(resumed)

    @mended
    def hold_for(self, holding: Holding) -> None:
        """Lets a call of several prompts keep what it needs of this one for those of them that are to come."""
        self._holding = holding
        if isinstance(self.checkpoint, Checkpoint) and holding.needs(self.resumed_tokens):
            holding.hold(self.checkpoint, new=False)

    def start_over(self) -> None:
        """Resumes from nothing after all and captures nothing: there is no memory for either."""
        if self.checkpoint is not None:
            self.reason = Reason(Cause.EVICTED)
        self.resumed_tokens, self.checkpoint = 0, None
        self.give_up_captures()

    def give_up_captures(self) -> None:
        """Captures nothing after all, and is cut for none."""
        self.planned, self.junctions = [], []
        self._cut_behind(self.resumed_tokens)

    def run_with(self, prompts: int) -> None:
        """Runs in one forward with others, `prompts` together, so that nothing of it can be kept."""
        self.give_up_captures()
        self.rows_together, self._visit.batched = prompts, True

    @property
    def announced(self) -> bool:
        """Whether a mark is to be captured."""
        return not self._marked.isdisjoint(self.planned)

    def _cut_behind(self, start: int) -> None:
        """Cuts the rest of the prompt for what is to be captured; what comes too close to `start` is not."""
        made = Lineage() if self.checkpoint is None else self.checkpoint.lineage
        stops = sorted({*self.planned, *self.junctions})
        ends = self._segmenting.segments(start, stops, self._prompt.cuts, self.prompt_tokens)
        self.segments = ends.tolist()
        self.planned = [position for position in self.planned if position in self.segments]
        self.junctions = [position for position in self.junctions if position in self.segments]
        self.lineage = self._segmenting.behind(made, ends, {*self.planned, *self.junctions})

    def rounds_at(self, position: int) -> bool:
        """Whether what is computed behind the end of a segment goes on from rounded values."""
        return self._segmenting.rounds and self.lineage.through(position).ends_rounded

    def steps(self) -> Iterator[int]:
        """Ends of the segments to run, in order; ask for the next one when everything of the last one is added.

        What other threads wait for is planned between two of them.
        """
        position = self.resumed_tokens
        while position < self.prompt_tokens:
            if self.promise is not None:
                self._heed(self.promise, position)
            position = next(end for end in self.segments if end > position)
            yield position
        if self.promise is not None:
            self._heed(self.promise, position)

    def _heed(self, promise: Promise, position: int) -> None:
        """Says how far it is, and plans to store what others ask for behind that."""
        with self._store.promises.lock:
            if promise.running is None:
                promise.resumed = position
            wishes, promise.wishes = promise.wishes, set()
            limit = self._prompt.limit
            for wish in sorted(wishes):
                if limit is None or len(self.planned) < limit:
                    self._plan_wish(wish, position)
            promise.done, promise.planned = position, set(self.planned)
            promise.running = next((end for end in self.segments if end > position), self.prompt_tokens)
            self._store.promises.changed.notify_all()

    def _plan_wish(self, wish: int, position: int) -> None:
        """Stores a checkpoint at `wish`, where no segment becomes too short by that; computed is up to `position`."""
        fixed = {position, self.prompt_tokens, *self.planned, *self.junctions}
        if not position < wish or wish in self.planned:
            return
        if wish not in fixed and any(abs(wish - other) < MIN_SUFFIX_TOKENS for other in fixed):
            return
        stops = sorted({wish, *self.planned, *self.junctions})
        ends = self._segmenting.segments(position, stops, self._prompt.cuts, self.prompt_tokens).tolist()
        if wish in ends:
            made = Lineage() if self.checkpoint is None else self.checkpoint.lineage
            self.planned = sorted({wish, *self.planned})
            self.segments = [*(end for end in self.segments if end <= position), *ends]
            self.lineage = self._segmenting.behind(made, np.asarray(self.segments), {*self.planned, *self.junctions})

    def hand_over(self, position: int, state: Payload, kv: KVCapture | None = None) -> Handover:
        """What others take over at the end of one segment; arguments as for `add`."""
        lineage = self._segmenting.kept(self.lineage.upto(position))
        known = {link.span: link.payload for link in self._chain()}
        spans = [] if kv is None else self._spans(lineage)
        links = [Link(span, known[span] if span in known else kv(span.start, span.end)) for span in spans if kv]
        found = self.handovers[position] = Handover(lineage, state, tuple(links))
        return found

    def take_over(self, given: Handover) -> None:
        """Goes on from what another prompt of the same call computed, where that is deeper than what is stored.

        The policy decides whether it is stored: where it wants a checkpoint there, it gets this one.

        Args:
            given: of a prompt that begins with the same tokens, up to its position at least.
        """
        position, expected = given.position, self._visit.expected
        fits = expected is None or expected.begins_with(given.lineage)
        if not fits or not self.resumed_tokens < position <= self.prompt_tokens - MIN_SUFFIX_TOKENS:
            return
        wanted = position in self.planned
        self.checkpoint, self.resumed_tokens = given, position
        self.overlap_tokens = max(self.overlap_tokens, position)
        self.reason = Reason(Cause.RESUMED)
        self.lineage = given.lineage
        if wanted:
            payloads = {(link.span.start, link.span.end): link.payload for link in given.links}
            self.add(position, given.state, (lambda start, end: payloads[start, end]) if payloads else None)
        self.planned = [other for other in self.planned if other > position]
        self.junctions = [other for other in self.junctions if other > position]
        self._cut_behind(position)

    def info(self, reason: Reason | None = None) -> RequestInfo:
        """What happened, for those who count; `reason` in place of its own."""
        return RequestInfo(
            prompt_tokens=self.prompt_tokens,
            overlap_tokens=self.overlap_tokens,
            resumed_tokens=self.resumed_tokens,
            computed_tokens=self.prompt_tokens - self.resumed_tokens,
            captured=tuple(self.captured),
            segments=self._segments_run(),
            reason=reason or self.reason,
        )

    def _segments_run(self) -> tuple[int | tuple[int, ...], ...]:
        ends = self.lineage.ends
        if self.rows_together == 1:
            return ends
        return (*ends[:-1], (self.resumed_tokens, self.prompt_tokens, self.rows_together))

    def kv_payloads(self) -> list[Payload]:
        """The KV segments below `checkpoint`, shallow to deep; empty when cold or without full attention."""
        return [segment.payload for segment in self._chain()]

    @mended
    def add(self, position: int, state: Payload, kv: KVCapture | None = None) -> bool:
        """Stores a checkpoint at the end of one segment.

        Args:
            position: the end of a segment of this prompt.
            state: the fixed-size payload, with `.nbytes`; at the end of the prompt with the logits of the last token.
            kv: called with `(start, end)` for each span up to `position` not stored yet, with no lock held; None when
                the model has no full attention layers.

        Returns:
            True if the checkpoint is stored now, False if there was no room for it.

        Raises:
            ValueError: if no segment of this prompt ends at `position`, or the request is closed.
        """
        if self._closed:
            raise ValueError(f"add({position}) on a closed request; call it inside the with block")
        lineage = self._segmenting.kept(self.lineage.upto(position))
        spans: list[Span] = []
        new: dict[Span, Payload] = {}
        if kv is not None:
            spans = self._spans(lineage)
            new = {span: kv(span.start, span.end) for span in self._visit.missing(spans)}
        unit = replace(
            unit_for(self._visit, lineage, state, (spans, new), self.planned),
            final=position == self.prompt_tokens,
            refund=self._prompt.refund(position) if not self.captured else 0.0,
        )
        # The footing holds its KV: later checkpoints of this prompt chain to it even if it is evicted by then.
        needed = self._holding is not None and self._holding.needs(position)
        stored = self._store.put(unit, self._visit.footing, urgent=needed, keep=position in self._marked)
        if stored is None:
            return False
        if needed and self._holding is not None:
            self._holding.hold(stored, new=stored.state is state)
        self.captured.append(position)
        self._kept = spans
        return True

    def _chain(self) -> Sequence[KVSegment | Link]:
        """The keys and values below `checkpoint`: as it had them when it was found, since it may be lost meanwhile."""
        if isinstance(self.checkpoint, Handover):
            return self.checkpoint.chain()
        return [] if self.checkpoint is None else self._visit.chain

    def _spans(self, lineage: Lineage) -> list[Span]:
        """The KV spans of a checkpoint: those that the request resumed from, and its own behind them."""
        chain = [segment.span for segment in self._chain()]
        return spans_of(self._segmenting, lineage, chain, sorted({*self.captured, *self.junctions}))

    def close(self) -> None:
        """Counts the prompt in the tree, lets the policy observe it, and unpins. Closing twice is harmless."""
        if self._closed:
            return
        try:
            if self._visit.settle():
                self.read = self._left()
                with self._policy.lock:
                    self._policy.observe(self._prompt)
        except BaseException as error:
            self._release(error)
            raise
        self._release()

    def _left(self) -> Read:
        """For the answer; taken before the request takes its hands off what is stored."""
        reached = max(self.captured, default=self.resumed_tokens)
        chain = [segment.span for segment in self._chain()]
        return Read(
            store=self._store,
            policy=self._policy,
            segmenting=self._segmenting,
            space=self._visit.space,
            tree=self._visit.tree,
            prompt=self._prompt,
            lineage=self.lineage,
            reached=reached,
            spans=tuple(chain if self._kept is None else self._kept),
        )

    def _release(self, error: BaseException | None = None) -> None:
        try:
            self._closed = True
            self._store.leave(self._visit, error)
        except BaseException as another:  # before its first line, perhaps
            self._store.leave(self._visit, another)
            raise

    def abandon(self, error: BaseException) -> None:
        """Ends it after an error that may have come before any line of who would have. Harmless where it ended."""
        self._release(error)
        if self.promise is not None:
            self._store.promises.end(self.promise)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            self._release(error)


def _among(cuts: set[int], wanted: list[int], limit: int | None) -> list[int]:
    """Those of `wanted` that are cuts, ascending; the deepest `limit` of them."""
    found = sorted(cuts.intersection(wanted))
    return found if limit is None else found[max(0, len(found) - limit) :]


def open_request(
    store: CheckpointStore,
    policy: Policy,
    ids: Tokens,
    segmenting: Segmenting,
    *,
    space: str = "",
) -> Request:
    """Opens a request: matches the prompt, pins the deepest usable checkpoint, plans what to capture.

    Args:
        store: where checkpoints live.
        policy: where new ones go; `limited` bounds how many.
        ids: the prompt's tokens, int32 of shape `(N,)`; not changed, and not to be changed while the request is open.
        segmenting: where it may be cut, and what it may resume from.
        space: fingerprint and namespace; nothing of one space is ever matched from another.

    Raises:
        ValueError: if `ids` is not a one-dimensional array of integers in the range of int32.
    """
    ids = np.ascontiguousarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be integers of shape (N,), got {ids.dtype} {ids.shape}; pass one prompt")
    tokens = ids.astype(np.int32, copy=False)
    if tokens is not ids and (tokens != ids).any():
        wrong = int(ids[tokens != ids][0])
        raise ValueError(f"ids must lie in the range of int32, got {wrong}; pass the ids of a tokenizer")
    started = time.perf_counter()
    visit: Visit | None = None
    try:
        visit = store.open(tokens, segmenting, space)
        for position in segmenting.junctions:
            visit.prompt.cuts = segmenting.joined(visit.prompt.cuts, position, len(ids))
        with store.lock:
            usable = min(visit.match.overlap, len(ids) - max(MIN_SUFFIX_TOKENS, segmenting.tail))
            reason = cause(visit.match, visit.checkpoint, usable, visit.prompt.cuts)
        if visit.checkpoint is None:
            reason = with_lower_tiers(reason, store, tokens, visit.expected, space)
        request = Request(store, policy, segmenting, visit, reason)
        request.match_seconds = (matched := time.perf_counter()) - started
        request.plan()
        request.plan_seconds = time.perf_counter() - matched
        return request
    except BaseException as error:
        if visit is not None:
            store.leave(visit, error)
        raise
