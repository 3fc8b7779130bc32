"""Policies on traffic of known truth: what can be saved at most is computed, and `learned` stays near it.

The traffic is drawn by `traffic`, never tuned on: it says whether a change to placement or eviction is sound.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic import KINDS, bound, documents, sessions, stays

from benchmarks.rivals import RIVALS
from hf_sparse_cache.simulator import simulate


REQUESTS, WARMUP = 500, 0.5
STATE = 400  # bytes, in units of the keys and values of one token

# Of the most that any cache could resume: slots without KV (8 and 24 states), and as many bytes with it.
LEAST = {
    "documents": (0.72, 0.92, 0.80, 0.92),
    "sessions": (0.55, 0.85, 0.55, 0.88),
    "sessions behind a hub": (0.75, 0.88, 0.70, 0.90),
    "edits": (0.35, 0.62, 0.58, 0.82),
    "hubs": (0.68, 0.72, 0.62, 0.72),
    "bursts": (0.70, 0.92, 0.50, 0.90),
    "once": (0.55, 0.85, 0.65, 0.88),
}
BUDGETS = ((8, 1, 0), (24, 1, 0), (16_000, STATE, 1), (48_000, STATE, 1))


def best(prompts: list[np.ndarray], slots: int) -> int:
    """The optimum of a small trace without KV, by trying every set of stays."""
    kept, most = stays(prompts), 0
    for count in range(len(kept) + 1):
        for chosen in combinations(kept, count):
            busy = np.zeros(len(prompts), dtype=int)
            for stay in chosen:
                busy[stay.first : stay.last] += 1
            if busy.max(initial=0) <= slots:
                deepest: dict[int, int] = {}
                for stay in chosen:
                    deepest[stay.last] = max(deepest.get(stay.last, 0), stay.position)
                most = max(most, sum(deepest.values()))
    return most


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 2**31), st.integers(1, 3))
def test_the_bound_is_one_and_a_close_one(kind: str, seed: int, slots: int) -> None:
    prompts = KINDS[kind](np.random.default_rng(seed), 7)
    most = bound(prompts, slots, 1)
    if len(stays(prompts)) <= 12:
        optimum = best(prompts, slots)
        assert optimum <= most + 1e-6
        assert most <= 1.35 * optimum + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_learned_stays_near_what_can_be_had(kind: str) -> None:
    """Below the bound, as everything is, and not far below it."""
    prompts = KINDS[kind](np.random.default_rng(7), REQUESTS)
    for (memory, state, kv), least in zip(BUDGETS, LEAST[kind], strict=True):
        most = bound(prompts, memory, state, kv, counted=int(WARMUP * REQUESTS))
        found = simulate(prompts, max_memory=memory, state_bytes=state, kv_bytes_per_token=kv, warmup=WARMUP)
        assert least * most <= found.resumed_tokens <= most, (memory, found.resumed_tokens / most)


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_no_rival_passes_the_bound(rival: object) -> None:
    """It would be none: the memory of all of them is counted the same way."""
    _, policy, eviction = rival.variants[0]  # type: ignore[attr-defined]
    for make in (documents, sessions):
        prompts = make(np.random.default_rng(3), 150)
        found = simulate(prompts, policy=policy(), eviction=eviction(), max_memory=10, state_bytes=1)
        assert found.resumed_tokens <= bound(prompts, 10, 1)
