"""Threads for what may hang, and how long a place that failed is left alone; by a clock that is set."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import pytest

from hf_sparse_cache.store import hands as module
from hf_sparse_cache.store.hands import BusyError, Hands, Trust


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now=1000.0, monotonic=lambda: made.now)
    monkeypatch.setattr(module, "time", made)
    return made


def test_a_place_that_failed_is_left_alone_for_longer_each_time(clock: Any) -> None:
    trust = Trust()
    assert trust.holds and trust.reason == ""
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        trust.broken(f"for {pause}")
        assert not trust.holds and trust.reason == f"for {pause}"
        clock.now += pause - 0.25
        assert not trust.holds
        clock.now += 0.25
        assert trust.holds and trust.reason
    trust.broken("again")
    trust.kept()
    assert trust.holds and trust.reason == ""
    trust.broken("anew")
    clock.now += 1
    assert trust.holds, "a first pause again"


def test_a_job_says_what_became_of_it() -> None:
    hands = Hands(1, "test")

    def fails(error: BaseException) -> None:
        raise error

    for error in (ValueError("x"), KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(error)):
            hands.wait(hands.begin(lambda error=error: fails(error)), time.monotonic() + 60)
    assert hands.wait(hands.begin(lambda: 7), time.monotonic() + 60) == 7, "the thread goes on"


def test_where_all_hang_nothing_more_is_begun_until_one_comes_back() -> None:
    hands, release, ran = Hands(2, "test"), threading.Event(), []
    stuck = [hands.begin(lambda: release.wait(60)) for _ in range(2)]
    queued = hands.begin(lambda: ran.append(1))  # nobody gave up yet
    with pytest.raises(TimeoutError):
        hands.wait(queued, 0.0)
    with pytest.raises(BusyError, match="3 earlier calls"):
        hands.begin(lambda: 1)
    release.set()
    assert all(job.result(60) for job in stuck)
    with pytest.raises(CancelledError):
        queued.result(60)
    until = time.monotonic() + 60
    while hands._open and time.monotonic() < until:
        time.sleep(0.001)
    assert hands.begin(lambda: 5).result(60) == 5 and not ran, "what nobody waited for any more was not begun"


def test_giving_up_on_what_is_done_or_while_others_are_free_stops_nothing() -> None:
    hands, release = Hands(2, "test"), threading.Event()
    done = hands.begin(lambda: 1)
    done.result(60)
    hands.gave_up(done)
    assert not hands._stalled
    hands.gave_up(hands.begin(lambda: release.wait(60)))
    assert hands.begin(lambda: 2).result(60) == 2, "one of two hangs"
    release.set()


def test_its_threads_hold_up_no_exit() -> None:
    hands = Hands(1, "named for this test")
    hands.begin(lambda: 1).result(60)
    (thread,) = [each for each in threading.enumerate() if each.name == "named for this test"]
    assert thread.daemon


def test_jobs_are_counted_under_a_lock() -> None:
    class Held:
        """Notes how often it was entered."""

        entered = 0

        def __enter__(self) -> None:
            self.entered += 1

        def __exit__(self, *_: object) -> None:
            pass

    hands = Hands(1, "test")
    lock = hands._lock = Held()  # type: ignore[assignment]
    hands.begin(lambda: 1).result(60)
    until = time.monotonic() + 60
    while hands._open and time.monotonic() < until:
        time.sleep(0.001)
    assert lock.entered == 2, "when it began, and when it came back"
    hands.gave_up(module.Future())
    assert lock.entered == 3
