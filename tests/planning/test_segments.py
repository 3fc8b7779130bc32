"""The two modes: what is a cut, what fits, and what is run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.planning.cuts import CutRule
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
