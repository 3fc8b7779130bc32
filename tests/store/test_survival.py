"""Survival tables recover the hazards that made the data, and what superseded a path lowers its value."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.simulator import simulate
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.survival import (
    AGE_EDGES,
    HALF_LIVES,
    LEAST_SHARE,
    LEVEL_EDGES,
    PASS_EDGES,
    PERIOD,
    WINDOW,
    SurvivalTables,
    cell_of,
)
from hf_sparse_cache.store.value import LeastValue


def feed(tables: SurvivalTables, hazard: float, most: int, ticks: int = 6000) -> None:
    """Families that are passed with a constant hazard until they were passed `most` times."""
    generator = np.random.default_rng(2)
    alive: list[tuple[int, int]] = []
    for now in range(1, ticks):
        tables.advance(now)
        waiting = []
        for passes, since in alive:
            if passes < most and generator.random() < hazard:
                tables.waits.hit(cell_of(passes, 1), since)
                tables.waits.leave(cell_of(passes, 1), since)
                tables.waits.enter(cell_of(passes + 1, 1))
                waiting.append((passes + 1, now))
            elif now - since < 1000:
                waiting.append((passes, since))
        alive = waiting
        if now % 20 == 0:
            tables.waits.enter(cell_of(1, 1))
            alive.append((1, now))


def test_tables_recover_a_constant_hazard_and_the_last_pass() -> None:
    tables = SurvivalTables()
    feed(tables, 0.02, 4)
    for passes in (1, 2, 3):
        assert 0.012 < tables.rate(cell_of(passes, 1)) < 0.035
    assert tables.rate(cell_of(4, 1), 100) < 0.003
    assert tables.rate(cell_of(1, 1)) > 2 * tables.rate(cell_of(1, 1), 600)


def test_an_edge_is_counted_where_its_passes_and_its_depth_begin() -> None:
    """Each pair of edges has a row of its own, up to the next edges; what lies beyond the last is as the last."""
    rows = [cell_of(int(passes), int(level)) for passes in PASS_EDGES for level in LEVEL_EDGES]
    assert rows == [*range(0, 2 * len(PASS_EDGES) * len(LEVEL_EDGES), 2)]
    assert len(SurvivalTables().index) == 2 * len(rows)
    assert cell_of(0, 0) == cell_of(1, 1) and cell_of(10_000, 10_000) == rows[-1]
    for edges, cell in ((PASS_EDGES, lambda edge: cell_of(edge, 3)), (LEVEL_EDGES, lambda edge: cell_of(3, edge))):
        for edge, following in pairwise(map(int, edges)):
            assert {cell(between) for between in range(edge, following)} == {cell(edge)} != {cell(following)}


def test_tables_are_of_fixed_size_and_forget_what_is_too_old() -> None:
    tables = SurvivalTables()
    before = tables._alive.nbytes
    tables.waits.enter(cell_of(1, 1))
    tables.advance(WINDOW + 5)
    tables.waits.hit(cell_of(1, 1), 0)
    tables.waits.leave(cell_of(1, 1), 0)
    assert tables._alive.nbytes == before
    assert (tables._alive >= 0).all()
    assert (tables._waiting == 0).all()


@given(st.lists(st.tuples(st.sampled_from("eblt"), st.integers(0, 30)), max_size=60))
def test_waiting_times_are_those_of_a_naive_count(steps: list[tuple[str, int]]) -> None:
    tables = SurvivalTables((np.inf,))
    cells = [cell_of(1, 1), cell_of(2, 3)]
    waiting: list[tuple[int, int]] = []
    exposure = np.zeros_like(tables._new_exposure)
    now = 0
    for step, number in steps:
        if step == "e":
            tables.waits.enter(cells[number % 2])
            waiting.append((cells[number % 2], now))
        elif step == "t":
            for _ in range(number):
                now += 1
                tables.advance(now)
                for cell, since in waiting:
                    exposure[np.searchsorted(AGE_EDGES, now - since, side="right") - 1, cell] += 1
        elif waiting and step == "b":
            cell, since = waiting[number % len(waiting)]
            waiting[number % len(waiting)] = tables.bypass(cell, since), since
        elif waiting:
            tables.waits.leave(*waiting.pop(number % len(waiting)))
    tables.waits.accrue()
    assert np.array_equal(tables._exposure[0] + tables._new_exposure, exposure)


def test_a_root_that_all_share_does_not_make_young_paths_hot() -> None:
    tables = SurvivalTables()
    root, fresh = cell_of(10**6, 1), cell_of(1, 2)
    for now in range(1, 20 * PERIOD):
        tables.advance(now)
        if now > 1:
            tables.waits.hit(root, now - 1)
            tables.waits.leave(root, now - 1)
        tables.waits.enter(root)
        tables.waits.enter(fresh)
        if now > 100 and now % 4 == 0:  # every fourth comes back, and never before its hundredth request
            tables.waits.hit(fresh, now - 100)
            tables.waits.leave(fresh, now - 100)
    assert tables.rate(root) > 0.5
    assert tables.rate(fresh) < 0.01


def test_a_path_left_for_another_is_worth_less_than_the_one_that_took_its_place() -> None:
    generator = np.random.default_rng(4)
    eviction = LeastValue()
    text = [generator.integers(0, 1000, 640).astype(np.int32) for _ in range(6)]
    revisions = []
    for _ in range(240):  # each text is edited somewhere: what came behind the edit is never seen again
        which = int(generator.integers(len(text)))
        edit = int(generator.integers(64, 576))
        text[which] = np.concatenate([text[which][:edit], generator.integers(0, 1000, 640 - edit).astype(np.int32)])
        revisions.append(text[which])
    simulate(revisions, eviction=eviction, state_bytes=1, max_memory=24, grid=32)
    cells = [cell_of(passes, level) for passes in (1, 2) for level in (2, 3, 4)]
    newest = np.mean([eviction.tables.rate(cell) for cell in cells])
    superseded = np.mean([eviction.tables.rate(cell + 1) for cell in cells])
    assert newest > 3 * superseded


def test_only_a_fork_supersedes_and_a_pass_takes_it_back() -> None:
    store = CheckpointStore(None)
    generator = np.random.default_rng(5)
    stem = generator.integers(0, 1000, 64).astype(np.int32)
    tails = [np.concatenate([[1000 + i], generator.integers(0, 1000, 63)]).astype(np.int32) for i in range(5)]

    def serve(tail: int) -> list[int]:
        ids = np.concatenate([stem, tails[tail]])
        store.ledger.clock += 1
        match = store.match(ids)
        store.eviction.passed(match.path, match.overlap, None, store.clock)
        store.eviction.settled(store.remember(ids), None, store.clock)
        root = store.forest.roots[""]
        stem_node = next(iter(root.children.values()))
        return [
            i
            for i, node in sorted((int(key) - 1000, n) for key, n in stem_node.children.items())
            if node.waiting is not None and node.waiting[0] % 2
        ]

    serve(0)
    assert serve(1) == [0]
    assert serve(0) == [1]  # passed again, it is the newest
    assert serve(2) == [0, 1]
    assert serve(3) == [0, 1]  # four paths are no fork


# -- the plain way ----------------------------------------------------------------------------------------------------


class Plain:
    """What the tables make of what was seen, one number after the other."""

    ROWS = 2 * len(LEVEL_EDGES)
    AGES = AGE_EDGES.tolist()
    WIDTHS = (*np.diff(AGE_EDGES).tolist(), AGE_EDGES[-1])

    def __init__(self, half_lives: tuple[float, ...], strength: float) -> None:
        self.half_lives, self.strength = half_lives, strength
        shape = (len(half_lives), len(PASS_EDGES), self.ROWS, len(self.AGES))
        self.events, self.waited = np.zeros(shape), np.zeros(shape)
        self.shares = [1.0 / len(half_lives)] * len(half_lives)
        self.solve()

    def solve(self) -> None:
        self.hazards = np.stack([self.learned(*both) for both in zip(self.events, self.waited, strict=True)])

    def learned(self, events: np.ndarray, waited: np.ndarray) -> np.ndarray:
        lean, found = self.strength, np.zeros(events.shape)
        before = 0.5 / (np.asarray(self.AGES) + 5.0)
        for passes, (seen, spent) in enumerate(zip(events, waited, strict=True)):
            before = (seen.sum() + lean) / (sum(float(row @ before) for row in spent) + lean) * before
            counted = zip(seen.T, spent.T, before, strict=True)
            before = np.asarray([(s.sum() + lean) / (w.sum() + lean / one) for s, w, one in counted])
            for row in range(self.ROWS):
                own = (seen[row].sum() + lean) / (float(spent[row] @ before) + lean)
                hazard = (seen[row] + 2 * lean) / (spent[row] + 2 * lean / (before * own))
                found[passes, row] = np.minimum(np.maximum(hazard, 1e-7), 1.0)
        return found

    def update(self, events: np.ndarray, waited: np.ndarray, ticks: int) -> None:
        """Of shape (ages, cells), as the tables have them."""
        new, spent = (each.T.reshape(self.events.shape[1:]) for each in (events, waited))
        said = [float((np.log(hazard) * new).sum() - (hazard * spent).sum()) for hazard in self.hazards]
        often = [share * np.exp(one - max(said)) for share, one in zip(self.shares, said, strict=True)]
        self.shares = [(1.0 - LEAST_SHARE) * one / sum(often) + LEAST_SHARE / len(often) for one in often]
        for speed, half_life in enumerate(self.half_lives):
            keep = 0.5 ** (ticks / half_life)
            self.events[speed] = (self.events[speed] + new) * keep
            self.waited[speed] = (self.waited[speed] + spent) * keep
        self.solve()

    def index(self, cell: int, age: int) -> float:
        """Best rate of hits over any time that ends with a bin of ages, from the bin of an age on."""
        first = max(bin for bin, edge in enumerate(self.AGES) if edge <= min(age, WINDOW))
        mixed = sum(share * hazard for share, hazard in zip(self.shares, self.hazards, strict=True))
        hazard = mixed.reshape(-1, len(self.AGES))[cell]
        best, spent, through = 0.0, 0.0, 1.0
        for bin in range(first, len(self.AGES)):
            missed = np.exp(-hazard[bin] * self.WIDTHS[bin])
            spent += through * (1.0 - missed) / hazard[bin]
            through *= missed
            best = max(best, (1.0 - through) / spent)
        return best


@pytest.mark.parametrize(("half_lives", "strength"), [(HALF_LIVES, 1.5), ((20.0, 90.0, 700.0), 0.7)])
def test_the_tables_are_what_one_number_after_the_other_says(half_lives: tuple[float, ...], strength: float) -> None:
    generator = np.random.default_rng(8)
    tables, plain = SurvivalTables(half_lives, strength), Plain(half_lives, strength)
    events, waited = tables._new_events, tables._new_exposure
    ages = [0, 1, 3, 4, 5, 100, 16383, 16384, 99_999]
    updated, updates = 0, []
    for now in range(400):
        if generator.random() < 0.3:
            events[:] += (generator.random(events.shape) < 0.05) * generator.integers(0, 3, events.shape)
            waited[:] += 5.0 * (generator.random(events.shape) < 0.2)
        if now == 100:
            waited[5:, 40:50], events[0, 60:70] = 1e9, 1e6
        ticks = now - updated
        if ticks >= (PERIOD if now > 4 * PERIOD else PERIOD // 8):
            plain.update(events.copy(), waited.copy(), ticks)
            updated, updates = now, [*updates, now]
        tables.advance(now)
        assert tables.waits.clock == now and (updated != now or not now or not (events.any() or waited.any()))
        if updated == now:
            assert tables.shares == pytest.approx(plain.shares)
        if now in (0, 120, 399):
            for cell in generator.integers(0, len(tables.index), 20).tolist():
                told = [tables.rate(cell, age) for age in ages]
                assert told == pytest.approx([plain.index(cell, age) for age in ages], rel=1e-9)
    assert updates == [*range(8, 257, 8), 320, 384]
    assert tables.rate(3) == tables.rate(3, 0)
    cells = generator.integers(0, len(tables.index), len(ages))
    expected = [tables.rate(int(cell), age) for cell, age in zip(cells, ages, strict=True)]
    assert tables.rates(cells, 99_999 - np.asarray(ages), 99_999).tolist() == expected


def test_an_edge_that_was_left_for_another_waits_in_the_row_behind() -> None:
    tables = SurvivalTables()
    tables.waits.enter(4)
    tables.advance(3)
    assert tables.bypass(4, 0) == 5
    assert tables._waiting[:, 4].sum() == 0 and tables._waiting[:, 5].sum() == 1
    assert tables.bypass(5, 0) == 5  # is there
    assert tables._waiting[:, 5].sum() == 1 and tables._waiting.sum() == 1


def test_what_waits_is_counted_before_it_is_learned_from() -> None:
    """Time that nobody has counted yet belongs to the update that it ends with."""
    tables, twin = SurvivalTables(), SurvivalTables()
    for each in (tables, twin):
        each.waits.enter(4)
        each.advance(PERIOD // 8 - 1)
    twin.waits.accrue()
    for each in (tables, twin):
        each.advance(PERIOD // 8)
    assert tables.index.tolist() == twin.index.tolist()
    assert tables._exposure.sum() == pytest.approx(sum(8 * 0.5 ** (8 / half) for half in HALF_LIVES))
