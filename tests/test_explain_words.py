"""Causes, remedies and figures of `explain`, by themselves: from what a tree knows, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hf_sparse_cache import explain as explaining
from hf_sparse_cache.explain import (
    Difference,
    Explanation,
    ModelFacts,
    cause,
    frequent,
    not_supported,
    remedy,
    too_small,
    with_lower_tiers,
)
from hf_sparse_cache.stats import Cause, Reason
from hf_sparse_cache.store.bounds import Bound
from hf_sparse_cache.store.tree import Departure


FACTS = ModelFacts(100, 10, lambda usable: 0)


# -- causes -----------------------------------------------------------------------------------------------------------


def node(**known: Any) -> Any:
    return SimpleNamespace(**{"lost": 0, "refused": 0, "batched": False, "start": 0, **known})


def match(overlap: int, path: Sequence[Any] = (), *, known: bool = True, checkpoints: Sequence[int] = ()) -> Any:
    return SimpleNamespace(
        known=known, overlap=overlap, path=list(path), checkpoints=lambda most: [c for c in checkpoints if c <= most]
    )


def caused(found: Any, usable: int, cuts: Sequence[int], ahead: Sequence[int] = ()) -> Reason:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explaining, "nearest", lambda nodes: [SimpleNamespace(position=at) for at in ahead])
        return cause(found, None, usable, np.asarray(cuts, dtype=np.int64))


def test_what_is_resumed_needs_no_other_cause() -> None:
    assert cause(match(0, known=False), SimpleNamespace(position=8), 8, np.asarray([8])) == "resumed"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reason", "found", "usable", "cuts"),
    [
        (Reason(Cause.NOTHING_STORED), match(0, known=False), 8, [4]),
        (Reason(Cause.TOO_SHORT), match(8), 8, []),
        (Reason(Cause.TOO_SHORT), match(8), 7, [8]),
        (Reason(Cause.DIVERGES, token=7), match(7), 7, [8]),  # it leaves before its end comes
        (Reason(Cause.CUT_OTHERWISE, tokens=8), match(8, [node(lost=4)], checkpoints=[8]), 8, [8]),
        (Reason(Cause.EVICTED), match(8, [node(), node(lost=8, refused=4)], checkpoints=[9]), 8, [8]),
        (Reason(Cause.EVICTED), match(8, [node(lost=1)]), 8, [8]),
        (Reason(Cause.NO_ROOM, tokens=8), match(8, [node(lost=9, refused=8)]), 8, [8]),
        (Reason(Cause.NO_ROOM, tokens=8), match(8, [node(refused=1)]), 8, [8]),
        (Reason(Cause.NOT_PLACED, tokens=8), match(8, [node(lost=9, refused=9)]), 8, [8]),
        (Reason(Cause.BATCHED, tokens=8), match(8, [node(), node(start=7, batched=True)]), 8, [8]),
        (Reason(Cause.NOT_PLACED, tokens=8), match(8, [node(start=8, batched=True)]), 8, [8]),
    ],
)
def test_the_cause_is_the_first_that_applies(reason: Reason, found: Any, usable: int, cuts: list[int]) -> None:
    assert caused(found, usable, cuts) == reason


def test_a_checkpoint_ahead_is_named_by_its_position() -> None:
    found = match(9, [node(batched=True), node()])
    assert caused(found, 8, [8], ahead=[40, 32, 48]) == Reason(Cause.BEFORE_FIRST, tokens=9, position=32)


def test_only_lower_tiers_that_hold_other_cuts_change_a_cause() -> None:
    def store(tiers: int, deepest: int) -> Any:
        return SimpleNamespace(tiers=[None] * tiers, cut_otherwise=lambda *_: deepest)

    def told(reason: Reason, tiers: int, deepest: int) -> Reason:
        return with_lower_tiers(reason, store(tiers, deepest), np.arange(3), None, "")

    nothing, short = Reason(Cause.NOTHING_STORED), Reason(Cause.TOO_SHORT)
    assert told(nothing, 1, 8) is nothing and told(nothing, 2, 0) is nothing
    assert told(nothing, 2, 8) == Reason(Cause.CUT_OTHERWISE, tokens=8)
    for kept in (short, Reason(Cause.CUT_OTHERWISE, tokens=3)):
        assert told(kept, 2, 8) is kept


# -- remedies ---------------------------------------------------------------------------------------------------------


def test_a_smaller_grid_is_named_where_one_helps() -> None:
    for reason in (Reason(Cause.TOO_SHORT), Reason(Cause.DIVERGES, token=3)):
        assert remedy(reason).endswith(" A smaller grid cuts earlier.")
        assert remedy(reason, grid=16).endswith(" A smaller grid cuts earlier: grid=16.")
        assert remedy(reason, grid=0) and "grid" not in remedy(reason, grid=0)
    assert "under namespace 'a'" in remedy(Reason(Cause.NOTHING_STORED), "a")
    assert "of this handle" in remedy(Reason(Cause.NOTHING_STORED))


def test_training_is_a_cause_of_its_own() -> None:
    assert not_supported(explaining.TRAINING_MODE).cause is Cause.TRAINING
    assert not_supported("this").kind == (Cause.NOT_SUPPORTED, "this")


def test_the_most_frequent_cause_is_worded_as_it_came_last() -> None:
    given = [Reason(Cause.DIVERGES, token=1), Reason(Cause.EVICTED), Reason(Cause.DIVERGES, token=2)]
    assert frequent(given) == (given[2], 2) and frequent(given[:2])[1] == 1


def test_what_a_checkpoint_takes() -> None:
    assert FACTS.bytes_of(7) == 100 + 70 and FACTS.bytes_of(7, 4) == 100 + 30 and FACTS.page_bytes == 1
    paged = ModelFacts(40000, 4096, lambda usable: 0, page_bytes=4096)
    assert paged.bytes_of(9, 1) == 40960 + 8 * 4096


def test_a_budget_that_is_too_small_is_told_in_bytes() -> None:
    assert too_small(Bound("max_memory", 2048, 500, 0), 1000, 4096) == (
        "A checkpoint at 1,000 takes 4.0 KiB, and max_memory is 2.0 KiB: give at least 4,096 bytes"
    )
    assert too_small(Bound("namespace_memory", 2048, 500, 1024), 8, 4096) == (
        "A checkpoint at 8 takes 4.0 KiB, beside 1.0 KiB that other marks or its own request keep, and "
        "namespace_memory is 2.0 KiB: give at least 5,120 bytes"
    )


def gap(path: Sequence[Any] = (), marked: Sequence[int] = ()) -> Any:
    return explaining._Gap.between(4, 8, match(8, path), marked)


def test_a_gap_knows_what_was_in_it() -> None:
    assert (gap().start, gap().end, gap().marked, gap().gone) == (4, 8, False, False)
    assert [gap(marked=[at]).marked for at in (3, 4, 5, 8, 9)] == [False, False, True, True, False]
    for name in ("lost", "refused"):
        assert [gap([node(**{name: at})]).gone for at in (0, 4, 5, 8, 9)] == [False, False, True, True, False]


def test_where_memory_decides_a_gap_says_how_much() -> None:
    need = FACTS.bytes_of(8)  # 180, of which 140 lie behind what it resumes from
    lost = gap([node(lost=8)])
    assert gap(marked=[8]).about_room(None, FACTS).startswith("It is marked: the next prompt")
    assert gap(marked=[8]).about_room(Bound("max_memory", need, need, 0), FACTS).startswith("It is marked")
    assert (
        gap(marked=[8]).about_room(Bound("max_memory", need, 0, 1), FACTS).startswith("A checkpoint at 8 takes 180 B")
    )
    assert gap().about_room(Bound("max_memory", need - 1, 0, 0), FACTS).endswith("give at least 180 bytes.")
    assert gap().about_room(Bound("max_memory", need, need, 0), FACTS) == "" == lost.about_room(None, FACTS)
    assert lost.about_room(Bound("max_memory", 200, 60, 0), FACTS) == ""
    said = lost.about_room(Bound("max_memory", 200, 61, 0), FACTS)
    assert said.startswith("There was no room for the checkpoint at 8: max_memory of at least 201 bytes holds it")


def test_the_ways_to_save_what_lies_behind_a_cut() -> None:
    ways = SimpleNamespace(rule=SimpleNamespace(special_distance=50))
    behind = explaining._with_ways("Do that.", 1000, 64, ways)  # type: ignore[arg-type]
    assert behind.startswith("Do that. 1,000 shared tokens lie behind the last cut before the prompts part and are")
    assert " a special token there," in behind
    before = explaining._with_ways("Do that.", 49, 0, ways)  # type: ignore[arg-type]
    assert before.startswith("49 shared tokens lie before the first cut and") and before.endswith(" Do that.")
    assert "special token" not in before
    assert " a special token there," in explaining._with_ways("", 50, 0, ways)  # type: ignore[arg-type]
    assert not explaining._with_ways("", 50, 0, ways).endswith(" ")  # type: ignore[arg-type]


# -- the first difference ---------------------------------------------------------------------------------------------


def words(ids: list[int]) -> str:
    return "".join(chr(token) for token in ids)


def differing(prompt: str, at: int, stored: str, generated: bool = False, decode: Any = words) -> Any:
    ids = np.asarray([ord(letter) for letter in prompt], dtype=np.int32)
    departure = Departure(at, np.asarray([ord(letter) for letter in stored], dtype=np.int32), generated)
    return Difference.of(ids, departure, decode)


def test_the_first_token_that_is_otherwise() -> None:
    assert differing("abcd", 2, "") is None
    assert differing("abcd", 2, "xy") == Difference(2, ord("c"), ord("x"), "c", "x")
    assert differing("abcd", 2, "xy", decode=None) == Difference(2, ord("c"), ord("x"))
    assert differing("abcd", 2, "xy", True, None) == Difference(2, ord("c"), ord("x"), in_answer=True)
    assert differing("abcd", 2, "xy", True) == Difference(2, ord("c"), ord("x"), "c", "x", True, False)


def test_whether_an_answer_goes_on_with_the_same_text() -> None:
    """Decoded with eight tokens before it, as far as both are known, but for half a letter at the end."""
    merged = {1: "ab", 2: "a", 3: "b", 4: "\N{REPLACEMENT CHARACTER}"}

    def decode(ids: list[int]) -> str:
        return "".join(merged.get(token, "x") for token in ids)

    def same(prompt: list[int], at: int, stored: list[int]) -> bool | None:
        departure = Departure(at, np.asarray(stored, dtype=np.int32), True)
        found = Difference.of(np.asarray(prompt, dtype=np.int32), departure, decode)
        assert found is not None
        return found.same_text

    assert same([9, 9, 1], 2, [2, 3]) is True
    assert same([9, 9, 1], 2, [3, 2]) is False
    assert same([9, 9, 1], 2, [2]) is True
    assert same([9, 9, 1], 2, [4]) is None  # nobody can tell by half a letter
    assert same([9, 9, 4, 2], 3, [3]) is False
    assert same([1], 0, [2, 3]) is True
    assert same([9] * 20 + [2, 3, 2], 20, [1, 3]) is False
    assert same([9] * 20 + [2, 3, 2], 20, [1, 2, 9]) is True
    counted: list[int] = []

    def count(ids: list[int]) -> str:
        counted.append(len(ids))
        return "x" * len(ids)

    Difference.of(np.arange(40, dtype=np.int32), Departure(20, np.asarray([5] * 3, dtype=np.int32), True), count)
    assert counted == [8, 16, 11, 1, 1]


def test_a_difference_reads_as_a_sentence() -> None:
    assert str(Difference(1000, 5, 6)) == "Token 1,000 is 5, and 6 in what is stored"
    assert str(Difference(1, 5, 6, "a", "b")) == "Token 1 is 'a' (5), and 'b' (6) in what is stored"
    said = [str(Difference(1, 5, 6, in_answer=True, same_text=same)) for same in (True, False, None)]
    assert len(set(said)) == 3 and all(", in an answer: " in one and one.endswith("reading") for one in said)
    assert "tokenised differently." in said[0] and "has another text there" in said[1] and "or it was re" in said[2]


# -- the whole --------------------------------------------------------------------------------------------------------


def test_an_explanation_reads_as_sentences_and_as_a_table() -> None:
    bare = Explanation(4000, 3000, 1000, Reason(Cause.EVICTED))
    assert str(bare) == ("Of 4,000 tokens, 3,000 are shared with earlier prompts and 1,000 would be skipped: evicted.")
    assert bare.recomputed_tokens == 2000 and Explanation(9, 1, 3, Reason(Cause.EVICTED)).recomputed_tokens == 0
    shown = bare._repr_html_()
    assert all(f">{text}<" in shown for text in ("4,000", "3,000", "1,000", "2,000", "evicted"))
    assert not any(text in shown for text in (">at<", ">first difference<", ">shared store<"))
    full = Explanation(9, 9, 9, Reason(Cause.EVICTED), "Do.", "ctx", "There.", Difference(1, 5, 6))
    assert str(full).endswith("skipped: evicted (at 'ctx'). Token 1 is 5, and 6 in what is stored. Do. There.")
    shown = full._repr_html_()
    assert ">at<" in shown and ">Token 1 is 5, and 6 in what is stored<" in shown and ">There.<" in shown
    assert ">Do.<" in shown
