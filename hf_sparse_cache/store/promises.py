"""Prompts in flight: whoever shares enough with one waits for what it will store, and does not compute it again.

A prompt promises what it is going to store while it is computed. One of another thread that shares more with it than
waiting costs asks for a checkpoint where the two part, and waits. It does so before it is opened: who waits pins
nothing, holds no lock and has promised nothing, so that no two can wait for each other. The one in flight looks at
what is asked of it between two forwards. When it fails or takes too long, whoever waited goes on by himself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..planning.batch import Member, shared_tokens
from ..planning.cuts import MIN_SUFFIX_TOKENS, Tokens
from ..planning.segments import Segmenting
from ..planning.views import Floats


FIRST_PATIENCE, LEAST_PATIENCE, MOST_PATIENCE = 30.0, 1.0, 60.0  # seconds; the first while no pace is known
PATIENCE_FACTOR = 4.0  # a wait may take so many times what it should
MOST_WAITS = 2  # of one prompt: what was promised may not have been stored


@dataclass(frozen=True)
class WaitTerms:
    """What a wait costs and saves.

    Attributes:
        segmenting: where prompts may be cut.
        cost: G(t) of the model, of an array of positions.
    """

    segmenting: Segmenting
    cost: Callable[[Floats], Floats]

    def between(self, start: int, end: int) -> float:
        """What it costs to compute from one position to another."""
        first, last = self.cost(np.asarray([start, end], dtype=np.float64)).tolist()
        return max(0.0, float(last - first))

    @property
    def least(self) -> float:
        """What has to be saved at least: one more cut of the prompt in flight."""
        return max(self.segmenting.cut_tokens, float(MIN_SUFFIX_TOKENS))


@dataclass(eq=False)
class Promise:
    """One prompt in flight; used under the lock of its `Promises`.

    Attributes:
        ids, space: the prompt, and where it lives.
        look: what is known of it (see `CheckpointStore.foretell`).
        resumed: where it began to compute.
        done: up to where it is computed, and stored where that was planned.
        running: the end of the forward that runs, behind which it can still be cut; None before the first.
        planned: the positions that it will store.
        wishes: further positions, asked for by others.
        over: whether nothing more is to be expected of it.
        began: when it was given, by `time.monotonic`.
    """

    ids: Tokens
    space: str
    look: Callable[[], Member]
    resumed: int = 0
    done: int = 0
    running: int | None = None
    planned: set[int] = field(default_factory=set)
    wishes: set[int] = field(default_factory=set)
    over: bool = False
    began: float = 0.0

    @cached_property
    def member(self) -> Member:
        """What was known of it, looked up when somebody asks."""
        return self.look()

    def meeting(self, other: Member, segmenting: Segmenting) -> int:
        """The deepest position at which another prompt may take over from this one, could it be cut anywhere."""
        shared = shared_tokens(other.ids, self.ids)
        if shared == len(other.ids) == len(self.ids):
            return shared
        if shared < MIN_SUFFIX_TOKENS:
            return 0
        return segmenting.meeting(shared, other.cuts, len(other.ids), self.member.cuts, len(self.ids))

    def offer(self, other: Member, segmenting: Segmenting) -> int:
        """The same, as far as it will be stored; 0 for nothing."""
        deepest = self.meeting(other, segmenting)
        if self.running is None or deepest >= self.running:
            return deepest
        return max((position for position in self.planned if self.done < position <= deepest), default=0)


class Promises:
    """The prompts in flight of one store.

    Attributes:
        pace: seconds that a token of prefill took lately; 0 before anything is known.
    """

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        """In a child process: none, and a new lock."""
        # Taken itself, where nothing is waited for: an interrupt inside `Condition.__enter__` would keep it for ever.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._open: list[Promise] = []
        self.pace = 0.0

    def forget(self, space: str | None) -> None:
        """What is in flight in a space, or in any, will not be stored: nobody is to wait for it."""
        with self.lock:
            for promise in self._open:
                promise.over |= space in (None, promise.space)
            self.changed.notify_all()

    @contextmanager
    def given(self, ids: Tokens, space: str, look: Callable[[], Member], terms: WaitTerms) -> Iterator[Promise]:
        """Waits where that pays, and promises what a prompt is going to store, until the end of the block.

        Args:
            ids: the prompt.
            space: where it lives; who lives elsewhere is never waited for.
            look: what is known of it at the moment.
            terms: what waiting costs and saves.
        """
        promise = Promise(ids, space, look)
        try:
            self.wait(space, look, terms, promise)
            promise.began = time.monotonic()
            yield promise
        finally:
            with self.lock:
                self.end(promise)
                spent = terms.between(promise.resumed, promise.done)
                self.pace = (time.monotonic() - promise.began) / spent if spent else self.pace

    def end(self, promise: Promise) -> None:
        """Nothing more is to be expected of it."""
        with self.lock:
            promise.over = True
            if promise in self._open:  # not after a fork
                self._open.remove(promise)
            self.changed.notify_all()

    def wait(self, space: str, look: Callable[[], Member], terms: WaitTerms, then: Promise | None = None) -> None:
        """Waits where that pays; the moment when nothing is waited for any more, `then` is given."""
        tried: list[Promise] = []
        while True:
            with self.lock:
                known = any(promise.space == space for promise in self._open)
            member = look() if known else None  # with no lock held
            with self.lock:
                found = [promise for promise in self._open if promise.space == space and not promise.over]
                if found and member is None:
                    continue
                wish = self._best(member, [p for p in found if p not in tried], terms) if member is not None else None
                if wish is None or len(tried) == MOST_WAITS:
                    if then is not None:
                        self._open.append(then)
                        then.wishes |= self._met(member, found, terms) if member is not None else set()
                    return
                promise, target = wish
                promise.wishes.add(target)
                tried.append(promise)
                self.changed.wait_for(
                    lambda promise=promise, target=target: promise.over or promise.done >= target,  # type: ignore[misc]
                    self._patience(terms.between(promise.done, target)),
                )

    def _best(self, member: Member, found: list[Promise], terms: WaitTerms) -> tuple[Promise, int] | None:
        """Whom to wait for, and until where: what saves most, and is sooner there than one would be oneself."""
        best, most = None, terms.least
        for promise in found:
            target = promise.offer(member, terms.segmenting)
            saved = terms.between(member.stored, target)
            if saved > most and terms.between(promise.done, target) <= saved:
                best, most = (promise, target), saved
        return best

    def _met(self, member: Member, found: list[Promise], terms: WaitTerms) -> set[int]:
        """Where a prompt parts from those in flight that cannot be waited for: others will part there as well."""
        meetings = {promise.meeting(member, terms.segmenting) for promise in found}
        return {position for position in meetings if terms.between(member.stored, position) > terms.least}

    def _patience(self, tokens: float) -> float:
        """Seconds that a wait for so many tokens may take."""
        if not self.pace:
            return FIRST_PATIENCE
        return min(max(PATIENCE_FACTOR * self.pace * tokens, LEAST_PATIENCE), MOST_PATIENCE)
