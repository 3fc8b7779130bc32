"""A call that knows all its texts: each token of their trie is computed once, as far as a segment may be short."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompting import Blob

from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.foresight import Foreseen, Foresight, TextInTurn, common, turns
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.planning.policies import NoCheckpoints, Policy, Prompt
from hf_sparse_cache.planning.segments import Bitwise, Replayable, Segmenting
from hf_sparse_cache.request import open_request
from hf_sparse_cache.store.holding import Holding
from hf_sparse_cache.store.store import CheckpointStore


TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple), min_size=1, max_size=12, unique=True)


def computed(texts: list[tuple[int, ...]], base: Segmenting, memory: int | None = None) -> tuple[int, CheckpointStore]:
    """Tokens that a call over these texts computes; states are 10 bytes, keys and values one a token."""
    arrays = [np.asarray(text, dtype=np.int32) for text in texts]
    store, total = CheckpointStore(memory), 0
    holding = Holding(store)
    for place, turn in enumerate(turns(arrays, [len(text) - 1 for text in arrays])):
        foresight = Foresight(NoCheckpoints(), turn.keep, place, holding.staying)
        holding.begin(foresight, place)
        segmenting = Foreseen(base.rule, base, tuple(sorted(turn.keep)), turn.first)
        with open_request(store, foresight, turn.tokens, segmenting) as request:
            request.hold_for(holding)
            start = request.resumed_tokens
            for end in request.segments:
                assert end - start >= min(2, len(turn.tokens))
                total, start = total + end - start, end
                if end in request.planned:
                    request.add(end, Blob(10), lambda a, b: Blob(b - a))
            assert start == len(turn.tokens)
        store.verify()
    holding.close()
    store.verify()
    return total, store


@settings(deadline=None)
@given(TEXTS)
def test_what_texts_share_is_computed_once(texts: list[tuple[int, ...]]) -> None:
    nodes = len({text[:end] for text in texts for end in range(1, len(text) + 1)})
    total, store = computed(texts, Replayable(CutRule(64)))
    # Beside the trie a text computes at most one token that it shares where its own part is shorter than a segment,
    # or another cut is that near, and those before where that makes a checkpoint impossible.
    assert nodes <= total <= nodes + 3 * len(texts)
    assert store.used_bytes == 0


@settings(deadline=None)
@given(TEXTS, st.integers(0, 40))
def test_it_holds_a_budget_and_computes_the_rest(texts: list[tuple[int, ...]], memory: int) -> None:
    nodes = len({text[:end] for text in texts for end in range(1, len(text) + 1)})
    for base in (Replayable(CutRule(64)), Bitwise(CutRule(4))):
        total, store = computed(texts, base, memory)
        assert nodes <= total <= sum(map(len, texts))
        assert store.peak_bytes <= memory and store.used_bytes == 0


def test_without_sharing_it_is_noticed() -> None:
    """The twin: what the first test bounds is far exceeded where nothing is kept."""
    texts = [(0,) * 12 + (1, 2) * 2 + (q % 3, q // 3) for q in range(9)]
    assert computed(texts, Replayable(CutRule(64)))[0] == 16 + 9 * 2
    assert computed(texts, Replayable(CutRule(64)), memory=0)[0] == 9 * 18


@settings(deadline=None)
@given(TEXTS)
def test_logits_of_a_shared_prefix_serve_every_text(texts: list[tuple[int, ...]]) -> None:
    arrays = [np.asarray(text, dtype=np.int32) for text in texts]
    firsts = [len(text) // 2 for text in texts]
    found = turns(arrays, firsts)
    for place, turn in enumerate(found):
        later = [found[other] for other in range(place, len(found))]
        sharing = [item for item in later if firsts[item.index] < common(turn.tokens, item.tokens)]
        needed = [firsts[item.index] for item in (turn, *sharing)]
        assert turn.first == min(needed)
    assert [turn.first for turn in turns(arrays, firsts, share=False)] == [firsts[turn.index] for turn in found]


def test_a_text_makes_up_for_one_that_did_not_pass() -> None:
    """Where later texts leave the path is noted at every text on the way that is computed before them."""
    texts = [(0,) * 8 + (1,) * 4, (0,) * 8 + (2,) * 4, (0,) * 8 + (3,) * 4, (0,) * 4 + (3,) * 4]
    found = turns([np.asarray(text, dtype=np.int32) for text in texts], [9, 9, 9, 6])
    assert [turn.keep for turn in found] == [{8: 2, 4: 3}, {8: 2, 4: 3}, {8: 2, 4: 3}, {4: 3}]


def test_a_checkpoint_is_needed_at_the_nearest_cut_alone() -> None:
    foresight = Foresight(NoCheckpoints(), {7: 3, 9: 5, 2: 4}, 0)
    ids = np.zeros(12, dtype=np.int32)
    nowhere = np.zeros(0, dtype=np.int64)
    prompt = Prompt(ids, np.asarray([3, 6, 8, 11]), 0, 0, nowhere, nowhere)
    assert foresight.place(prompt) == [6, 8]
    assert foresight.needed == {6: 3, 8: 5}


def drawn_texts(seed: int) -> tuple[list[np.ndarray], list[int]]:
    draw = random.Random(seed)
    texts = [np.asarray(draw.choices(range(2), k=draw.randrange(1, 9)), np.int32) for _ in range(draw.randrange(1, 9))]
    return texts, [draw.randrange(len(text)) for text in texts]


def test_texts_come_in_the_order_of_their_tokens() -> None:
    for seed in range(100):
        texts, firsts = drawn_texts(seed)
        for share in (True, False):
            found = turns(texts, firsts, share)
            told = [(turn.tokens.tolist(), firsts[turn.index]) for turn in found]
            assert told == sorted(told) and sorted(turn.index for turn in found) == list(range(len(texts)))
            assert [turn.place for turn in found] == list(range(len(texts)))
            assert all(turn.tokens is texts[turn.index] for turn in found) and found[0].shared == 0
            for before, turn in pairwise(found):
                assert turn.shared == max(common(other.tokens, turn.tokens) for other in found[: turn.place])
                assert turn.shared == common(before.tokens, turn.tokens)
    assert [
        turn.tokens.tolist() for turn in turns([np.asarray([300], np.int32), np.asarray([5], np.int32)], [0, 0])
    ] == [
        [5],
        [300],
    ]


def kept(found: list[TextInTurn]) -> list[dict[int, int]]:
    """At each text, where it or later ones leave the path, by looking at every text for every position."""
    owned: list[dict[int, int]] = [{} for _ in found]
    for place, turn in enumerate(found[1:], start=1):
        deepest = min(turn.shared, len(turn.tokens) - 2)
        if turn.first < turn.shared:
            deepest = min(deepest, turn.shared - 1)
        for position in range(deepest, 1, -1):
            owner = max(other for other in range(place) if other == 0 or found[other].shared < position)
            if len(found[owner].tokens) - position != 1:  # a segment of one token
                owned[owner][position] = place
                break
    return [
        {at: last for own in owned[: place + 1] for at, last in own.items() if last >= place}
        for place in range(len(found))
    ]


def test_each_text_keeps_what_it_and_later_ones_resume_from() -> None:
    for seed in range(300):
        texts, firsts = drawn_texts(seed)
        for share in (True, False):
            found = turns(texts, firsts, share)
            assert [turn.keep for turn in found] == kept(found)
    whole = [np.asarray([1] * length, np.int32) for length in (4, 5, 8)]
    assert [turn.keep for turn in turns(whole, [3, 4, 7])] == [{2: 1}, {2: 1, 5: 2}, {5: 2}]


def test_what_texts_have_in_common_is_counted_token_by_token() -> None:
    for seed in range(100):
        one, other = (drawn_texts(seed + 1000 * n)[0][0] for n in range(2))
        same = 0
        while same < min(len(one), len(other)) and one[same] == other[same]:
            same += 1
        assert common(one, other) == common(other, one) == same
    nothing = np.zeros(0, np.int32)
    assert common(nothing, nothing) == common(nothing, np.zeros(3, np.int32)) == 0


@pytest.mark.parametrize(
    "base", [Bitwise(CutRule(4)), Replayable(CutRule(64), 4, price=7.0), Replayable(CutRule(64), 4, 5)]
)
def test_few_logits_are_in_memory_together(base: Segmenting) -> None:
    ids = np.zeros(30, np.int32)
    for first in range(31):
        for most in (2, 3, 7, 2**31):
            mode = Foreseen(base.rule, base, (6, 12), first, most)
            cuts = mode.cuts(ids)
            expected, start = [], 8
            for end in base.segments(8, [12], cuts, 30).tolist():
                at = max(start, first)
                while end - at - most >= 2:
                    at += most
                    expected.append(at)
                expected.append(end)
                start = end
            assert mode.segments(8, [12], cuts, 30).tolist() == expected


@pytest.mark.parametrize("base", [Bitwise(CutRule(4)), Replayable(CutRule(64), 4, price=7.0)])
def test_in_all_else_it_is_as_the_handle_has_it(base: Segmenting) -> None:
    ids, mode = np.zeros(30, np.int32), Foreseen(base.rule, base, (6, 12))
    cuts = base.foreseen(ids, (6, 12), [9])
    assert mode.cuts(ids, [9]).tolist() == cuts.tolist() == mode.joined(cuts, 11, 30).tolist()
    assert mode.foreseen(ids, [5], [9]).tolist() == base.foreseen(ids, [5], [9]).tolist()
    assert (mode.mode, mode.cut_tokens) == (base.mode, base.cut_tokens)
    assert mode.expected(cuts, 30) == base.expected(cuts, 30) and mode.rounded([4, 8], {4}) == base.rounded(
        [4, 8], {4}
    )
    lineage = Lineage([4, 8, 30])
    assert mode.kv_ends(lineage, [8]) == base.kv_ends(lineage, [8])
    answered, other = mode.answered(ids, 8, Lineage([8])), base.answered(ids, 8, Lineage([8]))
    assert answered[0].tolist() == other[0].tolist() and answered[1] == other[1]
    assert mode.meeting(9, cuts, 30, cuts, 30) == base.meeting(9, cuts, 30, cuts, 30) > 0
    assert mode.first == 0 and mode.most == 2**31 and Foreseen(base.rule, base).positions == ()
    few = Foreseen(base.rule, base, most=3)
    if base.mode == "bitwise":
        assert few.expected(cuts, 30) == Lineage(few.segments(0, [], cuts, 30))


class Wishing(Policy):
    """Wishes for places, and notes where a prompt is said to resume."""

    def __init__(self, *wishes: int) -> None:
        super().__init__()
        self.wishes, self.resumed, self.seen = wishes, list[int](), list[Prompt]()

    def place(self, prompt: Prompt) -> list[int]:
        self.resumed.append(prompt.resumed)
        return [*self.wishes]

    def observe(self, prompt: Prompt) -> None:
        self.seen.append(prompt)


@pytest.mark.parametrize(
    ("limit", "wanted", "placed"),
    [
        (None, {2, 6, 12}, [8, 12]),
        (2, {6, 12}, [8, 12]),
        (1, {12}, [8, 12]),
        (0, set(), [8]),
        (5, {2, 6, 12}, [8, 12]),
    ],
)
def test_the_policy_of_the_handle_says_what_it_would_like_to_stay(
    limit: int | None, wanted: set[int], placed: list[int]
) -> None:
    policy = Wishing(12, 6, 2, 6)
    foresight = Foresight(policy, {5: 2, 9: 5, 3: 7, 8: 1, 10: 4, 6: 0}, 1, lambda position: position - 3)
    nowhere = np.zeros(0, dtype=np.int64)
    prompt = Prompt(np.zeros(12, np.int32), np.asarray([2, 4, 6, 8, 11]), 0, 4, nowhere, nowhere, limit)
    assert foresight.place(prompt) == placed
    assert policy.resumed == [1] and (prompt.resumed, prompt.limit) == (4, None)
    assert foresight.wanted == wanted
    assert foresight.needed == {4: 2, 8: 5}  # that of the third token is behind where it resumes
    assert foresight.lock is policy.lock and policy.seen == []
    foresight.observe(prompt)
    assert policy.seen == [prompt]
    plain = Foresight(policy, {}, 0)
    assert plain.place(prompt) == [12] and policy.resumed == [1, 4] and plain.needed == {}


def test_the_end_of_a_text_is_placed_once_where_all_want_it() -> None:
    nowhere = np.zeros(0, dtype=np.int64)
    for policy, placed in ((Wishing(12), [8, 12]), (Wishing(), [8, 12]), (Wishing(8), [8, 12])):
        foresight = Foresight(policy, {12: 5, 8: 4}, 0)
        prompt = Prompt(np.zeros(12, np.int32), np.asarray([4, 8, 12]), 0, 0, nowhere, nowhere)
        assert foresight.place(prompt) == placed and foresight.needed == {8: 4, 12: 5}
    assert (TextInTurn(0, 0, nowhere, 0).shared, TextInTurn(0, 0, nowhere, 0).keep) == (0, {})  # type: ignore[arg-type]
