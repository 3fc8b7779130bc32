"""One prompt while it is served: matched, planned, taken over from another, run, told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from transformers.utils import logging

from ..errors import UnprovedError, out_of_memory
from ..planning.batch import Member
from ..planning.cuts import Tokens
from ..planning.policies import NoCheckpoints, Policy
from ..planning.policy import limited
from ..planning.segments import Segmenting
from ..request import Handover, Request, open_request
from ..stats import Cause, Reason, RequestInfo, format_bytes
from ..store.answer import Read
from ..store.holding import Holding
from ..store.promises import Promise, WaitTerms
from ..store.store import CheckpointStore
from . import prefill
from .answers import Turn
from .binding import Binding
from .inputs import Row
from .live import LiveCache
from .prefill import Timing
from .space import Space
from .watch import ModelChangedError
from .weights import Identity, identity, unchanged


logger = logging.get_logger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Means:
    """What prompts are served with.

    Attributes:
        binding: the model.
        store: what is kept.
        policy: where checkpoints go.
        space: where the model's prompts live in the store.
    """

    binding: Binding
    store: CheckpointStore
    policy: Policy
    space: Space


@dataclass(frozen=True)
class Way:
    """How a prompt is served, where not as any other.

    Attributes:
        policy: where checkpoints go.
        segmenting: how it becomes segments.
        tail: how many of the last tokens are to be computed whatever is stored.
        holding: what a call of several prompts keeps for those that are to come.
    """

    policy: Policy
    segmenting: Segmenting
    tail: int = 1
    holding: Holding | None = None


@dataclass(frozen=True)
class Served:
    """One prompt that was served.

    Attributes:
        output: the model's, for the last segment.
        info: what happened; None for a run that is not counted.
        seconds: what it took, by the names of `CacheStats`.
        read: what the request leaves for the answer; None where nothing may be kept of it.
        made_of: the model's name when it was read.
    """

    output: Any
    info: RequestInfo | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    read: Read | None = None
    made_of: Identity | None = None

    def turn(self, live: LiveCache) -> Turn | None:
        """For its answer, decoded on `live`; None where nothing may be kept of it."""
        if self.read is None or self.info is None or self.made_of is None:
            return None
        return Turn(live, self.read, self.made_of, self.info)


@dataclass(eq=False)
class Asked:
    """One prompt of a call, among the others.

    Attributes:
        row: the prompt, as the model is to be given it.
        junctions: positions at which other prompts of the call take over from it.
        source: the prompt that it takes over from itself.
        meeting: the position at which it does.
        handovers: what was computed at its junctions, by position.
        made_of: the model that computed them.
        way: how it is served; None as any other.
    """

    row: Row
    junctions: Sequence[int] = ()
    source: Asked | None = None
    meeting: int = 0
    handovers: dict[int, Handover] = field(default_factory=dict)
    made_of: str = ""
    way: Way | None = None

    @cached_property
    def tokens(self) -> Tokens:
        """Its ids, int32 in main memory."""
        given = self.row.ids if self.row.read is None else self.row.read
        found: Tokens = given.to("cpu", torch.int32).numpy()
        return found

    def given(self, made_of: str) -> Handover | None:
        """What it takes over, if that was computed, by the very same model."""
        if self.source is None or self.source.made_of != made_of:
            return None
        return self.source.handovers.get(self.meeting)


class Sitting:
    """One prompt while it is served.

    Attributes:
        asked: the prompt.
        request: it, in the store; set while it is open.
    """

    request: Request

    def __init__(self, means: Means, asked: Asked, found: Identity) -> None:
        self._started = time.perf_counter()
        self._means, self.asked, self._found = means, asked, found
        self._space, self._changed = means.space.now(told=True, found=found)
        self._looked = time.perf_counter() - self._started
        self._closing = 0.0

    def check(self) -> None:
        """Whether the model is the one that it began with.

        Raises:
            ModelChangedError: It is another.
        """
        if not unchanged(self._means.binding.model, self._found):
            raise ModelChangedError("the model changed while the prompt was computed")

    def wait(self) -> None:
        """Waits for what other threads compute of it, where that pays (see `store.promises`)."""
        means = self._means
        means.store.promises.wait(self._space, self._look, self._terms)

    @property
    def _terms(self) -> WaitTerms:
        return WaitTerms(self._means.binding.segmenting, self._means.binding.prefill_cost)

    @property
    def _look(self) -> Callable[[], Member]:
        # Not a method: a promise that knew its own request would keep, in a circle, the states that it resumed from.
        means = self._means
        return partial(means.store.foretell, self.asked.tokens, means.binding.segmenting, self._space)

    @contextmanager
    def promised(self) -> Iterator[Request]:
        """Its request, as `opened`, on which other threads can wait, once it has waited itself."""
        stores = self._means.binding.config.max_checkpoints != 0
        if not stores or isinstance(self._means.policy, NoCheckpoints):
            with self.opened() as request:
                yield request
            return
        promises = self._means.store.promises
        with (
            promises.given(self.asked.tokens, self._space, self._look, self._terms) as promise,
            self.opened(promise) as request,
        ):
            yield request

    @contextmanager
    def opened(self, promise: Promise | None = None, afresh: bool = False) -> Iterator[Request]:
        """Its request, until the end of the block.

        Args:
            promise: what other threads know of it meanwhile.
            afresh: whether there is no memory to resume, nor to bring anything up for it.
        """
        means, asked = self._means, self.asked
        policy = limited(means.policy, means.binding.config.max_checkpoints)
        way = Way(policy, means.binding.segmenting, asked.row.tail) if asked.way is None else asked.way
        with open_request(
            means.store,
            way.policy,
            asked.tokens,
            replace(way.segmenting, tail=way.tail, junctions=tuple(asked.junctions), afresh=afresh),
            space=self._space,
        ) as self.request:
            self.request.promise = promise
            if way.holding is not None:
                self.request.hold_for(way.holding)
            given = asked.given(str(self._found))
            if given is not None:
                self.request.take_over(given)
            yield self.request
            asked.handovers, asked.made_of = self.request.handovers, str(self._found)
            closing = time.perf_counter()
        self._closing = time.perf_counter() - closing

    def run(self, live: LiveCache) -> tuple[Any, Timing]:
        """Bring a fresh live cache to the end of the prompt, by itself."""
        return prefill.prefill_row(self._means.binding, live, self.asked.row, self.request, self.check)

    def let_go(self, error: BaseException) -> None:
        """Keeps nothing pinned or promised, also where an interrupt came before who would have seen to it."""
        if not isinstance(error, Exception) and hasattr(self, "request"):
            self.request.abandon(error)

    def told(self, output: Any, timing: Timing) -> Served:
        """What happened, once its request is closed."""
        request = self.request
        info = request.info(Reason(Cause.WEIGHTS_CHANGED) if self._changed and not request.resumed_tokens else None)
        seconds = {
            "prefill_seconds": time.perf_counter() - self._started,
            "match_seconds": self._looked + request.match_seconds,
            "plan_seconds": request.plan_seconds + self._closing,
            "capture_seconds": timing.capture_seconds,
            "restore_seconds": timing.restore_seconds,
        }
        return Served(output, info, seconds, request.read, self._found)


def serve_alone(means: Means, live: LiveCache, asked: Asked) -> Served:
    """Run the prefill of one prompt by itself on a fresh live cache.

    Where the model changes meanwhile, it begins anew, once, with what is stored for the model as it is then.

    Raises:
        ChangedPrefillError: Segments do not compute what one piece would.
    """
    try:
        return _serve_proved(means, live, asked)
    except ModelChangedError:
        live.start_anew(means.binding.live_cache())
        return _serve_proved(means, live, asked)


def _serve_proved(means: Means, live: LiveCache, asked: Asked) -> Served:
    """Run it anew where what it resumed from turns out not to be what was written; the third time from nothing.

    What is of no use is stored no longer by then, and no other of its kind is resumed from before it is proved: a
    second one was handed on at the same time, to another thread.
    """
    for _ in range(2):
        try:
            return _serve_alone(means, live, asked)
        except UnprovedError:
            pass
        live.start_anew(means.binding.live_cache())
    return _serve_alone(means, live, asked, resumes=False)


def _serve_alone(means: Means, live: LiveCache, asked: Asked, resumes: bool = True) -> Served:
    sitting = Sitting(means, asked, identity(means.binding.model) if live.found is None else live.found)

    def attempt(spacious: bool) -> tuple[Any, Timing]:
        spacious = spacious and resumes
        promised = spacious and asked.way is None
        with sitting.promised() if promised else sitting.opened(afresh=not spacious) as request:
            if not spacious:
                request.start_over()
            return sitting.run(live)

    try:
        return sitting.told(*with_room(means, live, attempt))
    except BaseException as error:
        sitting.let_go(error)
        raise


def with_room(means: Means, live: LiveCache, attempt: Callable[[bool], _T]) -> _T:
    """What `attempt` returns; where memory runs out, what is stored goes, and it is tried once more.

    Args:
        means: the store that gives back, and the binding.
        live: what it fills, which begins anew then: nothing half done is ever used.
        attempt: told whether there is memory to resume and to capture as well.
    """
    try:
        return attempt(True)
    except Exception as error:
        if not out_of_memory(error):
            raise
        said = str(error).partition("\n")[0]
    # Behind the block, where the traceback no longer holds what the first attempt had allocated.
    live.start_anew(means.binding.live_cache())
    logger.warning(
        f"A prefill ran out of memory ({said}). {format_bytes(means.store.give_back())} of stored states were "
        "given back, and it runs once more from nothing; a smaller max_memory leaves it room."
    )
    return attempt(False)
