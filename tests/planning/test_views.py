"""Every view answers with a distribution function over depths, before and after it has learned."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.planning.overlap import shape_of
from hf_sparse_cache.planning.views import VIEWS, View


@pytest.mark.parametrize("kind", VIEWS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_is_a_distribution(kind: type[View], data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 5000))
    overlap = data.draw(st.integers(0, length))
    ends = np.unique(np.asarray(data.draw(st.lists(st.integers(1, length), max_size=4)), np.int64))
    passes = np.sort(data.draw(st.lists(st.integers(1, 9), min_size=len(ends), max_size=len(ends))))[::-1]
    shape = shape_of(length, overlap, ends, np.asarray(passes, np.int64), np.arange(64, length, 64), None)
    view = kind()
    for depth in [0, *data.draw(st.lists(st.integers(0, length), max_size=5))]:
        below = view.below(np.linspace(0, length + 1, 40), shape)
        assert abs(below[0]) < 1e-9
        assert abs(below[-1] - 1) < 1e-9
        assert (np.diff(below) >= -1e-12).all()
        view.learn(depth, shape, 1.0, 0.99)
