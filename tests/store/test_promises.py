"""Prompts in flight: who shares enough waits for what will be stored, for a time, with no lock and no pin held."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cutting import every
from reference_store import Blob

from hf_sparse_cache.planning.batch import Member
from hf_sparse_cache.planning.cuts import CutRule, Tokens
from hf_sparse_cache.planning.policies import Junction, NoCheckpoints, Policy
from hf_sparse_cache.planning.segments import Replayable, Segmenting
from hf_sparse_cache.request import Request, open_request
from hf_sparse_cache.store import promises as module
from hf_sparse_cache.store.promises import Promise, Promises, WaitTerms
from hf_sparse_cache.store.store import CheckpointStore


INTERLEAVINGS = int(os.environ.get("HF_SPARSE_CACHE_TEST_INTERLEAVINGS", "100"))
FREE = Replayable(CutRule(64), 64, None)
PIECES = Replayable(CutRule(64), 64, 16)
SHARED = np.arange(1000, 1200, dtype=np.int32)


class Broken(Exception):
    """What a forward raises."""


def prompt(own: int, length: int = 20, shared: Tokens = SHARED) -> Tokens:
    return np.concatenate([shared, np.arange(5000 + 100 * own, 5000 + 100 * own + length, dtype=np.int32)])


@contextmanager
def promised(
    store: CheckpointStore, ids: Tokens, segmenting: Segmenting, policy: Policy | None = None, space: str = ""
) -> Iterator[Request]:
    terms = WaitTerms(segmenting, lambda positions: positions)
    look: Callable[[], Any] = lambda: store.foretell(ids, segmenting, space)  # noqa: E731
    with (
        store.promises.given(ids, space, look, terms) as promise,
        open_request(store, policy or NoCheckpoints(), ids, segmenting, space=space) as request,
    ):
        request.promise = promise
        yield request


def run(
    store: CheckpointStore,
    ids: Tokens,
    segmenting: Segmenting,
    forward: Callable[[int], None] = lambda end: None,
    **options: Any,
) -> int:
    """Serves one prompt; returns the tokens that were computed."""
    with promised(store, ids, segmenting, **options) as request:
        for end in request.steps():
            forward(end)
            if end in request.planned:
                request.add(end, Blob(10), lambda start, stop: Blob(stop - start))
        return len(ids) - request.resumed_tokens


def together(work: list[Callable[[], Any]], seconds: float = 60.0) -> list[Any]:
    """Results, or errors, of some functions in threads of their own."""
    found: list[Any] = [None] * len(work)

    def one(index: int) -> None:
        try:
            found[index] = work[index]()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "deadlock"
    return found


class Leader:
    """A prompt in flight that stops in its first forward until it is told to go on."""

    def __init__(self, store: CheckpointStore, ids: Tokens, segmenting: Segmenting, **options: Any) -> None:
        self.inside, self.go_on, self.fails = threading.Event(), threading.Event(), False
        self.computed: list[int] = []
        self._thread = threading.Thread(target=self._run, args=(store, ids, segmenting, options), daemon=True)
        self._thread.start()
        assert self.inside.wait(10)

    def _run(self, store: CheckpointStore, ids: Tokens, segmenting: Segmenting, options: Any) -> None:
        def forward(end: int) -> None:
            self.inside.set()
            assert self.go_on.wait(30)
            if self.fails:
                raise Broken

        with suppress(Broken):
            self.computed.append(run(store, ids, segmenting, forward, **options))

    def ends(self) -> None:
        self.go_on.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("segmenting", [PIECES, every(16)])
def test_eight_threads_compute_a_prefix_once_where_it_runs_in_pieces(segmenting: Segmenting) -> None:
    store = CheckpointStore(None)
    work = [lambda own=own: run(store, prompt(own), segmenting, lambda end: time.sleep(0.001)) for own in range(8)]
    computed = together(work)
    assert sum(computed) <= 1.2 * 200 + 8 * (20 + 16), computed
    store.verify()
    assert not store.promises._open


def test_a_prompt_in_one_piece_that_began_alone_costs_one_more_prefix() -> None:
    store = CheckpointStore(None)
    leader = Leader(store, prompt(0), FREE)
    second = Leader(store, prompt(1), FREE)  # it cannot wait for the first, and captures where they part
    others = [threading.Thread(target=lambda own=own: found.append(run(store, prompt(own), FREE))) for own in (2, 3)]
    found: list[int] = []
    for thread in others:
        thread.start()
    time.sleep(0.05)
    assert not found and not any(checkpoint.pins for checkpoint in store.stored())  # they wait, and hold nothing
    assert store.lock.acquire(timeout=1)
    store.lock.release()
    second.ends()
    for thread in others:
        thread.join(30)
    leader.ends()
    assert found == [20, 20] and leader.computed == second.computed == [220]
    store.verify()


def waited(store: CheckpointStore, ids: Tokens, segmenting: Segmenting = PIECES, **options: Any) -> tuple[int, float]:
    clock = time.monotonic()
    return run(store, ids, segmenting, **options), time.monotonic() - clock


def test_who_shares_little_or_lives_elsewhere_does_not_wait() -> None:
    store = CheckpointStore(None)
    leader = Leader(store, prompt(0), Replayable(CutRule(64), 64, 16, price=30.0))
    costly = Replayable(CutRule(64), 64, 16, price=30.0)
    assert waited(store, prompt(1, shared=SHARED[:25]), costly)[1] < 1  # less than a cut costs
    assert waited(store, prompt(1), costly, space="other")[1] < 1
    assert waited(store, np.arange(50, dtype=np.int32), costly)[1] < 1
    assert not leader.computed
    leader.ends()


@pytest.mark.parametrize("how", ["fails", "cleared", "hangs"])
def test_the_follower_goes_on_by_itself(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PATIENCE", 0.3 if how == "hangs" else 20.0)
    store = CheckpointStore(None)
    leader = Leader(store, prompt(0), PIECES)
    leader.fails = how == "fails"
    if how != "hangs":
        threading.Timer(0.1, leader.go_on.set if how == "fails" else store.clear).start()
    computed, seconds = waited(store, prompt(1))
    assert computed == 220 and seconds < 10
    leader.ends()
    assert not store.promises._open
    store.verify()


def test_what_is_offered_is_what_will_be_stored() -> None:
    """Behind the forward that runs any place can be cut; before its end there is what is planned and not yet done."""
    ids = prompt(0)
    other = Member(prompt(1), np.arange(2, 219))
    promise = Promise(ids, "", lambda: Member(ids, np.arange(2, 219)), planned={60, 120, 160, 210})
    for done, running, offered in (
        (0, None, 200), (0, 100, 200), (100, 200, 200), (100, 201, 160), (120, 220, 160), (160, 220, 0), (30, 220, 160)
    ):  # fmt: skip
        promise.done, promise.running = done, running
        assert promise.offer(other, FREE) == offered, (done, running)


def test_the_pace_is_of_what_was_computed_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds a unit of cost: what a wait may take follows from it, whatever a prompt resumed before."""
    clock = iter([10.0, 13.0, 20.0, 20.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    promises = Promises()
    terms = WaitTerms(FREE, lambda positions: positions**2)
    for resumed, done in ((2, 4), (4, 4)):  # the second one computes nothing, which says nothing
        with promises.given(prompt(0), "", lambda: pytest.fail("nobody is there"), terms) as promise:
            promise.resumed, promise.done = resumed, done
        assert promises.pace == 3.0 / 12
    assert [promises._patience(tokens) for tokens in (1, 40, 1000)] == [1.0, 40.0, 60.0]
    assert Promises()._patience(1) == 30.0


def test_the_identical_prompt_computes_nothing() -> None:
    store = CheckpointStore(None)
    leader = Leader(store, prompt(0), PIECES)
    threading.Timer(0.1, leader.go_on.set).start()
    assert waited(store, prompt(0))[0] == 0
    leader.ends()


def test_a_wish_never_makes_a_short_segment() -> None:
    store = CheckpointStore(None)
    for length in range(195, 201):
        with promised(store, prompt(0, length=2), FREE) as request:
            store.promises._open[0].wishes.update({1, 2, 3, length, length + 1, 201, 202})
            ends = [0, *request.steps()]
            assert min(np.diff(ends)) >= 2 and ends[-1] == 202 and request.lineage.ends == tuple(ends[1:])


@contextmanager
def no_deadlock(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def interleaving(seed: int) -> None:
    """A few threads with prompts that share, fail, are cancelled, while others clear and evict."""
    draw = random.Random(seed)
    segmenting = draw.choice((FREE, PIECES, every(16)))
    store = CheckpointStore(draw.choice((None, 300, 1000)))

    def serve(own: random.Random) -> None:
        for _ in range(2):
            ids = prompt(own.randrange(3), own.randrange(2, 30), SHARED[: own.choice((40, 90, 91, 200))])

            def forward(end: int) -> None:
                if own.random() < 0.4:
                    time.sleep(0.0001 * own.random())
                if own.random() < 0.08:
                    raise own.choice((Broken, KeyboardInterrupt))

            with suppress(Broken, KeyboardInterrupt):
                run(store, ids, segmenting, forward, policy=Junction(), space=own.choice(("", "", "b")))

    def disturb(own: random.Random) -> None:
        for _ in range(3):
            time.sleep(0.0003 * own.random())
            if own.random() < 0.5:
                store.clear(own.choice((None, "", "b")))
            else:
                store.give_back()

    streams = [random.Random(draw.random()) for _ in range(5)]
    work = [*(lambda own=own: serve(own) for own in streams[:4]), lambda: disturb(streams[4])]
    for result in together(work, 30):
        assert result is None, (seed, result)
    store.verify()
    assert not store.promises._open and not any(checkpoint.pins for checkpoint in store.stored())


def test_random_interleavings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever, and nothing stays pinned or promised; 10,000 of them in the full run."""
    monkeypatch.setattr(module, "FIRST_PATIENCE", 20.0)
    monkeypatch.setattr(module, "LEAST_PATIENCE", 20.0)  # a wait that only its bound ends would show
    for seed in range(INTERLEAVINGS):
        with no_deadlock(19.0):
            interleaving(seed)


def test_a_promise_that_is_never_kept_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that must fail: whoever is in flight never says how far it is."""
    monkeypatch.setattr(module, "FIRST_PATIENCE", 1.0)
    monkeypatch.setattr(Promises, "forget", lambda *_: None)
    monkeypatch.setattr(Request, "_heed", lambda *_: None)
    store = CheckpointStore(None)
    leader = Leader(store, prompt(0), PIECES)
    computed, seconds = waited(store, prompt(1))
    assert computed == 220 and seconds >= 0.9
    leader.ends()
