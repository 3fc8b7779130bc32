"""Cuts are a pure, causal function of the prompt's own tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.planning.cuts import cut_positions


IDS = st.lists(st.integers(0, 5), max_size=60).map(lambda ids: np.asarray(ids, dtype=np.int32))
GRIDS = st.integers(1, 16)
SPECIALS = st.sets(st.integers(0, 5), max_size=2)


def naive(ids: list[int], grid: int, cut_ids: set[int], distance: int) -> list[int]:
    cuts: list[int] = []
    for position in range(1, len(ids) - 1):
        wanted = position % grid == 0 or ids[position - 1] in cut_ids
        if wanted and position - (cuts[-1] if cuts else 0) >= distance:
            cuts.append(position)
    return cuts


@given(IDS, GRIDS, SPECIALS)
def test_equals_the_naive_scan(ids: np.ndarray, grid: int, cut_ids: set[int]) -> None:
    distance = min(grid, max(2, grid // 4))
    assert cut_positions(ids, grid, cut_ids).tolist() == naive(ids.tolist(), grid, cut_ids, distance)


@given(IDS, GRIDS, SPECIALS, st.integers(0, 60))
def test_cuts_of_a_prefix_are_those_of_the_whole(ids: np.ndarray, grid: int, cut_ids: set[int], length: int) -> None:
    whole = cut_positions(ids, grid, cut_ids)
    prefix = cut_positions(ids[:length], grid, cut_ids)
    assert prefix.tolist() == whole[whole <= min(length, len(ids)) - 2].tolist()


def test_tokens_after_the_cut_decide_nothing() -> None:
    ids = np.zeros(100, dtype=np.int32)
    other = ids.copy()
    other[70:] = 1
    a, b = cut_positions(ids, 16, [1]), cut_positions(other, 16, [1])
    assert a[a <= 70].tolist() == b[b <= 70].tolist()


@pytest.mark.parametrize(("grid", "distance"), [(0, None), (8, 0), (8, 9)])
def test_bad_arguments(grid: int, distance: int | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        cut_positions(np.zeros(4, np.int32), grid, (), distance)
