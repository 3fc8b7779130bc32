"""What a request tells the policy and the eviction about its prompt, number by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cutting import every
from prompting import GRID, run

from hf_sparse_cache.planning.policies import NoCheckpoints
from hf_sparse_cache.planning.policy import Prompt, Terms
from hf_sparse_cache.request import open_request
from hf_sparse_cache.store.eviction import LRU
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.survival import cell_of
from hf_sparse_cache.store.value import LeastValue
from hf_sparse_cache.store.visit import LEAST_NEED, PRICED_SHARE


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
