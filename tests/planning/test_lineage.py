"""Lineage: the segments that made a state."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.planning.lineage import Lineage, Span, Step


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


def drawn(draw: random.Random) -> tuple[Lineage, list[Step]]:
    """A lineage that was made in one of the ways there are, and the steps that it has by a plain account of them."""
    lineage, steps = Lineage(), []
    for _ in range(draw.randrange(8)):
        end, how = lineage.end, draw.choice(("prefilled", "decoded", "rounded"))
        if how == "prefilled":
            ends = sorted(draw.sample(range(end + 1, end + 9), draw.randrange(1, 4)))
            lineage = lineage.then(ends)
            steps += [Step(before, here, False) for before, here in itertools.pairwise([end, *ends])]
        elif how == "decoded":
            here = end + draw.randrange(1, 4)
            lineage = lineage.decoded(here)
            start = steps.pop().start if steps and steps[-1].decoded else end
            steps.append(Step(start, here, True))
        elif steps and not steps[-1].rounds:
            lineage = lineage.rounded()
            steps.append(Step(end, end, False))
    return lineage, steps


def made_of(steps: list[Step]) -> Lineage:
    return Lineage([-step.end if step.decoded else step.end for step in steps])


def all_drawn(count: int = 150) -> list[tuple[Lineage, list[Step]]]:
    return [drawn(random.Random(seed)) for seed in range(count)]


def test_it_tells_the_steps_that_made_it() -> None:
    for lineage, steps in all_drawn():
        assert list(lineage.steps()) == steps and len(lineage) == len(steps) and lineage == made_of(steps)
        assert lineage.end == (steps[-1].end if steps else 0) and lineage.nbytes == 8 * len(steps)
        assert lineage.positions == sorted({step.end for step in steps})
        told = [(step.start, step.end) if step.decoded or step.rounds else step.end for step in steps]
        assert lineage.ends == tuple(told) and lineage.to_json() == json.loads(json.dumps(told))
        words = [f"{a}…{b}" if run else "rounded" if a == b else str(b) for a, b, run in steps]
        assert str(lineage) == ", ".join(words) and repr(lineage) == f"Lineage({lineage})"
        assert all(type(end) in (int, tuple) for end in lineage.ends)


def test_it_is_read_back_from_what_it_tells() -> None:
    for lineage, _ in all_drawn():
        assert Lineage.from_ends(lineage.ends) == Lineage.from_json(lineage.to_json()) == lineage
    assert Lineage.from_ends([4, (4, 9, 3), (9, 12)]).ends == (4, 9, (9, 12))  # a forward of three prompts


def test_it_is_cut_where_a_step_ends_and_nowhere_else() -> None:
    for lineage, steps in all_drawn():
        for position in range(1, lineage.end + 2):
            if position not in lineage.positions:
                with pytest.raises(ValueError, match=f"position={position} is not the end of a segment"):
                    lineage.upto(position)
                continue
            without = [step for step in steps if step.end <= position and not (step.rounds and step.end == position)]
            assert lineage.upto(position) == made_of(without)
            assert lineage.through(position) == made_of([step for step in steps if step.end <= position])


def test_a_rounding_at_the_end_is_put_there_once_and_taken_off() -> None:
    for lineage, steps in all_drawn():
        rounds = bool(steps) and steps[-1].rounds
        assert lineage.ends_rounded == rounds
        bare = made_of(steps[:-1] if rounds else steps)
        assert lineage.unrounded == bare
        again = Step(lineage.end, lineage.end, False)
        assert lineage.rounded() == made_of(steps if rounds or not steps else [*steps, again])
        if rounds or not steps:
            assert lineage.rounded() is lineage
        if not rounds:
            assert lineage.unrounded is lineage


def test_it_begins_with_its_first_steps() -> None:
    for (lineage, steps), (other, others) in itertools.product(all_drawn(40), all_drawn(40)):
        assert lineage.begins_with(other) == (steps[: len(others)] == others)
        assert (lineage == other) == (steps == others) and lineage != steps
    for lineage, steps in all_drawn():
        assert all(lineage.begins_with(made_of(steps[:count])) for count in range(len(steps) + 1))


def test_spans_say_which_forwards_ran_over_their_tokens() -> None:
    for lineage, steps in all_drawn():
        ends = lineage.positions
        for start in [0, *ends]:
            behind = [end for end in ends if end > start]
            spans = lineage.spans(start, behind)
            assert [(span.start, span.end) for span in spans] == list(itertools.pairwise([start, *behind]))
            for end in behind:
                within = [step for step in steps if start <= step.start and step.end <= end]
                within = [step for step in within if not (step.rounds and step.end == end)]
                forwards = [-step.end if step.decoded else step.end for step in within]
                assert lineage.span(start, end) == Span((start, *forwards))
        assert Lineage.of(lineage.spans(0, ends)) == lineage.unrounded
        assert lineage.spans(lineage.end, []) == []


def test_decoding_nothing_is_no_step() -> None:
    lineage = Lineage([4, 9])
    assert lineage.decoded(9) is lineage and lineage.decoded(3) is lineage
    assert Lineage().decoded(1).decoded(2).ends == ((0, 2),)


@pytest.mark.parametrize(
    "content",
    [
        [[0, True]],
        [[False, 3]],
        [True, 3],
        [5, [5, 7, 9]],
        [5, [5]],
        [5, [4, 7]],
        [[0, 0]],
        [0],
        [5, [5, 4]],
        (3, 5),
        [[0, 2**31]],
        [5, [[5], 7]],
    ],
)
def test_what_joins_nothing_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="lineage"):
        Lineage.from_json(content)


def test_it_may_be_as_long_as_a_text() -> None:
    assert Lineage.from_json([2**31 - 1]).end == 2**31 - 1
    assert Lineage.from_json([5, [5, 5], [5, 7], [7, 7]]).ends == (5, (5, 5), (5, 7), (7, 7))
    with pytest.raises(ValueError, match="not tuple"):
        Lineage.from_json((3, 5))


@pytest.mark.parametrize(
    "made",
    [
        lambda: Lineage([2, 4]),
        lambda: Lineage().then([2, 4]),
        lambda: Lineage([2, 4]).upto(2),
        lambda: Lineage.from_json([2]),
        lambda: Lineage().decoded(2),
    ],
)
def test_nobody_can_change_it(made: Callable[[], Lineage]) -> None:
    lineage = made()
    with pytest.raises(ValueError, match="read-only"):
        lineage._ends[0] = 1
    assert {lineage: 1}[made()] == 1


def test_it_keeps_its_own_numbers() -> None:
    ends = np.asarray([2, 4])
    lineage = Lineage(ends)
    ends[0] = 3
    assert lineage.ends == (2, 4)
