"""Oracles: obviously correct, slow, and used by nothing but tests and benchmarks."""

import math
from itertools import combinations


def placement_cost(weights, prefill_cost, positions):
    """sum_d w_d (G(d) - G(last checkpoint <= d)), straight from the definition."""
    return math.fsum(
        weight * (prefill_cost[depth] - prefill_cost[max((p for p in positions if p <= depth), default=0)])
        for depth, weight in enumerate(weights)
    )


def brute_force(weights, prefill_cost, candidates, max_checkpoints, checkpoint_cost):
    """(objective, number of checkpoints) of the best subset of the candidates; the smallest one on a tie."""
    most = len(candidates) if max_checkpoints is None else min(max_checkpoints, len(candidates))
    return min(
        (placement_cost(weights, prefill_cost, subset) + checkpoint_cost * size, size)
        for size in range(most + 1)
        for subset in combinations(candidates, size)
    )


def recurrence(weights, prefill_cost, candidates, max_checkpoints, checkpoint_cost):
    """The best objective by the plain O(N^2 M) recurrence over (number of checkpoints, last checkpoint)."""
    places = [0, *candidates, len(weights)]
    # span[i][j]: cost of the depths from place i up to place j when i is the last checkpoint
    span = [[0.0] * len(places) for _ in places]
    for i, start in enumerate(places):
        for j in range(i + 1, len(places)):
            depths = range(places[j - 1], places[j])
            span[i][j] = span[i][j - 1] + sum(weights[d] * (prefill_cost[d] - prefill_cost[start]) for d in depths)
    end = len(places) - 1
    most = len(candidates) if max_checkpoints is None else min(max_checkpoints, len(candidates))
    paid = [0.0] + [math.inf] * (end - 1)  # by the last checkpoint
    best = span[0][end]
    for _ in range(most):
        paid = [min((paid[i] + span[i][j] for i in range(j)), default=math.inf) + checkpoint_cost for j in range(end)]
        best = min(best, min(paid[j] + span[j][end] for j in range(end)))
    return best
