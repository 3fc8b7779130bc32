"""What pricing memory looks at: nothing more than the first to go where nothing is to place."""

from typing import Any
from unittest import mock

import numpy as np
import pytest

from hf_sparse_cache import CheckpointStore
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.policies import make_policy
from hf_sparse_cache.planning.segments import Bitwise
from hf_sparse_cache.request import open_request
from hf_sparse_cache.simulator import Sized


GRID, STATE, KV = 64, 1000, 4


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
    eviction: Any = store.eviction
    with mock.patch.object(eviction, "_leaving", side_effect=eviction._leaving) as leaving:
        request = open_request(store, policy, known[:length], Bitwise(CutRule(GRID)))
        looked_at = eviction._leaving(leaving.call_args.args[0]).looked_at
        assert request.resumed_tokens == GRID * 6 and request._prompt.terms.price > 0.0
        request.close()
    if most is None:
        assert looked_at > 12
    else:
        assert looked_at <= most and not request.planned
