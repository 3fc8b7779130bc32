"""What a request tells the policy and the eviction about its prompt, number by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cutting import every
from prompting import GRID, run

from hf_sparse_cache.planning.cuts import CutRule, message_start
from hf_sparse_cache.planning.policies import NoCheckpoints
from hf_sparse_cache.planning.policy import Prompt, Terms
from hf_sparse_cache.planning.segments import Bitwise
from hf_sparse_cache.request import open_request
from hf_sparse_cache.store.eviction import LRU
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.survival import cell_of
from hf_sparse_cache.store.value import LeastValue
from hf_sparse_cache.store.visit import LEAST_NEED, PRICED_SHARE, Before


class Watching(LRU):
    """Keeps what it is asked about each prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, float, int]] = []

    def terms(self, path: Sequence[Any], overlap: int, need: float, resumed: Any) -> Terms:
        self.asked.append((overlap, need, 0 if resumed is None else resumed.position))
        return super().terms(path, overlap, need, resumed)


class Looking(NoCheckpoints):
    """Keeps what it may look at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Prompt] = []

    def place(self, prompt: Prompt) -> list[int]:
        self.seen.append(prompt)
        return []


def look(store: CheckpointStore, ids: list[int]) -> Prompt:
    policy = Looking()
    with open_request(store, policy, np.asarray(ids, dtype=np.int32), every(GRID)):
        pass
    (seen,) = policy.seen
    return seen


DOCUMENT = list(range(100, 120))


def test_a_prompt_is_described_by_what_is_stored_and_by_who_passed() -> None:
    store = CheckpointStore(None, Watching())
    cold = look(store, DOCUMENT)
    assert (cold.overlap, cold.resumed, cold.state_bytes, cold.kv_bytes_per_token, cold.resumed_bytes) == (0,) * 5
    assert cold.path_ends.tolist() == [] and cold.cuts.tolist() == list(range(2, 20, 2))
    run(store, [*DOCUMENT, 1, 2], [10, 20], kv=3)
    run(store, [*DOCUMENT, 5, 6], [])
    warm = look(store, [*DOCUMENT[:15], 7, 8, 9])
    assert (warm.overlap, warm.resumed, warm.resumed_bytes) == (15, 10, 10)
    assert (warm.state_bytes, warm.kv_bytes_per_token) == (10.0, 3.0)
    assert warm.path_ends.tolist() == [20] and warm.path_passes.tolist() == [3]
    assert warm.open_cuts.tolist() == [12, 14, 16]


@pytest.mark.parametrize("limit", [10**6, 200, 95])
def test_it_is_asked_what_would_have_to_go_for_the_end_of_the_prompt(limit: int) -> None:
    store = CheckpointStore(limit, eviction := Watching())
    run(store, [*DOCUMENT, 1, 2], [20], kv=3)
    assert store.used_bytes == 10 + 20 * 3
    prompt = [*DOCUMENT, *range(200, 220)]
    look(store, prompt)
    wanted = 10 + 3 * (len(prompt) - 20) + 70 - limit
    assert eviction.asked[-1] == (20, max(wanted, PRICED_SHARE * limit) if wanted > 0 else 0.0, 20)
    prompt[0] = 1
    look(store, prompt)  # nothing of it is stored, so that its end takes the keys and values of all of it
    wanted = 10 + 3 * len(prompt) + 70 - limit
    assert eviction.asked[-1] == (0, max(wanted, PRICED_SHARE * limit) if wanted > 0 else 0.0, 0)


def test_a_prompt_without_a_cut_asks_only_whether_memory_is_full() -> None:
    store = CheckpointStore(75, eviction := Watching())
    run(store, [*DOCUMENT, 1, 2], [20], kv=3)
    look(store, [*DOCUMENT, 5, 6])
    assert eviction.asked[-1] == (20, LEAST_NEED, 20)


@pytest.mark.parametrize("passes", range(1, 8))
def test_a_path_has_the_rate_of_those_that_were_passed_as_often(passes: int) -> None:
    store = CheckpointStore(None, eviction := LeastValue())
    eviction.tables.rate = lambda cell: float(cell)  # type: ignore[method-assign]
    for question in range(passes):
        with open_request(store, NoCheckpoints(), np.asarray([*DOCUMENT, question], dtype=np.int32), every(GRID)):
            pass
    found = eviction.terms(store.match(np.asarray(DOCUMENT, dtype=np.int32)).path, 20, 0.0, None)
    assert (found.known_rate, found.new_rate) == (cell_of(passes + 1, 1), cell_of(1, 2))


class Failing(LRU):
    """Cannot say what a checkpoint is worth while it is told to fail."""

    error: BaseException | None = None

    def terms(self, path: Sequence[Any], overlap: int, need: float, resumed: Any) -> Terms:
        if self.error is not None:
            raise self.error
        return super().terms(path, overlap, need, resumed)


@pytest.mark.parametrize("error", [ValueError("of a user's own eviction"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["terms", "cuts"])
def test_a_visit_that_fails_to_begin_holds_nothing(
    error: BaseException, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = type(error)(*error.args)  # each place raises one of its own
    eviction = Failing()
    store = CheckpointStore(None, eviction)
    run(store, DOCUMENT, [2 * GRID], kv=3)
    held = store.used_bytes
    segmenting = every(GRID)
    with monkeypatch.context() as patch:
        if place == "terms":
            patch.setattr(eviction, "error", error)
        else:

            def cuts(*_: Any) -> Any:
                raise error

            patch.setattr(type(segmenting), "cuts", cuts)
        with pytest.raises(type(error)):
            open_request(store, NoCheckpoints(), np.asarray([*DOCUMENT, 7, 8], dtype=np.int32), segmenting)
    store.verify()
    # An interrupt is not told from one that strikes a line earlier, where the books could be half written.
    lost = isinstance(error, KeyboardInterrupt)
    assert not store.ledger.chains.footings and not store.ledger.in_use and store.used_bytes == (0 if lost else held)
    assert not any(item.pins for item in store.stored())
    store.clear()
    assert store.used_bytes == 0


# -- what it takes and gives back -------------------------------------------------------------------------------------


WHOLE = np.asarray([*DOCUMENT, 1, 2], dtype=np.int32)


def test_a_visit_pins_what_it_resumes_from_and_keeps_its_chain() -> None:
    store = CheckpointStore(None, "lru")
    run(store, [*DOCUMENT, 1, 2], [10, 20], kv=3)
    low, deep = store.stored()
    visit = store.open(WHOLE, every(GRID))
    assert visit.checkpoint is deep and (deep.hits, deep.last_used) == (1, store.clock) and low.hits == 0
    assert (deep.pins, low.pins) == (1, 0) and visit.chain == deep.chain() == visit.footing.chain
    assert visit.chain is not visit.footing.chain and [item.holds for item in visit.chain][-1] == 1
    assert (visit.marked, visit.counted, visit.batched) == (set(), 0, False)
    assert visit.tree == store.forest.trees[""].serial and visit.match.known
    store.leave(visit)
    assert deep.pins == 0 and deep.kv is not None and deep.kv.holds == 0
    store.leave(visit)  # once more: nothing is left to give back
    assert deep.pins == 0
    store.verify()
    assert store.open(WHOLE, every(GRID), "other").tree == 0


def test_what_came_up_after_it_was_announced_is_kept_by_the_next_visit() -> None:
    store = CheckpointStore(None, "lru")
    run(store, [*DOCUMENT, 1, 2], [4, 10, 20])
    store.marks.add(WHOLE[:10], "")
    visit = store.open(WHOLE, every(GRID))
    assert visit.marked == {10} and [item.pins for item in store.stored()] == [0, 1, 1]
    store.leave(visit)
    assert [item.pins for item in store.stored()] == [0, 1, 0]
    store.verify()


def test_a_prompt_says_where_its_last_message_begins_and_when_it_came() -> None:
    store = CheckpointStore(None, "lru")
    store.ledger.seconds = lambda: 17.5
    ids = np.asarray([9, 1, 2, 3, 9, 4, 5, 6, 7], dtype=np.int32)
    visit = store.open(ids, Bitwise(CutRule(GRID, (9,))))
    assert visit.prompt.message_start == message_start(ids, (9,)) > 0 and visit.prompt.seconds == 17.5
    store.leave(visit)


@pytest.mark.parametrize("resumed", [0, 10, 14, 20])
def test_a_text_is_visited_again_as_its_prompt_was(resumed: int) -> None:
    """It pins what the prompt resumed from, if that is still there; no age grows."""
    store = CheckpointStore(None, "lru")
    run(store, [*DOCUMENT, 1, 2], [10, 20], kv=3)
    first = store.open(WHOLE, every(GRID))
    store.leave(first)
    clock, hits = store.clock, [item.hits for item in store.stored()]
    store.ledger.seconds = lambda: 21.5
    prompt = replace(first.prompt, ids=np.asarray([*WHOLE, 5, 6, 7], dtype=np.int32))
    again = store.reopen(prompt, "", Before(first.tree, len(WHOLE), resumed))
    assert again is not None and (store.clock, [item.hits for item in store.stored()]) == (clock, hits)
    below = next((item for item in store.stored() if item.position == resumed), None)
    assert again.checkpoint is below and again.counted == len(WHOLE) and again.prompt.seconds == 21.5
    assert [item.pins for item in store.stored()] == [int(item is below) for item in store.stored()]
    assert again.footing.chain == ([] if below is None else below.chain())
    assert again.match.known and again.match.overlap == len(WHOLE) and again.expected is None
    store.leave(again)
    assert not store.ledger.in_use and not store.ledger.chains.footings
    store.verify()


def test_a_text_whose_prompt_was_cleared_is_not_visited_again() -> None:
    store = CheckpointStore(None, "lru")
    run(store, [*DOCUMENT, 1, 2], [10])
    first = store.open(WHOLE, every(GRID))
    store.leave(first)
    before = Before(first.tree, len(WHOLE), 10)
    assert store.reopen(first.prompt, "other", before) is None
    store.clear()
    assert store.reopen(first.prompt, "", before) is None
    run(store, [*DOCUMENT, 1, 2], [10])  # the same text, in another tree
    assert store.reopen(first.prompt, "", before) is None
    assert not store.ledger.chains.footings


def test_an_answer_is_priced_as_what_is_still_to_place() -> None:
    """However few of its prompt's cuts are left."""
    store = CheckpointStore(75, eviction := Watching())
    run(store, [*DOCUMENT, 1, 2], [20], kv=3)
    first = store.open(np.asarray([*DOCUMENT, 5, 6], dtype=np.int32), every(GRID))
    assert eviction.asked[-1] == (20, LEAST_NEED, 20)
    store.leave(first)
    again = store.reopen(first.prompt, "", Before(first.tree, len(WHOLE), 20))
    wanted = 10 + 3 * 2 + 70 - 75
    assert again is not None and eviction.asked[-1] == (20, max(wanted, PRICED_SHARE * 75), 0)
    store.leave(again)


@pytest.mark.parametrize("batched", [True, False])
def test_tokens_that_only_ran_with_others_are_known_as_such(batched: bool) -> None:
    store = CheckpointStore(None, "lru")
    run(store, [*DOCUMENT, 1, 2], [10])

    def served(ids: np.ndarray, batched: bool) -> list[bool]:
        visit = store.open(ids, every(GRID))
        visit.batched = batched
        assert visit.settle()
        store.leave(visit)
        return [node.batched for node in store.match(ids).path]

    longer = np.asarray([*DOCUMENT, *range(500, 510)], dtype=np.int32)
    assert served(longer, batched) == [False, batched]  # the first part ran alone before
    assert served(longer, True) == [False, batched]
    assert served(longer, False) == [False, False] and served(longer, True) == [False, False]


def test_what_was_resumed_from_or_counted_before_did_not_run() -> None:
    store = CheckpointStore(None, "lru")
    text = np.arange(30, dtype=np.int32)
    for length in (10, 20, 30):
        visit = store.open(text[:length], every(GRID))
        visit.batched = True
        visit.settle()
        store.leave(visit)
    path = store.match(text).path
    for node in path:
        node.batched = True
    run(store, text.tolist(), [20])
    for node in path:
        node.batched = True
    visit = store.open(text, every(GRID))  # alone, from 20 on
    assert visit.prompt.resumed == 20 and visit.settle()
    assert [node.batched for node in path] == [True, True, False]
    path[2].batched, visit.counted = True, 30
    assert visit.settle() and path[2].batched
    store.leave(visit)


def test_nothing_is_remembered_of_a_visit_that_was_cleared_or_forked() -> None:
    store = CheckpointStore(None, "lru")
    for how in ("cleared", "forked"):
        visit = store.open(WHOLE, every(GRID))
        store.clear() if how == "cleared" else store.after_fork()
        assert not visit.settle() and store.remembered_tokens == 0
        store.leave(visit)
        store.verify()
