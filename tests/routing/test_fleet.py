"""`simulate(replicas=, router=, fleet=)`: what routing and a shared tier are worth, and one replica as ever."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hf_sparse_cache import simulate
from hf_sparse_cache.planning.policies import Last
from hf_sparse_cache.routing.fleet import Arrival, Fleet
from hf_sparse_cache.routing.router import Rules
from hf_sparse_cache.simulator import SimulationResult
from hf_sparse_cache.stats import RequestInfo


OPTIONS: dict[str, Any] = {"policy": "junction", "state_bytes": 100, "kv_bytes_per_token": 2, "grid": 16}
FLEET = Fleet(block=16, rules=Rules(least_tokens=16), publish_seconds=0.05)


def agents(count: int = 12, turns: int = 5, systems: int = 4) -> tuple[list[np.ndarray], list[int]]:
    """Conversations, each behind one of a few long system prompts, interleaved; and whose each prompt is."""
    draw = np.random.default_rng(5)
    heads = [draw.integers(0, 90, 800) for _ in range(systems)]
    histories = [heads[number % systems] for number in range(count)]
    prompts, owners = [], []
    for _ in range(turns):
        for number in draw.permutation(count).tolist():
            histories[number] = np.concatenate([histories[number], draw.integers(0, 90, 120)])
            prompts.append(histories[number].astype(np.int32))
            owners.append(number)
    return prompts, owners


PROMPTS, OWNERS = agents()


def run(prompts: Any = PROMPTS, **more: Any) -> SimulationResult:
    return simulate(prompts, **{**OPTIONS, **more})


def counts(result: SimulationResult) -> tuple[int, ...]:
    return (
        result.requests, result.prompt_tokens, result.overlap_tokens, result.resumed_tokens, result.checkpoints,
        result.peak_bytes, result.evictions,
    )  # fmt: skip


@pytest.mark.parametrize("router", ["prefix", "round_robin", "session", lambda arrival: 0])
@pytest.mark.parametrize("max_memory", [None, 20_000])
def test_one_replica_is_as_ever_whoever_routes(router: Any, max_memory: int | None) -> None:
    rows: list[list[RequestInfo]] = [[], []]
    fleet = replace(FLEET, sessions=OWNERS)
    plain = run(max_memory=max_memory, on_request=rows[0].append, warmup=0.2)
    routed = run(max_memory=max_memory, on_request=rows[1].append, warmup=0.2, router=router, fleet=fleet)
    assert counts(plain) == counts(routed) and rows[0] == rows[1]
    assert plain.served is None and routed.served is not None and routed.served.requests == (60,)
    computed = [row.computed_tokens / 5000 for row in rows[1]]
    assert routed.served.mean_seconds == pytest.approx(sum(computed[12:]) / 48)
    assert routed.served.seconds == pytest.approx(sum(computed)) and routed.served.busy == pytest.approx(1.0)


def test_prefixes_find_their_replica_and_round_robin_does_not() -> None:
    fleet = replace(FLEET, sessions=OWNERS, requests_per_second=5.0)
    alone = run(fleet=fleet)
    prefix, session, turns = (
        run(replicas=4, router=router, fleet=fleet) for router in ("prefix", "session", "round_robin")
    )
    assert prefix.overlap_tokens == session.overlap_tokens == turns.overlap_tokens == alone.overlap_tokens
    assert prefix.resumed_tokens >= 0.95 * alone.resumed_tokens
    assert prefix.resumed_tokens > session.resumed_tokens > turns.resumed_tokens
    assert all(result.served is not None and sum(result.served.requests) == 60 for result in (prefix, turns))
    assert turns.served is not None and turns.served.requests == (15,) * 4 and turns.served.digest_bytes == 0
    assert prefix.served is not None and prefix.served.digest_bytes > 0 == prefix.served.fetched_bytes


def test_without_sessions_the_digests_alone_do_it() -> None:
    fleet = replace(FLEET, requests_per_second=5.0)
    alone, several = run(fleet=fleet), run(replicas=4, fleet=fleet)
    assert several.resumed_tokens >= 0.95 * alone.resumed_tokens
    deaf = run(replicas=4, fleet=replace(fleet, rules=Rules(least_tokens=10**6)))  # the twin: no prefix is long enough
    assert deaf.resumed_tokens < 0.9 * alone.resumed_tokens


def test_a_shared_tier_gives_every_replica_what_one_has_read() -> None:
    fleet = replace(FLEET, requests_per_second=5.0, lookup_seconds=0.01)
    alone = run(router="round_robin", fleet=fleet)
    apart = run(replicas=4, router="round_robin", fleet=fleet)
    shared = run(replicas=4, router="round_robin", fleet=replace(fleet, shared=True))
    assert shared.resumed_tokens >= 0.93 * alone.resumed_tokens > apart.resumed_tokens  # short ways are not looked up
    assert shared.served is not None and apart.served is not None
    assert shared.served.fetched_bytes > 0 and shared.served.written_bytes > 0
    assert shared.served.mean_seconds < apart.served.mean_seconds
    small = run(replicas=4, router="round_robin", fleet=replace(fleet, shared=True, shared_memory=10_000))
    assert apart.resumed_tokens <= small.resumed_tokens < shared.resumed_tokens


def test_bytes_and_seconds_of_a_shared_tier_by_hand() -> None:
    ids = np.arange(1000, dtype=np.int32)
    found: list[RequestInfo] = []
    fleet = Fleet(shared=True, network_bytes_per_second=1000.0, lookup_seconds=0.5, answer_seconds=2.0)
    options = {**OPTIONS, "policy": "last", "grid": 100}
    result = simulate(
        [ids, ids, ids], router=lambda arrival: arrival.index % 2, replicas=2, fleet=fleet, on_request=found.append,
        **options,
    )  # fmt: skip
    assert [row.resumed_tokens for row in found] == [0, 900, 900]  # the last cut that leaves two tokens
    assert result.served is not None
    assert result.served.written_bytes == result.served.fetched_bytes == 100 + 900 * 2
    # The third has all but 100 of its tokens in its own memory: it does not look.
    wanted = [0.5 + 1000 / 5000, 0.5 + 1.9 + 100 / 5000, 100 / 5000]
    assert result.served.mean_seconds == pytest.approx(sum(wanted) / 3)
    assert result.served.seconds == pytest.approx(sum(wanted) + 3 * 2.0)


def test_files_take_what_is_held_and_memory_whole_pages() -> None:
    ids = np.arange(1000, dtype=np.int32)
    options = {**OPTIONS, "policy": "last", "grid": 100, "state_bytes": 40_000, "kv_bytes_per_token": 500}
    fleet = Fleet(shared=True)
    paged, plain = (
        simulate([ids, ids], router="round_robin", replicas=2, fleet=fleet, page_bytes=page, **options)
        for page in (4096, 1)
    )
    assert paged.served is not None and paged.served == plain.served
    assert paged.served.written_bytes == paged.served.fetched_bytes == 40_000 + 900 * 500
    assert plain.peak_bytes == 2 * (40_000 + 900 * 500)
    assert paged.peak_bytes == 2 * (10 + 9 * 13) * 4096  # in both replicas, one of which has read it


def test_files_of_the_shared_tier_take_what_they_are_packed_to() -> None:
    ids = np.arange(1000, dtype=np.int32)
    fleet = Fleet(shared=True, network_bytes_per_second=1000.0)
    options = {**OPTIONS, "policy": "last", "grid": 100, "replicas": 2, "router": lambda arrival: arrival.index % 2}
    for packing, limit, takes in ((1.0, 1900, 1900), (0.7, 1330, 1330), (0.7, 1329, 0), (1.0, 1330, 0)):
        result = simulate([ids] * 2, fleet=replace(fleet, packing=packing, shared_memory=limit), **options)
        assert result.served is not None
        # What does not fit into the budget as it is packed is neither written nor read.
        assert (result.served.written_bytes, result.served.fetched_bytes) == (takes, takes), (packing, limit)
        seconds = [1000 / 5000, (takes / 1000 + 100 / 5000) if takes else 1000 / 5000]
        assert result.served.mean_seconds == pytest.approx(sum(seconds) / 2)


def test_a_crowd_spreads_and_waits_in_lines() -> None:
    ids = [np.arange(2000, dtype=np.int32)] * 200
    fleet = replace(FLEET, requests_per_second=40.0, answer_seconds=0.2, rules=Rules(most_ahead=2))
    crowd = run(ids, replicas=4, fleet=fleet)
    held = run(ids, replicas=4, fleet=replace(fleet, rules=Rules(most_ahead=10**6)))
    assert crowd.served is not None and held.served is not None
    assert sorted(held.served.requests) == [0, 0, 0, 200] and min(crowd.served.requests) > 30
    assert crowd.served.mean_seconds < held.served.mean_seconds / 3
    assert 0.25 < held.served.busy + 0.01 < 0.27 and crowd.served.busy > 0.8


def test_outputs_are_stored_where_they_were_written() -> None:
    draw = np.random.default_rng(2)
    first, answer, question = (draw.integers(0, 90, size).tolist() for size in (400, 300, 50))
    rows = [{"input_ids": first, "output_ids": answer}, {"input_ids": [*first, *answer, *question]}]
    options = {**OPTIONS, "policy": "last", "store_outputs": True}
    for shared, resumed in ((False, 0), (True, 688)):
        fleet = Fleet(shared=shared)
        result = simulate(rows, replicas=2, router="round_robin", fleet=fleet, **options)
        assert (result.overlap_tokens, result.resumed_tokens) == (700, resumed)


def test_what_a_router_of_ones_own_is_given() -> None:
    seen: list[Arrival] = []

    def first_free(arrival: Arrival) -> int:
        seen.append(replace(arrival, loads=tuple(arrival.loads)))
        return min(range(3), key=lambda number: arrival.loads[number])

    fleet = Fleet(requests_per_second=100.0, sessions=OWNERS)
    result = run(replicas=3, router=first_free, fleet=fleet)
    assert [arrival.index for arrival in seen] == list(range(60))
    assert [arrival.session for arrival in seen] == OWNERS and seen[0].loads == (0, 0, 0)
    assert max(max(arrival.loads) for arrival in seen) > 1
    assert result.served is not None and max(result.served.requests) - min(result.served.requests) < 5


def test_policies_and_evictions_are_each_replicas_own() -> None:
    ids = [np.arange(300, dtype=np.int32)] * 6
    policy = Last()
    both = simulate(ids, policy=policy, replicas=2, router="round_robin", state_bytes=1, grid=100, max_memory=1)
    assert both.checkpoints == 2 and both.peak_bytes == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"replicas": 0}, ValueError, "replicas"),
        (
            {"router": "best"},
            ValueError,
            "router must be one of prefix, round_robin, session, or a function",
        ),
        ({"router": 7}, TypeError, "router must be a name or a function"),
        ({"router": "session"}, ValueError, r"give Fleet\(sessions=...\)"),
        ({"router": lambda arrival: 5}, ValueError, "router gave 5 for request 0; replicas are 0 to 1"),
        ({"fleet": Fleet(sessions=[1])}, ValueError, "Fleet.sessions has 1 entries"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(**{"replicas": 2, **arguments})


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_tokens_per_second": 0}, {"network_bytes_per_second": -1}, {"lookup_seconds": -1},
        {"requests_per_second": 0}, {"publish_seconds": 0}, {"answer_seconds": -1}, {"shared_memory": "much"},
        {"packing": 0}, {"packing": 1.2}, {"packing": float("nan")},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Fleet(**settings)
