"""What pricing memory looks at: values in order, as far as they are needed; nothing more where nothing is to place."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache import CheckpointStore
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.policies import make_policy
from hf_sparse_cache.planning.segments import Bitwise
from hf_sparse_cache.request import open_request
from hf_sparse_cache.simulator import Sized
from hf_sparse_cache.store import value
from hf_sparse_cache.store.leaving import Leaving


GRID, STATE, KV = 64, 1000, 4


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, np.inf]) | st.floats(0, 4), max_size=60), st.data())
def test_values_come_in_the_order_of_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    with mock.patch.object(value, "MANY", data.draw(st.integers(1, 20))):
        found = list(value._ascending(np.asarray(values), count))
    order = np.argsort(np.asarray(values), kind="stable")[:count].tolist()
    assert found == [(values[place], place) for place in order]


def served(store: CheckpointStore, tokens: np.ndarray, policy: object) -> None:
    with open_request(store, policy, tokens, Bitwise(CutRule(GRID))) as request:  # type: ignore[arg-type]
        for position in request.planned:
            request.add(position, Sized(STATE), lambda start, end: Sized((end - start) * KV))


@pytest.mark.parametrize(("length", "most"), [(GRID * 6 + 30, 2), (GRID * 7 + 30, None)])
def test_a_prompt_without_an_open_cut_prices_one_checkpoint(length: int, most: int | None) -> None:
    """Its twin, one cut longer, prices all that a twentieth of the budget holds."""
    generator = np.random.default_rng(3)
    policy, limit = make_policy("learned"), 300 * (STATE + 6 * GRID * KV)
    store = CheckpointStore(limit)
    for _ in range(400):
        served(store, generator.integers(0, 50_000, GRID * 6 + 20).astype(np.int32), policy)
    assert store.evictions
    known = generator.integers(0, 50_000, GRID * 7 + 30).astype(np.int32)
    with mock.patch.object(store.ledger, "max_memory", None):  # its last cut is kept, and memory is full
        served(store, known[: GRID * 6 + 20], policy)
    with mock.patch.object(Leaving, "worth", autospec=True, side_effect=Leaving.worth) as worth:
        request = open_request(store, policy, known[:length], Bitwise(CutRule(GRID)))
        looked_at = worth.call_count
        assert request.resumed_tokens == GRID * 6 and request._prompt.terms.price > 0.0
        request.close()
    if most is None:
        assert looked_at > 12
    else:
        assert looked_at <= most and not request.planned
