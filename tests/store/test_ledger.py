"""One ledger, verb by verb: what comes and goes, whose budget it takes, what is pinned, and what a fork leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cutting import every
from reference_store import Blob, PledgedBlob

from hf_sparse_cache.errors import UnprovedError
from hf_sparse_cache.planning.lineage import Lineage, Span
from hf_sparse_cache.store import ledger as ledger_module
from hf_sparse_cache.store.audit import audit
from hf_sparse_cache.store.bounds import tightest
from hf_sparse_cache.store.eviction import FIFO, LRU
from hf_sparse_cache.store.forest import Trail
from hf_sparse_cache.store.ledger import Entry, Ledger, Room
from hf_sparse_cache.store.tree import TOKEN_BYTES, Checkpoint
from hf_sparse_cache.store.unit import Unit
from hf_sparse_cache.store.visit import Before, Visit


TEXT = np.arange(100, 140, dtype=np.int32)


def unit_on(ids: np.ndarray, position: int, nbytes: int = 10, kv: int = 0, space: str = "", **of: Any) -> Unit:
    """A unit with all its keys and values in one span, `kv` bytes a token; none for 0."""
    spans = [Span((0, position))] if kv else []
    payloads = {span: Blob(kv * position) for span in spans}
    return Unit(space, ids, Lineage([position]), Blob(nbytes), spans, payloads, **of)


def insert(ledger: Ledger, unit: Unit, **how: bool) -> Entry:
    with ledger.footing(unit.tokens, unit.space) as footing, ledger.lock:
        return ledger.insert(unit, footing, **how)


def put(ledger: Ledger, position: int, nbytes: int = 10, kv: int = 0, space: str = "", **of: Any) -> Checkpoint:
    stored = insert(ledger, unit_on(TEXT, position, nbytes, kv, space, **of)).checkpoint
    assert stored is not None
    audit(ledger)
    return stored


class Asked(FIFO):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def victim(self, incoming: Checkpoint | None, need: int) -> Checkpoint | None:
        told = None if incoming is None else (incoming.position, incoming.held, incoming.share, incoming.refund)
        self.calls.append((told, need))
        return super().victim(incoming, need)

    def passed(self, path: Sequence[Any], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        self.calls.append(([node.end for node in path], overlap, resumed, now))


# -- locks ------------------------------------------------------------------------------------------------------------


class Noting:
    """A lock that knows whether it is held, and lets somebody else do something each time that it is free."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.RLock(), 0
        self.meanwhile: Callable[[], object] | None = None

    def somebody(self) -> None:
        done, self.meanwhile = self.meanwhile, None
        if done is not None:
            done()

    def __enter__(self) -> None:
        if not self.depth:
            self.somebody()
        self.lock.acquire()
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        self.lock.release()
        if not self.depth:
            self.somebody()


class Watched(Ledger):
    """Whoever looks into its books holds its lock."""

    lock: Any
    strict = False
    BOOKS = (
        *("accounts", "chains", "checkpoint_bytes", "checkpoint_count", "clock", "demotions", "eviction", "evictions"),
        *("forest", "in_use", "marks", "pinned", "reserved_bytes", "_account_orders"),
    )

    def __getattribute__(self, name: str) -> Any:
        if name in Watched.BOOKS and self.strict:
            assert self.lock.depth, f"{name} is looked at without the lock"
        return super().__getattribute__(name)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.strict = True
        try:
            yield
        finally:
            self.strict = False


def watched() -> Watched:
    """Two checkpoints, the deeper one with keys and values."""
    ledger = Watched(1000, LRU(), {"ann": 500}, 100_000)
    ledger.lock = Noting()
    put(ledger, 4)
    put(ledger, 10, kv=1)
    return ledger


def take_footing(ledger: Ledger) -> None:
    with ledger.footing(TEXT, "") as footing:
        assert ledger.missing_spans(footing, [Span((0, 10)), Span((10, 20))]) == [(10, 20)]


def take_unit(ledger: Ledger, checkpoint: Checkpoint) -> None:
    with ledger.taken(checkpoint) as unit:
        assert unit is not None


def visit(ledger: Ledger) -> list[Visit]:
    """Its visits, which look without the lock whether they have ended when nobody has them any more."""
    found = Visit.begin(ledger, TEXT, every(2), "")
    assert found.settle()
    found.end()
    return [found]


def visit_again(ledger: Ledger, serial: int) -> list[Visit]:
    first = Visit.begin(ledger, TEXT, every(2), "")
    first.end()
    again = Visit.again(ledger, first.prompt, "", Before(serial, 10, 10))
    assert again is not None
    again.end()
    return [first, again]


TRAILS: list[Trail] = []
VERBS: dict[str, Callable[[Ledger, Checkpoint], object]] = {
    "match": lambda ledger, _: ledger.match(TEXT, ""),
    "departure": lambda ledger, _: ledger.departure(TEXT, "", 1),
    "stored": lambda ledger, _: ledger.stored(),
    "checkpoints": lambda ledger, _: ledger.checkpoints(),
    "payloads": lambda ledger, _: ledger.payloads(),
    "account": lambda ledger, _: ledger.account("ann#1"),
    "tree_bytes": lambda ledger, _: ledger.tree_bytes(""),
    "remember": lambda ledger, _: ledger.remember(TRAILS[0]),
    "resumed": lambda ledger, item: ledger.resumed(item, unit_on(TEXT, 4)),
    "trim": lambda ledger, _: ledger.trim(),
    "footing": lambda ledger, _: take_footing(ledger),
    "take": lambda ledger, item: ledger.take(item),
    "done_with": lambda ledger, item: ledger.done_with(item),
    "evict": lambda ledger, item: ledger.evict(item),
    "lose": lambda ledger, item: ledger.lose(item.state),
    "drop": lambda ledger, _: ledger.drop(""),
    "clear": lambda ledger, _: ledger.clear(""),
    "pin": lambda ledger, item: ledger.pin(item),
    "unpin": lambda ledger, item: (ledger.pin(item), ledger.unpin(item)),
    "taken": lambda ledger, item: take_unit(ledger, item),
    "mark": lambda ledger, _: ledger.mark(TEXT[:4]),
    "keep": lambda ledger, item: ledger.keep(item),
    "audit": lambda ledger, _: audit(ledger),
    "tightest": lambda ledger, _: tightest(ledger, TEXT, 4),
    "a visit": lambda ledger, _: visit(ledger),
    "a second visit": lambda ledger, item: visit_again(ledger, item.node.tree.serial),
}


@pytest.mark.parametrize("verb", VERBS)
def test_whoever_looks_into_the_books_holds_their_lock(verb: str) -> None:
    ledger = watched()
    checkpoint = ledger.stored()[0]
    TRAILS[:] = [Trail(ledger.forest, TEXT, "")]
    with ledger.watching():
        kept = VERBS[verb](ledger, checkpoint)
    assert ledger.lock.depth == 0
    del kept


def test_the_checkpoints_of_a_moment_are_listed_whatever_happens_next() -> None:
    ledger = watched()
    ledger.lock.meanwhile = lambda: setattr(ledger.lock, "meanwhile", ledger.clear)  # once it is free again
    listed = [(space, ids.tolist(), item.position) for space, ids, item in ledger.checkpoints()]
    assert listed == [("", TEXT[:4].tolist(), 4), ("", TEXT[:10].tolist(), 10)] and not ledger.stored()


def test_a_checkpoint_that_goes_before_it_is_taken_is_no_unit() -> None:
    ledger = watched()
    checkpoint = ledger.stored()[0]
    freed: list[bool] = []

    def evict() -> None:
        freed.append(checkpoint.stored)
        ledger.evict(checkpoint)

    ledger.lock.meanwhile = evict
    with ledger.taken(checkpoint) as unit:
        assert unit is None and checkpoint.pins == 0
    assert freed == [True]


def test_an_eviction_on_behalf_of_another_waits_for_the_pin_to_be_seen() -> None:
    """Whether it is pinned, and that it goes, is one step: nobody pins it in between."""
    ledger = watched()
    checkpoint = ledger.stored()[0]
    ledger.lock.meanwhile = lambda: ledger.pin(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint at 4 is pinned \(1\); close its requests first"):
        ledger.evict(checkpoint)
    assert checkpoint.stored


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_what_is_stored_is_listed_by_space_and_with_all_its_payloads() -> None:
    ledger = Ledger(None, FIFO(), max_remembered=None)
    kept = {space: [put(ledger, position, kv=1, space=space) for position in (4, 10)] for space in ("a", "b")}
    assert ledger.stored("b") == kept["b"] and ledger.stored() == kept["a"] + kept["b"] and ledger.stored("c") == []
    for space, ids, item in ledger.checkpoints("b"):
        assert space == "b" and item in kept["b"] and ids.tolist() == TEXT[: item.position].tolist()
    assert [item for _, _, item in ledger.checkpoints()] == ledger.stored()
    expected = [item.state for item in ledger.stored()] + [item.kv.payload for item in ledger.stored() if item.kv]
    assert {*map(id, ledger.payloads())} == {*map(id, expected)} and len(ledger.payloads()) == 8
    assert (ledger.kv_bytes, ledger.used_bytes, ledger.peak_bytes) == (28, 68, 68)
    ledger.evict(kept["a"][1])
    assert (ledger.kv_bytes, ledger.used_bytes, ledger.peak_bytes) == (18, 48, 68)


def test_a_ledger_without_a_bound_given_remembers_nothing() -> None:
    ledger = Ledger(None, FIFO())
    assert ledger.max_remembered == 0
    ledger.remember(Trail(ledger.forest, TEXT, ""))
    assert ledger.forest.nbytes == 0
    free = Ledger(None, FIFO(), max_remembered=None)
    free.remember(Trail(free.forest, TEXT, ""))
    free.trim()
    assert free.forest.tokens == len(TEXT)


def test_what_was_inserted_is_described_and_handed_to_the_eviction() -> None:
    ledger = Ledger(100, order := Asked())
    first = put(ledger, 10, 40, kv=3, hits=2, share=0.25, refund=7.0, final=True)
    assert (first.hits, first.share, first.refund, first.final) == (2, 0.25, 7.0, True)
    assert first.owner is ledger.account("") and first.last_used == ledger.clock and first.held == 70
    second = insert(ledger, unit_on(TEXT[::-1], 4, 20, kv=5, share=0.5, refund=3.0)).checkpoint
    assert order.calls == [((4, 40, 0.5, 3.0), 10)]
    assert ledger.stored() == [second] and not first.stored


def test_what_is_stored_already_is_found_with_the_hits_of_both() -> None:
    ledger = Ledger(None, FIFO())
    first = put(ledger, 10, hits=3)
    for hits, expected in ((2, 3), (5, 5)):
        assert insert(ledger, unit_on(TEXT, 10, hits=hits)) == Entry(first) and first.hits == expected
    assert ledger.checkpoint_count == 1


def test_a_unit_whose_shared_keys_and_values_are_gone_is_not_stored() -> None:
    ledger = Ledger(None, FIFO(), max_remembered=None)
    with ledger.footing(TEXT, "") as footing, ledger.lock:
        spans = [Span((0, 4)), Span((4, 10))]
        unit = Unit("", TEXT, Lineage([4, 10]), Blob(10), spans, {spans[1]: Blob(6)})
        assert ledger.insert(unit, footing) == Entry(None)
    audit(ledger)
    assert ledger.used_bytes == 0 and ledger.forest.tokens == len(TEXT)


@pytest.mark.parametrize("gone", ["cleared", "forked"])
def test_nothing_is_stored_on_a_text_whose_space_is_gone(gone: str) -> None:
    ledger = Ledger(None, FIFO(), max_remembered=None)
    with ledger.footing(TEXT, "a") as footing:
        if gone == "cleared":
            ledger.drop("b")
            assert not footing.ended
            ledger.drop("a")
            assert footing.ended
        else:
            ledger.after_fork()
            assert ledger.missing_spans(footing, [Span((0, 4))]) == [(0, 4)]
        assert ledger.insert(unit_on(TEXT, 4, space="a"), footing) == Entry(None)
        assert not ledger.stored() and ledger.forest.tokens == 0
    assert ledger.missing_spans(footing, []) == []
    audit(ledger)


def test_what_somebody_builds_on_stays_until_he_is_done() -> None:
    ledger = Ledger(None, FIFO(), max_remembered=None)
    with ledger.footing(TEXT, "") as footing:
        stored = ledger.insert(unit_on(TEXT, 10, kv=2), footing).checkpoint
        assert stored is not None
        ledger.evict(stored)
        assert (ledger.checkpoint_bytes, ledger.kv_bytes) == (0, 20)
        assert ledger.missing_spans(footing, [Span((0, 10)), Span((10, 12))]) == [(10, 12)]
        audit(ledger)
    assert ledger.used_bytes == 0 and not ledger.chains.footings
    audit(ledger)


def test_what_is_freed_is_noted_for_a_tier_that_deletes_it() -> None:
    ledger = Ledger(None, FIFO())
    stored = put(ledger, 10, kv=1)
    assert ledger.freed is None
    ledger.freed = freed = []
    payloads = [stored.state, stored.kv and stored.kv.payload]
    ledger.evict(stored)
    assert freed == payloads and ledger.freed is freed and stored.kv is None


# -- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [0, 1])
@pytest.mark.parametrize("budget", ["of all", "of a tenant"])
def test_nothing_leaves_for_what_can_never_fit_beside_what_is_in_use(budget: str, kv: int) -> None:
    """And all that may leave does where that is just enough."""
    ledger = Ledger(60, LRU()) if budget == "of all" else Ledger(1000, LRU(), {"ann": 60})
    space = "x\x1fann"
    other = insert(ledger, unit_on(TEXT[::-1], 4, 20, space=space)).checkpoint
    used = put(ledger, 10, 30 - 10 * kv, kv=kv, space=space)
    assert other is not None
    ledger.pin(used)
    assert insert(ledger, unit_on(TEXT[5:], 10, 31, space=space)) == Entry(None)
    assert other.stored and used.stored and ledger.evictions == 0
    assert insert(ledger, unit_on(TEXT[5:], 10, 30, space=space)).checkpoint is not None
    assert not other.stored and used.stored and ledger.evictions == 1 and ledger.used_bytes == 60
    ledger.unpin(used)
    audit(ledger)


def test_a_budget_that_is_just_met_refuses_nothing() -> None:
    ledger = Ledger(30, FIFO())
    put(ledger, 10, 20)
    assert ledger.make_room(10) == Room(True) and not ledger.over_budget
    put(ledger, 12, 10)
    assert ledger.evictions == 0 and ledger.used_bytes == 30 and not ledger.over_budget
    ledger.max_memory = 29
    assert ledger.over_budget
    ledger.max_memory = None
    assert not ledger.over_budget and ledger.make_room(10**9) == Room(True)


def test_as_many_go_as_have_to_and_the_first_goes_first() -> None:
    ledger = Ledger(40, order := Asked())
    for position in (4, 6, 8, 10):
        put(ledger, position)
    put(ledger, 12, 20)
    assert [item.position for item in ledger.stored()] == [8, 10, 12]
    assert [need for _, need in order.calls] == [20, 10]
    put(ledger, 14, 15)
    assert [item.position for item in ledger.stored()] == [12, 14]
    assert (ledger.evictions, ledger.account("").evictions, ledger.demotions) == (4, 4, 0)


def test_where_all_that_stays_leaves_no_room_nothing_goes() -> None:
    """Room that is kept, pinned states, and each of the keys and values below them once."""
    ledger = Ledger(100, FIFO())
    pinned = [put(ledger, 10, kv=1), put(ledger, 12, kv=1)]
    free = put(ledger, 4, 20)
    for item in pinned:
        ledger.pin(item)
    kept = 10 + 10 + 10 + 12
    assert ledger.used_bytes == kept + 20
    ledger.reserved_bytes = 8
    assert insert(ledger, unit_on(TEXT, 14, 101 - kept - 8)) == Entry(None) and free.stored
    assert insert(ledger, unit_on(TEXT, 14, 100 - kept - 8)).checkpoint is not None and not free.stored
    assert ledger.used_bytes + ledger.reserved_bytes == 100


def test_what_is_pinned_and_lost_takes_no_room() -> None:
    ledger = Ledger(30, FIFO())
    lost = put(ledger, 10, 20)
    ledger.take(lost)
    ledger.lose(lost.state)
    assert not lost.stored and ledger.used_bytes == 0 and ledger.pinned
    assert insert(ledger, unit_on(TEXT, 12, 30)).checkpoint is not None
    ledger.done_with(lost)
    audit(ledger)


def test_what_has_to_leave_for_the_tier_below_is_named_and_pinned() -> None:
    ledger = Ledger(20, order := Asked(), {"ann": 10})
    first = put(ledger, 10)
    second = put(ledger, 10, space="x\x1fann")
    found = insert(ledger, unit_on(TEXT, 12), demotes=True)
    assert found == Entry(None, first) and first.pins == 1 and ledger.in_use == [first] and first.stored
    assert first.node.refused == second.node.refused == 0
    found = insert(ledger, unit_on(TEXT, 12, space="x\x1fann"), demotes=True)  # out of its own budget
    assert found == Entry(None, second) and second.pins == 1 and second.stored
    found = insert(ledger, unit_on(TEXT, 12), demotes=True)  # there is nothing left that could go
    assert found == Entry(None, None) and first.node.refused == 12
    for item in (first, second):
        ledger.done_with(item)
    ledger.evict(first, demoted=True)
    assert (ledger.demotions, ledger.evictions, ledger.account("").evictions) == (1, 0, 0)
    assert [told for told, _ in order.calls] == [(12, 10, 1.0, 0.0)]


def test_the_shallowest_that_was_refused_or_evicted_on_an_edge_is_remembered() -> None:
    ledger = Ledger(10, FIFO(), max_remembered=None)
    node = put(ledger, 10).node
    ledger.pin(ledger.stored()[0])
    for position, refused in ((20, 20), (30, 20), (15, 15)):
        assert insert(ledger, unit_on(TEXT, position)) == Entry(None) and node.refused == refused
    ledger.unpin(ledger.stored()[0])
    for position, lost in ((20, 10), (5, 10), (30, 5)):
        put(ledger, position)
        assert node.lost == lost


def test_the_eviction_is_not_asked_what_is_worth_more_where_it_is_urgent() -> None:
    ledger = Ledger(10, order := Asked())
    put(ledger, 10)
    assert insert(ledger, unit_on(TEXT, 12), urgent=True).checkpoint is not None
    assert insert(ledger, unit_on(TEXT, 14)).checkpoint is not None
    assert [told and told[0] for told, _ in order.calls] == [None, 14]


def test_a_tenant_makes_room_out_of_its_own_budget() -> None:
    ledger = Ledger(100, FIFO(), {"ann": 30})
    other = put(ledger, 10)
    own = [put(ledger, position, space="x\x1fann") for position in (4, 6)]
    assert insert(ledger, unit_on(TEXT, 8, 31, space="x\x1fann")) == Entry(None)
    assert all(item.stored for item in own), "what can never fit sends nobody off"
    put(ledger, 8, 10, space="x\x1fann")  # just full
    assert all(item.stored for item in own)
    put(ledger, 10, 11, space="x\x1fann")
    assert [item.stored for item in (*own, other)] == [False, False, True]
    ledger.take(ledger.stored("x\x1fann")[0])
    put(ledger, 12, 20, space="x\x1fann")
    assert [item.position for item in ledger.stored("x\x1fann")] == [8, 12]
    put(ledger, 14, 40, space="x\x1fbob")
    assert ledger.account("ann").used_bytes == 30 and ledger.account("bob").limit is None
    assert insert(ledger, unit_on(TEXT, 14, 30, space="x\x1fann")) == Entry(None)


def test_within_its_budget_a_tenant_keeps_what_it_resumed_last() -> None:
    ledger = Ledger(None, FIFO(), {"ann": 20})
    own = [put(ledger, position, space="x\x1fann") for position in (4, 6)]
    ledger.resumed(own[0], unit_on(TEXT, 4, space="x\x1fann"))
    put(ledger, 8, space="x\x1fann")
    assert [item.stored for item in own] == [True, False]


# -- accounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "namespace", "payer"),
    [
        ({}, "a#b", "a#b"),
        ({"a": 1}, "a", "a"),
        ({"a": 1}, "a#b", "a"),
        ({"a": 1}, "a#b#c", "a"),
        ({"a": 1, "a#b": 2}, "a#b#c", "a#b"),
        ({"a": 1}, "ab", "ab"),
        ({"a": 1}, "b#a", "b#a"),
        ({"a": 1}, "#a", "#a"),
        ({"a": 1}, "", ""),
        ({"": 1}, "#a", ""),
        ({"": 1}, "a", "a"),
    ],
)
def test_a_namespace_is_paid_for_by_the_longest_name_that_it_continues(
    limits: dict[str, int | None], namespace: str, payer: str
) -> None:
    ledger = Ledger(None, FIFO(), limits)
    assert ledger.account(namespace) is ledger.account(payer)
    assert [name for name in ("", "a", "b", "a#b") if ledger.account(name) is ledger.account(namespace)] == [
        name for name in ("", "a", "b", "a#b") if ledger._payer(name) == payer
    ]
    assert ledger.account(namespace).limit == limits.get(payer)


def test_accounts_are_closed_the_oldest_first_and_only_of_those_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MOST_ACCOUNTS", 4)
    ledger = Ledger(None, FIFO(), {"gone": 50, "paid": 50}, None)
    held = put(ledger, 4, space="x\x1fheld")
    ledger.take(held)
    ledger.clear("x\x1fheld")  # still in use
    ledger.remember(Trail(ledger.forest, TEXT, "x\x1fknown"))
    ledger.account("known"), ledger.account("gone"), ledger.account("left")
    assert [*ledger.accounts] == ["held", "known", "gone", "left"] and len(ledger._account_orders) == 1
    ledger.account("new")
    assert [*ledger.accounts] == ["held", "known", "left", "new"] and not ledger._account_orders
    ledger.account("paid#1")  # with the one who pays for it
    assert [*ledger.accounts] == ["held", "known", "new", "paid", "paid#1"]
    ledger.account("other")  # who pays for somebody stays
    assert [*ledger.accounts] == ["held", "known", "paid", "other"]
    ledger.account("last")
    assert [*ledger.accounts] == ["held", "known", "other", "last"] and not ledger._account_orders
    ledger.done_with(held)
    ledger.account("more")
    assert [*ledger.accounts] == ["known", "other", "last", "more"]


def test_an_account_with_keys_and_values_alone_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MOST_ACCOUNTS", 1)
    ledger = Ledger(None, FIFO(), max_remembered=None)
    with ledger.footing(TEXT, "x\x1fann") as footing:
        stored = ledger.insert(unit_on(TEXT, 10, kv=2, space="x\x1fann"), footing).checkpoint
        assert stored is not None
        ledger.clear()
        assert not stored.stored and ledger.account("ann").kv_bytes == 20
        ledger.account("bob")
        assert [*ledger.accounts] == ["ann", "bob"]
        audit(ledger)


# -- who came by ------------------------------------------------------------------------------------------------------


def test_prompts_are_counted_along_their_path_once() -> None:
    ledger = Ledger(None, FIFO(), max_remembered=None)
    ledger.clock = 5
    ledger.remember(Trail(ledger.forest, TEXT[:10], ""))
    ledger.clock = 7
    path = ledger.remember(Trail(ledger.forest, TEXT[:20], ""), counted=10)  # an answer to it
    assert [(node.end, node.passes, node.generated, node.last_used) for node in path] == [
        (10, 1, False, 7),
        (20, 1, True, 7),
    ]
    ledger.clock = 8
    path = ledger.remember(Trail(ledger.forest, TEXT, ""))
    assert [(node.end, node.passes, node.generated) for node in path] == [
        (10, 2, False),
        (20, 2, True),
        (40, 1, False),
    ]
    ledger.remember(Trail(ledger.forest, TEXT, ""), counted=20)
    assert [(node.passes, node.generated) for node in path] == [(2, False), (2, True), (2, False)]


def test_what_is_brought_up_for_a_request_is_noted() -> None:
    ledger = Ledger(None, order := Asked(), {"ann": 100})
    stored = put(ledger, 10, space="x\x1fann")
    ledger.clock = 3
    ledger.resumed(stored, unit_on(TEXT[:20], 10, space="x\x1fann"))
    assert order.calls == [([40], 20, stored, 4)] and (stored.hits, ledger.clock) == (1, 4)


# -- what must stay ---------------------------------------------------------------------------------------------------


def test_what_is_pinned_twice_is_free_after_two() -> None:
    ledger = Ledger(None, FIFO())
    stored = put(ledger, 10)
    ledger.take(stored), ledger.take(stored)
    ledger.done_with(stored)
    assert stored.pins == 1 and [*ledger.pinned.values()] == [stored] == ledger.in_use
    ledger.done_with(stored)
    assert stored.pins == 0 and not ledger.pinned and not ledger.in_use
    ledger.done_with(stored)  # once too often: nobody has it
    assert stored.pins == 0 and stored.stored
    ledger.pin(stored)
    ledger.drop()
    assert stored.stored and stored.doomed
    ledger.pin(stored)
    ledger.unpin(stored)
    assert stored.stored
    ledger.unpin(stored)
    assert not stored.stored and ledger.evictions == 1
    audit(ledger)


def test_what_is_cleared_and_lost_while_it_is_used_goes_once() -> None:
    ledger = Ledger(None, FIFO())
    stored = put(ledger, 10)
    ledger.take(stored)
    ledger.clear()
    ledger.lose(stored.state)
    ledger.done_with(stored)
    assert (ledger.checkpoint_count, ledger.evictions, ledger.used_bytes) == (0, 1, 0)
    audit(ledger)


@pytest.mark.parametrize("damaged", ["state", "kv"])
def test_a_payload_that_is_lost_takes_all_that_need_it(damaged: str) -> None:
    ledger = Ledger(None, FIFO(), max_remembered=None)
    ledger.mark(TEXT[:4])
    with ledger.footing(TEXT, "") as footing:
        spans = [Span((0, 4)), Span((4, 10))]
        kv = {span: Blob(span.end - span.start) for span in spans}
        first = ledger.insert(Unit("", TEXT, Lineage([4]), Blob(10), spans[:1], kv), footing).checkpoint
        second = ledger.insert(Unit("", TEXT, Lineage([4, 10]), Blob(10), spans, kv), footing).checkpoint
    other = put(ledger, 12)
    assert first is not None and second is not None
    ledger.mark(TEXT[:12])
    ledger.keep(first), ledger.keep(first)
    assert first.pins == other.pins == 1
    ledger.lose(first.state if damaged == "state" else kv[spans[0]])
    assert [item.stored for item in (first, second, other)] == [False, damaged == "state", True]
    assert ledger.marks.kept == [("", other)] and (first.pins, other.pins) == (0, 1)
    audit(ledger)


def test_the_marks_of_one_space_are_taken_back_with_it() -> None:
    ledger = Ledger(None, FIFO(), max_remembered=None)
    kept = {space: put(ledger, 4, space=space) for space in ("a", "b")}
    free = put(ledger, 8, space="b")
    for space in kept:
        ledger.mark(TEXT[:4], space)
    ledger.drop("a")
    assert (kept["a"].stored, kept["b"].stored, kept["b"].pins, free.stored) == (False, True, 1, True)
    assert not kept["b"].doomed and ledger.forest.tokens == 2 * len(TEXT)
    ledger.drop()
    assert not ledger.stored() and not ledger.marks.kept and ledger.forest.tokens == 2 * len(TEXT)
    ledger.clear("a")
    assert [*ledger.forest.trees] == ["b"]
    audit(ledger)


def test_a_mark_is_bounded_by_what_may_be_remembered_beside_others() -> None:
    ledger = Ledger(None, FIFO(), max_remembered=TOKEN_BYTES * 20)
    ledger.mark(TEXT[:12])
    ledger.mark(TEXT[:8])  # just fits
    for _ in range(2):
        with pytest.raises(ValueError, match="a mark of 1 tokens, beside 20 of other marks"):
            ledger.mark(TEXT[:1])
        ledger.mark(TEXT[:12])  # known: takes nothing
    with pytest.raises(ValueError, match="beside 20 of other marks"):
        ledger.mark(TEXT[:12], "b")
    assert ledger.marks.tokens == 20
    free = Ledger(None, FIFO(), max_remembered=None)
    free.mark(TEXT)
    assert free.marks.tokens == len(TEXT)


def test_a_mark_keeps_what_is_stored_at_its_very_end() -> None:
    ledger = Ledger(None, FIFO(), max_remembered=None)
    stored = {position: put(ledger, position) for position in (4, 6, 8)}
    other = put(ledger, 6, space="b")
    ledger.mark(TEXT[:6])
    assert [item.pins for item in (*stored.values(), other)] == [0, 1, 0, 0]
    assert ledger.marks.kept == [("", stored[6])]


@pytest.mark.parametrize(("position", "kept"), [(4, 60), (10, 50), (12, 60), (20, 40), (30, 40)])
def test_what_stays_beside_a_checkpoint_is_what_marks_keep_and_it_does_not_share(position: int, kept: int) -> None:
    """Marks keep the states at 4 of another text and at 20, with 20 bytes of keys and values each; that at 10 stays
    where it is resumed from.
    """
    ledger, other = Ledger(1000, LRU(), {}, 100_000), np.arange(200, 240, dtype=np.int32)
    insert(ledger, unit_on(other, 4, kv=5))
    put(ledger, 10, kv=1)
    spans = [Span((0, 10)), Span((10, 20))]
    insert(ledger, Unit("", TEXT, Lineage([10, 20]), Blob(10), spans, {span: Blob(10) for span in spans}))
    ledger.mark(other[:4])
    ledger.mark(TEXT[:20])
    bound = tightest(ledger, TEXT, position)
    assert bound is not None and (bound.limit, bound.used, bound.kept) == (1000, 70, kept)


def test_a_unit_is_pinned_while_it_is_copied() -> None:
    ledger = Ledger(None, FIFO(), max_remembered=None)
    stored = put(ledger, 10, kv=1, hits=4)
    with ledger.taken(stored) as unit:
        assert unit is not None and (unit.position, unit.hits, unit.tokens.tolist()) == (10, 4, TEXT[:10].tolist())
        assert stored.pins == 1 and ledger.in_use == [stored]
        with pytest.raises(ValueError, match=r"checkpoint at 10 is pinned \(1\)"):
            ledger.evict(stored)
    assert stored.pins == 0 and not ledger.in_use
    with pytest.raises(KeyError), ledger.taken(stored):
        raise KeyError
    assert stored.pins == 0
    ledger.evict(stored)
    with ledger.taken(stored) as unit:
        assert unit is None and stored.pins == 0


def test_a_unit_that_is_not_what_was_written_is_none() -> None:
    def break_it() -> None:
        raise UnprovedError("damaged")

    ledger = Ledger(None, FIFO(), max_remembered=None)
    stored = put(ledger, 10)
    stored.state = PledgedBlob(10).pledged(break_it)
    with ledger.taken(stored) as unit:
        assert unit is None and stored.pins == 1  # until whoever has it is done
    assert stored.pins == 0


def test_a_child_process_begins_with_nothing_and_takes_nothing_back() -> None:
    ledger = Ledger(100, LRU(), {"ann": 50}, None)
    stored = put(ledger, 10, space="x\x1fann", kv=1)
    ledger.mark(TEXT[:10], "x\x1fann")
    ledger.take(stored)
    before, lock, clock = stored.pins, ledger.lock, ledger.seconds
    for _ in range(2):
        ledger.reserved_bytes = ledger.clock = 3
        ledger.after_fork()
        assert ledger.lock is not lock and ledger.seconds is clock
        assert type(ledger.eviction) is LRU and ledger.eviction.known() == []
        counts = (ledger.clock, ledger.evictions, ledger.demotions, ledger.checkpoint_count, ledger.checkpoint_bytes)
        assert counts == (0,) * 5 and ledger.reserved_bytes == ledger.peak_bytes == ledger.used_bytes == 0
        assert not (ledger.accounts or ledger.pinned or ledger.in_use or ledger.marks.kept or ledger.marks.tokens)
        assert not ledger.forest.trees and not ledger.chains.footings and not ledger._account_orders
        ledger.done_with(stored)
        assert stored.pins == before
        ledger.unpin(stored)  # of the parent's: it is another's count by now
        assert stored.stored and not ledger.pinned
        stored.pins = before
        ledger.evict(put(ledger, 4, space="x\x1fann"))
