"""Cuts are a pure, causal function of the prompt's own tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_cache.planning.cuts import CutRule, TextEnds, cut_positions, message_start


IDS = st.lists(st.integers(0, 5), max_size=60).map(lambda ids: np.asarray(ids, dtype=np.int32))
GRIDS = st.integers(1, 16)
SPECIALS = st.sets(st.integers(0, 5), max_size=2)


def naive(ids: list[int], grid: int, cut_ids: set[int], distance: int) -> list[int]:
    cuts: list[int] = []
    for position in range(1, len(ids) - 1):
        wanted = position % grid == 0 or ids[position - 1] in cut_ids
        if wanted and position - (cuts[-1] if cuts else 0) >= distance:
            cuts.append(position)
    return cuts


@given(IDS, GRIDS, SPECIALS)
def test_equals_the_naive_scan(ids: np.ndarray, grid: int, cut_ids: set[int]) -> None:
    distance = min(grid, max(2, grid // 4))
    assert cut_positions(ids, grid, cut_ids).tolist() == naive(ids.tolist(), grid, cut_ids, distance)


@given(IDS, GRIDS, SPECIALS, st.integers(0, 60))
def test_cuts_of_a_prefix_are_those_of_the_whole(ids: np.ndarray, grid: int, cut_ids: set[int], length: int) -> None:
    whole = cut_positions(ids, grid, cut_ids)
    prefix = cut_positions(ids[:length], grid, cut_ids)
    assert prefix.tolist() == whole[whole <= min(length, len(ids)) - 2].tolist()


def test_tokens_after_the_cut_decide_nothing() -> None:
    ids = np.zeros(100, dtype=np.int32)
    other = ids.copy()
    other[70:] = 1
    a, b = cut_positions(ids, 16, [1]), cut_positions(other, 16, [1])
    assert a[a <= 70].tolist() == b[b <= 70].tolist()


@pytest.mark.parametrize(("grid", "distance"), [(0, None), (8, 0), (8, 9)])
def test_bad_arguments(grid: int, distance: int | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        cut_positions(np.zeros(4, np.int32), grid, (), distance)


WORDS = ("a", "b", "ab", "\n", "?\n", "Q:", ":")


def spell(ids: list[int]) -> str:
    return "".join(WORDS[token] for token in ids)


def naive_rule(ids: list[int], grid: int, cut_ids: set[int], strings: tuple[str, ...], marks: set[int]) -> list[int]:
    distance = min(grid, max(2, grid // 4))
    cuts: list[int] = []
    for position in range(1, len(ids) - 1):
        if position in marks and position >= 2:
            while cuts and position - cuts[-1] < 2:
                del cuts[-1]
            cuts.append(position)
            continue
        behind = position - (cuts[-1] if cuts else 0)
        ends = bool(strings) and spell(ids[:position]).endswith(strings) and behind >= 2
        if ends or ((position % grid == 0 or ids[position - 1] in cut_ids) and behind >= distance):
            cuts.append(position)
    return cuts


@given(
    st.lists(st.integers(0, len(WORDS) - 1), max_size=50),
    st.integers(2, 16),
    SPECIALS,
    st.sets(st.sampled_from(["\nQ:", "b", "ab\n", "?"]), max_size=2),
    st.sets(st.integers(0, 50), max_size=3),
)
def test_strings_and_marks_cut_as_the_naive_scan_does(
    ids: list[int], grid: int, cut_ids: set[int], strings: set[str], marks: set[int]
) -> None:
    rule = CutRule(grid, tuple(cut_ids), TextEnds(strings, spell) if strings else None)
    expected = naive_rule(ids, grid, cut_ids, tuple(strings), marks)
    assert rule.cuts(np.asarray(ids, dtype=np.int32), marks).tolist() == expected


def test_a_string_that_ends_inside_a_token_does_not_cut() -> None:
    ids = np.asarray([0, 1, 4, 0, 1, 4, 0, 0], dtype=np.int32)  # the question mark lies inside "?\n"
    assert CutRule(64, (), TextEnds(["?"], spell)).cuts(ids).tolist() == []
    assert CutRule(64, (), TextEnds(["b?\n"], spell)).cuts(ids).tolist() == [3, 6]


def test_a_character_of_several_tokens_ends_with_its_last() -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    ids = np.frombuffer("über die Brücke: ja nein".encode(), dtype=np.uint8).astype(np.int32)
    found = TextEnds(["ü", "ke:"], decode).positions(ids).tolist()
    text = "über die Brücke: ja nein"
    assert found == [len(text[: at + 1].encode()) for at in (0, text.index("ücke"), text.index(":"))]


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([5, 5, 5, 5], 0),  # no special token
        ([9, 5, 5, 5, 5], 1),
        ([9, 5, 5, 9, 5, 5, 5, 5, 8, 5, 9, 5, 5], 4),  # what asks for the answer is no message
        ([9, 9, 5, 5, 5, 9], 2),
        ([5, 5, 5, 5, 9, 5, 5], 0),
    ],
)
def test_where_the_last_message_begins(ids: list[int], start: int) -> None:
    assert message_start(np.asarray(ids, dtype=np.int32), (8, 9)) == start
    assert message_start(np.asarray(ids, dtype=np.int32), ()) == 0


def test_text_ends_tell_whether_any_was_found() -> None:
    ends = TextEnds(["b?\n"], spell)
    assert not ends.found
    assert ends.positions(np.asarray([0, 0, 1], dtype=np.int32)).tolist() == [] and not ends.found
    assert ends.positions(np.asarray([0, 1, 4, 0], dtype=np.int32)).tolist() == [3] and ends.found
    assert ends.positions(np.asarray([0, 0, 1], dtype=np.int32)).tolist() == [] and ends.found  # once is enough


# -- the same on many drawn cases, which have all that there is in them -----------------------------------------------


def test_drawn_texts_are_cut_as_the_naive_scan_does() -> None:
    for seed in range(400):
        draw = random.Random(seed)
        ids = draw.choices(range(6), k=draw.randrange(90))
        grid, cut_ids = draw.randrange(1, 24), {*draw.sample(range(6), draw.randrange(3))}
        distance = draw.choice([None, draw.randrange(1, grid + 1)])
        found = cut_positions(np.asarray(ids, np.int32), grid, cut_ids, distance)
        expected = naive(ids, grid, cut_ids, min(grid, max(2, grid // 4)) if distance is None else distance)
        assert found.tolist() == expected and found.dtype == np.int64, (ids, grid, cut_ids, distance)


def test_drawn_strings_and_marks_cut_as_the_naive_scan_does() -> None:
    for seed in range(400):
        draw = random.Random(seed)
        ids = draw.choices(range(len(WORDS)), k=draw.randrange(3, 50))
        grid, cut_ids = draw.randrange(2, 16), {*draw.sample(range(len(WORDS)), draw.randrange(2))}
        strings = draw.sample(["\nQ:", "b", "ab\n", "?", "bab"], draw.randrange(3))
        marks = {*draw.sample(range(len(ids) + 2), draw.randrange(4))}
        rule = CutRule(grid, tuple(cut_ids), TextEnds(strings, spell) if strings else None)
        found = rule.cuts(np.asarray(ids, np.int32), marks)
        assert found.tolist() == naive_rule(ids, grid, cut_ids, tuple(strings), marks) and found.dtype == np.int64


def test_the_last_message_of_drawn_texts_begins_behind_a_special_token() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        ids = draw.choices([1, 1, 1, 8, 9], k=draw.randrange(30))
        special = [n for n, token in enumerate(ids, 1) if token in (8, 9)]
        begins = [n for n in special if len(ids) >= n + 3 and not {*ids[n : n + 3]} & {8, 9}]
        assert message_start(np.asarray(ids, np.int32), (9, 8)) == max(begins, default=0)


def test_a_tokenizer_that_drops_the_blank_before_a_text_finds_its_strings() -> None:
    """What is decoded begins one token before the string may: a blank at the very beginning is lost."""
    words = ["a", " ", "b", " b"]

    def decode(ids: list[int]) -> str:
        return "".join(words[token] for token in ids).removeprefix(" ")

    for ids in ([0, 1, 2, 0], [0, 0, 1, 2], [0, 3], [1, 2, 1, 2], [0, 1, 1, 2]):
        text = ["".join(words[token] for token in ids[:n]).removeprefix(" ") for n in range(1, len(ids) + 1)]
        expected = [n for n, upto in enumerate(text, 1) if upto.endswith(" b")]
        assert TextEnds([" b"], decode).positions(np.asarray(ids, np.int32)).tolist() == expected
    assert TextEnds((), decode).positions(np.asarray([0, 1], np.int32)).tolist() == []


def test_a_token_is_decoded_by_itself_once() -> None:
    asked: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        asked.append(ids)
        return spell(ids)

    ends = TextEnds(["Q:"], decode)
    for _ in range(2):
        assert ends.positions(np.asarray([0, 5, 0, 1, 5], np.int32)).tolist() == [2, 5]
    assert sorted(ids for ids in asked if len(ids) == 1) == [[0], [1], [5]]
    assert all(len(ids) <= 3 for ids in asked)  # no more is decoded than can matter


def test_cuts_next_to_the_ends_of_a_text() -> None:
    rule = CutRule(2, (), TextEnds(["b"], spell))
    for ids in ([1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0], [0, 1], [1, 1, 1], [0, 1, 0]):
        for marks in ((), (2,), (1, 2, 3), (len(ids) - 2,), (len(ids) - 1, len(ids))):
            expected = naive_rule(ids, 2, set(), ("b",), {*marks})
            assert rule.cuts(np.asarray(ids, np.int32), marks).tolist() == expected
    with pytest.raises(ValueError, match="grid must be at least 1 token, got 0; use a multiple"):
        cut_positions(np.zeros(4, np.int32), 0)
    with pytest.raises(ValueError, match=r"min_distance must be 1 to grid \(8\), got 9; leave it out"):
        cut_positions(np.zeros(4, np.int32), 8, (), 9)
    assert cut_positions(np.zeros(4, np.int32), 1, (), 1).tolist() == [1, 2]
    assert [CutRule(grid).special_distance for grid in (1, 2, 7, 8, 12, 64)] == [1, 2, 2, 2, 3, 16]
