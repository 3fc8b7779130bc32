"""No store refuses newcomers for ever: what is stored and never asked for again makes room, alone or in sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_cache.planning.compiled import Leaving
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.policies import Policy, Prompt, make_policy
from hf_sparse_cache.planning.segments import Bitwise, Replayable, Segmenting
from hf_sparse_cache.request import Request, open_request
from hf_sparse_cache.simulator import Sized
from hf_sparse_cache.store.store import CheckpointStore


STATE, KV, GRID, QUESTION = 400, 1, 64, 70
MODES: dict[str, Segmenting] = {"bitwise": Bitwise(CutRule(GRID)), "replayable": Replayable(CutRule(GRID), GRID)}


class Close(Policy):
    """Checkpoints at some of the last cuts before the question: all need nearly all of the keys and values."""

    def __init__(self, behind: Sequence[int]) -> None:
        super().__init__()
        self.behind = behind

    def place(self, prompt: Prompt) -> list[int]:
        """So many cuts before the last one."""
        cuts = prompt.open_cuts[prompt.open_cuts <= len(prompt.ids) - QUESTION]
        return [int(cuts[-1 - back]) for back in self.behind if back < len(cuts)]


def serve(store: CheckpointStore, policy: Policy, mode: str, ids: np.ndarray) -> Request:
    with open_request(store, policy, ids, MODES[mode]) as request:
        for position in request.planned:
            request.add(position, Sized(STATE), lambda start, end: Sized(KV * (end - start)))
    return request


def asked(generator: np.random.Generator, documents: int, times: int, tokens: tuple[int, int]) -> Iterator[np.ndarray]:
    """Documents that nobody knew, one after the other, each with so many questions."""
    for _ in range(documents):
        document = generator.integers(0, 50_000, int(generator.integers(*tokens)))
        for _ in range(times):
            yield np.concatenate([document, generator.integers(0, 50_000, QUESTION)]).astype(np.int32)


def captured(store: CheckpointStore, policy: Policy, mode: str, prompts: Iterator[np.ndarray]) -> float:
    served = [serve(store, policy, mode, ids) for ids in prompts]
    shared = sum(request.overlap_tokens for request in served)
    return sum(request.resumed_tokens for request in served) / max(shared, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("documents", [2, 3])
@pytest.mark.parametrize("behind", [(0, 1), (0, 1, 2)])
def test_checkpoints_that_share_their_keys_and_values_make_room_together(
    mode: str, documents: int, behind: tuple[int, ...]
) -> None:
    """A few long documents fill the store, each under checkpoints of which none frees the document alone."""
    generator = np.random.default_rng(1)
    store = CheckpointStore(documents * (6500 * KV + len(behind) * STATE))
    captured(store, Close(behind), mode, asked(generator, documents, 1, (6300, 6400)))
    assert len(store) == documents * len(behind)
    alone = [checkpoint.held_bytes() for checkpoint in store.stored()]
    assert sum(alone) < 6300 < store.used_bytes  # no set of them, each counted alone, makes room for one document
    assert captured(store, Close((0,)), mode, asked(generator, 100, 3, (6300, 6400))) > 0.6


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(MODES)),
    st.sampled_from(["learned", "close", "junction"]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.lists(st.integers(0, 8), max_size=4)), max_size=25),
    st.integers(0, 2**31),
)
def test_no_store_refuses_newcomers_for_ever(
    mode: str, name: str, before: list[tuple[int, int, list[int]]], seed: int
) -> None:
    """Whatever was stored: once only new documents are asked for, those are what it keeps."""
    generator = np.random.default_rng(seed)
    store = CheckpointStore(6000 * KV + 4 * STATE)
    stems = [generator.integers(0, 50_000, 6000) for _ in range(4)]
    for stem, cuts, behind in before:  # paths that share much or little, under few checkpoints or many, close or far
        ids = np.concatenate([stems[stem][: 190 * cuts], generator.integers(0, 50_000, QUESTION)]).astype(np.int32)
        serve(store, Close(behind), mode, ids)
    policy = Close((0,)) if name == "close" else make_policy(name)
    captured(store, policy, mode, asked(generator, 30, 3, (1500, 5000)))
    assert captured(store, policy, mode, asked(generator, 20, 3, (1500, 5000))) > 0.3


@given(st.sampled_from(sorted(MODES)), st.lists(st.integers(1, 12), min_size=1, max_size=12), st.randoms())
def test_a_set_frees_what_the_books_say_when_it_goes(mode: str, lengths: list[int], random: object) -> None:
    """Bytes of a set, counted before it goes, against the store's own after each has gone."""
    generator = np.random.default_rng(len(lengths))
    stem = generator.integers(0, 50_000, 1300)
    store = CheckpointStore(None)
    for cuts in lengths:
        ids = np.concatenate([stem[: 100 * cuts], generator.integers(0, 50_000, QUESTION)]).astype(np.int32)
        serve(store, Close((0, 2)), mode, ids)
    order = store.stored()
    random.shuffle(order)  # type: ignore[attr-defined]
    leaving, before = Leaving(0.0), store.used_bytes
    for checkpoint in order:
        above = leaving.above(checkpoint)
        assert above is None or above in store.stored()
        leaving.add(checkpoint)
        store.ledger.evict(checkpoint)
        assert leaving.freed == before - store.used_bytes
    assert store.used_bytes == 0
