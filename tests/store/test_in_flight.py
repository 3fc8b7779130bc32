"""Who waits for whom among prompts in flight, and for how long; things happen while one thread waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sharing import NotedLock, waiting

from hf_sparse_cache.planning.batch import Member
from hf_sparse_cache.planning.cuts import CutRule, Tokens
from hf_sparse_cache.planning.segments import Replayable
from hf_sparse_cache.store import promises as module
from hf_sparse_cache.store.promises import Promise, Promises, WaitTerms


FREE = Replayable(CutRule(64), 64, None)
COSTLY: Any = SimpleNamespace(cut_tokens=64.0, meeting=FREE.meeting)  # where one more cut is as many tokens
TERMS = WaitTerms(COSTLY, lambda positions: positions)
SHARED = np.arange(1000, 1200, dtype=np.int32)


def member(ids: Tokens, stored: int = 0) -> Member:
    return Member(ids, np.arange(2, len(ids) - 1), stored=stored)


def prompt(own: int, shared: int = 200, length: int = 20) -> Tokens:
    return np.concatenate([SHARED[:shared], np.arange(5000 + 100 * own, 5000 + 100 * own + length, dtype=np.int32)])


def in_flight(promises: Promises, own: int, space: str = "", **known: Any) -> Promise:
    ids = prompt(own)
    promise = Promise(ids, space, lambda: member(ids), **known)
    promises._open.append(promise)
    return promise


def given(promises: Promises, own: int, space: str = "", stored: int = 0) -> Promise:
    ids = prompt(own)
    with promises.given(ids, space, lambda: member(ids, stored), TERMS) as promise:
        assert promises._open[-1] is promise
    assert promise.over and promise not in promises._open
    return promise


def test_what_was_asked_for_is_waited_for_and_then_it_is_ones_turn() -> None:
    promises = Promises()
    first = in_flight(promises, 0)
    waited = waiting(promises.changed, [lambda: setattr(first, "done", 200)])
    assert given(promises, 1, stored=200).wishes == set() and waited == []
    assert given(promises, 1).wishes == {200} and waited == [module.FIRST_PATIENCE]
    assert first.wishes == {200}


@pytest.mark.parametrize("end", ["over", "nothing"])
def test_each_is_waited_for_once_and_no_more_than_two(end: str) -> None:
    promises = Promises()
    flying = [in_flight(promises, own, done=own) for own in range(4)]
    steps = [lambda: None, lambda: None, lambda: None]
    if end == "over":
        steps[0] = lambda: [setattr(promise, "over", True) for promise in flying]
    waited = waiting(promises.changed, steps)
    assert given(promises, 7).wishes == (set() if end == "over" else {200})
    assert len(waited) == (1 if end == "over" else module.MOST_WAITS)
    assert [promise.wishes for promise in flying] == [{200}, set() if end == "over" else {200}, set(), set()]


def test_who_is_over_or_lives_elsewhere_is_not_waited_for() -> None:
    promises = Promises()
    in_flight(promises, 0, "other"), in_flight(promises, 1, over=True)
    waited = waiting(promises.changed, [])
    with promises.given(prompt(2), "", lambda: member(prompt(2)), TERMS) as promise:
        assert promise.wishes == set() and waited == []
    with promises.given(prompt(2), "third", lambda: pytest.fail("nobody is there"), TERMS):
        pass


def test_one_that_comes_while_one_looks_is_seen() -> None:
    """Nobody was in flight when it was asked whether to look; one is when it is one's turn."""
    promises = Promises()
    looks: list[int] = []
    lock = promises.changed

    class Coming:
        entered = 0

        def __enter__(self) -> None:
            lock.__enter__()
            self.entered += 1
            if self.entered == 2:
                in_flight(promises, 0)

        def __exit__(self, *_: Any) -> None:
            lock.__exit__(None, None, None)

        def wait_for(self, done: Callable[[], bool], seconds: float) -> None:
            promises._open[0].over = True

    promises.lock = promises.changed = Coming()  # type: ignore[assignment]
    promises.wait("", lambda: looks.append(1) or member(prompt(1)), TERMS)
    assert looks and promises._open[0].wishes == {200}


@pytest.mark.parametrize("seed", range(20))
def test_who_is_waited_for_is_who_saves_most(seed: int) -> None:
    draw = random.Random(seed)
    promises = Promises()
    stored = draw.choice((0, 0, 50, 150))
    for own in range(draw.randrange(1, 6)):
        promise = in_flight(promises, own, done=draw.choice((0, 20, 100, 199)))
        promise.ids = prompt(own, draw.choice((1, 2, 40, 66, 120, 200)))
        promise.running = draw.choice((None, 90, 220))
        promise.planned = {*draw.sample(range(1, 200), 3)}
    asker = member(prompt(9), stored)
    best, most = None, 64.0
    for promise in promises._open:
        target = promise.offer(asker, FREE)
        if target - stored > most and max(0, target - promise.done) <= target - stored:
            best, most = (promise, target), float(target - stored)
    assert promises._best(asker, promises._open, TERMS) == best
    met = {promise.meeting(asker, FREE) for promise in promises._open}
    assert promises._met(asker, promises._open, TERMS) == {end for end in met if end - stored > 64}


@pytest.mark.parametrize(
    ("space", "over"), [(None, [True, True, True]), ("a", [True, False, True]), ("c", [False, False, True])]
)
def test_what_is_forgotten_is_waited_for_no_more(space: str | None, over: list[bool]) -> None:
    promises, told = Promises(), []
    flying = [in_flight(promises, 0, "a"), in_flight(promises, 1, "b"), in_flight(promises, 2, "b", over=True)]
    promises.changed.notify_all = lambda: told.append(1)  # type: ignore[method-assign]
    promises.forget(space)
    assert [promise.over for promise in flying] == over and told


def test_the_end_of_a_prompt_is_told_also_where_it_fails_or_was_forked() -> None:
    promises, told = Promises(), []
    promises.changed.notify_all = lambda: told.append(1)  # type: ignore[method-assign]
    with (
        pytest.raises(KeyError),
        promises.given(prompt(0), "", lambda: pytest.fail("nobody is there"), TERMS) as promise,
    ):
        raise KeyError
    assert promise.over and told == [1] and promises._open == []
    with promises.given(prompt(0), "", lambda: pytest.fail("nobody is there"), TERMS) as promise:
        promises.pace = 3.0
        promises.after_fork()
        assert promises._open == [] and promises.pace == 0.0
    assert promise.over


def test_costs_are_never_negative_and_something_is_least() -> None:
    terms = WaitTerms(FREE, lambda positions: positions**2)
    assert terms.between(3, 5) == 16.0 and terms.between(5, 3) == 0.0 and terms.between(4, 4) == 0.0
    assert TERMS.least == 64.0 and WaitTerms(SimpleNamespace(cut_tokens=0.5), terms.cost).least == 2.0  # type: ignore[arg-type]


def test_identical_prompts_meet_at_their_end_and_short_ones_nowhere() -> None:
    promise = Promise(prompt(0), "", lambda: member(prompt(0)))
    assert promise.meeting(member(prompt(0)), FREE) == 220 and promise.meeting(member(prompt(1)), FREE) == 200
    assert promise.meeting(member(prompt(1, 1)), FREE) == 0 and promise.meeting(member(prompt(1, 2)), FREE) == 2


def test_what_is_in_flight_is_changed_under_its_lock() -> None:
    class Lock(NotedLock):
        def notify_all(self) -> None:
            assert self.held

    class Open(list[Promise]):
        def append(self, promise: Promise) -> None:
            assert lock.held
            super().append(promise)

        def remove(self, promise: Promise) -> None:
            assert lock.held
            super().remove(promise)

        def __iter__(self) -> Any:
            assert lock.held
            return super().__iter__()

    lock, promises = Lock(), Promises()
    promises.lock = promises.changed = lock  # type: ignore[assignment]
    promises._open = Open()
    with promises.given(prompt(0), "", lambda: pytest.fail("nobody is there"), TERMS):
        promises.forget("other")
        assert not lock.held
    assert len(promises._open) == 0
