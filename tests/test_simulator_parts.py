"""`simulate` by hand: small traces whose every number can be reckoned, one replica and several."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_sparse_cache import CheckpointStore, simulate
from hf_sparse_cache.checks import MOST_ID, MOST_STATE_BYTES, MOST_TOKEN_BYTES
from hf_sparse_cache.planning.policies import Last
from hf_sparse_cache.routing.fleet import Arrival, Fleet, FleetTimes
from hf_sparse_cache.simulator import SimulationResult, _Sizes
from hf_sparse_cache.stats import Cause, Reason, RequestInfo
from hf_sparse_cache.store.eviction import LRU


TEXT = np.arange(100, dtype=np.int32)
OTHER = np.arange(200, 300, dtype=np.int32)
OPTIONS: dict[str, Any] = {"policy": "last", "state_bytes": 1000, "kv_bytes_per_token": 10, "grid": 40}


def run(trace: Any, **more: Any) -> SimulationResult:
    return simulate(trace, **{**OPTIONS, "progress": False, **more})


def conversation(folder: Path) -> Path:
    """A prompt with its answer, and the next turn."""
    turns = [
        {"input_ids": TEXT.tolist(), "output_ids": OTHER.tolist()},
        {"input_ids": [*TEXT.tolist(), *OTHER.tolist(), 1, 2]},
    ]
    path = folder / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, turns)))
    return path


# -- the result -------------------------------------------------------------------------------------------------------


def test_rates_of_a_result() -> None:
    found = SimulationResult(4, 1000, 500, 250, 3, 2048)
    assert (found.resume_rate, found.capture_rate, found.recomputed_tokens) == (0.25, 0.5, 62.5)
    assert (found.evictions, found.seconds, found.plan_seconds, found.served) == (0, 0.0, 0.0, None)
    nothing = SimulationResult(0, 0, 0, 0, 0, 0)
    assert (nothing.resume_rate, nothing.capture_rate, nothing.recomputed_tokens) == (0.0, 1.0, 0.0)


def test_a_result_is_a_line_and_a_table() -> None:
    found = SimulationResult(1, 4000, 2000, 1000, 1, 2048, 1500)
    assert str(found) == (
        "1 request · 4,000 tokens · overlap 2,000 · resumed 1,000 (25.0% of the prompt, 50.0% of the overlap) · "
        "1 checkpoint, peak 2,048 bytes"
    )
    shown = found._repr_html_()
    for cell in ("1", "4,000", "2,000", "1,000", "25.0%", "50.0%", "1,500", "2.0 KiB"):
        assert f">{cell}<" in shown
    assert "first token" not in shown and ">What this trace would reuse<" in shown
    served = SimulationResult(2, 8, 4, 2, 3, 4, served=FleetTimes((2,), 0.12345, 0.1, 0.2, 0.5, 9.0))
    assert str(served).endswith("3 checkpoints, peak 4 bytes · first token after 0.123 s")
    assert ">first token after, mean<" in served._repr_html_() and ">0.123 s<" in served._repr_html_()


# -- one replica ------------------------------------------------------------------------------------------------------


def test_a_trace_is_counted_behind_its_warm_up() -> None:
    infos: list[RequestInfo] = []
    trace = [TEXT, OTHER, TEXT[:90], OTHER]
    found = run(trace, warmup=0.5, on_request=infos.append)
    assert (found.requests, found.prompt_tokens, found.overlap_tokens, found.resumed_tokens) == (2, 190, 190, 160)
    assert (found.checkpoints, found.peak_bytes, found.evictions) == (2, 2 * 1800, 0) and found.served is None
    assert [(info.prompt_tokens, info.resumed_tokens, info.captured) for info in infos] == [
        (100, 0, (80,)),
        (100, 0, (80,)),
        (90, 80, ()),
        (100, 80, ()),
    ]
    assert found.seconds >= found.plan_seconds > 0
    for warmup, counted in ((0, 4), (0.24, 4), (0.25, 3), (0.74, 2), (0.99, 1)):
        assert run(trace, warmup=warmup).requests == counted
    assert run(trace).resumed_tokens == 160 and run(trace, kv_bytes_per_token=0).peak_bytes == 2000


def test_a_budget_evicts() -> None:
    found = run([TEXT, OTHER, TEXT], max_memory=1800, eviction="lru")
    assert (found.peak_bytes, found.evictions, found.resumed_tokens) == (1800, 2, 0)
    assert run([TEXT, OTHER, TEXT], max_memory="3600").evictions == 0


def test_sizes_in_pages_and_the_logits_of_an_end() -> None:
    sizes = {"state_bytes": 40000, "kv_bytes_per_token": 1000, "logits_bytes": 33000}
    exact = {"exactness": "replayable", "grid": 100, "max_checkpoints": 1}
    infos: list[RequestInfo] = []
    whole = run([TEXT], **exact, **sizes, on_request=infos.append)
    assert infos[0].captured == (100,) and whole.peak_bytes == 40000 + 33000 + 100 * 1000
    assert run([TEXT], **exact, **sizes, page_bytes=4096).peak_bytes == 40960 + 36864 + 102400
    assert run([TEXT], **{**exact, "grid": 40}, **{**sizes, "logits_bytes": 0}).peak_bytes == 140000


def test_answers_are_stored_behind_their_prompts(tmp_path: Path) -> None:
    path = conversation(tmp_path)
    infos: list[RequestInfo] = []
    found = run(path, store_outputs=True, on_request=infos.append)
    assert infos[0].captured == (80, 160) and infos[1].resumed_tokens == 160 == found.resumed_tokens
    assert found.checkpoints == 2 + len(infos[1].captured) and found.overlap_tokens == 200
    assert run(path).resumed_tokens == 80


def test_announced_prefixes_are_cut_and_kept() -> None:
    infos: list[RequestInfo] = []
    found = run([TEXT, [*range(61), *range(300, 340)]], marks=[range(61)], on_request=infos.append)
    assert 61 in infos[0].captured and found.resumed_tokens == 61
    assert run([TEXT, [*range(61), *range(300, 340)]]).resumed_tokens == 0


def test_a_policy_object_and_a_clock() -> None:
    seconds = iter(range(10**6))
    assert run([TEXT, TEXT], policy=Last(), clock=lambda: float(next(seconds))).resumed_tokens == 80
    assert next(seconds) > 0  # it was asked
    with pytest.raises(ValueError, match="^prefill_cost is for policies by name, but policy is a Last object"):
        run([TEXT], policy=Last(), prefill_cost=lambda positions: positions)
    with pytest.raises(TypeError, match="policy"):
        run([TEXT], policy=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"warmup": -0.1}, "warmup must be a fraction"),
        ({"warmup": 1}, "warmup must be a fraction"),
        ({"warmup": 1.5}, "warmup must be a fraction"),
        ({"warmup": "half"}, "warmup must be a fraction"),
        ({"grid": 0}, "grid must be a whole number, from 1"),
        ({"grid": MOST_ID + 1}, "grid must"),
        ({"cut_ids": [3, -1]}, "cut_ids must be a whole number, from 0"),
        ({"cut_ids": [MOST_ID + 1]}, "cut_ids must"),
        ({"replicas": 0}, "replicas must be a whole number, from 1"),
        ({"replicas": MOST_ID + 1}, "replicas must"),
        ({"state_bytes": 0}, "state_bytes must be a whole number, from 1"),
        ({"state_bytes": MOST_STATE_BYTES + 1}, "state_bytes must"),
        ({"kv_bytes_per_token": -1}, "kv_bytes_per_token must be a whole number, from 0"),
        ({"kv_bytes_per_token": MOST_TOKEN_BYTES + 1}, "kv_bytes_per_token must"),
        ({"logits_bytes": -1}, "logits_bytes must be a whole number, from 0"),
        ({"logits_bytes": MOST_STATE_BYTES + 1}, "logits_bytes must"),
        ({"page_bytes": 0}, "page_bytes must be a whole number, from 1"),
        ({"page_bytes": MOST_ID + 1}, "page_bytes must"),
        ({"storage": "fp4"}, "storage must be"),
        ({"exactness": "loose"}, "exactness must be 'replayable' or 'bitwise', not 'loose'"),
        ({"marks": [[0.5]]}, "marks has a prompt"),
        ({"marks": [[]]}, "marks has an empty prompt"),
        ({"router": lambda arrival: 1}, "router gave 1 for request 0; replicas are 0 to 0"),
        ({"router": lambda arrival: -1}, "router gave -1 for request 0"),
        (
            {"replicas": 2, "router": lambda arrival: arrival.index + 1},
            "router gave 2 for request 1; replicas are 0 to 1",
        ),
        ({"fleet": Fleet(sessions=["a"])}, "Fleet.sessions has 1 entries; give one for each"),
    ],
)
def test_arguments_out_of_range_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        run([TEXT, TEXT], **given)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    run([TEXT], state_bytes=1, kv_bytes_per_token=0, logits_bytes=0, page_bytes=1, grid=1, cut_ids=[0, MOST_ID])
    run([TEXT], state_bytes=MOST_STATE_BYTES, kv_bytes_per_token=MOST_TOKEN_BYTES, logits_bytes=MOST_STATE_BYTES)


# -- several ----------------------------------------------------------------------------------------------------------


FLEET = Fleet(prefill_tokens_per_second=1000.0, network_bytes_per_second=100.0, lookup_seconds=0.5)


def test_each_replica_knows_what_it_read_and_overlap_is_what_any_did() -> None:
    infos: list[RequestInfo] = []
    found = run([TEXT] * 3, replicas=2, router="round_robin", fleet=FLEET, on_request=infos.append)
    assert [info.resumed_tokens for info in infos] == [0, 0, 80]
    assert (found.overlap_tokens, found.resumed_tokens, found.checkpoints) == (200, 80, 2)
    assert found.peak_bytes == 2 * 1800 and found.served is not None
    assert found.served.requests == (2, 1) and found.served.mean_seconds == pytest.approx((0.1 + 0.1 + 0.02) / 3)
    assert found.served.fetched_bytes == found.served.written_bytes == 0


def test_what_is_shared_is_fetched_for_a_time() -> None:
    shared = Fleet(True, None, 1.0, 1000.0, 100.0, 0.5)
    text = np.arange(1000, dtype=np.int32)
    found = run([text] * 3, replicas=2, router="round_robin", fleet=shared, grid=400)
    assert found.resumed_tokens == 1600 and found.served is not None
    assert found.served.fetched_bytes == found.served.written_bytes == 9000
    looked_up = [1.0 + 0.5, 0.2 + 0.5 + 9000 / 100.0, 0.2]  # the last one has all but a few tokens itself
    assert found.served.mean_seconds == pytest.approx(sum(looked_up) / 3)
    texts = [text, text, text + 5000, text + 5000]
    twice = run(texts, replicas=2, router="round_robin", fleet=shared, grid=400).served
    assert twice is not None and twice.fetched_bytes == 18000  # each is told by what itself fetches
    assert twice.mean_seconds == pytest.approx((1.5 + 0.2 + 0.5 + 90.0) / 2)
    none = run([TEXT, OTHER], replicas=2, router="round_robin", fleet=shared)
    assert none.served is not None and none.served.fetched_bytes == 0 and none.served.written_bytes == 3600


def test_one_replica_of_a_fleet_tells_its_times() -> None:
    alone = run([TEXT, TEXT], fleet=FLEET, warmup=0.5)
    assert alone.served is not None and alone.served.requests == (2,)
    assert alone.served.mean_seconds == pytest.approx(0.02)
    assert run([TEXT], router="round_robin").served is not None and run([TEXT], replicas=2).served is not None
    assert run([TEXT, TEXT]).resumed_tokens == alone.resumed_tokens


def test_a_router_of_ones_own_is_told_what_arrives() -> None:
    told: list[Arrival] = []

    def router(arrival: Arrival) -> int:
        told.append(arrival)
        return arrival.index % 2

    run([TEXT, OTHER], replicas=2, router=router, fleet=Fleet(sessions=["a", "b"]))
    assert [(one.index, one.session) for one in told] == [(0, "a"), (1, "b")]
    assert np.array_equal(told[1].ids, OTHER)


def test_answers_count_as_overlap_wherever_they_were_given(tmp_path: Path) -> None:
    path = conversation(tmp_path)
    shared = Fleet(True, None, 1.0, 1000.0, 100.0, 0.5)
    found = run(path, store_outputs=True, replicas=2, router="round_robin", fleet=shared)
    assert found.overlap_tokens == 200 and found.served is not None and found.served.written_bytes == 5000
    assert run(path, replicas=2, router="round_robin", fleet=shared).overlap_tokens == 100


def test_each_replica_has_a_policy_and_a_lock_of_its_own() -> None:
    from hf_sparse_cache.simulator import _policies

    given = Last()
    one, two, three = _policies(given, (), None, 3)
    assert one is given and two is not given and three is not two
    assert len({id(policy.lock) for policy in (one, two, three)}) == 3
    named = _policies("last", (), None, 2)
    assert [type(policy) for policy in named] == [Last, Last] and named[0] is not named[1]
    assert copy.copy(given) is not given


def test_an_answer_that_may_not_be_kept_changes_nothing() -> None:
    sizes, info = _Sizes(1000, 10, 0, 1), RequestInfo(100, captured=(80,), reason=Reason(Cause.RESUMED))
    assert sizes.answer(None, OTHER, info) is info


def test_what_answers_take_is_counted(tmp_path: Path) -> None:
    """The state behind the answer, with the keys and values up to there; no logits."""
    path = conversation(tmp_path)
    for kv, logits in ((10, 0), (0, 0), (10, 50000)):
        found = run(path, kv_bytes_per_token=kv, logits_bytes=logits, store_outputs=True)
        assert found.peak_bytes == 3 * 1000 + 200 * kv and found.checkpoints == 3
    assert run(path, policy="none", store_outputs=True).overlap_tokens == 200  # what was said is known all the same
    exact = {"exactness": "replayable", "max_checkpoints": 1, "grid": 100}
    infos: list[RequestInfo] = []
    found = run(path, **exact, logits_bytes=7, store_outputs=True, on_request=infos.append)
    assert [info.captured for info in infos] == [(100, 199), (202,)]
    assert found.peak_bytes == 2 * (1000 + 7) + 1000 + 202 * 10


def test_left_alone_all_takes_what_it_holds() -> None:
    exact = {"exactness": "replayable", "max_checkpoints": 1, "grid": 100}
    assert run([TEXT], **exact, state_bytes=40001, kv_bytes_per_token=999).peak_bytes == 40001 + 99900
    infos: list[RequestInfo] = []
    simulate([np.arange(200)], policy="last", state_bytes=1, progress=False, on_request=infos.append)
    assert infos[0].captured == (192,) and infos[0].segments == (64, 128, 192, 200)


def test_special_tokens_and_pieces_cut() -> None:
    text = TEXT.copy()
    text[50] = 500
    infos: list[RequestInfo] = []
    for options in ({"cut_ids": [500]}, {"exactness": "replayable", "pieces": 30}, {"exactness": "replayable"}):
        run([text], policy="none", on_request=infos.append, **options)
    assert [info.segments for info in infos] == [(40, 51, 80, 100), (30, 60, 90, 100), (100,)]


def test_what_a_cut_costs_is_weighed() -> None:
    text = np.arange(2000, dtype=np.int32)
    options = {"policy": "learned", "exactness": "replayable", "progress": False}
    free, default, dear = (
        run([text], **options, **more).checkpoints for more in ({"cut_tokens": 0.0}, {}, {"cut_tokens": 1e6})
    )
    assert free == default > dear


def test_replicas_share_no_order_of_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, Any, Any]] = []

    def store(max_memory: Any, eviction: Any, max_remembered: Any) -> Any:
        made.append((max_memory, eviction, max_remembered))
        return CheckpointStore(max_memory, eviction, max_remembered)

    monkeypatch.setattr("hf_sparse_cache.simulator.CheckpointStore", store)
    order = LRU()
    options: dict[str, Any] = {"router": lambda arrival: arrival.index % 2}
    found = run([TEXT, OTHER] * 4, replicas=3, max_memory=900, eviction=order, **options)
    assert [memory for memory, _, _ in made] == [900] * 3 and made[0][1] is order
    assert len({id(one) for _, one, _ in made}) == 3 and {remembered for *_, remembered in made} == {None}
    assert found.checkpoints == 0 and found.peak_bytes == 0  # 1,800 bytes find no room
    texts = [TEXT, OTHER, OTHER[:50], TEXT[:50]] * 2
    found = run(texts, replicas=2, max_memory=1800, eviction="lru", **options)
    assert found.evictions > 0 and found.peak_bytes == 3600
    assert found.served is not None and found.served.digest_bytes == 0
    prefix = Fleet(publish_seconds=0.01, prefill_tokens_per_second=10.0, block=16)
    told = run(texts, replicas=2, fleet=prefix).served
    assert told is not None and told.digest_bytes > 0


def test_announced_prefixes_are_those_of_every_replica() -> None:
    infos: list[RequestInfo] = []
    run([TEXT, TEXT], marks=[range(61)], replicas=2, router="round_robin", on_request=infos.append)
    assert [61 in info.captured for info in infos] == [True, True]


def test_what_is_shared_has_a_budget_and_is_packed() -> None:
    text = np.arange(1000, dtype=np.int32)
    options = {"replicas": 2, "router": "round_robin", "grid": 400}
    none, half = (
        run([text] * 2, fleet=Fleet(True, memory, packing, 1000.0, 100.0, 0.5), **options).served
        for memory, packing in (("1KB", 1.0), (None, 0.5))
    )
    assert none is not None and (none.fetched_bytes, none.written_bytes) == (0, 0)
    assert half is not None and (half.fetched_bytes, half.written_bytes) == (4500, 4500)


def test_without_a_terminal_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    simulate([TEXT], policy=Last(), state_bytes=1)
    assert capsys.readouterr().err == ""


def test_a_policy_of_ones_own_is_named_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    simulate([TEXT], policy=Last(), state_bytes=1)
    told = capsys.readouterr().err
    assert "simulate Last" in told and told.endswith("\r")  # and is gone when it is done
