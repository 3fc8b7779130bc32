"""Views are distribution functions, the mixture credits the right one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.planning.overlap import BRANCHES, EXTENDS, FRESH, RETURNS, Forecast, OverlapModel, shape_of
from hf_sparse_cache.planning.views import VIEWS, FromEnd, Shape, Uniform, View


def shape(length: int, overlap: int = 0, ends: tuple[int, ...] = ()) -> Shape:
    known = np.asarray(ends, dtype=np.int64)
    return Shape(length, overlap, known, np.ones_like(known), np.arange(64, length - 1, 64), FRESH)


@pytest.mark.parametrize("kind", VIEWS)
@given(st.integers(1, 200_000), st.data())
def test_views_are_distribution_functions(kind: type[View], length: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, length))
    ends = tuple(sorted(data.draw(st.sets(st.integers(1, max(overlap, 1)), max_size=3))))
    view, described = kind(), shape(length, overlap, ends if overlap else ())
    for depth in data.draw(st.lists(st.integers(0, length), max_size=5)):
        view.learn(depth, described, data.draw(st.floats(0.01, 1.0)), 0.99)
    inner = data.draw(st.lists(st.integers(0, length), max_size=8))
    depths = np.sort(np.asarray([0, *inner, length + 1], dtype=float))
    below = view.below(depths, described)
    assert below[0] == pytest.approx(0.0, abs=1e-9)
    assert below[-1] == pytest.approx(1.0, abs=1e-9)
    assert (np.diff(below) >= -1e-9).all()


def test_mixture_credits_the_view_that_foresaw() -> None:
    generator = np.random.default_rng(1)
    near_end, anywhere = OverlapModel(), OverlapModel()
    for _ in range(300):
        length = int(generator.integers(500, 5000))
        cuts = np.arange(64, length, 64)
        near_end.learn(length - 20, cuts, shape(length))
        anywhere.learn(int(generator.integers(1, length)), cuts, shape(length))
    names = [type(view) for view in near_end.views]
    assert near_end.shares[FRESH].argmax() == names.index(FromEnd)
    spread = anywhere.forecast(np.arange(64, 4000, 64), shape(4000))
    first, last = spread.passing(np.asarray([1984, 2944]))
    assert 0.18 < first - last < 0.3
    assert anywhere.shares[FRESH][names.index(Uniform)] > 0.1
    sharp = near_end.forecast(np.arange(64, 4000, 64), shape(4000))
    assert sharp.passing(np.asarray([3904])) > 0.8


@pytest.mark.parametrize(
    ("overlap", "ends", "previous", "kind"),
    [
        (10, [], None, FRESH),
        (990, [1000], shape(1000), EXTENDS),
        (500, [1000], shape(1000), BRANCHES),
        (500, [500], shape(1000), RETURNS),
    ],
)
def test_kinds(overlap: int, ends: list[int], previous: Shape | None, kind: int) -> None:
    edges = np.asarray(ends, dtype=np.int64)
    cuts = np.arange(64, 1200, 64)
    assert shape_of(1200, overlap, edges, np.ones_like(edges), cuts, previous).kind == kind


def test_stops_are_prompts_that_went_no_further() -> None:
    cuts = np.arange(64, 1200, 64)
    described = shape_of(1200, 700, np.asarray([100, 700, 900]), np.asarray([9, 4, 3]), cuts, None)
    assert described.ends.tolist() == [100, 700]
    assert described.stops.tolist() == [5, 1]


def test_prompts_shared_in_whole_blocks_are_foreseen_by_the_block() -> None:
    model, generator = OverlapModel(), np.random.default_rng(3)
    for _ in range(300):  # what is shared ends at the last cut, wherever the prompt ends behind it
        length = int(generator.integers(500, 5000))
        cuts = np.arange(64, length - 1, 64)
        model.learn(int(cuts[-1]), cuts, shape(length))
    for length in (1000, 1030, 1085):
        cuts = np.arange(64, length - 1, 64)
        forecast = model.forecast(cuts, shape(length))
        assert forecast.passing(cuts[-1:]) > 0.7
        # The distance in tokens is even over a block, so that view alone puts much of it before the last cut.
        alone = model.views[[type(view) for view in model.views].index(FromEnd)].below(cuts[-1:] * 1.0, shape(length))
        assert 1.0 - alone[0] < 0.7 or length % 64 > 60


def test_shares_are_of_those_that_enter_the_edge() -> None:
    forecast = Forecast(np.asarray([64, 128, 192, 256]), np.asarray([0.5, 0.5, 0.75, 0.9]))
    assert forecast.shares([128], [64], [0.0])[0] == pytest.approx([1.0])
    assert forecast.shares([192], [64], [0.0])[0] == pytest.approx([0.5])
    assert forecast.shares([256], [0], [0.0])[0] == pytest.approx([0.2])
    assert forecast.shares([128, 256], [0, 0], [1.0, 0.0])[0] == pytest.approx([0.8, 0.2])
    assert forecast.shares([128, 256], [0, 0], [0.5, 0.0])[0] == pytest.approx([0.9, 0.2])
    assert forecast.shares([128, 256], [0, 0], [0.5, 0.0])[1] == pytest.approx([0.1, 0.0])


def test_every_observation_counts_whatever_its_kind() -> None:
    model = OverlapModel()
    cuts = np.arange(64, 1000, 64)
    assert model.observations == 0
    for count in range(1, 4):
        model.learn(500, cuts, shape(1000))
        assert model.observations == count


def test_nothing_passes_beyond_the_last_cut() -> None:
    found = Forecast(np.asarray([10, 20]), np.asarray([0.25, 0.5])).passing(np.asarray([5, 15, 20, 21]))
    assert found.tolist() == [0.75, 0.5, 0.5, 0.0]


def described(overlap: int, ends: tuple[int, ...] = (), before: int | None = None, first: int = 64) -> Shape:
    known = np.asarray(ends, dtype=np.int64)
    cuts = np.arange(first, 1200, 64)
    return shape_of(1200, overlap, known, np.ones_like(known), cuts, None if before is None else shape(before))


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (lambda: described(63), FRESH),
        (lambda: described(64), BRANCHES),
        (lambda: described(64, first=1200), FRESH),  # there is no cut
        (lambda: described(63, (63,), 79), FRESH),
        (lambda: described(500, (500,), 516), EXTENDS),
        (lambda: described(500, (500,), 517), RETURNS),
        (lambda: described(500, (500, 800)), RETURNS),
        (lambda: described(500, (499, 800)), BRANCHES),
        (lambda: described(500, (800,), 700), BRANCHES),
        (lambda: described(600, (800,), 500), EXTENDS),
    ],
)
def test_a_prompt_meets_the_tree_in_one_of_four_ways(found: Callable[[], Shape], kind: int) -> None:
    made = found()
    assert made.kind == kind and made.length == 1200


def test_nobody_leaves_an_earlier_prompt_behind_its_end() -> None:
    longer, upto = OverlapModel(), OverlapModel()
    cuts = np.arange(64, 1000, 64)
    longer.learn(900, cuts, shape(700))
    upto.learn(700, cuts, shape(700))
    asked = (np.arange(64, 1000, 64), shape(1000))
    assert longer.forecast(*asked).below.tobytes() == upto.forecast(*asked).below.tobytes()
    upto.learn(650, cuts, shape(700))
    assert longer.forecast(*asked).below.tobytes() != upto.forecast(*asked).below.tobytes()
    assert (longer.observations, upto.observations, OverlapModel().observations) == (1, 2, 0)


def test_at_first_all_views_say_the_same_share() -> None:
    model, cuts, at = OverlapModel(), np.arange(64, 1000, 64), shape(1000, 300, (200,))
    views = [view().below(cuts.astype(float), at) for view in VIEWS]
    assert model.forecast(cuts, at).below == pytest.approx(np.mean(views, axis=0))
    assert model.forecast(cuts, at).cuts is cuts and model.shares.shape == (5, len(VIEWS))


def test_a_view_of_ones_own_says_and_learns_by_itself() -> None:
    assert View().learn(10, shape(100), 1.0, 0.9) is None  # type: ignore[func-returns-value]
    with pytest.raises(NotImplementedError):
        View().below(np.asarray([1.0]), shape(100))
