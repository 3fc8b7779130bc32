"""A call that knows all its texts: each token of their trie is computed once, as far as a segment may be short."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from prompting import Blob

from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.foresight import Foreseen, Foresight, common, turns
from hf_sparse_cache.planning.policies import NoCheckpoints, Prompt
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
