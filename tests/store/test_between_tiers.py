"""What moves between memory, host and disk, who is asked under which lock, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cutting import Anywhere, at, every
from disks import disk_of, serve
from prompting import begin, run
from reference_store import Blob

from hf_sparse_cache import CheckpointStore, forks
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store import store as stores
from hf_sparse_cache.store.audit import WrongBooksError
from hf_sparse_cache.store.evictions import make_eviction
from hf_sparse_cache.store.host import HostTier
from hf_sparse_cache.store.tier import Tier
from hf_sparse_cache.store.tree import Node
from hf_sparse_cache.store.unit import Unit


def ids(first: int, length: int = 12) -> list[int]:
    return list(range(first, first + length))


def tokens(first: int, length: int = 12) -> np.ndarray:
    return np.asarray(ids(first, length), dtype=np.int32)


def filled(max_memory: int | None = None, **options: Any) -> CheckpointStore:
    """Three prompts with a checkpoint of 10 bytes each."""
    store = CheckpointStore(max_memory, "lru", **options)
    for first in (0, 100, 200):
        run(store, ids(first), [4])
    return store


def kept_in(tier: Any) -> list[int]:
    return sorted(int(own[0]) for _, own, _ in tier.checkpoints())


def owned(tier: Any) -> bool:
    return bool(tier.lock._is_owned())


def watch(monkeypatch: pytest.MonkeyPatch, thing: Any, name: str, tier: Any, seen: list[bool]) -> None:
    """Notes at each call whether the lock of a tier is held."""
    own = getattr(thing, name)
    monkeypatch.setattr(thing, name, lambda *given, **named: seen.append(owned(tier)) or own(*given, **named))


# -- the budget -------------------------------------------------------------------------------------------------------


def test_a_smaller_budget_sends_off_what_no_longer_fits(caplog: pytest.LogCaptureFixture) -> None:
    store = filled()
    store.resize("20")
    assert (store.max_memory, store.used_bytes, kept_in(store)) == (20, 20, [100, 200]) and not caplog.records
    store.resize(None)
    assert store.max_memory is None and len(store) == 2
    below = filled(30, host_memory=1000)
    below.resize(10)
    assert (
        kept_in(below) == [200] and kept_in(below.below) == [0, 100] and (below.evictions, below.demotions) == (0, 2)
    )
    below.verify()


def test_a_budget_below_what_is_kept_is_said_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(100, "lru")
    run(store, ids(0), [4])
    store.mark(tokens(0, 4))
    store.resize("10")
    assert not caplog.records
    store.resize("9")
    assert len(store) == 1 and "max_memory='9' is less than the 10 bytes that marks and open" in caplog.text
    assert "take the marks back with clear()" in caplog.text


def test_what_was_in_use_goes_when_the_request_ends() -> None:
    for options, below in (({}, 0), ({"host_memory": 1000}, 3)):
        store = filled(30, **options)
        with begin(store, ids(0)) as request:
            assert request.resumed_tokens == 4
            store.resize(0)
            assert kept_in(store) == [0]
        assert len(store) == 0 and len(store.tiers[-1]) == below
        store.verify()
        store.settle()


def test_a_model_that_is_short_of_memory_gets_what_nobody_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, below in (({}, None), ({"host_memory": 1000}, [100, 200])):
        store = filled(100, **options)
        seen: list[bool] = []
        for name in ("take", "evict", "done_with"):
            watch(monkeypatch, store.ledger, name, store, seen)
        with begin(store, ids(0)):
            seen.clear()
            assert store.give_back() == 20 and kept_in(store) == [0] and all(seen) and seen
        assert store.below is None if below is None else kept_in(store.below) == below
        assert store.give_back() == 10 and len(store) == 0 and store.give_back() == 0
        assert (store.evictions, store.demotions) == ((3, 0) if below is None else (0, 3))
        store.verify()


def test_what_left_memory_while_it_was_looked_through_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(100)
    listed = store.stored()
    store.evict(listed[1])
    monkeypatch.setattr(store.tiers[0], "stored", lambda: listed)
    assert store.give_back() == 20 and len(store) == 0


# -- what is told of a prompt before it is opened ---------------------------------------------------------------------


def test_how_far_the_tiers_below_would_resume_is_told_without_moving_anything() -> None:
    store = CheckpointStore(10, "lru", host_memory=1000)
    own = ids(0, 20)
    run(store, own, [4, 8])
    run(store, ids(100), [4])
    assert store.below is not None and len(store.below) == 2
    grid, whole = every(2), np.asarray(own, dtype=np.int32)
    expected = grid.expected(grid.cuts(whole), len(whole))
    assert store.reach(whole, expected) == (8, 8)
    assert store.reach(whole[:7], expected) == (4, 7) and store.reach(whole, expected, "other") == (0, 0)
    assert store.reach(tokens(500), None) == (0, 0) and store.reach(tokens(100), expected) == (0, 0)
    assert CheckpointStore(10, "lru").reach(whole, expected) == (0, 0)
    told = store.foretell(whole, grid)
    assert told.stored == 8 and told.ids is whole and told.cuts.tolist() == grid.cuts(whole).tolist()
    assert store.foretell(tokens(100), grid).stored == 4 and store.foretell(tokens(500), grid).stored == 0
    assert kept_in(store) == [100] and len(store.below) == 2


def test_a_prompt_is_foretold_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = filled(), []
    watch(monkeypatch, store.marks, "lengths", store, seen)
    watch(monkeypatch, store.ledger, "match", store, seen)
    store.mark(tokens(0, 6))
    seen.clear()
    told = store.foretell(tokens(0), every(2))
    assert told.stored == 4 and list(told.marked) == [6] and seen == [True, True]


def test_states_of_other_cuts_are_told_by_the_deepest_of_them() -> None:
    store = CheckpointStore(10, "lru", host_memory=1000)
    run(store, ids(0, 20), [4, 8])
    run(store, ids(100), [4])
    whole = tokens(0, 20)
    assert store.cut_otherwise(whole, Lineage([3, 20])) == 8
    assert store.cut_otherwise(whole, every(2).expected(every(2).cuts(whole), 20)) == 0
    assert store.cut_otherwise(whole, None) == store.cut_otherwise(tokens(500), Lineage([3, 12])) == 0
    assert store.cut_otherwise(whole[:10], Lineage([3, 10])) == 8
    assert store.cut_otherwise(whole[:9], Lineage([3, 9])) == 4  # a suffix has two tokens at least
    assert store.cut_otherwise(whole, Lineage([3, 20]), "other") == 0


# -- up ---------------------------------------------------------------------------------------------------------------


def test_tiers_are_asked_under_their_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(10, host_memory=1000)
    seen: list[bool] = []
    for tier in store.tiers:
        watch(monkeypatch, tier, "match", tier, seen)
    own, looked = Node.path_tokens, []
    monkeypatch.setattr(
        Node, "path_tokens", lambda node: looked.append(any(owned(tier) for tier in store.tiers)) or own(node)
    )
    store.lift(tokens(0), None)
    assert seen == [True, True] and kept_in(store) == [0] and all(looked)
    assert store.below is not None
    (checkpoint,) = (item for _, own, item in store.below.checkpoints() if own[0] == 100)
    looked.clear()
    assert store.bring_up(store.below, checkpoint) and looked and all(looked) and kept_in(store) == [100]


def test_what_is_as_deep_in_memory_is_not_brought_up(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(100, "lru", host_memory=1000)
    assert store.below is not None
    run(store, ids(0), [4])
    store.below.put(Unit("", tokens(0), Lineage([2, 4]), Blob(10, "low", True)), urgent=True)
    monkeypatch.setattr(store, "bring_up", lambda *given: pytest.fail("there is nothing to gain"))
    store.lift(tokens(0), None)
    assert len(store.below) == 1


def test_a_lost_checkpoint_gives_way_to_the_next_best(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(10, "lru", host_memory=1000)
    run(store, ids(0, 20), [4, 8])
    run(store, ids(100), [4])
    assert store.below is not None
    own, asked = store.below.fetch, []

    def fetch(unit: Unit, spans: Any) -> Unit | None:
        asked.append(unit.position)
        return None if unit.position == 8 else own(unit, spans)

    monkeypatch.setattr(store.below, "fetch", fetch)
    with begin(store, ids(0, 20)) as request:
        assert request.resumed_tokens == 4 and asked == [8, 4]


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyError("a fault")])
def test_a_checkpoint_that_there_is_no_memory_for_stays_where_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    store = filled(10, host_memory=1000)
    assert store.below is not None

    def fetch(unit: Unit, spans: Any) -> Unit:
        raise error

    monkeypatch.setattr(store.below, "fetch", fetch)
    if isinstance(error, KeyError):
        with pytest.raises(KeyError), begin(store, ids(0)):
            pass
    else:
        with begin(store, ids(0)) as request:
            assert request.resumed_tokens == 0
        assert "could not be brought up from the host tier: no room" in caplog.text
    assert kept_in(store.below) == [0, 100] and not any(item.pins for item in store.below.stored())
    store.verify()


def test_a_checkpoint_that_finds_no_room_stays_below_and_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(10, "lru", host_memory=1000)
    assert store.below is not None
    store.below.put(Unit("", tokens(0), Lineage([2, 4]), Blob(11, "large", True)), urgent=True)
    told: list[str] = []
    monkeypatch.setattr(store.below, "brought_up", lambda checkpoint: told.append("brought up"))
    monkeypatch.setattr(store.below, "tidy", lambda: told.append("tidied"))
    (checkpoint,) = store.below.stored()
    assert store.bring_up(store.below, checkpoint) and told == ["tidied"] and len(store) == 0
    assert (checkpoint.hits, store.below.ledger.clock) == (1, 1)
    store.resize(11)
    assert store.bring_up(store.below, checkpoint) and told == ["tidied", "brought up", "tidied"] and len(store) == 1
    store.below.ledger.evict(checkpoint)
    assert not store.bring_up(store.below, checkpoint, tokens(0), "") and told[-1] == "tidied" and len(told) == 3


def test_it_comes_up_on_the_text_and_in_the_space_that_are_asked_for() -> None:
    for space in ("", "other"):
        store = filled(10, host_memory=1000)
        assert store.below is not None
        (checkpoint,) = (item for _, own, item in store.below.checkpoints() if own[0] == 0)
        assert store.bring_up(store.below, checkpoint, tokens(0, 9), space)
        assert store.match(tokens(0), space).overlap == (12 if space == "" else 9)
        assert [(found, own.tolist()) for found, own, _ in store.checkpoints()] == [(space, ids(0, 4))]


# -- down -------------------------------------------------------------------------------------------------------------


def test_a_victim_is_looked_at_and_leaves_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = filled(30, host_memory=1000), []
    watch(monkeypatch, stores, "unit_of", store, seen)
    for name in ("done_with", "evict"):
        watch(monkeypatch, store.ledger, name, store, seen)
    run(store, ids(300), [4])
    assert seen == [True] * 3 and kept_in(store.below) == [0] and not any(item.pins for item in store.stored())


def test_the_first_tier_below_that_takes_a_victim_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(10, "lru", host_memory=1000)
    store.tiers.append(HostTier(1000))
    asked: list[int] = []
    for number, takes in ((1, False), (2, True)):
        own = store.tiers[number].accept
        monkeypatch.setattr(
            store.tiers[number],
            "accept",
            lambda unit, demote, number=number, takes=takes, own=own: (
                asked.append(number) or (own(unit, demote) if takes else False)
            ),
        )
    run(store, ids(0), [4]), run(store, ids(100), [4])
    assert asked == [1, 2] and [kept_in(tier) for tier in store.tiers] == [[100], [], [0]]
    assert (store.evictions, store.demotions) == (0, 1)
    monkeypatch.setattr(store.tiers[2], "accept", lambda unit, demote: False)
    run(store, ids(200), [4])
    assert (store.evictions, store.demotions, kept_in(store)) == (1, 1, [200])
    store.verify()


def test_each_tier_sends_its_victims_to_those_below_it() -> None:
    store = CheckpointStore(10, "lru", host_memory=10)
    for first in (0, 100, 200, 300):
        run(store, ids(first), [4])
    assert [kept_in(tier) for tier in store.tiers] == [[300], [200]]
    assert [(tier.evictions, tier.demotions) for tier in store.tiers] == [(0, 3), (2, 0)]
    assert store._demotion(store.tiers[-1]) is None and store.below is store.tiers[1]


def test_a_tier_that_fails_leaves_no_victim_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(30, host_memory=1000)
    assert store.below is not None

    def accept(unit: Unit, demote: Any) -> bool:
        raise KeyError("a fault")

    monkeypatch.setattr(store.below, "accept", accept)
    with pytest.raises(KeyError):
        run(store, ids(300), [4])
    assert not any(item.pins for item in store.stored()) and store._journeys == [] and store.evictions == 1


def test_a_victim_that_a_request_resumes_from_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(30, host_memory=1000)
    assert store.below is not None
    own, opened = store.below.accept, []

    def accept(unit: Unit, demote: Any) -> bool:
        opened.append(begin(store, ids(0)))
        return own(unit, demote)

    monkeypatch.setattr(store.below, "accept", accept)
    store._demotion(store.tiers[0])
    (victim,) = (item for _, own_ids, item in store.checkpoints() if own_ids[0] == 0)
    store.ledger.take(victim)
    store._demotion(store.tiers[0])(victim)  # type: ignore[misc]
    assert victim.stored and opened[0].resumed_tokens == 4 and store.demotions == 0
    opened[0].close()
    assert not victim.pins


@pytest.mark.parametrize("how", ["clear", "drop"])
@pytest.mark.parametrize(("space", "comes_back"), [("", False), ("other", True), (None, False)])
def test_what_is_forgotten_on_its_way_down_does_not_arrive(
    monkeypatch: pytest.MonkeyPatch, how: str, space: str | None, comes_back: bool
) -> None:
    store = filled(30, host_memory=1000)
    assert store.below is not None
    own, went = store.below.accept, []

    def accept(unit: Unit, demote: Any) -> bool:
        if not went:
            went.append(len(store._journeys))
            if how == "drop" and space is None:
                store._forget(None, lambda tier, space: tier.drop(space))
            else:
                getattr(store, how)(space)
        return own(unit, demote)

    monkeypatch.setattr(store.below, "accept", accept)
    run(store, ids(300), [4])
    assert went == [1] and store._journeys == []
    assert kept_in(store.below) == ([0] if comes_back else [])
    store.verify()


def test_journeys_are_noted_under_the_lock_and_a_fork_forgets_them() -> None:
    store = filled(30, host_memory=1000)

    class Noted(list[Any]):
        def append(self, item: Any) -> None:
            assert owned(store)
            super().append(item)

        def remove(self, item: Any) -> None:
            assert owned(store)
            super().remove(item)

        def __iter__(self) -> Any:
            assert owned(store)
            return super().__iter__()

    store._journeys = Noted()
    run(store, ids(300), [4])
    store.clear("other")
    with store._journey("", []):
        assert len(store._journeys) == 1
        store._journeys.clear()  # as after a fork
    assert len(store._journeys) == 0 and kept_in(store) == [100, 200, 300]


# -- all tiers at once ------------------------------------------------------------------------------------------------


def test_every_tier_is_told_how_to_read_and_what_to_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(10, host_memory=1000)
    told: list[Any] = []
    for tier in store.tiers:
        monkeypatch.setattr(tier, "expect", lambda space, like, tier=tier: told.append((tier.name, space, like)))
    store.read_with(Blob.from_bytes)
    store.expect("s", 7)  # type: ignore[arg-type]
    assert [tier.reader for tier in store.tiers] == [Blob.from_bytes] * 2
    assert told == [("memory", "s", 7), ("host", "s", 7)]


@pytest.mark.parametrize("number", [0, 1])
def test_wrong_books_are_found_in_every_tier_and_say_which(number: int) -> None:
    store = filled(10, host_memory=1000)
    store.verify()
    store.tiers[number].ledger.checkpoint_bytes += 1
    with pytest.raises(WrongBooksError, match=f"^{store.tiers[number].name}: "):
        store.verify()


def test_a_clear_and_a_drop_reach_every_tier() -> None:
    for call, remembered in ((CheckpointStore.clear, 0), (CheckpointStore.drop, 36)):
        store = filled(10, host_memory=1000)
        call(store, "other")
        assert [len(tier) for tier in store.tiers] == [1, 2]
        call(store, "")
        assert [len(tier) for tier in store.tiers] == [0, 0] and store.remembered_tokens == remembered
    store = filled(10, host_memory=1000)
    store.clear()
    assert [len(tier) for tier in store.tiers] == [0, 0]


def test_who_waits_for_a_prompt_is_told_that_it_was_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    store, told = filled(), []
    monkeypatch.setattr(store.promises, "forget", told.append)
    store.clear(), store.clear("a"), store.drop("b")
    assert told == [None, "a", "b"]


def test_a_flush_writes_what_only_memory_holds_and_a_close_gives_the_disk_back(opened: Any, tmp_path: Path) -> None:
    for flush, written in ((None, 3), (True, 3), (False, 0)):
        store = opened(max_memory=1000)
        store.clear()
        for first in (3, 1, 2):
            serve(store, first)
        disk = disk_of(store)
        assert store.outlives_process and len(disk) == 0
        store.close() if flush is None else store.close(flush=flush)
        assert [tier.name for tier in store.tiers] == ["memory"] and not store.outlives_process and len(store) == 3
        assert store.below is None and len(disk) == written and disk._lock_file is None
        if written:
            assert [int(own[0]) for _, own, _ in disk.checkpoints()] == [3, 1, 2]
        store.close()
    store = CheckpointStore(1000, "lru", host_memory=1000)
    run(store, ids(0), [4])
    store.flush()  # host memory is no place that anything is kept in
    store.close()
    assert len(store.tiers) == 2 and store.below is not None and len(store.below) == 0


def test_a_child_process_begins_with_nothing(opened: Any) -> None:
    store = opened(max_memory=1000)
    assert store in forks._known
    serve(store, 1)
    tiers, disk = store.tiers, disk_of(store)
    promises, journey = store.promises.changed, store._journeys
    journey.append("on its way")
    lock = store.lock
    store.after_fork()
    assert [tier.name for tier in store.tiers] == ["memory"] and len(store) == 0 and len(disk) == 0
    assert store._journeys == [] and store.promises.changed is not promises and store.lock is not lock
    assert disk._lock_file is None
    store.tiers = tiers


# -- how a store is made ----------------------------------------------------------------------------------------------


def test_a_store_says_what_it_holds() -> None:
    store = filled(4096)
    assert repr(store) == "CheckpointStore(3 checkpoints, 30 of 4,096 bytes)"
    assert repr(CheckpointStore(None)) == "CheckpointStore(0 checkpoints, 0 of no limit bytes)"
    assert (store.clock, store.peak_bytes, store.checkpoint_bytes, store.kv_bytes) == (3, 30, 30, 0)
    assert store.account("").used_bytes == 30 and set(store.accounts) == {""} and store.marks is store.ledger.marks
    assert not store.outlives_process and store.below is None and len(store) == 3
    assert (store.used_bytes, store.reserved_bytes, store.remembered_tokens) == (30, 0, 36)
    assert store.tree_bytes == store.forest.nbytes > 36 * 4 and store.eviction is store.ledger.eviction


def test_budgets_of_a_store_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore()
    assert (store.max_memory, store.ledger.max_remembered, store.shared) == (2**31, 2**27, None)
    assert type(store.eviction) is type(make_eviction("learned"))
    assert CheckpointStore(max_remembered=None).ledger.max_remembered is None
    assert CheckpointStore(max_remembered=1).ledger.max_remembered == 1
    assert CheckpointStore(host_memory="1KiB").tiers[1].max_memory == 1024
    assert stores._limits({"a": "1KiB", "": 7}) == {"a": 1024, "": 7}
    for wrong, named in (([("a", 1)], "namespace_memory is .*: give sizes by name"), ({3: 1}, "a name in namespace")):
        with pytest.raises(ValueError, match=named):
            CheckpointStore(namespace_memory=wrong)
    with pytest.raises(ValueError, match=r"namespace_memory\['a'\]="):
        CheckpointStore(namespace_memory={"a": "much"})
    with pytest.raises(ValueError, match="host_memory="):
        CheckpointStore(host_memory="much")
    with pytest.raises(ValueError, match="eviction is 7: give a name such as 'learned', or an Eviction"):
        CheckpointStore(eviction=7)  # type: ignore[arg-type]
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    assert stores.default_folder() == tmp_path / "home" / "sparse_cache"
    with_disk = CheckpointStore(disk_memory="1MiB")
    assert (disk_of(with_disk).folder, disk_of(with_disk).max_memory) == (tmp_path / "home" / "sparse_cache", 2**20)
    with_disk.close()
    monkeypatch.setenv("HOME", str(tmp_path / "own"))
    both = CheckpointStore(host_memory=10, disk_memory=10**6, disk_dir="~/tier")
    assert [tier.name for tier in both.tiers] == ["memory", "host", "disk"]
    assert disk_of(both).folder == tmp_path / "own" / "tier"
    both.close()


# -- one tier ---------------------------------------------------------------------------------------------------------


def test_a_tier_changes_and_makes_room_under_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = filled(30), []
    tier: Tier = store.tiers[0]
    for name in ("make_room", "insert", "keep"):
        watch(monkeypatch, tier.ledger, name, tier, seen)
    tier.put(Unit("", tokens(0, 8), Lineage([2, 4, 6]), Blob(10, "x")), keep=True)
    assert seen and all(seen) and len(tier) == 3
    seen.clear()
    tier.shrink()
    assert seen == [True]


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_kept_is_as_urgent_as_what_a_request_waits_for(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    store = CheckpointStore(30, "lru")
    tier, asked = store.tiers[0], []
    own = tier.ledger.insert
    monkeypatch.setattr(
        tier.ledger, "insert", lambda *given, **named: asked.append(dict(named)) or own(*given, **named)
    )
    for urgent in (False, True):
        unit = Unit("", tokens(100 * urgent, 8), Lineage([2, 4]), Blob(10, "x"))
        assert store.put(unit, urgent=urgent, keep=keep) is not None
    assert asked == [{"urgent": keep, "demotes": False}, {"urgent": True, "demotes": False}]
    assert store.put(Unit("", tokens(0, 8), Lineage([2, 6]), Blob(31, "x")), urgent=True, keep=keep) is None


def test_units_come_in_the_order_of_use_and_pinned() -> None:
    store = filled(100)
    run(store, ids(0), [])
    for unit in (units := store.tiers[0].units()):
        assert [item.pins > 0 for _, own, item in store.checkpoints() if own[0] == unit.tokens[0]] == [True]
        if unit.tokens[0] == 100:
            break
    assert [int(unit.tokens[0]) for unit in units] == [200, 0]
    assert not any(item.pins for item in store.stored())
    assert [int(unit.tokens[0]) for unit in store.tiers[0].units("")] == [100, 200, 0]
    assert list(store.tiers[0].units("other")) == []
    going = store.tiers[0].units()
    assert next(going).tokens[0] == 100
    (gone,) = (item for _, own, item in store.checkpoints() if own[0] == 200)
    store.evict(gone)
    assert [int(unit.tokens[0]) for unit in going] == [0]


def test_a_warning_of_a_kind_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    tier = HostTier(None)
    for kind, message in (("a", "first"), ("a", "second"), ("b", "third")):
        tier.warn(kind, message)
    assert [entry.getMessage().partition(".")[0] for entry in caplog.records] == ["first", "third"]


# -- host memory ------------------------------------------------------------------------------------------------------


class Refusing(Blob):
    """A payload that cannot be moved."""

    error: Exception = MemoryError("no pinned memory")

    def moved_to(self, tier: str) -> Blob:
        raise self.error


def unit(state: Blob, kv: Callable[[], Blob] | None = None) -> Unit:
    lineage = Lineage([2, 4])
    spans = lineage.spans(0, [2, 4]) if kv else ()
    return Unit("", tokens(0), lineage, state, spans, {span: kv() for span in spans} if kv else {})


def test_host_memory_takes_what_lives_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    tier = HostTier(1000)
    assert tier.accept(unit(Blob(10, "s"), lambda: Blob(5, "k")))
    assert tier.used_bytes == 20
    (stored,) = tier.stored()
    assert stored.state.on_host and all(segment.payload.on_host for segment in stored.chain())
    assert tier.accept(unit(Blob(10, "s"), lambda: Blob(5, "k"))) and len(tier) == 1  # it is there
    with tier.ledger.taken(stored) as found:
        assert found is not None
        spans = list(found.spans)
        back = tier.fetch(found, spans[1:])
        assert back is not None and not back.state.on_host and list(back.kv) == spans[1:]
        assert not any(blob.on_host for blob in back.kv.values())
        tier.brought_up(stored)
        assert stored.stored  # somebody else uses it
    tier.brought_up(stored)
    assert not stored.stored and (tier.evictions, tier.demotions) == (0, 1)
    tier.brought_up(stored)
    assert not HostTier(5).accept(unit(Blob(10, "s")))


def test_host_memory_has_no_use_for_what_lives_there() -> None:
    assert not HostTier(1000).accept(unit(Blob(10, "s", True), lambda: Blob(5, "k")))
    assert not HostTier(1000).accept(unit(Blob(0, "s", True), lambda: Blob(5, "k", True)))
    assert HostTier(1000).accept(unit(Blob(0, "s", True), lambda: Blob(5, "k")))
    assert HostTier(1000).accept(unit(Blob(0, "s", True)))


def test_a_state_that_cannot_be_moved_is_let_go_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    tier = HostTier(1000)
    for given in (unit(Refusing(10, "s")), unit(Blob(10, "s"), lambda: Refusing(5, "k"))):
        assert not tier.accept(given)
    assert [entry.getMessage()[:65] for entry in caplog.records] == [
        "A state could not be moved to the host tier: no pinned memory. Re"
    ]
    fault = Refusing(10, "s")
    fault.error = KeyError("a fault")
    with pytest.raises(KeyError):
        tier.accept(unit(fault))


def test_memory_is_tidied_after_a_unit_came(monkeypatch: pytest.MonkeyPatch) -> None:
    tier, told = HostTier(1000), []
    tier.ledger.max_remembered = 1
    monkeypatch.setattr(tier, "tidy", lambda: told.append(owned(tier)))
    assert tier.accept(unit(Blob(10, "s"))) and told == [False]
    monkeypatch.undo()
    monkeypatch.setattr(tier.ledger, "trim", lambda: told.append(True))
    tier.tidy()
    assert told == [False, True]


def test_any_lineage_is_brought_up_for_whom_any_will_do() -> None:
    store = CheckpointStore(100, "lru", host_memory=1000)
    assert store.below is not None
    store.below.put(Unit("", tokens(0), Lineage([3, 4]), Blob(10, "x", True)), urgent=True)
    for segmenting, resumed in ((at(2, 4), 0), (Anywhere(CutRule(1), (2, 4)), 4)):
        visit = store.open(tokens(0), segmenting)
        assert len(store) == (resumed > 0)
        store.leave(visit)
