"""Prompts that are served together: who takes over from whom, and which run in one forward."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from hf_sparse_cache.planning.batch import Member, padded_groups, plan_rows, shared_tokens
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.segments import Bitwise, Replayable, Segmenting


def member(ids: list[int], segmenting: Segmenting, stored: int = 0, marked: tuple[int, ...] = ()) -> Member:
    tokens = np.asarray(ids, dtype=np.int32)
    return Member(tokens, segmenting.cuts(tokens, marked), stored, marked)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way of putting items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in partitions(rest):
        yield [[first], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [first, *group], *groups[index + 1 :]]


@pytest.mark.parametrize("forward_tokens", [0.0, 3.0, 10.0, 1000.0])
def test_no_other_groups_cost_less(forward_tokens: float) -> None:
    def cost(groups: list[list[int]]) -> float:
        return sum(max(lengths[index] for index in group) * len(group) + forward_tokens for group in groups)

    for seed in range(20):
        draw = random.Random(seed)
        lengths = [draw.randrange(1, 20) for _ in range(draw.randrange(1, 7))]
        found = padded_groups(lengths, forward_tokens)
        assert sorted(index for group in found for index in group) == list(range(len(lengths))) and all(
            group == sorted(group) for group in found
        )
        assert cost(found) == min(cost(groups) for groups in partitions(list(range(len(lengths)))))
        longest = [max(lengths[index] for index in group) for group in found]
        assert longest == sorted(longest)
    assert padded_groups([], forward_tokens) == []


def test_shared_tokens_are_counted_from_the_start() -> None:
    for one, other, shared in (([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 4], 2), ([1], [2], 0), ([], [2], 0)):
        assert (
            shared_tokens(np.asarray(one), np.asarray(other))
            == shared_tokens(np.asarray(other), np.asarray(one))
            == shared
        )


FREE = Replayable(CutRule(64), 64)
SHARED = list(range(1, 21))


def planned(segmenting: Segmenting, *rows: Member) -> list[tuple[list[int], int, list[int]]]:
    """In their order: what each begins to share behind the text of all, where it takes over, who takes over there."""
    order = plan_rows(rows, segmenting)
    for place, row in enumerate(order):
        assert (row.source is None) == (row.meeting == 0) and row.start == max(row.stored, row.meeting)
        assert row.source is None or any(row.source is other for other in order[:place])
        takers = {other.meeting for other in order if other.source is row}
        assert row.junctions == sorted(takers)
        if row.source is not None:
            assert row.ids[: row.meeting].tolist() == row.source.ids[: row.meeting].tolist()
    return [(row.ids[20:].tolist(), row.meeting, row.junctions) for row in order]


def test_each_takes_over_where_they_part() -> None:
    rows = [member([*SHARED, *own], FREE) for own in ([9, 1, 1, 1], [3, 1, 1, 1], [9, 1, 7, 7, 7], [5, 5, 5])]
    assert planned(FREE, *rows) == [
        ([3, 1, 1, 1], 0, [20]),
        ([5, 5, 5], 20, []),
        ([9, 1, 1, 1], 20, [22]),
        ([9, 1, 7, 7, 7], 22, []),
    ]


@pytest.mark.parametrize(
    ("stored", "takes"), [(0, True), (17, True), (18, False), (19, False), (20, False), (21, False)]
)
def test_it_takes_over_where_that_saves_more_than_a_forward(stored: int, takes: bool) -> None:
    """More than two tokens, where a cut costs nothing else."""
    rows = [member([*SHARED, 3, 3, 3], FREE), member([*SHARED, 4, 4, 4], FREE, stored)]
    assert planned(FREE, *rows)[1][1] == (20 if takes else 0)


@pytest.mark.parametrize(("others", "takes"), [(1, False), (2, False), (3, True)])
def test_several_pay_for_a_cut_together(others: int, takes: bool) -> None:
    costly = Replayable(CutRule(64), 64, price=40.0)
    rows = [member([*SHARED, own, 3, 3], costly) for own in range(30, 31 + others)]
    assert [meeting for _, meeting, _ in planned(costly, *rows)] == [0, *[20 * takes] * others]


def test_nothing_is_taken_from_a_prompt_that_begins_behind() -> None:
    rows = [member([*SHARED, 3, 3, 3], FREE, stored=20), member([*SHARED, 4, 4, 4], FREE)]
    assert [meeting for _, meeting, _ in planned(FREE, *rows)] == [0, 0]
    rows = [member([*SHARED, 3, 3, 3], FREE, stored=18), member([*SHARED, 4, 4, 4], FREE)]
    assert [meeting for _, meeting, _ in planned(FREE, *rows)] == [0, 20]
    rows = [member([*SHARED, 3, 3, 3], FREE, stored=19), member([*SHARED, 4, 4, 4], FREE)]
    assert [meeting for _, meeting, _ in planned(FREE, *rows)] == [0, 0]  # a segment of one token


@pytest.mark.parametrize(("mark", "meeting"), [(17, 20), (18, 20), (19, 19), (20, 20), (21, 19), (22, 20)])
def test_a_meeting_keeps_its_distance_to_a_mark(mark: int, meeting: int) -> None:
    for marks in (((mark,), ()), ((), (mark,))):
        rows = [member([*SHARED, 3, 3, 3, 3], FREE, 0, marks[0]), member([*SHARED, 4, 4, 4, 4], FREE, 0, marks[1])]
        assert planned(FREE, *rows)[1][1] == meeting


@pytest.mark.timeout(30)  # it ended never
@pytest.mark.parametrize("segmenting", [FREE, Bitwise(CutRule(8))])
def test_no_meeting_is_none_whatever_is_marked_beside_it(segmenting: Segmenting) -> None:
    """No handle announces a single token, and a store or a saved file may."""
    rows = [member([1, own, *SHARED], segmenting, marked=(1,)) for own in (2, 3, 4)]
    assert [meeting for _, meeting, _ in planned(segmenting, *rows)] == [0, 0, 0]


def test_a_meeting_keeps_its_distance_to_another() -> None:
    tails = ([3, 3, 3, 3], [3, 4, 4, 4], [5, 5, 5, 5])
    rows = [member([*SHARED, *tail], FREE) for tail in tails]
    assert [(meeting, junctions) for _, meeting, junctions in planned(FREE, *rows)] == [
        (0, [19, 21]),
        (21, []),
        (19, []),
    ]


def test_bitwise_takes_over_at_cuts() -> None:
    mode = Bitwise(CutRule(8))
    rows = [member([*SHARED, own, 3, 3, 3, 3, 3], mode) for own in (7, 8, 9)]
    assert [(meeting, junctions) for _, meeting, junctions in planned(mode, *rows)] == [(0, [16]), (16, []), (16, [])]
    apart = [member([own, *SHARED], mode) for own in (7, 8)]
    assert [row.source for row in plan_rows(apart, mode)] == [None, None]


def plainly(rows: list[Member], segmenting: Replayable) -> list[tuple[int, int | None, int]]:
    """In their order: which of the rows it is, which it takes over from, and where; by trying every position."""
    order = sorted(range(len(rows)), key=lambda number: rows[number].ids.tolist())
    source: dict[int, int] = {}
    meeting = dict.fromkeys(order, 0)
    junctions: dict[int, list[int]] = {number: [] for number in order}

    def start(number: int) -> int:
        return max(rows[number].stored, meeting[number])

    for place, number in enumerate(order):
        row = rows[number]
        for before in reversed(order[:place]):
            other = rows[before]
            shared = next(
                (n for n, (a, b) in enumerate(zip(row.ids, other.ids, strict=False)) if a != b), len(other.ids)
            )
            if shared <= start(number):
                break
            near = [*junctions[before], *other.marked, *row.marked, start(before)]
            fits = [
                at
                for at in range(2, min(shared, len(row.ids) - 2) + 1)
                if len(other.ids) - at != 1 and all(abs(at - position) != 1 for position in near)
            ]
            if max(fits, default=0) > max(start(number), start(before)):
                source[number], meeting[number] = before, max(fits)
                junctions[before].append(max(fits))
    for before, at in {(source[number], meeting[number]) for number in source}:
        takers = [number for number in source if (source[number], meeting[number]) == (before, at)]
        if sum(at - rows[number].stored for number in takers) <= max(segmenting.cut_tokens, 2):
            for number in takers:
                del source[number]
                meeting[number] = 0
    return [(number, source.get(number), meeting[number]) for number in order]


@pytest.mark.parametrize("price", [0.0, 9.0])
def test_drawn_rows_take_over_where_a_plain_account_says(price: float) -> None:
    mode = Replayable(CutRule(64), 64, price=price)
    for seed in range(300):
        draw = random.Random(seed)
        texts = {tuple(draw.choices((1, 2), (4, 1), k=draw.randrange(1, 16))) for _ in range(draw.randrange(1, 7))}
        rows = []
        for text in sorted(texts, key=lambda text: draw.random()):
            stored = draw.choice([0, 0, 0, *range(2, max(3, len(text) - 1))])
            marked = tuple(sorted(n for n in (draw.randrange(2, 14), draw.randrange(2, 30)) if n <= len(text)))
            rows.append(member([*text], mode, stored, marked))
        expected = plainly(rows, mode)
        found = plan_rows(rows, mode)
        numbers = {id(row): number for number, row in enumerate(rows)}
        told = [(numbers[id(row)], row.source and numbers[id(row.source)], row.meeting) for row in found]
        assert told == expected, seed
        for row in found:
            assert row.junctions == sorted({other.meeting for other in found if other.source is row})
