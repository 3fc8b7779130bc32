"""Every policy keeps the rules of placement; the learned one finds out where prompts diverge."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cutting import every

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.planning.cuts import CutRule, cut_positions
from hf_sparse_cache.planning.policies import POLICIES, Block, Last, Learned, Policy, Prompt, make_policy
from hf_sparse_cache.planning.policy import limited
from hf_sparse_cache.planning.segments import Bitwise
from hf_sparse_cache.request import open_request
from hf_sparse_cache.simulator import Sized, simulate
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.tools.traces import Trace


GENERATOR = np.random.default_rng(0)


def tokens(count: int) -> np.ndarray:
    return GENERATOR.integers(10, 50_000, count).astype(np.int32)


def documents(count: int = 12, questions: int = 4) -> Trace:
    stories = [tokens(int(length)) for length in GENERATOR.integers(600, 2000, count)]
    return Trace([np.concatenate([story, tokens(20)]) for _ in range(questions) for story in stories])


def conversations(count: int = 10, turns: int = 6) -> Trace:
    histories = [tokens(300) for _ in range(count)]
    prompts = []
    for _ in range(turns):
        prompts += histories
        histories = [np.concatenate([history, tokens(150)]) for history in histories]
    return Trace(prompts)


def edits(count: int = 6, revisions: int = 12) -> Trace:
    prompts = []
    pages = [tokens(2000) for _ in range(count)]
    for _ in range(revisions):
        for page in pages:
            page[int(GENERATOR.integers(0, 2000))] += 1
            prompts.append(page.copy())
    return Trace(prompts)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("limit", [None, 0, 1, 3])
def test_plans_are_open_cuts_within_the_limit(name: str, limit: int | None) -> None:
    store, policy = CheckpointStore(40, "learned"), make_policy(name, [7])
    for ids in list(conversations())[:30]:
        ids = np.where(GENERATOR.random(len(ids)) < 0.01, 7, ids).astype(np.int32)
        cuts = cut_positions(ids, 32, [7])
        rule = Bitwise(CutRule(32, (7,)))
        with open_request(store, limited(policy, limit), ids, rule) as request:
            assert request.planned == sorted(set(request.planned) & {*cuts.tolist(), len(ids)})
            assert all(position > request.resumed_tokens for position in request.planned)
            assert limit is None or len(request.planned) <= limit
            for position in request.planned:
                request.add(position, Sized(1))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_works_from_the_first_request(name: str) -> None:
    ids = tokens(4000)
    with open_request(CheckpointStore(None), make_policy(name), ids, every(64)) as request:
        assert request.planned


@pytest.mark.parametrize(("trace", "recomputed"), [(documents(), 40.0), (conversations(), 40.0)])
def test_learned_finds_where_structure_ends(trace: Trace, recomputed: float) -> None:
    result = simulate(trace, max_checkpoints=2, state_bytes=1, warmup=0.5)
    assert result.recomputed_tokens <= recomputed


def test_learned_spreads_where_text_is_edited_anywhere() -> None:
    trace = edits()
    cost = {
        name: simulate(trace, policy=name, max_checkpoints=4, state_bytes=1, warmup=0.5).recomputed_tokens
        for name in ("learned", "last", "junction")
    }
    assert cost["learned"] < 0.6 * min(cost["last"], cost["junction"])


def test_learned_keeps_up_with_a_shift_of_workload() -> None:
    trace = Trace([*documents(20, 4), *conversations(12, 8)])
    assert simulate(trace, max_checkpoints=2, state_bytes=1, warmup=0.7).recomputed_tokens <= 60.0


class Answers(Policy):
    """Places whatever it is told to."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def place(self, prompt: Prompt) -> list[int]:
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize("answer", [None, 64, [64.0], [1.5, "x", None], "64", [[64]]])
def test_what_is_no_position_is_refused(answer: object) -> None:
    with pytest.raises(TypeError, match="Answers.place returned .*return a list of positions"):
        simulate([range(200)], policy=Answers(answer), state_bytes=1)


def test_any_whole_numbers_will_do() -> None:
    assert simulate([range(200)], policy=Answers(np.asarray([64, 128])), state_bytes=1).checkpoints == 2


class Placeless(Policy):
    pass


class Lockless(Last):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Last, "policy is the class Last: give an object of it, policy=Last()"),
        (None, "policy is None"),
        (7, "policy is 7 (int)"),
        (Placeless(), "Placeless, which has no place"),
        (Lockless(), "super().__init__()"),
    ],
)
def test_what_is_no_policy_is_refused_before_the_first_request(policy: object, said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        simulate([range(200)], policy=policy, state_bytes=1)
    with pytest.raises(TypeError, match=re.escape(said)):
        SparsePrefixCache(None, policy=policy, exactness="bitwise")


def test_price_thins_out_checkpoints() -> None:
    trace = edits(20, 6)
    roomy, tight = (simulate(trace, state_bytes=1, max_memory=memory) for memory in (None, 10))
    assert tight.checkpoints < roomy.checkpoints
    assert tight.peak_bytes == 10


def test_learned_weighs_the_prefill_cost_it_is_given() -> None:
    ids = tokens(4000)
    late = Learned(prefill_cost=lambda positions: positions**4)
    depths = []
    for policy in (Learned(), late):
        with open_request(CheckpointStore(None), limited(policy, 2), ids, every(64)) as request:
            depths.append(sum(request.planned))
    assert depths[1] > depths[0]


def planned(policy: Policy, ids: np.ndarray, limit: int | None = None) -> list[int]:
    """What a policy places on a prompt of which nothing is stored."""
    with open_request(CheckpointStore(None), limited(policy, limit), ids, every(32)) as request:
        return request.planned


def test_the_histogram_plans_for_the_depths_it_saw() -> None:
    """Twenty prompts part at token 600 of 2,000: one checkpoint goes to the cut before it."""
    policy, store, shared = make_policy("dp"), CheckpointStore(None), tokens(600)
    for _ in range(20):
        ids = np.concatenate([shared, tokens(1400)])
        with open_request(store, policy, ids, every(32)):
            pass
    assert planned(policy, np.concatenate([shared, tokens(1400)]), 1) == [576]
    assert planned(make_policy("dp"), tokens(2000), 1) == [992]  # nothing was seen: the middle
    # Depths beyond the end of a shorter prompt say nothing about it.
    assert planned(policy, tokens(500), 1) == planned(make_policy("dp"), tokens(500), 1)


def test_dyadic_places_eight_unless_told_otherwise() -> None:
    ids = tokens(2**14)
    assert planned(make_policy("dyadic"), ids) == [2**14 - 2 ** (14 - i) for i in range(1, 9)]
    assert planned(make_policy("dyadic"), ids, 2) == [2**13, 2**13 + 2**12]


def untold(length: int, limit: int | None, resumed: int = 0) -> Prompt:
    """A prompt of which nothing is known, with a cut at every token."""
    nowhere = np.zeros(0, dtype=np.int64)
    return Prompt(tokens(length), np.arange(1, length + 1), 0, resumed, nowhere, nowhere, limit)


@pytest.mark.parametrize(
    ("limit", "resumed", "expected"),
    [(None, 0, [16, 32, 48, 64, 80, 96]), (3, 0, [32, 64, 96]), (3, 48, [64, 80, 96]), (1, 0, [64]), (0, 0, [])],
)
def test_blocks_grow_until_the_limit_suffices(limit: int | None, resumed: int, expected: list[int]) -> None:
    found = Block(16).place(untold(100, limit, resumed))
    assert [position for position in found if position > resumed] == expected


def test_with_room_left_the_end_is_kept_for_the_same_prompt_again() -> None:
    for limit in (None, 5):
        prompt = untold(300, limit)
        prompt.cuts = np.asarray([100, 200])
        assert Learned().place(prompt)[-1] == 300


def test_without_a_forecast_nothing_becomes_superfluous() -> None:
    assert untold(100, None, resumed=50).refund(80) == 0.0
