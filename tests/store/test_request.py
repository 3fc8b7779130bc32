"""One request against the store: what it plans, cuts, hands on, says and leaves, step by step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cutting import at, every
from reference_store import Blob

from hf_sparse_cache import request as module
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.foresight import Foresight
from hf_sparse_cache.planning.lineage import Lineage, Span
from hf_sparse_cache.planning.policies import NoCheckpoints, Policy, Prompt
from hf_sparse_cache.planning.policy import limited
from hf_sparse_cache.planning.segments import Replayable, Segmenting
from hf_sparse_cache.request import Handover, Request, open_request
from hf_sparse_cache.stats import Cause, Reason
from hf_sparse_cache.store.answer import open_answer
from hf_sparse_cache.store.holding import Holding
from hf_sparse_cache.store.promises import Promise
from hf_sparse_cache.store.store import CheckpointStore


FREE = Replayable(CutRule(64), 2)
TEXT = np.arange(100, 120, dtype=np.int32)


class Wanting(Policy):
    """Wants checkpoints at given places, and is asked and told under its lock."""

    def __init__(self, *wishes: int) -> None:
        super().__init__()
        self.wishes, self.seen = list(wishes), list[Prompt]()

    def place(self, prompt: Prompt) -> list[int]:
        assert self.lock.locked()
        return self.wishes

    def observe(self, prompt: Prompt) -> None:
        assert self.lock.locked()
        self.seen.append(prompt)


def blob(start: int, end: int) -> Blob:
    return Blob(end - start, (start, end))


def opened(
    store: CheckpointStore, segmenting: Segmenting, *wishes: int, ids: np.ndarray = TEXT, limit: int | None = None
) -> Request:
    return open_request(store, limited(Wanting(*wishes), limit), ids, segmenting)


def served(store: CheckpointStore, segmenting: Segmenting, *positions: int, ids: np.ndarray = TEXT) -> Request:
    """A request that stores checkpoints with keys and values at some positions."""
    with opened(store, segmenting, *positions, ids=ids) as request:
        for position in request.planned:
            assert request.add(position, Blob(10, position), blob)
    store.verify()
    return request


def test_what_a_prompt_can_never_be_is_told_by_what_it_is() -> None:
    store = CheckpointStore(None)
    for ids in (np.zeros((1, 4), np.int32), np.zeros(4), np.asarray(["a"]), np.asarray([True, False])):
        with pytest.raises(ValueError, match="ids must be integers of shape"):
            open_request(store, NoCheckpoints(), ids, FREE)
    for wrong in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match=f"range of int32, got {wrong}"):
            open_request(store, NoCheckpoints(), np.asarray([1, wrong, 2]), FREE)
    with open_request(store, NoCheckpoints(), np.asarray([2**31 - 1, 5], np.uint64), FREE) as request:
        assert request.prompt_tokens == 2
    with open_request(store, NoCheckpoints(), np.asarray([-(2**31), 5]), FREE) as request:
        assert request.prompt_tokens == 2
    assert len(store.forest.trees[""].root.children) == 2


@pytest.mark.parametrize(
    ("limit", "planned"), [(None, [4, 8, 20]), (5, [4, 8, 20]), (3, [4, 8, 20]), (2, [8, 20]), (1, [20]), (0, [])]
)
def test_the_deepest_wishes_that_are_cuts_are_planned(limit: int | None, planned: list[int]) -> None:
    with opened(CheckpointStore(None), every(4), 20, 8, 6, 4, 25, 4, limit=limit) as request:
        assert request.planned == planned
        assert request.segments == [4, 8, 12, 16, 20] and request.lineage == Lineage([4, 8, 12, 16, 20])
        assert not request.announced
        assert (request.resumed_tokens, request.checkpoint, request.overlap_tokens) == (0, None, 0)
        assert request.match_seconds >= 0.0 and request.plan_seconds >= 0.0


def test_marks_are_planned_beside_what_a_limit_allows() -> None:
    store = CheckpointStore(None)
    store.mark(TEXT[:7])
    with opened(store, every(4), 4, 12, limit=1) as request:
        assert request.planned == [7, 12] and request.announced
        request.add(7, Blob(10))
        request.give_up_captures()
        assert not request.announced and request.planned == []
    with opened(store, every(4), 4, 12) as request:
        assert request.resumed_tokens == 7 and request.planned == [12] and not request.announced
    assert store.marks.prefixes("")[0].tolist() == TEXT[:7].tolist()


def test_what_is_marked_never_goes_and_what_is_planned_may() -> None:
    store = CheckpointStore(10, "lru")
    store.mark(TEXT[:8])
    with opened(store, every(4), 4) as request:
        assert request.add(4, Blob(10)) and request.add(8, Blob(10)) and not request.add(12, Blob(10))
        assert request.captured == [4, 8]
    assert [item.position for item in store.stored()] == [8]


def test_a_resumed_prompt_runs_what_is_left_of_it() -> None:
    store = CheckpointStore(None)
    assert served(store, every(4), 8).captured == [8]
    with opened(store, every(4), 4, 8, 12, ids=TEXT[:18]) as request:
        assert (request.resumed_tokens, request.overlap_tokens) == (8, 18)
        assert request.planned == [12] and request.segments == [12, 16, 18]
        assert list(request.steps()) == [12, 16, 18] and request.lineage == Lineage([4, 8, 12, 16, 18])
        assert [payload.label for payload in request.kv_payloads()] == [(0, 4), (4, 8)]
        info = request.info()
        assert (info.prompt_tokens, info.resumed_tokens, info.computed_tokens) == (18, 8, 10)
        assert (info.overlap_tokens, info.captured, info.segments) == (18, (), (4, 8, 12, 16, 18))
        assert info.reason.cause is Cause.RESUMED
        assert request.info(Reason(Cause.TRAINING)).reason.cause is Cause.TRAINING


def test_the_very_same_prompt_has_nothing_left_to_run() -> None:
    store = CheckpointStore(None)
    served(store, every(4), 8, 20)
    with opened(store, every(4), 12, 20) as request:
        assert (request.resumed_tokens, request.planned, request.segments) == (20, [], [])
        assert list(request.steps()) == [] and request.info().computed_tokens == 0
        assert request.info().segments == (4, 8, 12, 16, 20) and not request.announced
    longer = np.concatenate([TEXT, [1, 2, 3]]).astype(np.int32)
    with opened(store, every(5), ids=longer) as request:
        assert request.checkpoint is None and request.reason.cause is Cause.CUT_OTHERWISE
    tail = Replayable(CutRule(64), 2, tail=3)
    served(store, tail, 20, ids=TEXT[:20])
    with opened(store, tail) as request:
        assert request.resumed_tokens == 8  # the logits of three tokens are wanted


def test_a_state_inside_of_a_longer_prompt_is_no_end_of_it() -> None:
    store = CheckpointStore(None)
    served(store, FREE, 20, ids=np.append(TEXT, [1, 2, 3]).astype(np.int32)[:20])
    with opened(store, FREE, ids=np.append(TEXT, [1, 2, 3]).astype(np.int32)) as request:
        assert request.resumed_tokens == 20
        request.add(23, Blob(10))
    for ids, final in ((TEXT, True), (np.append(TEXT, [1, 2, 3]), True), (np.append(TEXT, [1, 2, 3])[:22], False)):
        with opened(store, FREE, ids=ids.astype(np.int32)) as request:
            assert (request.resumed_tokens == len(ids)) == final


def test_captures_are_given_up_and_the_rest_is_cut_anew() -> None:
    store = CheckpointStore(None)
    served(store, FREE, 8)
    with opened(store, FREE, 14) as request:
        assert request.segments == [14, 20] and request.lineage == Lineage([8, 14, 20])
        request.give_up_captures()
        assert (request.planned, request.segments) == ([], [20]) and request.lineage == Lineage([8, 20])
        assert request.resumed_tokens == 8 and request.reason.cause is Cause.RESUMED
    with opened(store, FREE, 14) as request:
        request.start_over()
        assert (request.planned, request.segments) == ([], [20]) and request.lineage == Lineage([20])
        assert (request.resumed_tokens, request.checkpoint, request.kv_payloads()) == (0, None, [])
        assert request.reason.cause is Cause.EVICTED
    with opened(CheckpointStore(None), FREE, 14) as request:
        request.start_over()
        assert request.reason.cause is Cause.NOTHING_STORED


def test_what_ran_with_others_says_so_and_keeps_nothing() -> None:
    store = CheckpointStore(None)
    served(store, FREE, 8)
    other = np.concatenate([TEXT[:12], [1, 2, 3, 4]]).astype(np.int32)
    with opened(store, FREE, 14, ids=other) as request:
        assert request.rows_together == 1
        request.run_with(3)
        assert request.info().segments == (8, (8, 16, 3)) and request.planned == []
    with opened(store, at(14), ids=np.append(other[:15], [9, 9]).astype(np.int32)) as request:
        assert request.reason.cause is not Cause.NOTHING_STORED
    fresh = CheckpointStore(None)
    with opened(fresh, every(4)) as request:
        request.run_with(2)
    with opened(fresh, every(4)) as request:
        assert request.reason.cause is Cause.BATCHED


def test_it_is_told_where_a_lower_tier_holds_what_was_cut_otherwise() -> None:
    store = CheckpointStore(30, "lru", host_memory=100)
    served(store, at(5), 5)
    served(store, every(4), 8, ids=TEXT[::-1].copy())
    assert [item.position for item in store.tiers[1].stored()] == [5]
    with opened(store, every(4)) as request:
        assert request.reason == "cut otherwise: the checkpoints on the first 5 tokens were made with other settings"
    with opened(store, at(5)) as request:
        assert request.resumed_tokens == 5 and request.reason.cause is Cause.RESUMED


def test_rounding_is_asked_of_the_segment_that_ends_there() -> None:
    rounding = Replayable(CutRule(64), 2, rounds=True)
    with opened(CheckpointStore(None), rounding, 8, 14) as request:
        assert request.lineage.ends == (8, (8, 8), 14, (14, 14), 20)
        assert [request.rounds_at(end) for end in request.steps()] == [True, True, False]
    with opened(CheckpointStore(None), FREE, 8, 14) as request:
        assert not any(request.rounds_at(end) for end in request.steps())


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_asked_for() -> None:
    store, asked = CheckpointStore(None), list[tuple[int, int]]()

    def kv(start: int, end: int) -> Blob:
        assert not store.lock._is_owned()  # type: ignore[attr-defined]
        asked.append((start, end))
        return blob(start, end)

    with opened(store, FREE, 8, 14) as request:
        assert request.add(8, Blob(10), kv) and request.add(14, Blob(10), kv) and request.add(8, Blob(10), kv)
        assert asked == [(0, 8), (8, 14)] and request.captured == [8, 14, 8]
    with opened(store, FREE, 18) as request:
        assert request.resumed_tokens == 14
        assert request.add(18, Blob(10), kv) and asked[2:] == [(14, 18)]
    deepest = max(store.stored(), key=lambda item: item.position)
    assert [segment.span for segment in deepest.chain()] == [Span((0, 8)), Span((8, 14)), Span((14, 18))]
    store.verify()


def test_what_has_no_room_is_not_captured() -> None:
    with opened(CheckpointStore(10), FREE, 8, 14) as request:
        assert not request.add(8, Blob(11)) and request.captured == []
        assert request.add(14, Blob(10)) and request.captured == [14]


def test_nothing_is_added_where_no_segment_ends_or_after_the_end() -> None:
    store = CheckpointStore(None)
    wrong = "position=9 is not the end of a segment"
    with opened(store, FREE, 8) as request, pytest.raises(ValueError, match=wrong):
        request.add(9, Blob(10))
    with pytest.raises(ValueError, match=r"add\(8\) on a closed request"):
        request.add(8, Blob(10))
    assert not store.stored()


def test_the_first_checkpoint_behind_the_resumed_one_has_its_refund(monkeypatch: pytest.MonkeyPatch) -> None:
    store, refunds = CheckpointStore(None), []
    put = store.put
    monkeypatch.setattr(Prompt, "refund", lambda self, position: float(position))
    monkeypatch.setattr(store, "put", lambda unit, *rest, **how: (refunds.append(unit), put(unit, *rest, **how))[1])
    with opened(store, FREE, 8, 14) as request:
        for position in (8, 14, 20):
            request.add(position, Blob(10))
    assert [unit.refund for unit in refunds] == [8.0, 0.0, 0.0]
    assert [unit.final for unit in refunds] == [False, False, True]


def test_the_copy_that_is_kept_is_rounded() -> None:
    store = CheckpointStore(None)
    with opened(store, Replayable(CutRule(64), 2, rounds=True), 8) as request:
        request.add(8, Blob(10), blob)
        request.add(20, Blob(10), blob)
        handed = request.hand_over(20, Blob(10))
    assert [item.lineage.ends for item in store.stored()] == [(8, (8, 8)), (8, (8, 8), 20, (20, 20))]
    assert handed.lineage.ends == (8, (8, 8), 20, (20, 20))


# -- from one prompt to another ---------------------------------------------------------------------------------------


def handing(store: CheckpointStore, position: int = 8, kv: Any = blob) -> tuple[Request, Handover]:
    segmenting = Replayable(CutRule(64), 2, junctions=(position,))
    with opened(store, segmenting, 4) as request:
        assert request.junctions == [position] and request.segments == [4, position, 20]
        return request, request.hand_over(position, Blob(7, "state"), kv)


def test_what_is_handed_over_is_all_that_is_computed_up_to_there() -> None:
    request, given = handing(CheckpointStore(None))
    assert given.position == 8 and given.lineage == Lineage([4, 8]) and given.state.nbytes == 7
    assert request.handovers == {8: given}
    assert [(link.span, link.payload.label) for link in given.links] == [(Span((0, 4, 8)), (0, 8))]
    assert given.chain() == given.links
    bare = handing(CheckpointStore(None), kv=None)[1]
    assert bare.links == ()


def test_what_it_resumed_from_is_handed_on_and_not_asked_for_again() -> None:
    store = CheckpointStore(None)
    served(store, FREE, 8)
    with opened(store, Replayable(CutRule(64), 2, junctions=(8, 14))) as request:
        assert request.junctions == [14]
        given = request.hand_over(14, Blob(7), lambda start, end: blob(start, end) if start == 8 else pytest.fail())
    assert [link.payload.label for link in given.links] == [(0, 8), (8, 14)]


def test_a_prompt_takes_over_what_is_deeper_than_what_is_stored() -> None:
    _, given = handing(CheckpointStore(None))
    store = CheckpointStore(None)
    other = np.concatenate([TEXT[:8], np.arange(12)]).astype(np.int32)
    with opened(store, Replayable(CutRule(64), 2, junctions=(8, 12)), 4, 8, 14, ids=other) as request:
        assert request.planned == [4, 8, 14] and request.junctions == [8, 12]
        request.take_over(given)
        assert request.checkpoint is given and (request.resumed_tokens, request.overlap_tokens) == (8, 8)
        assert (request.planned, request.junctions, request.segments) == ([14], [12], [12, 14, 20])
        assert request.lineage == Lineage([4, 8, 12, 14, 20]) and request.reason.cause is Cause.RESUMED
        assert request.captured == [8]  # it wanted one there
        assert [payload.label for payload in request.kv_payloads()] == [(0, 8)]
        assert request.add(14, Blob(10), lambda start, end: blob(start, end) if start >= 8 else pytest.fail())
    assert [item.position for item in store.stored()] == [8, 14]
    assert [item.lineage for item in store.stored()] == [Lineage([4, 8]), Lineage([4, 8, 12, 14])]
    store.verify()


def test_a_prompt_that_wants_no_checkpoint_there_stores_none() -> None:
    _, given = handing(CheckpointStore(None), kv=None)
    store = CheckpointStore(None)
    with opened(store, FREE, 12) as request:
        request.take_over(given)
        assert request.planned == [12] and request.captured == [] and request.kv_payloads() == []
    assert not store.stored()
    with opened(store, FREE, 8) as request:
        request.take_over(given)  # without keys and values
        assert request.captured == [8] and request.planned == []


@pytest.mark.parametrize(
    ("length", "stored", "taken"), [(10, 0, True), (9, 0, False), (20, 6, True), (20, 8, False), (20, 12, False)]
)
def test_it_takes_over_what_leaves_enough_to_compute(length: int, stored: int, taken: bool) -> None:
    _, given = handing(CheckpointStore(None))
    store = CheckpointStore(None)
    if stored:
        served(store, FREE, stored)
    with opened(store, FREE, ids=TEXT[:length]) as request:
        request.take_over(given)
        assert (request.checkpoint is given) == taken and request.resumed_tokens == (8 if taken else stored)
        assert request.overlap_tokens == max(length if stored else 0, 8 * taken)


def test_it_takes_over_only_what_is_cut_as_it_is() -> None:
    with opened(CheckpointStore(None), every(4)) as request:
        request.take_over(Handover(Lineage([5, 8]), Blob(7), ()))
        assert request.checkpoint is None and request.resumed_tokens == 0
        request.take_over(Handover(Lineage([4, 8]), Blob(7), ()))
        assert request.resumed_tokens == 8 and request.segments == [12, 16, 20]


# -- its end ----------------------------------------------------------------------------------------------------------


def test_the_policy_sees_a_prompt_once_and_only_where_it_went_well() -> None:
    store, policy = CheckpointStore(None), Wanting()
    with pytest.raises(RuntimeError), open_request(store, policy, TEXT, FREE) as request:
        raise RuntimeError
    assert not policy.seen and request.read is None and not store.ledger.chains.footings
    request.close()
    assert not policy.seen and request.read is None
    with open_request(store, policy, TEXT, FREE) as request:
        pass
    request.close()
    assert [len(prompt.ids) for prompt in policy.seen] == [20] and request.read is not None
    with open_request(store, policy, TEXT, FREE) as request:
        store.clear()
    assert len(policy.seen) == 1 and request.read is None and not store.ledger.chains.footings


def test_it_lets_go_where_the_policy_fails() -> None:
    class Failing(Wanting):
        def observe(self, prompt: Prompt) -> None:
            raise RuntimeError

    store = CheckpointStore(None)
    served(store, FREE, 8)
    with pytest.raises(RuntimeError), open_request(store, Failing(), TEXT, FREE) as request:
        assert request.resumed_tokens == 8 and store.ledger.in_use
    assert not store.ledger.in_use and not store.ledger.chains.footings
    request.close()
    store.verify()


@pytest.mark.parametrize("broken", ["place", "cause", "joined"])
def test_it_lets_go_where_it_fails_to_open(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(None)
    served(store, FREE, 8)

    def fails(*_: object) -> Any:
        raise KeyboardInterrupt

    owner: Any = {"place": Wanting, "cause": module, "joined": FREE.__class__}[broken]
    monkeypatch.setattr(owner, broken, fails)
    with pytest.raises(KeyboardInterrupt):
        opened(store, FREE)
    assert not store.ledger.in_use and not store.ledger.chains.footings


def test_why_it_resumes_there_is_told_while_nobody_changes_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = CheckpointStore(None), []

    def cause(match: object, checkpoint: object, usable: int, cuts: Sequence[int]) -> Reason:
        assert store.lock._is_owned()  # type: ignore[attr-defined]
        asked.append((usable, list(cuts)))
        return Reason(Cause.RESUMED)

    monkeypatch.setattr(module, "cause", cause)
    for tail in (1, 2, 5):
        with opened(store, Replayable(CutRule(64), 64, tail=tail, junctions=(6, 9))):
            pass
    with opened(store, Replayable(CutRule(64), 64), ids=np.append(TEXT[:7], [1] * 9).astype(np.int32)):
        pass
    assert asked == [(0, [6, 9, 20]), (18, [6, 9, 20]), (15, [6, 9, 20]), (7, [7, 16])]


def test_what_it_leaves_for_its_answer() -> None:
    store = CheckpointStore(None)
    with opened(store, FREE, 8, 14) as request:
        request.add(8, Blob(10), blob)
        request.add(14, Blob(10), blob)
    read = request.read
    assert read is not None and (read.reached, read.space, read.lineage) == (14, "", Lineage([8, 14, 20]))
    assert read.spans == (Span((0, 8)), Span((8, 14))) and read.prompt.ids.tolist() == TEXT.tolist()
    assert read.tree == store.forest.trees[""].serial and read.store is store and read.segmenting is FREE
    again = served(store, FREE).read
    assert again is not None and (again.reached, again.spans) == (14, (Span((0, 8)), Span((8, 14))))
    cold = served(CheckpointStore(None), FREE).read
    assert cold is not None and (cold.reached, cold.spans) == (0, ())


# -- what other threads ask of it -------------------------------------------------------------------------------------


def promising(request: Request) -> Promise:
    request.promise = Promise(TEXT, "", lambda: pytest.fail("nobody asks"))
    return request.promise


def test_it_says_how_far_it_is_before_and_after_every_segment() -> None:
    store = CheckpointStore(None)
    served(store, FREE, 4)
    with opened(store, FREE, 8, 14) as request:
        promise, told = promising(request), []
        for _ in request.steps():
            told.append((promise.done, promise.running, promise.resumed, set(promise.planned)))
        told.append((promise.done, promise.running, promise.resumed, set(promise.planned)))
    assert told == [(4, 8, 4, {8, 14}), (8, 14, 4, {8, 14}), (14, 20, 4, {8, 14}), (20, 20, 4, {8, 14})]


def test_those_who_wait_are_woken_when_it_gets_on() -> None:
    store = CheckpointStore(None)
    with opened(store, FREE, 8) as request:
        promise, woken, ready = promising(request), threading.Event(), threading.Event()

        def wait() -> None:
            with store.promises.changed:
                ready.set()
                store.promises.changed.wait_for(lambda: promise.done == 8, 60)
                woken.set()

        waiting, steps = threading.Thread(target=wait, daemon=True), request.steps()
        next(steps)
        waiting.start()
        assert ready.wait(30)
        next(steps)
        assert woken.wait(30)
        waiting.join(30)


def test_it_tells_and_is_told_under_the_lock_of_all_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    store, held = CheckpointStore(None), []
    with opened(store, FREE) as request:
        promising(request).wishes.add(8)
        plan = request._plan_wish

        def plan_wish(wish: int, position: int) -> None:
            held.append(store.promises.changed._is_owned())  # type: ignore[attr-defined]
            plan(wish, position)

        monkeypatch.setattr(request, "_plan_wish", plan_wish)
        assert list(request.steps()) == [8, 20] and held == [True]


@pytest.mark.parametrize(
    ("wish", "planned", "steps"),
    [
        (7, [7, 8, 14], None),  # a token beside a planned one
        (9, [8, 9, 14], None),
        (6, [6, 8, 14], [6, 8, 14, 20]),
        (10, [8, 10, 14], [8, 10, 14, 20]),
        (1, [], None),
        (2, [2, 8, 14], [2, 8, 14, 20]),
        (0, [], None),
        (8, [], None),
        (18, [8, 14, 18], [8, 14, 18, 20]),
        (19, [], None),
        (20, [8, 14, 20], [8, 14, 20]),
        (21, [], None),
        (30, [], None),
    ],
)
def test_a_wish_is_planned_where_no_segment_gets_too_short(wish: int, planned: list[int], steps: Any) -> None:
    with opened(CheckpointStore(None), FREE, 8, 14) as request:
        promise = promising(request)
        promise.wishes.add(wish)
        assert list(request.steps()) == (steps or [8, 14, 20])
        assert request.planned == (planned if steps else [8, 14]) and promise.wishes == set()
        assert promise.planned == set(request.planned)
        assert request.lineage.ends == tuple(steps or [8, 14, 20])


def test_a_wish_that_comes_late_is_planned_behind_what_is_done() -> None:
    store = CheckpointStore(None)
    served(store, FREE, 4)
    with opened(store, Replayable(CutRule(64), 2, junctions=(16,)), 8) as request:
        promise, steps = promising(request), request.steps()
        assert next(steps) == 8
        promise.wishes |= {6, 8, 9, 12, 15, 16, 17}
        assert [*steps] == [12, 16, 20]
        assert request.planned == [8, 12, 16] and request.lineage == Lineage([4, 8, 12, 16, 20])
        assert request.segments == [8, 12, 16, 20] and request.junctions == [16]


@pytest.mark.parametrize(("limit", "planned"), [(0, []), (1, [6]), (2, [6, 10]), (None, [6, 10, 14])])
def test_wishes_count_in_the_limit(limit: int | None, planned: list[int]) -> None:
    with opened(CheckpointStore(None), FREE, limit=limit) as request:
        promising(request).wishes.update({14, 10, 6})
        assert list(request.steps())[:-1] == request.planned == planned


def test_a_wish_that_is_no_cut_is_none_in_bitwise_mode() -> None:
    with opened(CheckpointStore(None), every(4)) as request:
        promising(request).wishes.update({6, 12})
        assert list(request.steps()) == [4, 8, 12, 16, 20] and request.planned == [12]


# -- what one call keeps for its later prompts ------------------------------------------------------------------------


def test_a_call_keeps_what_its_later_prompts_need_and_no_longer() -> None:
    store = CheckpointStore(None)
    holding = Holding(store)
    assert not holding.needs(8)
    first = Foresight(Wanting(), {8: 2, 14: 1}, 0)
    holding.begin(first, 0)
    with open_request(store, first, TEXT, at(8, 14)) as request:
        request.hold_for(holding)
        assert request.planned == [8, 14] and holding.needs(8) and not holding.needs(20)
        request.add(8, Blob(10)), request.add(14, Blob(10)), request.add(20, Blob(10))
    assert [(item.position, item.pins) for item in store.stored()] == [(8, 1), (14, 1), (20, 0)]
    assert holding.staying(14) == holding.staying(8) == 0 and holding.staying(20) == 20
    holding.begin(Foresight(Wanting(), {8: 2}, 2), 2)
    assert [(item.position, item.pins) for item in store.stored()] == [(8, 1), (20, 0)]
    assert not holding.needs(8)  # by later ones than this
    holding.close()
    assert [item.position for item in store.stored()] == [20] and not holding.needs(8)
    store.verify()


def test_what_is_there_already_stays_when_the_call_is_over() -> None:
    store = CheckpointStore(None)
    served(store, at(8, 14), 8)
    holding, foresight = Holding(store), Foresight(Wanting(), {8: 1, 14: 1}, 0)
    holding.begin(foresight, 0)
    with open_request(store, foresight, TEXT, at(8, 14)) as request:
        request.hold_for(holding)
        assert request.resumed_tokens == 8 and request.planned == [14]
        request.add(14, Blob(10))
        request.add(14, Blob(10))  # the one that is there is held once
    assert [item.pins for item in store.stored()] == [1, 1]
    assert holding.staying(14) == holding.staying(8) == 8
    holding.close()
    assert [(item.position, item.pins) for item in store.stored()] == [(8, 0)]
    store.verify()


@pytest.mark.parametrize("when", ["at once", "by a later prompt", "by the last"])
def test_what_the_policy_wants_as_well_stays(when: str) -> None:
    store, policy = CheckpointStore(None), Wanting(*([8] if when == "at once" else []))
    holding = Holding(store)
    for place in range(3):
        foresight = Foresight(policy, {8: 2}, place, holding.staying)
        holding.begin(foresight, place)
        with open_request(store, foresight, TEXT[: 20 - place], at(8)) as request:
            request.hold_for(holding)
            assert request.resumed_tokens == (8 if place else 0)
            if not place:
                request.add(8, Blob(10))
        if place == 0 and when == "by a later prompt":
            policy.wishes = [8]
        if place == 1:
            policy.wishes = [8] if when == "by the last" else []
    holding.close()
    assert [(item.position, item.pins) for item in store.stored()] == [(8, 0)]


def test_what_others_use_when_the_call_is_over_stays_with_them() -> None:
    store = CheckpointStore(None)
    holding, foresight = Holding(store), Foresight(Wanting(), {8: 1}, 0)
    holding.begin(foresight, 0)
    with open_request(store, foresight, TEXT, at(8)) as request:
        request.hold_for(holding)
        request.add(8, Blob(10))
    with opened(store, at(8), ids=TEXT[:12]) as other:
        assert other.resumed_tokens == 8
        holding.close()
        assert [(item.position, item.pins) for item in store.stored()] == [(8, 1)]
    holding.close()
    store.verify()


def test_what_a_call_needs_is_stored_whatever_else_is_worth() -> None:
    store, asked = CheckpointStore(None), []
    put = store.put

    def noted(unit: Any, footing: Any, *, urgent: bool, keep: bool) -> Any:
        asked.append((unit.lineage.end, urgent, keep))
        return put(unit, footing, urgent=urgent, keep=keep)

    store.put = noted  # type: ignore[method-assign]
    holding, foresight = Holding(store), Foresight(Wanting(20), {8: 1}, 0)
    holding.begin(foresight, 0)
    store.mark(TEXT[:14])
    with open_request(store, foresight, TEXT, at(8, 14)) as request:
        request.hold_for(holding)
        for position in request.segments:
            request.add(position, Blob(10))
    assert asked == [(8, True, False), (14, False, True), (20, False, False)]
    holding.close()


def test_what_is_gone_by_then_is_not_held() -> None:
    store = CheckpointStore(None)
    holding, foresight = Holding(store), Foresight(Wanting(), {8: 1}, 0)
    holding.begin(foresight, 0)
    with open_request(store, foresight, TEXT, at(8)) as request:
        request.hold_for(holding)
        request.add(8, Blob(10))
        (found,) = store.stored()
    store.clear()
    holding.hold(found, new=True)
    assert len(holding._held) == 1 and holding.staying(8) == 0
    holding.close()
    assert store.used_bytes == 0
    store.verify()
    holding.begin(foresight, 0)
    holding.hold(found, new=True)
    assert holding.staying(8) == 8  # it was not even held


# -- the answer -------------------------------------------------------------------------------------------------------


ANSWER = np.arange(200, 206)


def test_nothing_is_kept_of_an_answer_whose_prompt_is_forgotten() -> None:
    assert open_answer(None, ANSWER) is None
    store = CheckpointStore(None)
    read = served(store, FREE).read
    store.clear()
    assert open_answer(read, ANSWER) is None


@pytest.mark.parametrize(
    ("wishes", "limit", "planned"),
    [
        ((), None, []),
        ((25,), None, [25]),
        ((26,), None, [25]),  # the one state there is, whatever is wanted behind it
        ((24,), None, []),
        ((25,), 1, [25]),
        ((25,), 0, []),
    ],
)
def test_the_state_behind_what_was_decoded_is_kept_where_it_is_wanted(
    wishes: Sequence[int], limit: int | None, planned: list[int]
) -> None:
    store, policy = CheckpointStore(None), Wanting()
    with open_request(store, limited(policy, limit), TEXT, FREE) as request:
        request.add(20, Blob(10), blob)
    policy.wishes = list(wishes)
    answer = open_answer(request.read, ANSWER)
    assert answer is not None and answer.planned == planned and answer.captured == []
    with answer:
        for position in planned:
            assert answer.add(position, Blob(10), lambda a, b: blob(a, b) if a >= 20 else pytest.fail())
    assert answer.captured == planned and len(policy.seen) == 1
    assert [item.lineage.ends for item in store.stored()] == [(20,), *[(20, (20, 25)) for _ in planned]]
    assert store.match(np.concatenate([TEXT, ANSWER]).astype(np.int32)).overlap == 26
    store.verify()


def test_an_answer_is_kept_at_its_cuts_where_it_is_read_once_more() -> None:
    store, policy = CheckpointStore(None), Wanting(8, 16)
    with open_request(store, policy, TEXT[:18], every(4)) as request:
        request.add(8, Blob(10), blob), request.add(16, Blob(10), blob)
    policy.wishes = [4, 20, 24, 28, 29, 40]
    with open_answer(request.read, np.arange(200, 220)) as answer:  # type: ignore[union-attr]
        assert answer is not None and answer.planned == [20, 24, 28]
        for position in (20, 28):
            assert answer.add(position, Blob(10), lambda a, b: blob(a, b) if a >= 16 else pytest.fail())
    assert answer.captured == [20, 28]
    found = {item.position: item for item in store.stored()}
    assert found[28].lineage == Lineage([4, 8, 12, 16, 20, 24, 28])
    assert [segment.span.start for segment in found[28].chain()] == [0, 4, 8, 12, 16, 20, 24]
    store.verify()
    policy = Wanting(20, 24, 28)
    with open_request(store, limited(policy, 2), TEXT[:18], every(4)) as request:
        pass
    with open_answer(request.read, np.arange(300, 320)) as answer:  # type: ignore[union-attr]
        assert answer is not None and answer.planned == [24, 28]


def test_an_answer_holds_nothing_where_it_fails() -> None:
    store, policy = CheckpointStore(None), Wanting(8)
    with open_request(store, policy, TEXT, FREE) as request:
        request.add(8, Blob(10), blob)
    with pytest.raises(RuntimeError), open_answer(request.read, ANSWER):  # type: ignore[union-attr]
        raise RuntimeError
    assert store.match(np.concatenate([TEXT, ANSWER]).astype(np.int32)).overlap == 20  # nothing is remembered of it
    policy.wishes = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match="return a list of positions"):
        open_answer(request.read, ANSWER)
    assert not store.ledger.in_use and not store.ledger.chains.footings
    store.verify()


def test_an_answer_without_room_or_without_keys_and_values() -> None:
    store = CheckpointStore(25)
    with opened(store, FREE, 8) as request:
        request.add(8, Blob(10))
    with open_answer(request.read, ANSWER) as answer:  # type: ignore[union-attr]
        assert answer is not None
        assert not answer.add(25, Blob(26)) and answer.captured == []
        assert answer.add(25, Blob(10)) and answer.captured == [25]
    assert [len(item.chain()) for item in store.stored()] == [0, 0]


def test_what_is_behind_an_answer_is_that_it_goes_on_from_the_deepest_state() -> None:
    """A policy is shown the whole text as one that resumes there."""
    store, seen = CheckpointStore(None), []

    class Looking(Wanting):
        def place(self, prompt: Prompt) -> list[int]:
            seen.append(prompt)
            return super().place(prompt)

    with open_request(store, Looking(8), TEXT, FREE) as request:
        request.add(8, Blob(10))
    with open_answer(request.read, ANSWER.astype(np.int64)):  # type: ignore[union-attr]
        whole = seen[-1]
        assert whole.ids.tolist() == [*TEXT.tolist(), *ANSWER.tolist()] and whole.ids.dtype == np.int32
        assert (whole.resumed, whole.resumed_bytes, whole.shape, whole.forecast) == (8, 0, None, None)
        assert whole.cuts.tolist() == [2, 4, 6, 8, 25]
    with open_request(store, Looking(), TEXT, every(4)) as request:
        pass
    with open_answer(request.read, ANSWER):  # type: ignore[union-attr]
        assert seen[-1].cuts.tolist() == [20, 24] and seen[-1].resumed == 0
    served(store, every(4), 8)
    with open_request(store, Looking(), TEXT, every(4)) as request:
        assert request.resumed_tokens == 8
    with open_answer(request.read, ANSWER):  # type: ignore[union-attr]
        assert seen[-1].cuts.tolist() == [4, 8, 20, 24] and seen[-1].resumed == 8
