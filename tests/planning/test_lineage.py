"""Lineage: the segments that made a state."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.planning.lineage import Lineage, Step


STEPS = st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=12)


def built(steps: list[tuple[int, bool]]) -> Lineage:
    lineage = Lineage()
    for length, decoded in steps:
        end = lineage.end + length
        lineage = lineage.decoded(end) if decoded else lineage.then([end])
    return lineage


@given(STEPS)
def test_steps_lead_from_nothing_to_the_end(steps: list[tuple[int, bool]]) -> None:
    found = list(built(steps).steps())
    assert [step.start for step in found] == [0, *(step.end for step in found)][: len(found)]
    assert built(steps).end == sum(length for length, _ in steps)
    assert sum(step.end - step.start for step in found if step.decoded) == sum(n for n, decoded in steps if decoded)
    assert not any(a.decoded and b.decoded for a, b in itertools.pairwise(found))  # a run stays one run


@given(STEPS, STEPS)
def test_equal_when_every_segment_is(one: list[tuple[int, bool]], other: list[tuple[int, bool]]) -> None:
    a, b = built(one), built(other)
    assert (a == b) == (list(a.steps()) == list(b.steps()))
    assert a != b or hash(a) == hash(b)


@given(STEPS)
def test_json_keeps_it(steps: list[tuple[int, bool]]) -> None:
    lineage = built(steps)
    assert Lineage.from_json(json.loads(json.dumps(lineage.to_json()))) == lineage


def test_it_reads_as_people_write_it() -> None:
    lineage = Lineage([256, 300]).decoded(301).decoded(340).then([400])
    assert str(lineage) == "256, 300, 300…340, 400"
    assert list(lineage.steps())[2] == Step(300, 340, True)


@pytest.mark.parametrize(
    "content", [7, [3, 3], [3, 2], [[1, 4]], [2, [3, 4]], [-1], [1.0], ["1"], [True], [[0, 1, 2]], [2**31], [[0]]]
)
def test_what_is_no_lineage_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="lineage"):
        Lineage.from_json(content)


def test_a_rounding_is_told_by_the_end_alone() -> None:
    lineage = Lineage().then([10, 20, 30])
    rounded = lineage.rounded()
    assert rounded.ends_rounded and not lineage.ends_rounded and rounded.unrounded == lineage
    later = rounded.then([40])
    assert not later.ends_rounded and later.unrounded == later
    again = later.rounded()
    assert again.ends_rounded and again.rounded() is again and again.unrounded == later
    for one in (lineage, rounded, later, again):
        read = Lineage.from_json(json.loads(json.dumps(one.to_json())))
        assert read == one and read.ends_rounded == one.ends_rounded


def test_nothing_is_rounded_twice() -> None:
    with pytest.raises(ValueError, match="does not continue a lineage at position 20"):
        Lineage.from_json([20, [20, 20], [20, 20]])


def test_what_was_read_is_nobodys_to_change() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Lineage.from_json([20, 30])._ends[0] = 10
