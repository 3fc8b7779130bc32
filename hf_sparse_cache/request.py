"""One request against the store, start to end: match, plan, capture, remember.

The live cache and the simulator both go through `open_request`, so they cannot differ:

```python
with open_request(store, policy, ids, cut_positions(ids, grid), space=fingerprint) as request:
    if request.checkpoint is not None:               # pinned until the request closes
        restore(request.checkpoint.state, request.kv_payloads())
    for position in request.planned:                 # ascending, each one of the cuts behind request.resumed_tokens
        state = prefill_up_to(position)              # the store holds no lock meanwhile
        request.add(position, state, kv)             # kv(start, end) is asked for each cut-to-cut span not stored yet
```

Closing counts the prompt in the tree and lets the policy observe it; leaving the block by an exception only unpins,
and everything added before stays valid. `add` may be called for any cut of the prompt (a mark, say), planned or not. A
cache that keeps states produced by decoding would go on with `continued` before it closes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from .explain import cause
from .planning.cuts import MIN_SUFFIX_TOKENS, Positions, Tokens
from .planning.policies import Policy, Prompt
from .planning.policy import placed
from .stats import RequestInfo
from .store.store import CheckpointStore
from .store.tree import Checkpoint, Payload
from .store.unit import Span, Unit


KVCapture = Callable[[int, int], Payload]


class Request:
    """What one prompt reuses and adds. Open it with `open_request`, close it by leaving the `with` block.

    Attributes:
        prompt_tokens: length of the prompt.
        overlap_tokens: tokens shared with earlier prompts of the space, remembered or stored.
        resumed_tokens: position of `checkpoint`, 0 when cold.
        checkpoint: deepest stored checkpoint on the path that leaves at least 2 tokens to compute, or None.
        planned: positions to capture, ascending.
        captured: positions stored so far by this request.
        reason: why it resumed where it did, one sentence of a closed set.
        match_seconds: time spent finding what is stored.
        plan_seconds: time spent deciding what to capture.
    """

    def __init__(
        self,
        store: CheckpointStore,
        policy: Policy,
        ids: Tokens,
        cuts: Positions,
        space: str,
        max_checkpoints: int | None,
    ) -> None:
        started = time.perf_counter()
        self._store, self._policy, self._ids, self._cuts, self._space = store, policy, ids, cuts, space
        self._held = ExitStack()
        self._closed = False
        self.prompt_tokens = len(ids)
        self.captured: list[int] = []
        store.lift(ids, space)
        ledger = store.ledger
        with ledger.lock:
            ledger.clock += 1
            match = ledger.match(ids, space)
            self.overlap_tokens = match.overlap
            usable = min(match.overlap, len(ids) - MIN_SUFFIX_TOKENS)
            stored = match.checkpoints(usable)
            self.checkpoint: Checkpoint | None = stored[-1] if stored else None
            self.resumed_tokens = self.checkpoint.position if self.checkpoint else 0
            if self.checkpoint is not None:
                ledger.pin(self.checkpoint)
                self.checkpoint.hits += 1
                self.checkpoint.last_used = ledger.clock
                if self.checkpoint.kv is not None:
                    self._held.enter_context(ledger.holding(self.checkpoint.kv))
            marked = ledger.marks.positions(ids, cuts, space)
            for checkpoint in stored:  # a tier below may have brought it after it was announced
                if checkpoint.position in marked:
                    ledger.keep(checkpoint, space)
            ledger.passed(match, self.checkpoint, space)
            self.reason = cause(match, self.checkpoint, usable, cuts)
            state_bytes = ledger.checkpoint_bytes / max(ledger.checkpoint_count, 1)
            kv_bytes = ledger.kv_bytes / max(ledger.kv_tokens, 1)
            need, limit = 0.0, ledger.max_memory
            if limit is not None:
                need = state_bytes + kv_bytes * (len(ids) - self.resumed_tokens) + ledger.used_bytes - limit
                need = max(need, 0.05 * limit) if need > 0 else 0.0
            terms = ledger.eviction.terms(match.path, match.overlap, need, self.checkpoint)
            ends = np.asarray([node.end for node in match.path], dtype=np.int64)
            passes = np.asarray([node.passes for node in match.path], dtype=np.int64)
            self._prompt = Prompt(
                ids,
                cuts,
                match.overlap,
                self.resumed_tokens,
                ends,
                passes,
                max_checkpoints,
                latest=match.path[-1].latest if match.path else None,
                terms=terms,
                state_bytes=state_bytes,
                kv_bytes_per_token=kv_bytes,
                resumed_bytes=self.checkpoint.nbytes if self.checkpoint else 0,
            )
        matched = time.perf_counter()
        self.match_seconds = matched - started
        try:
            with policy.lock:
                wanted = placed(policy, self._prompt)
        except BaseException:
            self._release()
            raise
        fresh = _among(self._prompt.open_cuts, wanted, max_checkpoints)
        self._marked = {position for position in marked if position > self.resumed_tokens}
        self.planned: list[int] = sorted({*fresh, *self._marked})
        self.plan_seconds = time.perf_counter() - matched

    def info(self, reason: str = "") -> RequestInfo:
        """What happened, for those who count; `reason` in place of its own."""
        return RequestInfo(
            prompt_tokens=self.prompt_tokens,
            overlap_tokens=self.overlap_tokens,
            resumed_tokens=self.resumed_tokens,
            computed_tokens=self.prompt_tokens - self.resumed_tokens,
            captured=tuple(self.captured),
            reason=reason or self.reason,
        )

    def kv_payloads(self) -> list[Payload]:
        """The KV segments below `checkpoint`, shallow to deep; empty when cold or without full attention."""
        payloads: list[Payload] = []
        segment = self.checkpoint.kv if self.checkpoint is not None else None
        while segment is not None:
            payloads.append(segment.payload)
            segment = segment.parent
        return payloads[::-1]

    def add(self, position: int, state: Payload, kv: KVCapture | None = None) -> bool:
        """Stores a checkpoint at one cut of the prompt.

        Args:
            position: one of the prompt's cuts.
            state: the fixed-size payload, with `.nbytes`.
            kv: called with `(start, end)` for each cut-to-cut span up to `position` not stored yet, with no lock
                held; None when the model has no full attention layers.

        Returns:
            True if the checkpoint is stored now, False if there was no room for it.

        Raises:
            ValueError: if `position` is not a cut of this prompt, or the request is closed.
        """
        if self._closed:
            raise ValueError(f"add({position}) on a closed request; call it inside the with block")
        index = int(np.searchsorted(self._cuts, position))
        if index == len(self._cuts) or self._cuts[index] != position:
            raise ValueError(f"position={position} is not a cut of this prompt; choose one of its cuts")
        spans: list[Span] = []
        new: dict[Span, Payload] = {}
        if kv is not None:
            ends = self._cuts[: index + 1].tolist()
            spans = list(zip([0, *ends[:-1]], ends, strict=True))
            missing = self._store.ledger.missing_spans(self._ids, spans, self._space, self._held)
            new = {span: kv(*span) for span in missing}
        share = self._prompt.share(position, self.planned)
        refund = self._prompt.refund(position) if not self.captured else 0.0
        # Held, because later checkpoints of this prompt chain to its KV even if it is evicted by then.
        unit = Unit(self._space, self._ids, position, state, spans, new, share=share, refund=refund)
        stored = self._store.put(unit, hold=self._held, keep=position in self._marked)
        if stored is None:
            return False
        self.captured.append(position)
        return True

    def continued(self, output: Tokens, cuts: Positions) -> list[int]:
        """Goes on with what the model generated, as if its states had been kept while it was decoded.

        Call it when everything of the prompt was added. From here on the prompt and the output are one text: `add`
        takes its cuts, closing remembers it, and the policy and the eviction learn from it.

        Args:
            output: the generated tokens, int32 of shape `(M,)`.
            cuts: the cuts of prompt and output together.

        Returns:
            Positions to capture, ascending, none of them before the end of the prompt. A limit of new checkpoints
            counts anew for the output.
        """
        self._ids, self._cuts = np.concatenate([self._ids, output.astype(np.int32, copy=False)]), cuts
        self._prompt = replace(self._prompt, ids=self._ids, cuts=cuts, shape=None, forecast=None)
        with self._policy.lock:
            wanted = placed(self._policy, self._prompt)
        behind = cuts[np.searchsorted(cuts, self.prompt_tokens) :]
        self.planned = _among(behind, wanted, self._prompt.limit)
        return self.planned

    def close(self) -> None:
        """Counts the prompt in the tree, lets the policy observe it, and unpins. Closing twice is harmless."""
        if self._closed:
            return
        try:
            with self._store.lock:
                path = self._store.remember(self._ids, self._space)
                for node in path:
                    node.latest = self._prompt.shape
                self._store.eviction.settled(path, self._prompt.forecast, self._store.clock)
            with self._policy.lock:
                self._policy.observe(self._prompt)
        finally:
            self._release()

    def _release(self) -> None:
        self._closed = True
        self._held.close()
        if self.checkpoint is not None:
            self._store.ledger.unpin(self.checkpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            self._release()


def _among(cuts: Positions, wanted: list[int], limit: int | None) -> list[int]:
    """Those of `wanted` that are cuts, ascending; the deepest `limit` of them."""
    found = sorted(set(wanted).intersection(cuts.tolist()))
    return found if limit is None else found[max(0, len(found) - limit) :]


def open_request(
    store: CheckpointStore,
    policy: Policy,
    ids: Tokens,
    cuts: Positions,
    *,
    space: str = "",
    max_checkpoints: int | None = None,
) -> Request:
    """Opens a request: matches the prompt, pins the deepest usable checkpoint, plans what to capture.

    Args:
        store: where checkpoints live.
        policy: where new ones go.
        ids: the prompt's tokens, int32 of shape `(N,)`; not changed, and not to be changed while the request is open.
        cuts: its cuts, from `cut_positions`.
        space: fingerprint and namespace; nothing of one space is ever matched from another.
        max_checkpoints: most new checkpoints for this prompt; None leaves it to the policy.

    Raises:
        ValueError: if `ids` is not a one-dimensional array of integers or `max_checkpoints` is negative.
    """
    ids = np.ascontiguousarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be integers of shape (N,), got {ids.dtype} {ids.shape}; pass one prompt")
    if max_checkpoints is not None and max_checkpoints < 0:
        raise ValueError(f"max_checkpoints must be at least 0 or None, got {max_checkpoints}")
    return Request(store, policy, ids.astype(np.int32, copy=False), cuts, space, max_checkpoints)
