"""Survival tables recover the hazards that made the data, and what superseded a path lowers its value."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.simulator import simulate
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.survival import AGE_EDGES, LEVEL_EDGES, PASS_EDGES, PERIOD, WINDOW, SurvivalTables, cell_of
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
