"""The compiled inner loops of a request say what numpy and plain Python say, to the last bit."""

from __future__ import annotations

import copy
import heapq
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache import CheckpointStore, _planner
from hf_sparse_cache.planning import compiled
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.overlap import OverlapModel
from hf_sparse_cache.planning.policies import make_policy
from hf_sparse_cache.planning.segments import Bitwise, Replayable, Segmenting
from hf_sparse_cache.planning.views import VIEWS, Shape, View
from hf_sparse_cache.request import open_request
from hf_sparse_cache.simulator import Sized
from hf_sparse_cache.store.value import LEAST_STOPPING, LeastValue


DEPTHS = st.lists(st.floats(0, 300), max_size=40)


@given(st.lists(st.tuples(st.floats(0, 1.5), st.floats(0, 1)), max_size=12), DEPTHS)
def test_a_histogram_is_that_of_numpy(counted: list[tuple[float, float]], values: list[float]) -> None:
    edges = np.linspace(0.0, 1.0, 17)
    found, counts = compiled.Histogram(edges, 2.0), np.full(16, 2.0 / 16)
    for value, credit in counted:
        found.add(value, credit, 0.9)
        counts *= 0.9**credit
        counts[min(int(np.searchsorted(edges, value, side="right")), 16) - 1] += credit
    total = np.concatenate([[0.0], np.cumsum(counts)])
    asked = np.asarray([*values, *edges, 1.0, 2.0]) / 1.7
    expected = np.interp(asked, edges, total)
    assert found.upto(asked).tobytes() == expected.tobytes()
    assert found.upto(asked[::-1]).tobytes() == expected[::-1].tobytes()
    assert [found.mass(value) for value in asked.tolist()] == expected.tolist()
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        copied.add(0.5, 1.0, 0.5)
        assert copied.total != found.total and found.upto(asked).tobytes() == expected.tobytes()


def told(shape: Shape, views: dict[str, Any], depths: np.ndarray) -> dict[str, np.ndarray]:
    """What each view says, by numpy."""

    def upto(name: str, values: np.ndarray, whole: float, least: float = 0.0) -> np.ndarray:
        seen = views[name].seen
        return seen.upto(values) / max(seen.mass(whole), least)

    length, overlap = shape.length, shape.overlap
    missed = (len(shape.cuts) - np.searchsorted(shape.cuts, depths)).astype(float)
    even, total = depths / (length + 1), shape.stops.sum()
    steps = np.concatenate([[0.0], np.cumsum(shape.stops) / total]) if total else None
    return {
        "Uniform": even,
        "Absolute": upto("Absolute", depths, length + 1.0, 1e-9),
        "Ratio": upto("Ratio", even, 1.0),
        "FromEnd": 1.0 - upto("FromEnd", length + 1 - depths, length + 1.0),
        "CutsFromEnd": np.where(depths > 0.0, 1.0 - upto("CutsFromEnd", missed, len(shape.cuts) + 1.0), 0.0),
        "Beyond": upto("Beyond", np.maximum(depths - overlap, 0.0), length + 1.0 - overlap, 1e-9),
        "Again": (depths > overlap).astype(float),
        "Junctions": even if steps is None else steps[shape.ends.searchsorted(depths)],
    }


@given(st.integers(2, 3000), st.data())
def test_the_views_say_what_numpy_says(length: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, length))
    ends = np.asarray(sorted(data.draw(st.sets(st.integers(1, length), max_size=5))), dtype=np.int64)
    stops = np.asarray(data.draw(st.lists(st.integers(0, 9), min_size=len(ends), max_size=len(ends))), dtype=np.int64)
    shape = Shape(length, overlap, ends, stops, np.arange(64, length, 64), 1)
    views = [view() for view in VIEWS]
    for depth in data.draw(st.lists(st.integers(0, length), max_size=6)):
        for view in views:
            view.learn(depth, shape, 0.7, 0.99)
    depths = np.asarray(sorted(data.draw(st.lists(st.floats(0, length + 1), max_size=30))))
    found = compiled.viewed(views, depths, shape)
    named = {type(view).__name__: view for view in views}
    for row, (name, expected) in zip(found, told(shape, named, depths).items(), strict=True):
        assert row.tobytes() == expected.tobytes() == named[name].below(depths, shape).tobytes()


class Told(View):
    """A view in Python that is told what to say, and notes what it is asked and learns."""

    def __init__(self, said: np.ndarray) -> None:
        self.said, self.cell, self.learned = said, list[float](), list[float]()

    def below(self, depths: np.ndarray, shape: Shape) -> np.ndarray:
        self.cell = depths.tolist()
        return self.said

    def learn(self, depth: int, shape: Shape, credit: float, decay: float) -> None:
        self.learned.append(credit)


@given(st.integers(1, 40), st.integers(0, 4), st.integers(0, 1000))
def test_credit_is_given_as_by_numpy(count: int, kind: int, seed: int) -> None:
    generator, model = np.random.default_rng(seed), OverlapModel()
    edges = np.sort(generator.random((count, 2)))
    model.views, model.shares, model.seen = (
        [Told(row) for row in edges],
        generator.random((5, count)),
        [3, 0, 50, 7, 60],
    )
    shares, often = model.shares.copy(), [*model.seen]
    credit = (often[kind] * shares[kind] + 8.0 * shares[-1]) / (often[kind] + 8.0)
    assert compiled.leaning(shares, often, kind, 8.0).tobytes() == credit.tobytes()
    credit *= np.maximum(edges[:, 1] - edges[:, 0], 1e-6)
    credit /= credit.sum()
    for row in (kind, -1):
        often[row] += 1
        shares[row] += max(1.0 / (often[row] + 4.0), 0.01) * (credit - shares[row])
    shape = Shape(200, 0, *np.zeros((3, 0), dtype=np.int64), kind)
    assert compiled.credited(model, 150, np.asarray([64, 128, 192]), shape, 8.0) == credit.tolist()
    assert model.seen == often and model.shares.tobytes() == shares.tobytes()
    for view, amount in zip(model.views, credit.tolist(), strict=True):
        assert view.cell == [128.0, 192.0] and view.learned == ([amount] if amount > 1e-3 else [])
    assert compiled.credited(model, 63, np.asarray([64, 128, 192]), shape, 8.0) == [] and model.seen == often


def test_what_a_compiled_view_counts_is_what_it_looks_at() -> None:
    cuts = np.arange(64, 1000, 64)
    shape = Shape(1000, 300, *np.zeros((2, 0), dtype=np.int64), cuts, 0)
    looked = {"Absolute": 700.0, "Ratio": 700 / 1001, "FromEnd": 300.0, "CutsFromEnd": 5.0, "Beyond": 400.0}
    for view, fresh in zip((kind() for kind in VIEWS), (kind() for kind in VIEWS), strict=True):
        if fresh.seen is not None:
            fresh.seen.add(looked[type(view).__name__], 0.7, 0.99)
            view.learn(700, shape, 0.7, 0.99)
            assert view.seen is not None and view.seen.counts == fresh.seen.counts
    beyond: Any = VIEWS[5]()
    before = beyond.seen.counts[:]
    beyond.learn(299, shape, 0.7, 0.99)  # before its overlap there is nothing to count
    assert beyond.seen.counts == before
    beyond.learn(300, shape, 0.7, 0.99)
    assert beyond.seen.counts != before


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9)), max_size=8), st.integers(0, 300))
def test_who_left_a_path_is_counted_as_by_numpy(edges: list[tuple[int, int]], overlap: int) -> None:
    ends, passes = np.cumsum([0, *(length for length, _ in edges)])[1:], np.asarray([often for _, often in edges], int)
    known = int(ends.searchsorted(overlap, side="right"))
    stops = passes[:known] - np.append(passes[1:], 0)[:known]
    places, left = compiled.junctions(ends, passes, overlap)
    assert places.tolist() == ends[:known].tolist() and left.tolist() == np.maximum(stops, 0).tolist()
    path = [SimpleNamespace(end=end, passes=often) for end, often in zip(ends.tolist(), passes.tolist(), strict=True)]
    assert [found.tolist() for found in compiled.edges_of(path)] == [ends.tolist(), passes.tolist()]


@given(st.sets(st.integers(1, 90)), st.integers(0, 90), st.integers(0, 90))
def test_a_prefill_ends_its_segments_at_each_cut(positions: set[int], start: int, more: int) -> None:
    found = compiled.segment_ends(np.asarray(sorted(positions), dtype=np.int64), start, start + more)
    assert found.tolist() == [*(cut for cut in sorted(positions) if start < cut < start + more), start + more]


def test_one_tick_moves_who_comes_of_each_age() -> None:
    generator, later, window = np.random.default_rng(0), np.asarray([1, 4, 16]), 16
    alive = generator.integers(0, 9, (window, 7)).astype(np.int16)
    waiting, events, exposure = generator.integers(0, 99, (3, 4, 7)).astype(float)
    waits, spent = compiled.Waits(alive, waiting, events, exposure, np.append(0, later), 39), exposure.copy()
    for clock in range(40, 80):
        older = alive[(clock - later) % window]
        expected = waiting.copy()
        expected[:-1] -= older
        expected[1:-1] += older[:-1]
        spent = spent + expected
        waits.tick()
        assert waits.clock == clock and not alive[clock % window].any()
        if clock % 3:
            waits.accrue()
            assert (exposure == spent).all()
        assert (waiting == expected).all()
        alive[clock % window] = generator.integers(0, 9, 7)


def test_a_copy_of_waits_keeps_what_it_shares() -> None:
    counts = np.zeros((8, 2), dtype=np.int16), *np.zeros((3, 3, 2))
    waits = compiled.Waits(*counts, np.asarray([0, 1, 8]))
    for others, (alive, waiting, events, exposure) in (
        copy.deepcopy((waits, counts)),
        pickle.loads(pickle.dumps((waits, counts))),
    ):
        others.enter(1)
        for _ in range(5):
            others.tick()
        others.hit(1, 0)
        others.leave(1, 0)
        others.accrue()
        assert events[:, 1].tolist() == [0, 1, 0] and exposure[:, 1].tolist() == [0, 5, 0]
        assert not alive.any() and not waiting.any() and others.clock == 5
    assert waits.clock == 0 and not any(array.any() for array in counts)


def test_what_would_lead_outside_an_array_is_refused() -> None:
    counts, places = np.zeros((3, 4)), np.asarray([1, 2])
    alive = np.zeros((8, 4), dtype=np.int16)
    sound = compiled.Waits(alive, counts, counts, counts, np.asarray([0, 1, 8]), 9)
    for ages, clock, waiting in (
        ([0, 1, 8], -1, counts),
        ([0, 1, 9], 9, counts),
        ([0, 1, 8], 9, counts[:2]),
        ([1, 2, 8], 9, counts),
    ):
        with pytest.raises(ValueError):
            compiled.Waits(alive, waiting, counts, counts, np.asarray(ages), clock)
    for row, since in ((4, 9), (-1, 9), (0, 10), (0, -1)):
        for told in (sound.leave, sound.hit):
            with pytest.raises(ValueError, match="row"):
                told(row, since)
    with pytest.raises(ValueError, match="row"):
        sound.enter(4)
    bins = np.asarray([0, 1, 2], dtype=np.uint8)
    for cells, ticks, now in (([3], [5], 5), ([-1], [5], 5), ([0], [5], 4), ([0, 1], [5], 5)):
        with pytest.raises(ValueError):
            compiled.looked_up(counts, np.asarray(cells), np.asarray(ticks), now, bins)
    with pytest.raises(ValueError, match="rates"):
        compiled.Leaving(0.0).until(1.0, [None], np.ones(2), np.ones(1))
    with pytest.raises(ValueError, match="cuts"):
        compiled.shares(np.ones(3), np.asarray([64, 128]), [64], [0], [0.0])
    with pytest.raises(ValueError, match="stops"):
        compiled.viewed([], np.ones(1), Shape(9, 0, places, places[:1], places, 0))
    with pytest.raises(ValueError, match="contexts"):
        compiled.leaning(np.ones((5, 8)), [0] * 5, 5, 8.0)
    with pytest.raises(ValueError, match="passes"):
        compiled.junctions(places, places[:1], 1)
    model: Any = OverlapModel()
    model.views = model.views[1:]
    with pytest.raises(ValueError, match="views"):
        compiled.credited(model, 1, places, Shape(9, 0, places, places, places, 0), 8.0)
    with pytest.raises(ValueError, match="edges"):
        compiled.Histogram(np.ones(1))


class Reference:
    """What goes, in plain Python: a heap of what changed beside a sorted list of the rest."""

    def __init__(self) -> None:
        self.gone: dict[Any, None] = {}
        self.freed, self.lost = 0, 0.0
        self.references: dict[Any, int] = {}
        self.given: dict[Any, float] = {}

    def above(self, checkpoint: Any) -> Any:
        found = checkpoint.above()
        while found is not None and found in self.gone:
            found = found.above()
        return found

    def bytes_of(self, checkpoint: Any) -> int:
        total, segment = checkpoint.nbytes, checkpoint.kv
        while segment is not None and not segment.holds and self.references.get(segment, segment.refs) <= 1:
            total += segment.nbytes
            segment = segment.parent
        return int(total)

    def worth(self, checkpoint: Any, rate: float) -> tuple[float, float]:
        above = self.above(checkpoint)
        worth = rate * (max(checkpoint.share, LEAST_STOPPING) + self.given.get(checkpoint, 0.0))
        worth *= checkpoint.position - (above.position if above else 0)
        return worth, worth / (self.bytes_of(checkpoint) or 1)

    def add(self, checkpoint: Any) -> None:
        self.freed += checkpoint.nbytes
        segment = checkpoint.kv
        while segment is not None:
            self.references[segment] = self.references.get(segment, segment.refs) - 1
            if self.references[segment] or segment.holds:
                break
            self.freed += segment.nbytes
            segment = segment.parent
        self.gone[checkpoint] = None

    def until(self, need: float, items: list[Any], values: np.ndarray, rates: np.ndarray) -> None:
        ranked = [(value, slot, 0) for slot, value in enumerate(values.tolist()) if items[slot] is not None]
        heapq.heapify(ranked)
        latest: dict[int, float] = {}
        while self.freed < need and ranked:
            known, slot, again = heapq.heappop(ranked)
            checkpoint = items[slot]
            current = latest.get(slot) == known if again else slot not in latest
            if not current or checkpoint.pins or checkpoint in self.gone:
                continue
            above = self.above(checkpoint)
            worth, value = self.worth(checkpoint, rates.item(slot))
            if value > 1.001 * known:
                latest[slot] = value
                heapq.heappush(ranked, (value, slot, 1))
                continue
            self.lost += worth
            self.add(checkpoint)
            if above is not None:
                self.given[above] = self.given.get(above, 0.0) + self._back(checkpoint, above)
                latest[above.slot] = value = self.worth(above, rates.item(above.slot))[1]
                heapq.heappush(ranked, (value, above.slot, 1))

    def _back(self, checkpoint: Any, above: Any) -> float:
        node = checkpoint.node
        while node is not above.node:
            if node.parent is None or node.parent.recent is not node:
                return 0.0
            node = node.parent
        passing = checkpoint.share + checkpoint.onward
        part = checkpoint.share + self.given.get(checkpoint, 0.0)
        return float(above.onward * part / passing) if passing > 0.0 else 0.0


def filled(segmenting: Segmenting, kv: int, seed: int) -> CheckpointStore:
    """A store after conversations that grow, part and are asked again."""
    generator, policy, store = np.random.default_rng(seed), make_policy("learned"), CheckpointStore(60_000)
    texts = [generator.integers(0, 99, 300) for _ in range(6)]
    for _ in range(250):
        text = texts[place := int(generator.integers(6))]
        end = int(generator.integers(100, len(text) + 1))
        ids = np.concatenate([text[:end], generator.integers(0, 99, 80)]).astype(np.int32)
        texts[place] = ids if len(ids) < 900 and generator.random() < 0.6 else text
        with open_request(store, policy, ids, segmenting) as request:
            for position in request.planned:
                request.add(position, Sized(700), (lambda start, end: Sized((end - start) * kv)) if kv else None)
    return store


@pytest.mark.parametrize("kv", [0, 3])
@pytest.mark.parametrize(
    "segmenting", [Bitwise(CutRule(32)), Replayable(CutRule(32), 32)], ids=["bitwise", "replayable"]
)
def test_what_goes_is_what_plain_python_says(segmenting: Segmenting, kv: int) -> None:
    for seed in range(3):
        store = filled(segmenting, kv, seed)
        eviction = store.eviction
        assert isinstance(eviction, LeastValue) and store.evictions
        rates, values = eviction.tables.rates(eviction.cells, eviction.ticks, eviction.now), eviction.values()
        several = 0
        for need in (1.0, 2_000.0, 20_000.0, 1e9):
            found, expected = compiled.Leaving(LEAST_STOPPING), Reference()
            found.until(need, eviction.items, eviction.gains, rates)
            expected.until(need, eviction.items, values, rates)
            assert list(found.gone) == list(expected.gone) and found.freed == expected.freed
            assert found.lost == expected.lost
            several = max(several, len(found.gone))
        assert several > 5 and found.freed == store.used_bytes


def test_the_twin_that_ranks_nothing_again_differs() -> None:
    """A set that frees keys and values together is worth other than its members: the walk has to rank anew."""
    differs = 0
    for seed in range(3):
        eviction: Any = filled(Bitwise(CutRule(32)), 3, seed).eviction
        order = [eviction.items[slot] for slot in eviction.ranked()[0].tolist()]
        differs += order != list(eviction._leaving(1e9).gone)
    assert differs == 3


def test_a_walk_compares_tokens() -> None:
    store = CheckpointStore(None)
    for tail in ([1, 2, 3], [1, 2, 4, 5], [9]):
        store.remember(np.asarray([7, 7, *tail], dtype=np.int32))
    for ids, depth, nodes in (
        ([7, 7, 1, 2, 4, 6], 5, 3),
        ([7, 7, 1, 9], 3, 2),
        ([7], 1, 1),
        ([8, 7], 0, 0),
        ([], 0, 0),
    ):
        path, found = store.forest.walk(np.asarray(ids, dtype=np.int64), "")
        assert (found, len(path)) == (depth, nodes)


def test_all_that_is_compiled_has_its_place() -> None:
    assert set(compiled.__all__) == {name for name in dir(_planner) if not name.startswith("_")} - {
        "array",
        "asarray",
        "empty",
    }
