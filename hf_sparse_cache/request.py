"""One request against the store, start to end: match, plan, capture, remember.

The live cache and the simulator both go through `open_request`, so they cannot differ:

```python
with open_request(store, policy, ids, Bitwise(CutRule(grid)), space=fingerprint) as request:
    if request.checkpoint is not None:               # pinned until the request closes
        restore(request.checkpoint.state, request.kv_payloads())
    for end in request.segments:                     # ascending; nothing is left where the prompt is known to its end
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
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from .explain import cause
from .planning.cuts import MIN_SUFFIX_TOKENS, Tokens
from .planning.lineage import Lineage, Span
from .planning.policies import Policy
from .planning.policy import placed
from .planning.segments import Segmenting
from .stats import Cause, Reason, RequestInfo
from .store.answer import KVCapture, Read, spans_of, unit_for
from .store.store import CheckpointStore
from .store.tree import Payload
from .store.visit import Visit


class Request:
    """What one prompt reuses and adds. Open it with `open_request`, close it by leaving the `with` block.

    Attributes:
        prompt_tokens: length of the prompt.
        overlap_tokens: tokens shared with earlier prompts of the space, remembered or stored.
        resumed_tokens: position of `checkpoint`, 0 when cold.
        checkpoint: deepest stored checkpoint on the path that leaves at least 2 tokens to compute, or none where it is
            `final`; None when cold.
        planned: positions to capture, ascending.
        segments: ends of the segments to run from `resumed_tokens` on, ascending; empty where nothing is left.
        lineage: the segments behind the result, from 0.
        captured: positions stored so far by this request.
        read: once it has closed, what its answer goes on from; None where nothing of the prompt may be remembered.
        reason: why it resumed where it did.
        match_seconds: time spent finding what is stored.
        plan_seconds: time spent deciding what to capture.
    """

    def __init__(
        self, store: CheckpointStore, policy: Policy, segmenting: Segmenting, visit: Visit, reason: Reason
    ) -> None:
        self._store, self._policy, self._segmenting, self._visit = store, policy, segmenting, visit
        self._prompt = visit.prompt
        self._marked: set[int] = set()
        self._closed = False
        self.reason = reason
        self.match_seconds = self.plan_seconds = 0.0
        self.prompt_tokens, self.overlap_tokens = len(visit.prompt.ids), visit.prompt.overlap
        self.resumed_tokens, self.checkpoint = visit.prompt.resumed, visit.checkpoint
        self.lineage = Lineage() if visit.checkpoint is None else visit.checkpoint.lineage
        self.planned: list[int] = []
        self.segments: list[int] = []
        self.captured: list[int] = []
        self.read: Read | None = None
        self._kept: list[Span] | None = None  # spans of the deepest checkpoint that it stored

    def plan(self) -> None:
        """Asks the policy where to capture, marks come on top of it, and cuts the rest of the prompt accordingly."""
        with self._policy.lock:
            wanted = placed(self._policy, self._prompt)
        length, resumed = self.prompt_tokens, self.resumed_tokens
        if resumed == length:
            return
        fresh = _among([*self._prompt.open_cuts.tolist(), length], wanted, self._prompt.limit)
        reached = {length, *self._prompt.open_cuts.tolist()}
        self._marked = {position for position in self._visit.marked if position in reached}
        self.planned = sorted({*fresh, *self._marked})
        self.segments = self._segmenting.segments(resumed, self.planned, self._prompt.cuts, length).tolist()
        self.lineage = self.lineage.then(self.segments)

    def start_over(self) -> None:
        """Resumes from nothing after all and captures nothing: there is no memory for either."""
        if self.checkpoint is not None:
            self.reason = Reason(Cause.EVICTED)
        self.resumed_tokens, self.checkpoint, self.planned = 0, None, []
        self.segments = self._segmenting.segments(0, [], self._prompt.cuts, self.prompt_tokens).tolist()
        self.lineage = Lineage(self.segments)

    def info(self, reason: Reason | None = None) -> RequestInfo:
        """What happened, for those who count; `reason` in place of its own."""
        return RequestInfo(
            prompt_tokens=self.prompt_tokens,
            overlap_tokens=self.overlap_tokens,
            resumed_tokens=self.resumed_tokens,
            computed_tokens=self.prompt_tokens - self.resumed_tokens,
            captured=tuple(self.captured),
            segments=self.lineage.ends,
            reason=reason or self.reason,
        )

    def kv_payloads(self) -> list[Payload]:
        """The KV segments below `checkpoint`, shallow to deep; empty when cold or without full attention."""
        return [] if self.checkpoint is None else [segment.payload for segment in self.checkpoint.chain()]

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
        lineage = self.lineage.upto(position)
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
        if self._store.put(unit, self._visit.footing, keep=position in self._marked) is None:
            return False
        self.captured.append(position)
        self._kept = spans
        return True

    def _spans(self, lineage: Lineage) -> list[Span]:
        """The KV spans of a checkpoint: those that the request resumed from, and its own behind them."""
        chain = [segment.span for segment in self.checkpoint.chain()] if self.checkpoint is not None else []
        return spans_of(self._segmenting, lineage, chain, self.captured)

    def close(self) -> None:
        """Counts the prompt in the tree, lets the policy observe it, and unpins. Closing twice is harmless."""
        if self._closed:
            return
        try:
            if self._visit.settle():
                self.read = self._left()
                with self._policy.lock:
                    self._policy.observe(self._prompt)
        finally:
            self._release()

    def _left(self) -> Read:
        """For the answer; taken before the request takes its hands off what is stored."""
        reached = max(self.captured, default=self.resumed_tokens)
        chain = [segment.span for segment in self.checkpoint.chain()] if self.checkpoint is not None else []
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

    def _release(self) -> None:
        self._closed = True
        self._store.leave(self._visit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            self._release()


def _among(cuts: list[int], wanted: list[int], limit: int | None) -> list[int]:
    """Those of `wanted` that are cuts, ascending; the deepest `limit` of them."""
    found = sorted(set(wanted).intersection(cuts))
    return found if limit is None else found[max(0, len(found) - limit) :]


def open_request(
    store: CheckpointStore,
    policy: Policy,
    ids: Tokens,
    segmenting: Segmenting,
    *,
    space: str = "",
    tail: int = 1,
) -> Request:
    """Opens a request: matches the prompt, pins the deepest usable checkpoint, plans what to capture.

    Args:
        store: where checkpoints live.
        policy: where new ones go; `limited` bounds how many.
        ids: the prompt's tokens, int32 of shape `(N,)`; not changed, and not to be changed while the request is open.
        segmenting: where it may be cut, and what it may resume from.
        space: fingerprint and namespace; nothing of one space is ever matched from another.
        tail: of how many of the last tokens the logits are wanted, so that they are computed, whatever is stored.

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
    visit = store.open(tokens, segmenting, space, tail)
    try:
        with store.lock:
            usable = min(visit.match.overlap, len(ids) - max(MIN_SUFFIX_TOKENS, tail))
            reason = cause(visit.match, visit.checkpoint, usable, visit.prompt.cuts)
        request = Request(store, policy, segmenting, visit, reason)
        request.match_seconds = (matched := time.perf_counter()) - started
        request.plan()
        request.plan_seconds = time.perf_counter() - matched
    except BaseException:
        store.leave(visit)
        raise
    return request
