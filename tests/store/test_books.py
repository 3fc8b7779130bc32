"""The books of the store: every count is found again, planted faults are noticed, and memory is given back."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cutting import Anywhere, At, every
from hypothesis import given, settings
from hypothesis import strategies as st
from prompting import begin, run
from reference_store import Blob

from benchmarks.bench_deciding import held_bytes
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.lineage import Span
from hf_sparse_cache.planning.policies import NoCheckpoints, make_policy
from hf_sparse_cache.request import open_request
from hf_sparse_cache.store.audit import WrongBooksError
from hf_sparse_cache.store.bounds import Bound
from hf_sparse_cache.store.forest import Forest
from hf_sparse_cache.store.ledger import MOST_ACCOUNTS
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.tree import Checkpoint, KVSegment


# -- verify finds every fault -----------------------------------------------------------------------------------------


def filled(eviction: str = "learned") -> CheckpointStore:
    """Two prompts that branch, in memory with KV, one of them under an open request."""
    store = CheckpointStore(1000, eviction)
    run(store, list(range(12)), [4, 10], kv=1)
    run(store, [*range(6), *range(50, 60)], [12], kv=1)
    store.mark(np.arange(4, dtype=np.int32))
    return store


def deepest(store: CheckpointStore) -> Checkpoint:
    return max(store.stored(), key=lambda item: item.position)


def moved(store: CheckpointStore) -> None:
    """One checkpoint hangs on the wrong edge."""
    checkpoint = deepest(store)
    other = next(node for node in store.forest.nodes("") if node is not checkpoint.node)
    other.checkpoints.append(checkpoint)


def orphan(store: CheckpointStore) -> None:
    node = deepest(store).node
    store.ledger.chains.attach(KVSegment(Span((0, node.end)), Blob(1), None, node, store.account("")))


def change(name: str, amount: int = 1) -> Callable[[CheckpointStore], None]:
    return lambda store: setattr(store.ledger, name, getattr(store.ledger, name) + amount)


def set_on(find: Callable[[CheckpointStore], Any], name: str, amount: int) -> Callable[[CheckpointStore], None]:
    return lambda store: setattr(find(store), name, getattr(find(store), name) + amount)


FAULTS: dict[str, tuple[Callable[[CheckpointStore], object], str]] = {
    "a checkpoint too many": (change("checkpoint_count"), "checkpoints: 4 counted, 3 found"),
    "bytes of states": (change("checkpoint_bytes"), "checkpoint_bytes"),
    "bytes of KV": (set_on(lambda store: store.ledger.chains, "nbytes", -1), "kv_bytes"),
    "tokens of KV": (set_on(lambda store: store.ledger.chains, "tokens", 1), "kv_tokens"),
    "an account": (set_on(lambda store: store.account(""), "kv_bytes", 1), "namespace ''"),
    "a closed account": (lambda store: store.accounts.clear(), "account that was closed"),
    "a pin": (set_on(deepest, "pins", 1), "pins: 1 counted, 0 found"),
    "a pin that nobody took back": (lambda store: store.ledger.pin(deepest(store)), "pins: 1 counted, 0 found"),
    "a mark without its pin": (lambda store: store.ledger.unpin(store.marks.kept[0][1]), "pins: 0 counted, 1 found"),
    "a reference": (lambda store: setattr(deepest(store).kv, "refs", 2), "references: 2 counted, 1 found"),
    "a hold": (lambda store: setattr(deepest(store).kv, "holds", 1), "holds: 1 counted, 0 found"),
    "a segment that nothing needs": (orphan, "is kept for nothing"),
    "a chain that is cut short": (
        lambda store: setattr(deepest(store), "kv", deepest(store).kv.parent),
        "needs a segment 8..10 that is not on its way",
    ),
    "a segment that is gone": (lambda store: deepest(store).node.segments.clear(), "that is not stored"),
    "a checkpoint that is gone": (lambda store: deepest(store).node.checkpoints.clear(), "3 counted, 2 found"),
    "a checkpoint in two places": (moved, "two places"),
    "a position": (set_on(deepest, "position", -1), "is owned by two places"),
    "a payload that grew": (set_on(lambda store: deepest(store).state, "nbytes", 5), "is counted as 10"),
    "tokens": (set_on(lambda store: store.forest, "tokens", 1), "tokens of all trees"),
    "bytes of nodes": (set_on(lambda store: store.forest, "overhead_bytes", 1), "bytes of all trees"),
    "tokens of a tree": (set_on(lambda store: store.forest.trees[""], "tokens", 1), "tree of space '', tokens"),
    "nodes of a tree": (set_on(lambda store: store.forest.trees[""], "nodes", 1), "tree of space '', nodes"),
    "an edge": (set_on(lambda store: deepest(store).node, "end", 1), "follows one that ends at"),
    "an edge that hangs elsewhere": (
        lambda store: setattr(deepest(store).node, "parent", store.forest.roots[""]),
        "follows one that ends at|does not hang where",
    ),
    "an edge of another tree": (
        lambda store: setattr(deepest(store).node, "tree", Forest().extend([], 0, np.arange(3), "", 0)[0].tree),
        "does not hang where it says",
    ),
    "an edge that nobody is above": (lambda store: setattr(deepest(store).node, "parent", None), "does not hang"),
    "an edge in another one's place": (
        lambda store: deepest(store).node.parent.children.update({77: deepest(store).node}),
        "does not hang|two places|hangs",
    ),
    "a leaf that is never forgotten": (lambda store: store.forest._leaves.clear(), "will never be forgotten"),
    "a leaf that waits twice": (
        lambda store: store.forest._leaves.append(store.forest._leaves[0]),
        "waits 2 times to be forgotten",
    ),
    "the eviction's own books": (lambda store: store.eviction.dropped(deepest(store)), "that the eviction knows"),
    "the budget": (lambda store: setattr(store.ledger, "max_memory", 1), "max_memory is 1"),
    "a reservation": (change("reserved_bytes", -1), "reserved_bytes is -1"),
}


@pytest.mark.parametrize("eviction", ["learned", "lru"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_found(fault: str, eviction: str) -> None:
    plant, said = FAULTS[fault]
    store = filled(eviction)
    store.verify()
    plant(store)
    with pytest.raises(WrongBooksError, match=said):
        store.verify()


def test_a_fault_in_a_lower_tier_is_found_under_its_name() -> None:
    store = CheckpointStore(10, "lru", host_memory=100)
    run(store, list(range(12)), [4])
    run(store, list(range(50, 62)), [4])
    assert store.below is not None and len(store.below) == 1
    store.verify()
    store.below.ledger.checkpoint_bytes += 1
    with pytest.raises(WrongBooksError, match="^host: checkpoint_bytes: 11 counted, 10 found"):
        store.verify()


# -- chains -----------------------------------------------------------------------------------------------------------


def serve_freely(store: CheckpointStore, ids: np.ndarray, grid: int) -> int:
    """One prompt of a conversation, cut where it leaves what is known and at its end."""
    free = {store.match(ids).overlap, len(ids)}
    cuts = sorted({*range(grid, len(ids) - 1, grid), *free} - {0})
    with open_request(store, NoCheckpoints(), ids, Anywhere(CutRule(1), cuts)) as request:
        chain = request.kv_payloads()
        ends = [payload.label[1] for payload in chain]
        starts = [payload.label[0] for payload in chain]
        assert starts == [0, *ends][: len(starts)] and (not ends or ends[-1] == request.resumed_tokens)
        for position in [int(cut) for cut in cuts if cut > request.resumed_tokens]:
            request.add(position, Blob(10), lambda a, b: Blob(b - a, (a, b)))
            store.verify()
    store.verify()
    return request.resumed_tokens


def test_a_growing_conversation_is_cleared() -> None:
    store = CheckpointStore(None)
    text = np.arange(700, dtype=np.int32)
    resumed = [serve_freely(store, text[:length], 128) for length in (200, 330, 470, 600)]
    assert resumed[0] == 0 and all(resumed[1:])
    store.clear()
    assert (store.used_bytes, len(store), store.remembered_tokens, store.tree_bytes) == (0, 0, 0, 0)
    assert serve_freely(store, text[:600], 128) == 0


def test_a_chain_goes_on_from_where_its_request_resumed() -> None:
    """A span that two chains have in common is stored for each, and neither takes the other's place."""
    store = CheckpointStore(None, "lru")
    text = np.arange(40, dtype=np.int32)

    def serve(mode: type[At], cuts: list[int], adds: list[int]) -> list[tuple[int, int]]:
        with open_request(store, NoCheckpoints(), text, mode(CutRule(1), cuts)) as request:
            for position in adds:
                request.add(position, Blob(1), lambda a, b: Blob(b - a, (a, b)))
            return [payload.label for payload in request.kv_payloads()]

    serve(At, [8, 16, 24], [24])
    serve(At, [6, 16, 24, 30], [24])
    assert [item.lineage.ends for item in store.stored()] == [(8, 16, 24), (6, 16, 24)]
    store.verify()
    assert serve(At, [6, 16, 24, 30], [30]) == [(0, 6), (6, 16), (16, 24)]
    assert serve(Anywhere, [8, 12, 30, 36], [36]) == [(0, 6), (6, 16), (16, 24), (24, 30)]
    assert serve(Anywhere, [], []) == [(0, 6), (6, 16), (16, 24), (24, 30), (30, 36)]
    assert serve(At, [8, 16, 24, 32], [32]) == [(0, 8), (8, 16), (16, 24)]
    store.verify()
    for checkpoint in sorted(store.stored(), key=lambda item: item.position):
        store.evict(checkpoint)
        store.verify()
    assert store.used_bytes == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(5, 60), st.sampled_from([4, 7, 16])), max_size=25))
def test_chains_under_pressure(requests: list[tuple[int, int, int]]) -> None:
    store = CheckpointStore(90, "lru")
    for which, length, grid in requests:
        ids = np.concatenate([np.arange(20 + which), np.arange(100 * which, 100 * which + 50)]).astype(np.int32)
        serve_freely(store, ids[:length], grid)
        assert store.used_bytes <= 90
    store.clear()
    store.verify()
    assert store.used_bytes == 0


# -- memory is given back ---------------------------------------------------------------------------------------------


def watched(store: CheckpointStore, ids: list[int], positions: list[int]) -> list[weakref.ref[Blob]]:
    states = [Blob(10) for _ in positions]
    with begin(store, ids) as request:
        for position, state in zip(positions, states, strict=True):
            request.add(position, state)
    return [weakref.ref(state) for state in states]


@pytest.mark.parametrize("eviction", ["learned", "lru", "fifo"])
def test_an_evicted_state_is_gone(eviction: str) -> None:
    store = CheckpointStore(None, eviction)
    (state,) = watched(store, list(range(12)), [4])
    assert state() is not None
    store.evict(deepest(store))
    gc.collect()
    assert state() is None


SECRET = 2**30 + 11  # beyond what any test draws


def holders_of(secret: int) -> list[np.ndarray]:
    """Arrays anywhere in memory that a garbage collector can reach and that contain a token."""
    gc.collect()
    reached = [item for thing in gc.get_objects() for item in gc.get_referents(thing) if type(item) is np.ndarray]
    return [array for array in reached if array.dtype == np.int32 and array.size and (array == secret).any()]


@pytest.mark.parametrize(("kv", "how"), [(0, "clear"), (1, "clear one space"), (1, "forget")])
def test_a_cleared_prompt_leaves_memory(how: str, kv: int) -> None:
    store = CheckpointStore(None, max_remembered=2**22)
    for secret in range(SECRET + 1, SECRET + 6):  # they split each other's edges
        run(store, [*range(secret - SECRET + 4), secret, *range(500)], [2, 40], kv=kv)
    assert holders_of(SECRET + 3)
    if how == "forget":
        for checkpoint in store.stored():
            store.evict(checkpoint)
        store.forest.forget(0)
    else:
        store.clear("" if how == "clear one space" else None)
    store.verify()
    assert (store.tree_bytes, store.forest._leaves, store.used_bytes) == (0, [], 0)
    assert not holders_of(SECRET + 3)


@pytest.mark.parametrize(("kv", "outcome"), [(0, "closed"), (1, "failed")])
def test_clear_with_an_open_request(kv: int, outcome: str) -> None:
    store = CheckpointStore(None)
    run(store, [*range(10), SECRET + 7, *range(500)], [4], kv=kv)
    run(store, [*range(12), SECRET + 8, *range(500)], [40], kv=kv)
    (state,) = watched(store, [*range(6), SECRET + 9, *range(100)], [6])
    try:
        with begin(store, [*range(10), SECRET + 10, *range(100)]) as request:
            assert request.resumed_tokens == 6
            store.clear()
            store.verify()
            for secret in (SECRET + 7, SECRET + 8):
                assert not holders_of(secret), "another prompt is still in memory"
            assert state() is not None and len(store) == 1  # in use
            assert begin(store, [*range(10), SECRET + 10]).resumed_tokens == 0
            assert not request.add(8, Blob(10), (lambda a, b: Blob(b - a)) if kv else None)
            if outcome == "failed":
                raise KeyError
    except KeyError:
        pass
    del request
    store.verify()
    gc.collect()
    assert state() is None and (len(store), store.used_bytes, store.remembered_tokens) == (0, 0, 0)
    assert run(store, list(range(12)), []).reason == "nothing stored"


def test_clear_of_one_space_leaves_the_others() -> None:
    store = CheckpointStore(None)
    for space in ("x\x1fa", "x\x1fb"):
        with begin(store, list(range(12)), space) as request:
            request.add(4, Blob(10))
        store.mark(np.arange(4, dtype=np.int32), space)
    store.clear("x\x1fa")
    store.verify()
    assert [(space, item.pins) for space, _, item in store.checkpoints()] == [("x\x1fb", 1)]
    assert store.marks.lengths(np.arange(9, dtype=np.int32), "x\x1fa") == []
    assert store.marks.lengths(np.arange(9, dtype=np.int32), "x\x1fb") == [4]


class Slow(Blob):
    """A state that something happens to while it is copied."""

    def __init__(self, nbytes: int, meanwhile: Callable[[], None], on_host: bool = False) -> None:
        super().__init__(nbytes, None, on_host)
        self.meanwhile = meanwhile

    def moved_to(self, tier: str) -> Blob:
        self.meanwhile()
        return Slow(self.nbytes, lambda: None, tier == "host")


@pytest.mark.parametrize("cleared", [None, "a", "b"])
@pytest.mark.parametrize("way", ["down", "up"])
def test_what_is_cleared_on_its_way_between_tiers_stays_away(cleared: str | None, way: str) -> None:
    store = CheckpointStore(10, "lru", host_memory=1000)
    with begin(store, [5, *range(12)], "b") as request:
        request.add(4, Blob(10))
    doing: list[str] = []

    def meanwhile() -> None:
        if way in doing:
            doing.remove(way)
            store.clear(cleared)

    with begin(store, list(range(12)), "a") as request:
        request.add(4, Slow(10, meanwhile))
    assert store.below is not None and len(store.below) == 1
    doing += [way] if way == "down" else []
    with begin(store, list(range(50, 62)), "c") as request:
        request.add(4, Blob(10))
    if way == "up":
        store.below.stored("a")[0].state.meanwhile = meanwhile
        doing.append(way)
        begin(store, list(range(12)), "a").close()
    assert not doing
    store.verify()
    spaces = {space for tier in store.tiers for space, _, _ in tier.checkpoints()}
    assert "a" not in spaces if cleared in (None, "a") else "a" in spaces
    assert ("b" in spaces) == (cleared == "a"), "another tenant lost what it had"


def test_the_heap_holds_each_leaf_once() -> None:
    store = CheckpointStore(20, "lru", max_remembered=2**22)
    for number in range(300):
        run(store, [number % 3, *range(20)], [2, 4, 6], kv=1)
    assert len(store.forest._leaves) <= 3


def test_accounts_of_tenants_that_left_are_closed() -> None:
    store = CheckpointStore(40, "lru", namespace_memory={f"t{n}": 20 for n in range(3000)})
    for number in range(MOST_ACCOUNTS + 100):
        with begin(store, list(range(12)), f"x\x1ft{number}") as request:
            request.add(4, Blob(10))
        if number:
            store.clear(f"x\x1ft{number}")
    store.verify()
    assert len(store.accounts) <= MOST_ACCOUNTS and len(store.ledger._account_orders) <= MOST_ACCOUNTS
    assert store.account("t0").used_bytes == 10  # who still holds something keeps its account
    assert store.tree_bytes == store.ledger.tree_bytes("t0") > 0 == store.ledger.tree_bytes("t1")


def test_namespaces_that_continue_a_name_share_its_budget() -> None:
    store = CheckpointStore(1000, "lru", namespace_memory={"ann": 30})
    for number in range(10):
        for name in (f"ann#{number}", f"annika#{number}", "ann"):
            with begin(store, list(range(12)), f"x\x1f{name}") as request:
                request.add(4, Blob(10))
            store.verify()
    assert store.account("ann").used_bytes == store.account("ann#3").used_bytes == 30
    assert sum(store.account(f"annika#{number}").used_bytes for number in range(10)) == 100
    # Names that are gone are closed, the budget that they shared is not.
    for number in range(MOST_ACCOUNTS + 50):
        with begin(store, list(range(12)), f"x\x1fann#s{number}") as request:
            request.add(4, Blob(10))
        store.clear(f"x\x1fann#s{number}")
    store.verify()
    assert len(store.accounts) <= MOST_ACCOUNTS and store.account("ann").limit == 30
    assert store.account("ann#new") is store.account("ann")


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_the_room_of_a_tenant_is_what_its_own_marks_leave() -> None:
    """What another one keeps counts towards the budget of all alone."""
    store = CheckpointStore(1000, "lru", namespace_memory={"ann": 900, "bob": 900})
    for name, marked in (("ann", 4), ("bob", 8)):
        ids = np.arange(12, dtype=np.int32) + ord(name[0])
        store.mark(ids[:marked], f"x\x1f{name}")
        with begin(store, ids.tolist(), f"x\x1f{name}") as request:
            request.add(marked, Blob(marked), lambda a, b: Blob(5 * (b - a)))
    store.verify()
    new = np.arange(500, 512, dtype=np.int32)
    assert store.bound(new, 12, "x\x1fann") == Bound("namespace_memory", 900, 4 * 6, 4 * 6)
    assert store.bound(new, 12, "x\x1fbob") == Bound("namespace_memory", 900, 8 * 6, 8 * 6)
    assert store.bound(new, 12, "x\x1fcarl") == Bound("max_memory", 1000, 12 * 6, 12 * 6)


def test_the_room_for_a_checkpoint_is_what_the_one_resumed_from_leaves() -> None:
    """Those above may go; the keys and values below are its own as well."""
    store = CheckpointStore(1000, "lru")
    run(store, list(range(12)), [4, 10], kv=1)
    text = np.arange(20, dtype=np.int32)
    at = {item.position: int(item.state.nbytes) for item in store.stored()}
    used = sum(at.values()) + 10
    assert store.bound(text, 18) == Bound("max_memory", 1000, used, at[10])
    assert store.bound(text, 10) == Bound("max_memory", 1000, used, at[4])
    assert store.bound(text[:6], 6) == Bound("max_memory", 1000, used, at[4])
    assert store.bound(text[1:], 18) == Bound("max_memory", 1000, used, 0)


def test_a_node_that_is_forgotten_keeps_no_token() -> None:
    store = CheckpointStore(1000, "lru")
    run(store, list(range(12)), [4, 10], kv=1)
    nodes = list(store.forest.nodes(""))
    store.clear()
    assert nodes and all(len(node.tokens) == 0 and node.parent is None for node in nodes)


def branches(kind: str, count: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    stem = draw.integers(0, 1000, 512)
    lengths = {"flat": lambda: 64, "deep": lambda: int(draw.integers(1, 512)), "long": lambda: 0}[kind]
    tails = 3000 if kind == "long" else 20
    return [
        np.concatenate([stem[: lengths()], [1000 + number], draw.integers(0, 1000, tails)]).astype(np.int32)
        for number in range(count)
    ]


@pytest.mark.parametrize("kind", ["flat", "deep", "long"])
def test_tree_bytes_are_those_of_the_objects(kind: str) -> None:
    store, policy = CheckpointStore(None, max_remembered=None), make_policy("learned")
    for ids in branches(kind, 300):
        with open_request(store, policy, ids, every(64)):
            pass
    store.verify()
    assert store.tree_bytes == pytest.approx(held_bytes(store.forest), rel=0.2)


def test_tree_bytes_of_a_namespace_are_those_of_its_spaces() -> None:
    store = CheckpointStore(None)
    for name, tokens in (("a", 10), ("b", 300), ("b#1", 500), ("c", 40)):
        for space in ("x", "y"):
            with begin(store, list(range(tokens)), f"{space}\x1f{name}"):
                pass
    by_name = {name: store.ledger.tree_bytes(name) for name in ("a", "b", "b#1", "c", "d")}
    assert sum(by_name.values()) == store.tree_bytes and by_name["d"] == 0
    assert by_name["b#1"] - by_name["b"] >= 2 * 4 * 200 > by_name["c"] - by_name["a"] > 0


def test_short_branches_are_bounded_by_the_byte() -> None:
    most = 2**19
    store, policy = CheckpointStore(None, max_remembered=most), make_policy("learned")
    for ids in branches("flat", 2500):
        with open_request(store, policy, ids, every(64)) as request:
            if not request.overlap_tokens:
                request.add(64, Blob(10))
        assert store.tree_bytes <= most
    store.verify()
    assert store.tree_bytes > 0.9 * most and held_bytes(store.forest) <= 1.2 * most
    assert store.remembered_tokens < 2500 * 21 and most > 4 * 2500 * 21  # by their tokens alone all would fit
    assert request.overlap_tokens == 64 and request.resumed_tokens == 64


def test_marks_are_bounded_and_forgotten() -> None:
    store = CheckpointStore(None, max_remembered=400)
    text = np.arange(200, dtype=np.int32)
    for _ in range(3):  # announcing it again takes nothing
        store.mark(text[:60])
    assert store.marks.tokens == 60
    with pytest.raises(ValueError, match=r"41 tokens, beside 60 of other marks, .* max_remembered=400; take"):
        store.mark(text[:41], "b")
    assert store.marks.lengths(text, "b") == []
    store.mark(text[:40], "b")
    assert (store.marks.lengths(text, ""), store.marks.lengths(text, "b")) == ([60], [40])
    assert store.marks.lengths(text[1:], "") == store.marks.lengths(text[:59], "") == []
    assert [prefix.tolist() for prefix in store.marks.prefixes("b")] == [list(range(40))]
    store.clear("b")
    assert store.marks.tokens == 60 and store.marks.prefixes("b") == []
    store.clear()
    assert store.marks.tokens == 0 and store.marks._prefixes == {}


def test_resize_below_what_is_kept_says_so(caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(100, "lru")
    run(store, list(range(12)), [4, 8])
    store.mark(np.arange(4, dtype=np.int32))
    with caplog.at_level(logging.WARNING):
        store.resize(10)
    assert not caplog.records and store.used_bytes == 10
    store.resize(5)
    (record,) = caplog.records
    assert "max_memory=5 is less than the 10 bytes that marks and open requests keep" in record.getMessage()
    assert "give at least that" in record.getMessage()
    with begin(store, list(range(50, 62))) as request:
        assert not request.add(4, Blob(1))
    store.verify()
    store.clear()
    assert store.used_bytes == 0


@pytest.mark.parametrize("host", [None, 1000])
def test_what_an_open_request_kept_above_the_budget_goes_when_it_closes(host: int | None) -> None:
    store = CheckpointStore(100, "lru", host_memory=host)
    run(store, list(range(12)), [4, 8], kv=1)
    with begin(store, list(range(12))) as request:
        assert request.resumed_tokens == 8
        store.resize(5)
        assert store.used_bytes == 18
        store.verify()
    assert store.used_bytes == 0
    store.verify()
    assert store.below is None or len(store.below) == 2


# -- one walk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_a_request_walks_the_tree_once(known: bool) -> None:
    store = CheckpointStore(None, "lru")
    if known:
        run(store, list(range(30)), [4], kv=1)
        run(store, [*range(20), *range(90, 100)], [], kv=1)
    with mock.patch.object(Forest, "walk", autospec=True, side_effect=Forest.walk) as walk:
        with begin(store, [*range(25), *range(50, 60)]) as request:
            for position in (8, 16, 24, 32):
                assert request.add(position, Blob(10), lambda a, b: Blob(b - a))
        assert walk.call_count == 1
    store.verify()


def test_another_request_may_change_the_tree_meanwhile() -> None:
    store = CheckpointStore(None, "lru", max_remembered=4_000)
    with begin(store, list(range(30))) as request:
        assert request.add(4, Blob(10), lambda a, b: Blob(b - a))
        run(store, [*range(10), *range(90, 100)], [8], kv=1)  # splits the edge
        assert request.add(12, Blob(10), lambda a, b: Blob(b - a))
        for other in range(5):
            run(store, [200 + other, *range(20)], [])
        run(store, list(range(30)), [20], kv=1)
        assert request.add(28, Blob(10), lambda a, b: Blob(b - a))
        store.verify()
    store.verify()
    assert run(store, list(range(30)), []).resumed_tokens == 28


def test_a_prompt_that_is_forgotten_at_once_leaves_nothing_counted() -> None:
    """Its description came when its nodes had gone, and stayed in the sum for good, until nothing was remembered."""
    store = CheckpointStore(max_remembered=14)
    for _ in range(3):
        open_request(
            store, make_policy("learned"), np.zeros(2, dtype=np.int32), Anywhere(CutRule(1), []), space="m\x1fa"
        ).close()
        store.verify()
    store.clear()
    assert store.tiers[0].tree_bytes == 0
