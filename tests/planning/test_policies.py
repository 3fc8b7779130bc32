"""Every policy keeps the rules of placement; the learned one finds out where prompts diverge."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cutting import every

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.planning.cuts import CutRule, cut_positions
from hf_sparse_cache.planning.overlap import BRANCHES, EXTENDS, Forecast
from hf_sparse_cache.planning.planner import plan_checkpoints
from hf_sparse_cache.planning.policies import (
    FIRST_SIGHT_DISTANCES,
    FIRST_SIGHT_OBSERVATIONS,
    MIN_GAIN_TOKENS,
    POLICIES,
    UNKNOWN_SHARE,
    Block,
    HistogramDP,
    Last,
    Learned,
    Policy,
    Prompt,
    affordable,
    first_sight,
    make_policy,
)
from hf_sparse_cache.planning.policy import Terms, check_policy, limited, placed
from hf_sparse_cache.planning.segments import Bitwise
from hf_sparse_cache.planning.views import Shape
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


# -- each policy beside a plain account of it -------------------------------------------------------------------------


def drawn_prompt(draw: random.Random, length: int = 400) -> Prompt:
    """A prompt that has met a tree in some way, with cuts here and there."""
    ids = np.asarray(draw.choices(range(9), k=length), dtype=np.int32)
    cuts = sorted(draw.sample(range(1, length + 1), draw.choice([0, 1, 3, 30])))
    resumed = draw.choice([0, *cuts])
    behind = [cut for cut in cuts if cut >= resumed]
    overlap = draw.choice([resumed, min(length, resumed + draw.randrange(1, 200)), *behind])
    ends = sorted({*draw.sample(range(1, length), 3), max(overlap, 1)})
    passes = sorted((draw.randrange(1, 6) for _ in ends), reverse=True)
    return Prompt(
        ids, np.asarray(cuts, np.int64), overlap, resumed, np.asarray(ends), np.asarray(passes),
        limit=draw.choice([None, 0, 1, 2, 5]),
        terms=Terms(draw.random(), draw.random(), draw.choice([0.0, 0.0, 0.1, 1.0, 10.0]), draw.random()),
        state_bytes=draw.choice([0.0, 40.0]), kv_bytes_per_token=draw.choice([0.0, 0.02]),
        resumed_bytes=draw.randrange(60), message_start=draw.choice([0, length // 2]),
        cut_tokens=draw.choice([0.0, 0.0, 2.0, 8.0]),
    )  # fmt: skip


def prompts(count: int = 150) -> list[Prompt]:
    return [drawn_prompt(random.Random(seed)) for seed in range(count)]


def snapped(prompt: Prompt, positions: Sequence[float]) -> list[int]:
    """The deepest open cut at or before each."""
    opened = [cut for cut in prompt.cuts.tolist() if cut > prompt.resumed]
    nearest = [max((cut for cut in opened if cut <= position), default=None) for position in positions]
    return sorted({cut for cut in nearest if cut is not None})


def blocks(prompt: Prompt) -> list[float]:
    length, size = len(prompt.ids), 16
    while prompt.limit is not None and sum(prompt.resumed < n for n in range(size, length + 1, size)) > prompt.limit:
        size *= 2
    return [*range(size, length + 1, size)]


def spans(prompt: Prompt, count: int) -> list[float]:
    count = count if prompt.limit is None else min(count, prompt.limit)
    span = (len(prompt.ids) - prompt.resumed) / (count + 1)
    return [prompt.resumed + span * n for n in range(1, count + 1)]


def halves(prompt: Prompt) -> list[float]:
    span = len(prompt.ids) - prompt.resumed
    return [len(prompt.ids) - span / 2**n for n in range(1, (8 if prompt.limit is None else prompt.limit) + 1)]


def deepest(prompt: Prompt, positions: list[int], default: int) -> list[int]:
    count = default if prompt.limit is None else prompt.limit
    return sorted(positions, reverse=True)[:count][::-1]


PLAIN: dict[str, Callable[[Prompt], list[int]]] = {
    "none": lambda prompt: [],
    "block": lambda prompt: [] if prompt.limit == 0 else snapped(prompt, blocks(prompt)),
    "balanced": lambda prompt: snapped(prompt, spans(prompt, 8)),
    "sqrt": lambda prompt: snapped(
        prompt, spans(prompt, int(math.sqrt(sum(cut > prompt.resumed for cut in prompt.cuts.tolist()))))
    ),
    "dyadic": lambda prompt: snapped(prompt, halves(prompt)),
    "boundary": lambda prompt: deepest(
        prompt, snapped(prompt, [*(n for n, token in enumerate(prompt.ids, 1) if token in (3, 7)), len(prompt.ids)]), 8
    ),
    "last": lambda prompt: snapped(prompt, [len(prompt.ids)] * (prompt.limit != 0)),
    "junction": lambda prompt: snapped(prompt, [len(prompt.ids), prompt.overlap][: prompt.limit]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_policy_places_what_it_says(name: str) -> None:
    for prompt in prompts():
        policy = Block(16) if name == "block" else make_policy(name, (7, 3, 7))
        assert policy.place(prompt) == PLAIN[name](prompt), prompt


def test_cuts_behind_the_resumed_one_are_open() -> None:
    for prompt in prompts(40):
        assert prompt.open_cuts.tolist() == [cut for cut in prompt.cuts.tolist() if cut > prompt.resumed]
        wishes = [-1.0, 0.0, 0.5, *prompt.cuts.tolist(), *(prompt.cuts - 0.5).tolist(), 1000.0]
        assert prompt.snap(wishes) == snapped(prompt, wishes)


def test_the_histogram_counts_depths_in_bins_and_forgets() -> None:
    for seed in range(40):
        draw = random.Random(seed)
        policy, seen = HistogramDP(decay=0.9, bin_tokens=8, prior=0.2), dict[int, float]()
        for _ in range(draw.randrange(12)):
            overlap = draw.choice([0, 7, 8, 511, 512, 513, draw.randrange(1, 400), draw.randrange(400, 3000)])
            policy.observe(replace(drawn_prompt(draw), overlap=overlap))
            seen = {depth: weight * 0.9 for depth, weight in seen.items()}
            if overlap:
                seen[overlap // 8 * 8] = seen.get(overlap // 8 * 8, 0.0) + 1.0
        for _ in range(3):
            prompt = drawn_prompt(draw)
            cuts, limit = prompt.open_cuts.tolist(), 16 if prompt.limit is None else prompt.limit
            borders = [prompt.resumed, *cuts, len(prompt.ids)]
            weights = [0.2 * (end - start) / (borders[-1] - borders[0] or 1) for start, end in pairwise(borders)]
            for depth, weight in seen.items():
                if depth <= len(prompt.ids):
                    weights[sum(cut <= depth for cut in cuts)] += weight
            cost = [0.0, *(cut - prompt.resumed for cut in cuts)]
            plan = plan_checkpoints(weights, limit, prefill_cost=cost).positions if cuts else ()
            assert policy.place(prompt) == [cuts[index - 1] for index in plan]


@pytest.mark.parametrize(
    ("cut_tokens", "overlap", "most", "affords"),
    [(0.0, 0, 9, 9), (4.0, MIN_GAIN_TOKENS, 9, 9), (4.0, MIN_GAIN_TOKENS - 1, 9, 3), (4.0, 0, 2, 2), (13.0, 0, 9, 0)],
)
def test_of_what_shares_nothing_few_cuts_are_paid(cut_tokens: float, overlap: int, most: int, affords: int) -> None:
    assert UNKNOWN_SHARE == 0.03
    prompt = replace(untold(400, None), cut_tokens=cut_tokens, overlap=overlap)
    assert affordable(prompt, most) == affords


def sighted(prompt: Prompt) -> list[int]:
    found: list[int] = []
    for wish in (prompt.message_start, *(len(prompt.ids) - distance for distance in FIRST_SIGHT_DISTANCES)):
        found += [cut for cut in snapped(prompt, [wish]) if cut not in found]
    return found[: affordable(prompt, len(found))]


def test_at_first_sight_the_message_comes_first() -> None:
    for prompt in prompts(60):
        assert first_sight(prompt) == sighted(prompt)
    assert first_sight(replace(untold(400, None), message_start=200)) == [200, 392, 264, 136]


def weighed(prompt: Prompt, below: Sequence[float]) -> tuple[list[float], float]:
    """The rate at which prompts leave in each cell between two open cuts, and what a cut costs then."""
    cuts = prompt.cuts.tolist()
    borders = [0.0, *below, 1.0]
    cells = [(start, borders[n + 1] - borders[n]) for n, start in enumerate([0, *cuts])]
    cells = cells[sum(cut <= prompt.resumed for cut in cuts) :]
    old = [start <= prompt.overlap for start, _ in cells]
    old[0] = True
    new = sum(part for (_, part), known in zip(cells, old, strict=True) if not known)
    whole, terms = sum(part for _, part in cells), prompt.terms
    rates = [
        part * (terms.known_rate / max(whole, 1e-12) if known else terms.new_rate / max(new, 1e-12))
        for (_, part), known in zip(cells, old, strict=True)
    ]
    cut_price, kv_price = prompt.cut_tokens * sum(rates), terms.price * prompt.kv_bytes_per_token
    for index in reversed(range(len(rates))):
        taken = min(kv_price, rates[index])
        rates[index], kv_price = rates[index] - taken, kv_price - taken
    return rates, cut_price


def plainly_planned(prompt: Prompt, below: Sequence[float], limit: int, cost_of: Callable[[Any], Any]) -> list[int]:
    cuts, terms = prompt.open_cuts.tolist(), prompt.terms
    if not limit or not cuts:
        return []
    rates, cut_price = weighed(prompt, below)
    cost = [float(cost_of(cut) - cost_of(prompt.resumed)) for cut in [prompt.resumed, *cuts]]
    price = terms.price * prompt.state_bytes
    plan = plan_checkpoints(rates, limit, prefill_cost=cost, checkpoint_cost=price + cut_price).positions
    if not plan and price > 0.0 and prompt.resumed:
        plan = plan_checkpoints(rates, 1, prefill_cost=cost).positions
        paid = price + cut_price - sum(terms.price * prompt.refund(cuts[index - 1]) for index in plan)
        plan = tuple(index for index in plan if cost[index] * sum(rates[index:]) > paid)
    return [cuts[index - 1] for index in plan]


def plainly_learned(policy: Learned, prompt: Prompt, cost_of: Callable[[Any], Any]) -> list[int]:
    """What `Learned` places on a prompt that it was just shown, so that its forecast is there."""
    assert prompt.forecast is not None
    limit = 32 if prompt.limit is None else prompt.limit
    if not limit:
        return []
    sure: list[int] = []
    shares = prompt.overlap >= MIN_GAIN_TOKENS
    if prompt.terms.price == 0.0:
        if prompt.overlap in prompt.open_cuts.tolist() and prompt.overlap >= prompt.resumed + MIN_GAIN_TOKENS:
            sure = [prompt.overlap]
        elif not shares and policy.model.observations < FIRST_SIGHT_OBSERVATIONS:
            sure = sighted(prompt)
    sure = sure[: math.ceil(limit / 2)]
    left = limit - len(sure)
    room = affordable(prompt, limit) - len(sure)
    for most in (left, room + 1, room):
        found = plainly_planned(prompt, prompt.forecast.below.tolist(), min(left, most), cost_of)
        if sum(position < len(prompt.ids) for position in found) <= room:
            break
    placed = {*sure, *found}
    if prompt.terms.price == 0.0 and (prompt.limit is None or len(placed) < limit):
        placed.add(len(prompt.ids))
    return sorted(placed)


@pytest.mark.parametrize("cost_of", [lambda depths: depths, lambda depths: depths * 3.0 + depths**2 / 50.0])
@pytest.mark.parametrize("seen", [0, FIRST_SIGHT_OBSERVATIONS - 1, FIRST_SIGHT_OBSERVATIONS, 40])
def test_learned_places_what_a_plain_account_of_it_does(seen: int, cost_of: Callable[[Any], Any]) -> None:
    draw = random.Random(seen)
    policy = Learned() if cost_of(2.0) == 2.0 else Learned(cost_of)
    nowhere = np.zeros(0, np.int64)
    for _ in range(seen):
        before = Shape(
            draw.randrange(60, 400), draw.randrange(60), nowhere, nowhere, np.arange(20, 400, 20), draw.randrange(4)
        )
        prompt = replace(drawn_prompt(draw), overlap=draw.randrange(20, 400), latest=before, cuts=before.cuts)
        policy.observe(prompt)
        policy.observe(replace(prompt, latest=None))  # says nothing
    assert policy.model.observations == seen
    for prompt in prompts(60):
        found = policy.place(prompt)
        assert prompt.shape is not None and prompt.shape.length == len(prompt.ids)
        assert found == plainly_learned(policy, prompt, cost_of), prompt


# -- what a prompt tells of the prompts that will come ----------------------------------------------------------------


class Told:
    """A forecast that says what a test wants, and notes what it is asked."""

    def __init__(self, passing: dict[int, float] | None = None) -> None:
        self.asked: list[Any] = []
        self._passing = passing or {}

    def shares(self, *arguments: Any) -> tuple[list[float], list[float]]:
        self.asked.append(arguments)
        return [0.25, 0.5], [0.75, 1.0]

    def passing(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray([self._passing[position] for position in positions.tolist()])


def met(forecast: Any, overlap: int = 60, kind: int = BRANCHES, **terms: float) -> Prompt:
    nowhere = np.zeros(0, dtype=np.int64)
    shape = Shape(100, overlap, nowhere, nowhere, nowhere, kind)
    ends = np.asarray([20, 50, 70])
    return Prompt(
        tokens(100), np.arange(1, 101), overlap, 30, ends, np.asarray([4, 3, 2]), terms=Terms(**terms), shape=shape,
        forecast=forecast, resumed_bytes=80,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("position", "planned", "options", "positions", "start", "following"),
    [
        (50, [40, 50, 80, 90], {}, [50, 80], 20, [0.25, 0.0]),  # half of those who pass go on elsewhere
        (51, [80], {}, [51, 80], 50, [0.25, 0.0]),
        (60, [80], {}, [60, 80], 50, [0.25, 0.0]),
        (61, [80], {}, [61, 80], 60, [1.0, 0.0]),
        (50, [60, 80], {}, [50, 60], 20, [1.0, 0.0]),
        (50, [61], {}, [50, 61], 20, [0.25, 0.0]),
        (50, [50], {}, [50], 20, [0.0]),
        (10, [], {}, [10], 0, [0.0]),
        (50, [80], {"known_rate": 0.0}, [50, 80], 20, [1.0, 0.0]),
        (50, [80], {"kind": EXTENDS}, [50, 80], 20, [1.0, 0.0]),
    ],
)
def test_the_share_of_a_checkpoint_is_that_of_its_edge(
    position: int,
    planned: list[int],
    options: dict[str, Any],
    positions: list[int],
    start: int,
    following: list[float],
) -> None:
    prompt = met(Told(), **{"known_rate": 2.0, "new_rate": 0.5, **options})
    assert prompt.share(position, planned) == 0.25
    ((asked, starts, onward),) = prompt.forecast.asked  # type: ignore[union-attr]
    assert (asked, starts, onward) == (positions, [start] * len(positions), following)
    assert met(None).share(position, planned) == 1.0


@pytest.mark.parametrize(
    ("position", "options", "refund"),
    [
        (40, {}, 80 * 0.5 * 0.25 / 0.5),
        (60, {}, 80 * 0.5 * 0.2 / 0.5),
        (61, {}, 80 * 0.25 * 0.1 / 0.5),  # behind the overlap prompts come at another rate
        (61, {"kind": EXTENDS}, 80 * 0.5 * 0.1 / 0.5),
        (40, {"resumed_rate": 0.5}, 80 * 0.25 / 0.5),  # never more than all of it
        (40, {"resumed_rate": 0.0}, 80 * 0.25 / 0.5),
    ],
)
def test_a_refund_is_what_the_resumed_state_is_no_longer_good_for(
    position: int, options: dict[str, Any], refund: float
) -> None:
    passing = {30: 0.5, 40: 0.25, 60: 0.2, 61: 0.1}
    rates = {"known_rate": 1.0, "new_rate": 0.5, "resumed_rate": 2.0}
    prompt = met(Told(passing), **{**rates, **options})
    assert prompt.refund(position) == pytest.approx(refund)
    assert met(Told({30: 0.0, 40: 0.0})).refund(40) == 0.0
    assert replace(prompt, resumed=0).refund(position) == 0.0
    assert replace(prompt, forecast=None).refund(position) == 0.0


def test_a_limit_is_told_to_the_policy_that_has_it() -> None:
    inner = Answers([1, 2, 3])
    seen: list[Prompt] = []
    inner.observe = seen.append  # type: ignore[method-assign]
    outer = limited(inner, 2)
    prompt = untold(100, None)
    assert outer.place(prompt) == [1, 2, 3] and prompt.limit == 2 and outer.lock is inner.lock
    outer.observe(prompt)
    assert seen == [prompt] and limited(inner, None) is inner
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="max_checkpoints must be at least 0 or None, got"):
            limited(inner, wrong)  # type: ignore[arg-type]
    check_policy(outer), check_policy(inner)
    with pytest.raises(NotImplementedError):
        Policy().place(prompt)
    assert Policy().observe(prompt) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(("length", "cut"), [(78, False), (79, True)])
def test_what_is_no_answer_is_shown_as_far_as_it_is_short(length: int, cut: bool) -> None:
    with pytest.raises(TypeError) as raised:
        placed(Answers("x" * length), untold(100, None))
    assert ("…" in str(raised.value)) == cut and f"returned '{'x' * 70}" in str(raised.value)


def test_a_policy_is_made_by_its_name() -> None:
    for name, kind in POLICIES.items():
        assert type(make_policy(name)) is kind
    cost = lambda depths: depths  # noqa: E731
    learned, boundary = make_policy("learned", (1, 2), cost), make_policy("boundary", (2, 1, 2), cost)
    assert isinstance(learned, Learned) and learned.prefill_cost is cost
    assert boundary.cut_ids.tolist() == [1, 2]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="policy='best' is unknown; choose one of learned, dp"):
        make_policy("best")


# -- where a budget is short, or a cut is dear, so that little decides ------------------------------------------------


def pressed(seed: int) -> Prompt:
    """A prompt that resumes, whose best checkpoint saves about what it costs."""
    draw = random.Random(seed)
    prompt = drawn_prompt(draw)
    cuts = np.asarray(sorted(draw.sample(range(20, 400), 12)), np.int64)
    resumed = int(cuts[draw.randrange(6)])
    below = np.sort([draw.random() for _ in cuts])
    prompt = replace(
        prompt, cuts=cuts, resumed=resumed, overlap=draw.choice([resumed, resumed + 30]), state_bytes=40.0,
        kv_bytes_per_token=0.0, resumed_bytes=draw.choice([0, 20, 40]), forecast=Forecast(cuts, below),
        terms=replace(prompt.terms, price=1e-9), cut_tokens=draw.choice([0.0, 3.0]),
    )  # fmt: skip
    (best,) = plainly_planned(prompt, below.tolist(), 1, lambda depths: depths) or (None,)
    if best is None:
        return prompt
    rates, cut_price = weighed(prompt, below.tolist())
    index = prompt.open_cuts.tolist().index(best) + 1
    worth = (best - resumed) * sum(rates[index:]) - cut_price
    return replace(prompt, terms=replace(prompt.terms, price=max(1e-6, worth * draw.uniform(0.6, 2.5) / 40.0)))


def test_where_memory_is_dear_a_checkpoint_may_take_the_place_of_the_resumed_one() -> None:
    replaced = 0
    for seed in range(200):
        prompt = pressed(seed)
        assert prompt.forecast is not None
        for limit in (0, 1, 3):
            expected = plainly_planned(prompt, prompt.forecast.below.tolist(), limit, lambda depths: depths)
            assert Learned()._planned(prompt, prompt.forecast, limit) == expected, (seed, limit)
        replaced += bool(expected) and not plainly_planned(
            replace(prompt, resumed_bytes=0), prompt.forecast.below.tolist(), limit, lambda depths: depths
        )
        nowhere = replace(prompt, resumed=400)
        assert Learned()._planned(nowhere, prompt.forecast, 3) == []
    assert replaced > 10  # it is the refund that decides


def test_the_price_of_keys_and_values_is_taken_off_the_deepest() -> None:
    for seed in range(100):
        draw = random.Random(seed)
        weights = [draw.choice([0.0, draw.random()]) for _ in range(draw.randrange(1, 6))]
        price = draw.choice([0.0, draw.random(), 9.0])
        left, found = price, np.asarray(weights)
        for index in reversed(range(len(weights))):
            taken = min(left, weights[index])
            weights[index], left = weights[index] - taken, left - taken
        Learned._charge(found, price)
        assert found.tolist() == weights


def test_a_prompt_that_shares_nothing_has_as_many_cuts_as_it_can_pay() -> None:
    policy, nowhere, bound = Learned(), np.zeros(0, np.int64), 0
    for seed in range(FIRST_SIGHT_OBSERVATIONS + 30):
        draw = random.Random(seed)
        before = Shape(400, 0, nowhere, nowhere, np.arange(20, 400, 20), draw.randrange(4))
        policy.observe(replace(drawn_prompt(draw), overlap=draw.randrange(20, 400), latest=before, cuts=before.cuts))
    for seed in range(200):
        draw = random.Random(seed)
        cuts = np.asarray(sorted({*draw.sample(range(20, 400), 30), *draw.choice([(), (400,)])}), np.int64)
        prompt = replace(
            untold(400, draw.choice([None, 3, 8])), cuts=cuts, cut_tokens=draw.choice([0.5, 1.5, 2.0, 3.0, 5.0, 13.0])
        )
        found = policy.place(prompt)
        assert found == plainly_learned(policy, prompt, lambda depths: depths), seed
        bound += len([position for position in found if position < 400]) == affordable(prompt, 32)
    assert bound > 10


def test_the_histogram_forgets_what_was_long_ago() -> None:
    nowhere = np.zeros(0, np.int64)
    for decay, place in ((0.5, 100), (1.0, 300)):
        policy = HistogramDP(decay, prior=1e-3)
        for overlap in (300, 300, 300, 100, 100):
            policy.observe(Prompt(tokens(400), np.arange(20, 400, 20), overlap, 0, nowhere, nowhere))
        weights = policy._weights[[300 // 16, 100 // 16]].tolist()
        assert weights == pytest.approx([0.25 * (0.5 + 0.25 + 1.0), 1.5] if decay == 0.5 else [3.0, 2.0])
        prompt = Prompt(tokens(400), np.asarray([80, 280]), 0, 0, nowhere, nowhere, limit=1)
        assert policy.place(prompt) == [80 if place == 100 else 280]
