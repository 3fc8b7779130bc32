"""What checkpoints are worth, number by number: gains, rates, shares, who goes for whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from growing import grown, hung
from prompting import begin
from reference_store import Blob

from hf_sparse_cache.planning.compiled import Leaving
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store.eviction import FIFO, LRU
from hf_sparse_cache.store.evictions import make_eviction
from hf_sparse_cache.store.forest import Forest
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.survival import cell_of
from hf_sparse_cache.store.tree import Checkpoint, Node
from hf_sparse_cache.store.value import (
    FORK_CHILDREN,
    LEAST_STOPPING,
    MIN_EDGE_TOKENS,
    MIN_STEM_TOKENS,
    NEARLY_TIED,
    LeastValue,
    Scored,
)


class ByGain(Scored):
    """What a byte saves, however long ago."""

    def values(self) -> np.ndarray:
        return self.gains


class Stops(ByGain):
    """Only who resumes uses a checkpoint."""

    def touched(self, slot: int, resumed: bool) -> bool:
        return resumed


class Told:
    """Survival tables that note what they are told, and say the cell itself for its rate."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        note = self.calls.append
        self.waits = SimpleNamespace(
            enter=lambda cell: note(("enter", cell)),
            leave=lambda cell, since: note(("leave", cell, since)),
            hit=lambda cell, since, split=False: note(("hit", cell, since, split)),
        )

    def advance(self, now: int) -> None:
        self.calls.append(("advance", now))

    def bypass(self, cell: int, since: int) -> int:
        self.calls.append(("bypass", cell, since))
        return cell | 1

    def rate(self, cell: int, age: int = 0) -> float:
        return float(cell + 1)

    def rates(self, cells: np.ndarray, ticks: np.ndarray, now: int) -> np.ndarray:
        return cells + 1.0


def learned() -> tuple[LeastValue, Any]:
    eviction: Any = LeastValue()
    eviction.tables = Told()
    return eviction, eviction.tables


def stem(length: int, count: int = 3, tail: int = 20) -> list[tuple[int, ...]]:
    """Prompts that part after so many tokens."""
    return [(*range(length), *range(1000 * which, 1000 * which + tail)) for which in range(1, count + 1)]


# -- the books --------------------------------------------------------------------------------------------------------


def gain_of(checkpoint: Checkpoint) -> float:
    """The plain way: what it saves over the one above, for each byte that goes with it."""
    node: Node | None = checkpoint.node
    above = [0]
    while node is not None:
        above += [item.position for item in node.checkpoints if item.position < checkpoint.position]
        node = node.parent
    return (checkpoint.position - max(above)) * max(checkpoint.share, LEAST_STOPPING) / max(checkpoint.held, 1)


@pytest.mark.parametrize("kv", [0, 2])
@pytest.mark.parametrize("make", [ByGain, LeastValue])
def test_the_tables_say_what_is_stored(make: type[Scored], kv: int) -> None:
    generator, eviction = np.random.default_rng(kv), make()
    store = CheckpointStore(None, eviction)
    for number in range(90):
        stem = range(int(generator.choice([8, 14, 20])))  # few ways down: a look at those below is bounded
        ids = [int(generator.integers(12)), *stem, 50 + number % 2, *range(8)]
        with begin(store, ids) as request:
            for cut in np.unique(generator.integers(1, len(ids) // 2, 3)).tolist():
                if 2 * cut > request.resumed_tokens:
                    request.add(2 * cut, Blob(10), (lambda a, b: Blob(kv * (b - a))) if kv else None)
        if number % 5 == 2:
            going = store.stored()[int(generator.integers(len(store)))]
            near = [item for item in (going.above(), *going.below()) if item is not None]
            store.evict(going)
            assert eviction.items[going.slot] is None and eviction.gains[going.slot] == np.inf
            assert eviction.held[going.slot] == 0.0
            assert all(item.held == item.held_bytes() == eviction.held[item.slot] for item in near)
        stored = store.stored()
        if number % 5 < 2:
            continue
        assert [item.slot for item in stored] == [eviction.items.index(item) for item in stored]
        assert sorted(map(id, eviction.known() or [])) == sorted(map(id, stored))
        assert len(eviction._free) == len(eviction.items) - len(stored) == eviction.items.count(None)
        assert eviction.gains[[item.slot for item in stored]] == pytest.approx([*map(gain_of, stored)])
        assert [eviction.held[item.slot] for item in stored] == [item.held for item in stored]
        order, values = eviction.ranked()
        assert len(order) == len(stored) and values[order].tolist() == sorted(values[item.slot] for item in stored)
    assert len(stored) > 64 < len(eviction.items) == len(eviction.cells) == len(eviction.ticks) == len(eviction.held)
    assert np.isinf(eviction.gains[eviction._free]).all()


def test_places_double_and_the_first_is_taken_first() -> None:
    eviction, forest = ByGain(), Forest()
    items = [hung(grown(forest, (number, 1), 1), 2) for number in range(129)]
    for count, item in enumerate(items):
        eviction.stored(item)
        assert len(eviction.items) == (64 if count < 64 else 128 if count < 128 else 256)
    assert [item.slot for item in items] == [*range(129)]
    assert len(eviction.ticks) == len(eviction.cells) == len(eviction.gains) == len(eviction.held) == 256
    eviction.dropped(items[7])
    eviction.stored(items[7])
    assert items[7].slot == 7


def test_who_is_worth_least_goes_first_and_of_equals_the_first() -> None:
    eviction, forest = ByGain(), Forest()
    items = [hung(grown(forest, (number, *range(19)), 1), at) for number, at in enumerate((9, 5, 5, 12))]
    assert eviction.victim(None, 10) is None
    for item in items:
        eviction.stored(item)
    order, values = eviction.ranked()
    assert order.tolist() == [1, 2, 0, 3] and values[:4].tolist() == [0.9, 0.5, 0.5, 1.2]
    assert eviction.victim(None, 10) is items[1]
    items[1].pins = items[2].pins = 1
    assert eviction.victim(items[3], 10) is items[0]
    for item in items:
        item.pins = 1
    assert eviction.victim(None, 10) is None


@pytest.mark.parametrize("make", [ByGain, Stops])
def test_a_pass_is_noted_at_all_that_the_prompt_shares(make: type[Scored]) -> None:
    eviction, forest = make(), Forest()
    for ids in stem(20):
        grown(forest, ids, 1)
    path = forest.walk(np.asarray(stem(20)[0], dtype=np.int32), "")[0]
    path[0].passes, path[1].passes = 3, 1
    items = [hung(path, position) for position in (4, 20, 30, 35)]
    eviction.now = 2
    for item in items:
        eviction.stored(item)
    assert eviction.ticks[:4].tolist() == [2] * 4
    assert eviction.cells[:4].tolist() == [cell_of(4, 1)] * 2 + [cell_of(2, 2)] * 2
    path[0].passes, path[1].passes = 8, 5
    eviction.passed(path, 30, items[1], 9)
    assert eviction.now == 9
    used = [True, True, True, False] if make is ByGain else [False, True, False, False]
    assert eviction.ticks[:4].tolist() == [9 if one else 2 for one in used]
    cells = [(cell_of(4, 1), cell_of(9, 1))] * 2 + [(cell_of(2, 2), cell_of(6, 2))] * 2
    assert eviction.cells[:4].tolist() == [pair[one] for pair, one in zip(cells, used, strict=True)]
    assert eviction.touched(0, True)


def test_who_keeps_books_of_his_own_is_not_asked_for_them() -> None:
    class Own(ByGain):
        def stored(self, checkpoint: Checkpoint) -> None:
            pass

    class Other(FIFO):
        def stored(self, checkpoint: Checkpoint) -> None:
            pass

    assert Own().known() is None and Other().known() is None and ByGain().known() == [] == LRU().known()


def test_evictions_have_names() -> None:
    assert [type(make_eviction(name)) for name in ("learned", "lru", "fifo")] == [LeastValue, LRU, FIFO]
    with pytest.raises(ValueError, match="eviction='best' is unknown; choose one of learned, lru, fifo"):
        make_eviction("best")


@pytest.mark.parametrize("make", [FIFO, LRU])
def test_the_first_goes_first_unless_it_was_resumed(make: type[FIFO | LRU]) -> None:
    order, forest = make(), Forest()
    items = [hung(grown(forest, (number, 1), 1), 2) for number in range(3)]
    assert order.victim(None, 1) is None
    for item in items:
        order.stored(item)
    order.passed([], 0, None, 1)
    assert order.victim(None, 1) is items[0]
    order.passed([], 0, items[0], 2)
    first = items[1] if make is LRU else items[0]
    assert order.victim(None, 1) is first
    first.pins = 1
    assert order.victim(None, 1) is items[2 if make is LRU else 1]
    order.dropped(first)
    assert first not in (order.known() or [first]) and len(order.known() or []) == 2


# -- what waits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [10, 15, 16, 20, 30, 35, 36, 44, 45, 46, 60])
def test_an_edge_that_waits_is_met_where_enough_of_it_is_shared(overlap: int) -> None:
    """All of it but a few tokens: it waits no longer. Only a part: the rest goes on waiting."""
    eviction, tables = learned()
    forest = Forest()
    for ids in stem(20, tail=40):
        grown(forest, ids, 1)
    path = forest.walk(np.asarray(stem(20, tail=40)[0], dtype=np.int32), "")[0]
    path[0].waiting, path[1].waiting = (6, 2), (8, 3)
    eviction.passed(path, overlap, None, 5)
    expected: list[tuple[Any, ...]] = [("advance", 5)]
    for node, cell, since in ((path[0], 6, 2), (path[1], 8, 3)):
        shared, left = overlap - node.start, node.end - overlap
        if shared >= MIN_EDGE_TOKENS:
            expected.append(("hit", cell, since, left >= MIN_EDGE_TOKENS))
            expected += [("leave", cell, since)] * (left < MIN_EDGE_TOKENS)
        gone = shared >= MIN_EDGE_TOKENS > left
        assert node.waiting == (None if gone else (cell, since))
    assert tables.calls == expected and eviction.now == 5
    tables.calls.clear()
    path[0].waiting = path[1].waiting = None
    eviction.passed(path, overlap, None, 6)
    assert tables.calls == [("advance", 6)]


def test_the_edges_of_a_prompt_wait_for_their_next_pass() -> None:
    eviction, tables = learned()
    forest = Forest()
    grown(forest, tuple(range(40)), 1)
    grown(forest, tuple(range(16)), 1)
    path = grown(forest, (*range(16), *range(16, 40), *range(500, 515)), 1)
    path += grown(forest, (*path[-1].path_tokens(), *range(600, 620)), 1)[len(path) :]
    assert [len(node.tokens) for node in path] == [16, 24, 15, 20]
    for node, passes in zip(path, (5, 4, 3, 2), strict=True):
        node.passes = passes
    path[1].waiting, eviction.now = (77, 1), 9
    eviction.settled(path, None, 9)
    cells = [cell_of(5, 1), 77, None, cell_of(2, 3)]
    assert [node.waiting and node.waiting[0] for node in path] == cells
    assert [node.waiting and node.waiting[1] for node in path] == [9, 1, None, 9]
    assert tables.calls == [("enter", cells[0]), ("enter", cells[3])]
    assert [node.recent for node in path] == [*path[1:], None]


@pytest.mark.parametrize("length", [MIN_STEM_TOKENS - 1, MIN_STEM_TOKENS])
@pytest.mark.parametrize("count", [FORK_CHILDREN, FORK_CHILDREN + 1])
def test_a_path_is_superseded_where_few_part_late_and_in_all_its_length(length: int, count: int) -> None:
    eviction, tables = learned()
    forest = Forest()
    paths = [grown(forest, ids, 1) for ids in stem(length, count)]
    old = grown(forest, (*stem(length)[0], *range(80, 110)), 1)
    paths[-1] = forest.walk(paths[-1][-1].path_tokens(), "")[0]
    old = forest.walk(old[-1].path_tokens(), "")[0]
    items = [hung(old, length + 10), hung(old, length + 40)]
    for item in items:
        eviction.stored(item)
    for node in old:
        node.recent = None
    eviction.settled(old, None, 1)
    assert old[0].recent is old[1] and old[1].recent is old[2] and all(node.waiting for node in old)
    before = [node.waiting for node in old]
    cells = eviction.cells[[item.slot for item in items]].tolist()
    old[1].waiting, before[1] = None, None  # passed since
    tables.calls.clear()
    eviction.settled(old, None, 2)  # the same path once more
    assert not [call for call in tables.calls if call[0] == "bypass"]
    old[1].waiting = None
    tables.calls.clear()
    eviction.settled(paths[-1], None, 3)
    assert old[0].recent is paths[-1][1]
    left = length >= MIN_STEM_TOKENS and count <= FORK_CHILDREN
    cell, since = before[2] or (0, 0)
    assert [call for call in tables.calls if call[0] == "bypass"] == [("bypass", cell, since)] * left
    assert [node.waiting for node in old] == [before[0], None, (cell | left, since)]
    assert eviction.cells[[item.slot for item in items]].tolist() == [one | left for one in cells]


# -- who stops where --------------------------------------------------------------------------------------------------


class Foreseen:
    """Says of the shares what it was told to, and keeps what it was asked."""

    def __init__(self, *shares: float) -> None:
        self.told, self.asked = shares, ()

    def shares(self, *asked: Any) -> tuple[list[float], list[float]]:
        self.asked = asked
        return [*self.told], [share / 2 for share in self.told]


@pytest.mark.parametrize("branch", ["none", "short", "long", "short and on", "at the first", "at the second"])
def test_the_shares_are_asked_for_with_the_rates_from_one_to_the_next(branch: str) -> None:
    """Where others leave in between, by more than a few tokens, fewer come to the next one."""
    eviction, _ = learned()
    forest = Forest()
    text = tuple(range(120))
    at = {"at the first": 30, "at the second": 90}.get(branch, 60)
    for cut in (30, 60, 90):
        grown(forest, text[:cut], 1)
    grown(forest, text, 1)
    if branch != "none":
        off = (*text[:at], *range(500, 503 if branch.startswith("short") else 516))
        grown(forest, off, 1)
        if branch == "short and on":
            grown(forest, (*off, 1), 1)
    path = forest.walk(np.asarray(text, dtype=np.int32), "")[0]
    for node, passes in zip(path, (9, 7, 5, 3), strict=True):
        node.passes = passes
    items = [hung(path, position) for position in (10, 25, 70, 110)]
    for item in items:
        eviction.stored(item)
    forecast = Foreseen(0.1, 0.2, 0.3, 0.4)
    eviction.settled(path, forecast, 1)  # type: ignore[arg-type]
    rates = [cell_of(passes, level) + 1.0 for level, passes in enumerate((9, 7, 5, 3), 1)]
    first = rates[2] / rates[0] if branch in ("long", "short and on", "at the first") else 1.0
    second = rates[3] / rates[2] if branch == "at the second" else 1.0
    assert forecast.asked == ([10, 25, 70, 110], [0, 0, 60, 90], [1.0, first, second, 0.0])
    assert [item.share for item in items] == [0.1, 0.2, 0.3, 0.4]
    assert [item.onward for item in items] == [0.05, 0.1, 0.15, 0.2]
    assert eviction.gains[:4].tolist() == pytest.approx([*map(gain_of, items)])


def test_without_a_forecast_or_a_checkpoint_no_share_is_asked_for() -> None:
    eviction, _ = learned()
    forest = Forest()
    path = grown(forest, tuple(range(40)), 1)
    eviction.settled(path, forecast := Foreseen(), 1)  # type: ignore[arg-type]
    assert forecast.asked == ()
    item = hung(path, 20)
    eviction.stored(item)
    eviction.settled(path, None, 1)
    assert (item.share, item.onward) == (1.0, 0.0)


def test_those_who_stopped_at_what_goes_stop_at_the_one_above() -> None:
    eviction, _ = learned()
    path = grown(Forest(), tuple(range(40)), 1)
    upper, lower = hung(path, 10), hung(path, 30)
    for item in (upper, lower):
        eviction.stored(item)
    upper.share, upper.onward = 0.25, 0.5
    lower.share, lower.onward = 0.3, 0.1
    path[0].checkpoints = [upper]
    eviction.dropped(lower)
    assert (upper.share, upper.onward) == pytest.approx((0.25 + 0.5 * 0.75, 0.5 * 0.25))
    assert eviction.gains[upper.slot] == pytest.approx(gain_of(upper)) == pytest.approx(10 * 0.625 / 10)
    path[0].checkpoints = []
    eviction.dropped(upper)
    assert eviction.known() == []


# -- what it earns and costs ------------------------------------------------------------------------------------------


def priced() -> tuple[Any, list[Node], list[Checkpoint]]:
    """One path with two checkpoints and a branch, a second one with another."""
    eviction, _ = learned()
    forest = Forest()
    for ids in stem(30, 2, 40):
        grown(forest, ids, 1)
    paths = [forest.walk(np.asarray(ids, dtype=np.int32), "")[0] for ids in stem(30, 2, 40)]
    items = [hung(paths[0], 20), hung(paths[0], 50), hung(paths[1], 60)]
    for node, passes in ((paths[0][0], 6), (paths[0][1], 3), (paths[1][1], 2)):
        node.passes = passes
    for item in items:
        eviction.stored(item)
    return eviction, paths[0], items


def test_the_terms_of_a_path_are_its_rates_and_the_price_of_the_next_byte() -> None:
    eviction, path, items = priced()
    known, new, above = cell_of(4, 2) + 1.0, cell_of(1, 3) + 1.0, cell_of(7, 1) + 1.0

    def told(need: float, resumed: Checkpoint | None, path: list[Node] = path) -> tuple[float, ...]:
        found = eviction.terms(path, 60, need, resumed)
        return found.known_rate, found.new_rate, found.price, found.resumed_rate

    assert told(0.0, None) == (known, new, 0.0, known)
    assert told(0.0, items[1]) == (known, new, 0.0, known)
    assert told(0.0, items[0]) == (known, new, 0.0, above)  # others leave in between
    assert told(0.0, None, path[:1]) == (above, cell_of(1, 2) + 1.0, 0.0, above)
    assert told(0.0, None, []) == (0.0, cell_of(1, 1) + 1.0, 0.0, 0.0)
    for need in (1.0, 15.0, 30.0):
        leaving = Leaving(LEAST_STOPPING)
        leaving.until(need, eviction.items, eviction.gains, eviction.cells + 1.0)
        assert told(need, None)[2] == leaving.lost / leaving.freed > 0.0
    for item in items:
        item.pins = 1
    assert told(5.0, None)[2] == 0.0, "nothing can go"


def test_a_path_that_nobody_left_has_one_rate() -> None:
    eviction, _ = learned()
    forest = Forest()
    grown(forest, tuple(range(30)), 1)
    path = grown(forest, tuple(range(60)), 1)
    items = [hung(path, 20), hung(path, 50)]
    for item in items:
        eviction.stored(item)
    path[0].passes = 9
    found = eviction.terms(path, 60, 0.0, items[0])
    assert found.resumed_rate == found.known_rate == cell_of(1, 2) + 1.0


def even() -> tuple[Any, Forest]:
    """All paths come back as often."""
    eviction, tables = learned()
    tables.rate = lambda cell, age=0: 2.0
    tables.rates = lambda cells, ticks, now: np.full(len(cells), 2.0)
    return eviction, Forest()


@pytest.mark.parametrize(
    ("position", "refund", "stays"),
    [(7, 0.0, True), (8, 0.0, False), (3, 5.0, True), (4, 5.0, False), (1, 10.0, False), (1, 50.0, False)],
)
def test_a_newcomer_has_to_be_worth_nearly_what_would_go(position: int, refund: float, stays: bool) -> None:
    """Nearly tied, the newcomer comes in; what it makes superfluous is none of its costs."""
    eviction, forest = even()
    old = hung(grown(forest, tuple(range(30)), 1), 10)
    eviction.stored(old)
    incoming = Checkpoint(Lineage([position]), old.state, grown(forest, (99, *range(30)), 1)[0], old.owner, 1)
    incoming.refund = refund
    assert (2.0 * position <= NEARLY_TIED * 20.0 * max(0.0, 10 - refund) / 10) == stays
    assert eviction.victim(incoming, 10) is (None if stays else old)
    if not refund:  # by the byte, however few are short
        assert eviction.victim(incoming, 1) is (None if stays else old)
    assert eviction.victim(incoming, 11) is None  # as much cannot come free
    assert eviction.victim(None, 11) is old and eviction.victim(None, 0) is None
    old.pins = 1
    assert eviction.victim(None, 5) is None


def test_a_newcomer_is_weighed_against_all_that_have_to_go() -> None:
    eviction, forest = even()
    items = [hung(grown(forest, (number, *range(30)), 1), 10 + number) for number in range(3)]
    for item in items:
        eviction.stored(item)
    incoming = Checkpoint(Lineage([20]), items[0].state, grown(forest, (99, *range(30)), 1)[0], items[0].owner, 1)
    incoming.held, incoming.share = 20, 0.5
    for share, goes in ((0.75, True), (0.7, False)):  # 15 against 14.7, and 14
        incoming.share = share
        assert eviction.victim(incoming, 20) is (items[0] if goes else None)
    assert eviction.victim(incoming, 10) is items[0]
