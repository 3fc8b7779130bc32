"""What a model generated, kept behind its prompt at no compute: the text goes on, the request is over.

While a model decodes, nothing is pinned and nothing held. When it has answered, the text of prompt and answer is
visited once more: what is stored of it may be gone by then, and whatever cleared it meanwhile is respected. The live
cache and the simulator both go through `open_answer`, so they cannot differ:

```python
with open_request(...) as request:
    ...
with open_answer(request.read, output) as answer:   # request.read is None where nothing was remembered
    for position in answer.planned:
        answer.add(position, state, kv)
```

It is no prompt of its own: no age grows, no hit is counted, and no overlap is learned from it. Closing remembers the
answer behind its prompt, so that the next turn is known to share both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from ..planning.cuts import Tokens
from ..planning.lineage import Lineage, Span
from ..planning.policies import Policy
from ..planning.policy import Prompt, placed
from ..planning.segments import Segmenting
from .mending import mended
from .store import CheckpointStore
from .tree import Payload
from .unit import Unit
from .visit import Before, Visit


KVCapture = Callable[[int, int], Payload]


class Read(NamedTuple):
    """What the request of a prompt leaves for its answer: numbers and tokens, nothing that is stored.

    Attributes:
        store, policy, segmenting, space: of the request.
        tree: number of the tree that the prompt is remembered in; another one says that it was cleared since.
        prompt: as the policy saw it.
        lineage: the segments behind the prompt.
        reached: deepest position that the request stored or resumed from.
        spans: how keys and values are cut up to there; empty without full attention.
    """

    store: CheckpointStore
    policy: Policy
    segmenting: Segmenting
    space: str
    tree: int
    prompt: Prompt
    lineage: Lineage
    reached: int
    spans: tuple[Span, ...]


class Answer:
    """The states behind a prompt that its model has answered. Open it with `open_answer`.

    Attributes:
        planned: positions to capture, ascending, none of them before the end of the prompt.
        captured: positions stored so far.
    """

    def __init__(self, read: Read, visit: Visit, lineage: Lineage) -> None:
        self._read, self._visit, self._lineage = read, visit, lineage
        self._store = read.store
        self.planned: list[int] = []
        self.captured: list[int] = []

    def plan(self, candidates: list[int]) -> None:
        """Asks the policy which of the candidates to capture; a limit of new checkpoints counts anew."""
        prompt = self._visit.prompt
        with self._read.policy.lock:
            wanted = placed(self._read.policy, prompt)
        end = len(prompt.ids) - 1  # the only state there is of a text that was decoded, whatever is wanted behind it
        found = [item for item in candidates if item in wanted or (item == end and max(wanted, default=0) > item)]
        self.planned = found if prompt.limit is None else found[max(0, len(found) - prompt.limit) :]

    @mended
    def add(self, position: int, state: Payload, kv: KVCapture | None = None) -> bool:
        """Stores a checkpoint; arguments and result as of `Request.add`."""
        lineage = self._read.segmenting.kept(self._lineage.upto(position))
        spans = []
        if kv is not None:
            spans = spans_of(self._read.segmenting, lineage, self._read.spans, self.captured)
        new = {span: kv(span.start, span.end) for span in self._visit.missing(spans)} if kv is not None else {}
        unit = unit_for(self._visit, lineage, state, (spans, new), self.planned)
        if self._store.put(unit, self._visit.footing) is None:
            return False
        self.captured.append(position)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._visit.settle()
        except BaseException as failed:
            self._store.leave(self._visit, failed)
            raise
        self._store.leave(self._visit, error)


def open_answer(read: Read | None, output: Tokens) -> Answer | None:
    """Opens the text of a prompt and what was generated behind it.

    Args:
        read: what the request of the prompt left.
        output: the generated tokens, int32 of shape `(M,)`.

    Returns:
        None where nothing may be kept: the prompt was not remembered, or has been cleared since.
    """
    if read is None:
        return None
    before = read.prompt
    ids = np.concatenate([before.ids, output.astype(np.int32, copy=False)])
    candidates, lineage = read.segmenting.answered(ids, len(before.ids), read.lineage)
    done = max(read.reached, before.resumed)
    cuts = np.union1d(before.cuts[before.cuts <= done], candidates)
    prompt = replace(before, ids=ids, cuts=cuts, resumed=done, resumed_bytes=0, shape=None, forecast=None)
    visit: Visit | None = None
    try:
        visit = read.store.reopen(prompt, read.space, Before(read.tree, len(before.ids), before.resumed))
        if visit is None:
            return None
        answer = Answer(read, visit, lineage)
        answer.plan(candidates.tolist())
        return answer
    except BaseException as error:
        if visit is not None:
            read.store.leave(visit, error)
        raise


def unit_for(
    visit: Visit,
    lineage: Lineage,
    state: Payload,
    kv: tuple[list[Span], dict[Span, Payload]],
    planned: list[int],
) -> Unit:
    """A checkpoint on the text of a visit, with its spans and the payloads of those that are not stored yet."""
    share = visit.prompt.share(lineage.end, planned)
    return Unit(visit.space, visit.prompt.ids, lineage, state, *kv, share=share)


def spans_of(segmenting: Segmenting, lineage: Lineage, below: Sequence[Span], captured: Sequence[int]) -> list[Span]:
    """The KV spans of a checkpoint of this lineage: those of one below it, and its own behind them."""
    whole = lineage.end
    found = [span for span in below if abs(span[-1]) <= whole]
    last = found[-1].end if found else 0
    if last == whole:
        return found
    ends = [end for end in segmenting.kv_ends(lineage, captured) if last < end < whole]
    return found + lineage.spans(last, [*ends, whole])
