"""The two modes: what is a cut, what fits, and what is run."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.planning.cuts import CutRule, TextEnds, cut_positions
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.planning.segments import Bitwise, Replayable, Segmenting


IDS = st.lists(st.integers(0, 3), min_size=3, max_size=80).map(lambda ids: np.asarray(ids, dtype=np.int32))
RULES = st.builds(CutRule, st.integers(2, 16), st.sets(st.integers(0, 3), max_size=1).map(tuple))
MODES = st.one_of(
    st.builds(Bitwise, RULES),
    st.builds(Replayable, RULES, st.integers(2, 16), st.one_of(st.none(), st.integers(2, 20))),
)


@given(IDS, MODES, st.data())
def test_segments_run_from_the_start_to_the_end_and_pass_every_capture(
    ids: np.ndarray, mode: Segmenting, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, len(ids)))
    marked = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=2)))
    cuts = mode.joined(mode.cuts(ids, marked), overlap, len(ids))
    assert np.all(np.diff(np.append(0, cuts)) >= 2)
    start = data.draw(st.sampled_from([0, *(cut for cut in cuts.tolist() if cut <= len(ids) - 2)]))
    planned = [cut for cut in cuts.tolist() if cut > start and data.draw(st.booleans())]
    ends = mode.segments(start, planned, cuts, len(ids))
    lengths = np.diff(np.append(start, ends))
    assert ends[-1] == len(ids) and np.all(lengths >= 2)
    assert set(planned) <= set(ends.tolist())
    if isinstance(mode, Replayable) and mode.piece is not None:
        assert np.all(lengths <= mode.piece + 1)  # one more where a token would be left alone


@given(IDS, RULES, st.data())
def test_bitwise_fits_what_a_cold_run_makes_and_nothing_else(
    ids: np.ndarray, rule: CutRule, data: st.DataObject
) -> None:
    mode = Bitwise(rule)
    cuts = mode.cuts(ids)
    whole, expected = mode.segments(0, [], cuts, len(ids)), mode.expected(cuts, len(ids))
    for count in range(1, len(whole) + 1):
        assert expected.begins_with(Lineage(whole[:count]))
    other = sorted(data.draw(st.sets(st.integers(1, len(ids)), min_size=1, max_size=6)))
    assert expected.begins_with(Lineage(other)) == (other == whole[: len(other)].tolist())


def test_the_end_of_a_shorter_prompt_is_no_cut_of_a_longer_one() -> None:
    mode = Bitwise(CutRule(4))
    ids = np.zeros(12, dtype=np.int32)
    shorter = mode.expected(mode.cuts(ids[:7]), 7)
    assert not mode.expected(mode.cuts(ids), 12).begins_with(shorter)


def test_decoded_tokens_fit_replayable_mode_alone() -> None:
    ids = np.zeros(40, dtype=np.int32)
    answer = Lineage([16]).decoded(20)
    bitwise, replayable = Bitwise(CutRule(4)), Replayable(CutRule(4), 4)
    assert not bitwise.expected(bitwise.cuts(ids), 40).begins_with(answer)
    assert replayable.expected(replayable.cuts(ids), 40) is None


@pytest.mark.parametrize(("piece", "ends"), [(None, [100]), (40, [40, 80, 100]), (49, [49, 98, 100]), (99, [100])])
def test_pieces(piece: int | None, ends: list[int]) -> None:
    mode = Replayable(CutRule(256), 64, piece)
    assert mode.segments(0, [], np.asarray([64]), 100).tolist() == ends


def in_pieces(start: int, stops: list[int], piece: int | None) -> list[int]:
    ends: list[int] = []
    for stop in stops:
        while piece is not None and stop - start - piece >= 2:
            start += piece
            ends.append(start)
        ends.append(stop)
        start = stop
    return ends


def test_replayable_runs_from_checkpoint_to_checkpoint_in_pieces() -> None:
    draw = random.Random(0)
    for _ in range(200):
        length, piece = draw.randrange(6, 60), draw.choice([None, 2, 3, 5, 20, 80])
        start = draw.randrange(length - 2)
        planned = sorted(draw.sample(range(1, length + 1), draw.randrange(4)))
        stops = [*(stop for stop in planned if start + 2 <= stop < length), length]
        found = Replayable(CutRule(64), 4, piece).segments(start, planned, np.asarray(planned), length)
        assert found.tolist() == in_pieces(start, stops, piece) and found.dtype == np.int64


def first_come(groups: list[list[int]], length: int) -> list[int]:
    """Each position in its turn, unless one that is there, or an end of the text, is a token away."""
    taken: list[int] = []
    for position in itertools.chain(*groups):
        inside = position == length or 2 <= position <= length - 2
        if inside and all(abs(position - other) >= 2 for other in taken):
            taken.append(position)
    return sorted(taken)


def test_replayable_cuts_the_important_places_first() -> None:
    draw = random.Random(1)
    for _ in range(200):
        ids = np.asarray(draw.choices(range(5), k=draw.randrange(3, 50)), dtype=np.int32)
        step, specials = draw.randrange(2, 9), tuple(draw.sample(range(5), draw.randrange(2)))
        strings = draw.choice([None, TextEnds(["3"], lambda tokens: "".join(map(str, tokens)))])
        marked = sorted(draw.sample(range(len(ids) + 1), draw.randrange(3)))
        mode = Replayable(CutRule(64, specials, strings), step)
        behind = [] if strings is None else (np.flatnonzero(ids == 3) + 1).tolist()
        regular = cut_positions(ids, step, specials, 2).tolist()
        assert mode.cuts(ids, marked).tolist() == first_come([[len(ids)], marked, behind, regular], len(ids))
        assert mode.cuts(ids).tolist() == first_come([[len(ids)], behind, regular], len(ids))
        wishes = sorted(draw.sample(range(len(ids) + 1), 3))
        assert mode.foreseen(ids, wishes, marked).tolist() == first_come([[len(ids)], marked, wishes], len(ids))
        assert mode.foreseen(ids, wishes).tolist() == first_come([[len(ids)], wishes], len(ids))


def test_the_junction_takes_the_place_of_cuts_beside_it() -> None:
    draw, mode = random.Random(2), Replayable(CutRule(64), 4)
    for _ in range(300):
        length = draw.randrange(3, 30)
        cuts = np.asarray(first_come([draw.choices(range(2, length), k=5), [length]], length))
        for overlap in range(length + 1):
            kept = [cut for cut in cuts.tolist() if abs(cut - overlap) >= 2]
            expected = sorted([*kept, overlap]) if 2 <= overlap <= length - 2 else cuts.tolist()
            assert mode.joined(cuts, overlap, length).tolist() == expected


def test_replayable_takes_over_where_nothing_gets_too_short() -> None:
    mode, nothing = Replayable(CutRule(64), 4), np.zeros(0, np.int64)
    for length, other, shared in itertools.product(range(2, 9), range(2, 9), range(9)):
        if shared > min(length, other):
            continue
        fits = [at for at in range(2, min(shared, length - 2) + 1) if other - at != 1]
        assert mode.meeting(shared, nothing, length, nothing, other) == max(fits, default=0), (length, other, shared)


def test_bitwise_takes_over_at_the_last_cut_of_both() -> None:
    draw, mode = random.Random(3), Bitwise(CutRule(4))
    for _ in range(200):
        one, other = (np.asarray(sorted(draw.sample(range(1, 30), draw.randrange(9)))) for _ in range(2))
        shared = draw.randrange(32)
        both = [cut for cut in one.tolist() if cut in other.tolist() and cut <= shared]
        assert mode.meeting(shared, one, 32, other, 32) == max(both, default=0)


def test_bitwise_looks_at_nothing_but_the_text() -> None:
    mode, ids = Bitwise(CutRule(4, (7,))), np.asarray([1, 1, 1, 1, 1, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], dtype=np.int32)
    assert mode.cuts(ids).tolist() == mode.foreseen(ids, [3]).tolist() == [4, 6, 8, 12]
    assert mode.cuts(ids, [9]).tolist() == mode.foreseen(ids, [3], [9]).tolist() == mode.rule.cuts(ids, [9]).tolist()
    assert mode.joined(mode.cuts(ids), 7, len(ids)).tolist() == [4, 6, 8, 12]
    assert mode.segments(4, [], mode.cuts(ids), len(ids)).tolist() == [6, 8, 12, 16]
    assert mode.expected(mode.cuts(ids), len(ids)) == Lineage([4, 6, 8, 12, 16])
    assert mode.kv_ends(Lineage([4, 6, 8]), [6]) == [4, 6, 8]


@pytest.mark.parametrize(("start", "left"), [(0, [4, 8, 12]), (7, [8, 12]), (8, [8, 12]), (9, [12]), (13, [])])
def test_bitwise_keeps_of_an_answer_what_a_reader_of_it_would(start: int, left: list[int]) -> None:
    mode = Bitwise(CutRule(4))
    positions, lineage = mode.answered(np.zeros(14, dtype=np.int32), start, Lineage([start or 4]))
    assert positions.tolist() == left and lineage == Lineage([4, 8, 12, 14])


@pytest.mark.parametrize(("start", "left"), [(10, [13]), (12, [13]), (13, []), (14, [])])
def test_replayable_keeps_the_last_token_that_was_read(start: int, left: list[int]) -> None:
    mode, made = Replayable(CutRule(4), 4), Lineage([start])
    positions, lineage = mode.answered(np.zeros(14, dtype=np.int32), start, made)
    assert positions.tolist() == left and lineage == made.decoded(13)
    assert mode.kv_ends(lineage, [4, 6]) == [4, 6]


def test_rounding_is_where_each_mode_goes_on_from_what_it_keeps() -> None:
    ends, stops = np.asarray([4, 8, 12]), {8, 12}
    for rounds in (False, True):
        bitwise, replayable = Bitwise(CutRule(4), rounds=rounds), Replayable(CutRule(4), 4, rounds=rounds)
        made = Lineage([2]).rounded() if rounds else Lineage([2])
        everywhere, inside = ([4, 4, 8, 8, 12, 12], [4, 8, 8, 12]) if rounds else ([4, 8, 12], [4, 8, 12])
        assert bitwise.behind(made, ends, stops) == made.then(everywhere)
        assert replayable.behind(made, ends, stops) == made.then(inside)
        for mode in (bitwise, replayable):
            assert mode.kept(Lineage([4])) == (Lineage([4, 4]) if rounds else Lineage([4]))
    assert Replayable(CutRule(4), 4).rounded([4, 8], {8}) == set()
    assert Bitwise(CutRule(4), rounds=True).expected(np.asarray([4]), 9) == Lineage([4, 4, 9, 9])


def test_what_a_cut_and_a_forward_cost_is_said_by_the_mode() -> None:
    bitwise, replayable = Bitwise(CutRule(4)), Replayable(CutRule(4), price=7.0, overhead=5.0)
    assert (bitwise.cut_tokens, bitwise.forward_tokens) == (0.0, 0.0)
    assert (replayable.cut_tokens, replayable.forward_tokens) == (7.0, 5.0)
    assert (bitwise.mode, replayable.mode) == ("bitwise", "replayable")
    fresh = Replayable(CutRule(4))
    assert (fresh.cut_tokens, fresh.forward_tokens, fresh.tail, fresh.junctions) == (0.0, 0.0, 1, ())
    assert not (fresh.rounds or fresh.afresh or fresh.gathers) and fresh.piece is None


@pytest.mark.parametrize(
    ("options", "tokens", "loses", "together"),
    [
        ({"overhead": 5.0}, 20, True, True),  # four times what its forward costs besides
        ({"overhead": 5.0}, 21, True, False),
        ({"overhead": 5.0}, 21, False, False),
        ({"overhead": 5.0, "piece": 20}, 20, True, True),
        ({"overhead": 5.0, "piece": 30}, 20, True, True),
        ({"overhead": 5.0, "piece": 19}, 20, True, False),
        ({"overhead": 1e6}, 1024, True, True),
        ({"overhead": 1e6}, 1025, True, False),
        ({"gathers": True}, 5000, False, True),
        ({"gathers": True}, 5000, True, False),
        ({"gathers": True, "piece": 4999}, 5000, False, False),
    ],
)
def test_who_runs_in_one_forward_with_others(options: dict, tokens: int, loses: bool, together: bool) -> None:
    assert Replayable(CutRule(4), **options).together(tokens, loses) == together
    assert Bitwise(CutRule(4)).together(tokens, loses) is False
