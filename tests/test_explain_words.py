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
    def nearest(nodes: list[Any]) -> list[Any]:
        assert nodes == found.path[-1:]  # only what lies ahead of the place where it leaves
        return [SimpleNamespace(position=at) for at in ahead]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explaining, "nearest", nearest)
        return cause(found, None, usable, np.asarray(cuts, dtype=np.int64))


def test_what_is_resumed_needs_no_other_cause() -> None:
    assert cause(match(0, known=False), SimpleNamespace(position=8), 8, np.asarray([8])) == "resumed"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reason", "found", "usable", "cuts"),
    [
        (Reason(Cause.NOTHING_STORED), match(0, known=False), 8, [4]),
        (Reason(Cause.TOO_SHORT), match(8), 8, []),
        (Reason(Cause.TOO_SHORT), match(8), 7, [8]),
        (Reason(Cause.DIVERGES, token=5), match(5), 7, [8]),
        (Reason(Cause.DIVERGES, token=7), match(7), 7, [8]),  # it leaves before its end comes
        (Reason(Cause.CUT_OTHERWISE, tokens=8), match(8, [node(lost=4)], checkpoints=[8]), 8, [8]),
        (Reason(Cause.EVICTED), match(8, [node(), node(lost=8, refused=4)], checkpoints=[9]), 8, [8]),
        (Reason(Cause.EVICTED), match(8, [node(lost=1)]), 8, [8]),
        (Reason(Cause.NOT_PLACED, tokens=8), match(8, [node(lost=-1, refused=-1)]), 8, [8]),
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
    found = match(9, [node(batched=True), node(), node()])
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
    assert frequent([given[1], given[1], given[0]]) == (given[1], 2)


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
    for used in (60, 5):
        assert lost.about_room(Bound("max_memory", 200, used, 0), FACTS) == ""
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
    counted.clear()
    Difference.of(np.arange(40, dtype=np.int32), Departure(3, np.asarray([5] * 3, dtype=np.int32), True), count)
    assert counted == [3, 11, 6, 1, 1]


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


# -- one prompt, from what a store says -------------------------------------------------------------------------------


class Known:
    """A store that says what a test wants of a prompt, and is looked at only under its lock where it may change."""

    def __init__(self, found: Any, **others: Any) -> None:
        self.found, self.held = found, False
        self.lock = self
        self.marks = SimpleNamespace(lengths=lambda ids, space: self.marked if self.held else None)
        self.marked = others.get("marked", [])
        self.deeper, self.shared = others.get("deeper", (0, 0)), others.get("shared")
        self.tiers = [
            SimpleNamespace(departure=lambda *_, one=one: one) for one in others.get("departures", [NOWHERE])
        ]
        self.room, self.otherwise = others.get("room"), others.get("otherwise", 0)

    def __enter__(self) -> None:
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False

    def match(self, ids: Any, space: str) -> Any:
        assert self.held and space == "space"
        return self.found

    def reach(self, ids: Any, expected: Any, space: str) -> tuple[int, int]:
        return self.deeper

    def bound(self, ids: Any, position: int, space: str) -> Any:
        self.asked = position
        return self.room

    def cut_otherwise(self, ids: Any, expected: Any, space: str) -> int:
        return self.otherwise


NOWHERE = Departure(0, np.empty(0, dtype=np.int32), False)


def overlapping(overlap: int, resumed: int = 0, **others: Any) -> Any:
    found = match(overlap, **others)
    found.fitting = lambda length, expected: iter([SimpleNamespace(position=resumed)] if resumed else [])
    return found


def explained(
    found: Any, cuts: Sequence[int] = (16, 32, 64), length: int = 100, lineage: Any = "lineage", **others: Any
) -> Explanation:
    """Of a prompt of tokens 0, 1, 2, ..., with cuts that `joined` leaves as they are."""
    decode, grids = others.pop("decode", None), others.pop("grids", lambda usable: 0)
    store, given = Known(found, **others), np.asarray(cuts, dtype=np.int64)
    segmenting = SimpleNamespace(
        cuts=lambda ids, marked: given if marked == store.marked else None,
        expected=lambda cuts, length: lineage,
        joined=lambda cuts, overlap, length: cuts,
        rule=SimpleNamespace(special_distance=10**6),
    )
    facts = ModelFacts(100, 10, grids, decode)
    return explaining.explain(store, np.arange(length, dtype=np.int32), segmenting, "space", facts)  # type: ignore[arg-type]


def test_what_is_resumed_of_what_is_shared() -> None:
    one = explained(overlapping(70, 64), lineage=None)
    assert (one.prompt_tokens, one.overlap_tokens, one.resumed_tokens, one.reason) == (100, 70, 64, "resumed")
    assert one.remedy == one.context == one.shared == "" and one.difference is None
    none = explained(overlapping(70))
    assert (none.overlap_tokens, none.resumed_tokens, none.reason.cause) == (70, 0, Cause.NOT_PLACED)
    assert none.reason.values == {"tokens": 70}
    assert explained(overlapping(100)).reason.values == {"tokens": 98}  # a prompt of its own length lacks a segment
    assert explained(overlapping(0, known=False)).reason == "nothing stored"


def test_a_lower_tier_may_reach_deeper_and_know_more() -> None:
    for deeper, expected in (((64, 80), (64, 80)), ((64, 64), (64, 70)), ((16, 90), (16, 90)), ((0, 90), (0, 70))):
        found = explained(overlapping(70), deeper=deeper)
        assert (found.resumed_tokens, found.overlap_tokens) == expected
        assert (found.reason == "resumed") == (expected[0] > 0)
    assert explained(overlapping(70, 32), deeper=(32, 90)).overlap_tokens == 70
    assert explained(overlapping(70), otherwise=16, departures=[NOWHERE, NOWHERE]).reason.cause is Cause.CUT_OTHERWISE
    assert explained(overlapping(70, 32), otherwise=16, departures=[NOWHERE, NOWHERE]).reason == "resumed"


def test_a_shared_store_may_reach_deeper_and_says_what_it_has() -> None:
    def shared(there: int, resumed: int) -> Any:
        def reach(ids: Any, expected: Any, space: str, held: int) -> tuple[int, str]:
            assert held == resumed
            return there, "told"

        return SimpleNamespace(reach=reach)

    for there, expected in ((80, (80, 80, "resumed")), (64, (64, 70, "resumed"))):
        found = explained(overlapping(70, 32), shared=shared(there, 32))
        assert (found.resumed_tokens, found.overlap_tokens, found.reason) == expected and found.shared == "told"
    found = explained(overlapping(70), shared=shared(0, 0))
    assert (found.resumed_tokens, found.overlap_tokens, found.shared) == (0, 70, "told")
    assert found.reason.cause is Cause.NOT_PLACED


def test_shared_tokens_behind_the_last_checkpoint_are_counted_to_the_last_cut() -> None:
    def marks(overlap: int, resumed: int, cuts: Sequence[int]) -> str:
        return explained(overlapping(overlap, resumed), cuts, lineage=None).remedy

    assert marks(70, 16, (16, 32, 64)).startswith("48 shared tokens lie behind the last checkpoint: cache.mark()")
    assert marks(64, 16, (16, 32, 64)).startswith("48 shared tokens")
    assert marks(63, 16, (16, 32, 64)).startswith("16 shared tokens")
    assert marks(31, 16, (16, 32, 64)) == marks(70, 64, (16, 32, 64)) == marks(70, 64, (80,)) == marks(9, 4, ()) == ""
    assert marks(16, 4, (16, 80)).startswith("12 shared tokens")


def test_what_memory_decides_comes_before_what_the_cause_says() -> None:
    room = Bound("max_memory", 100, 0, 0)
    assert explained(overlapping(70, 32), room=room).remedy.startswith("A checkpoint at 64 takes 740 B")
    assert explained(overlapping(70), room=Bound("max_memory", 10**6, 0, 0)).remedy.startswith("Call cache.mark()")
    assert explained(overlapping(70), marked=[64]).remedy.startswith("It is marked")
    assert explained(overlapping(70, 64), room=room, lineage=None).remedy == ""  # nothing is missing


def test_many_shared_tokens_behind_a_cut_are_told_with_the_ways_to_save_them() -> None:
    most = explaining.MESSAGE_TOKENS

    def ways(overlap: int, resumed: int, cuts: Sequence[int], length: int = 1000, lineage: Any = "lineage") -> str:
        return explained(overlapping(overlap, resumed), cuts, length, lineage).remedy

    behind = ways(64 + most + 1, 64, (64,))
    assert behind.startswith(f"{most + 1:,} shared tokens lie behind the last cut")
    assert ways(64 + most, 64, (64,)) == ""
    assert ways(64 + most + 1, 64, (64,), lineage=None) == ""
    assert ways(500, 64, (64,), length=500) == ""  # all of it is known: it parts from nothing
    assert f"{500 - 96} shared tokens lie behind" in ways(500, 64, (64, 96))
    assert f"{500 - 128} shared tokens lie behind" in ways(500, 128, (64, 96))
    assert ways(500, 0, (600,)).startswith("500 shared tokens lie before the first cut")
    assert explained(overlapping(3), (8,), grids=lambda usable: usable + 4).remedy.endswith("grid=7.")
    assert "namespace" not in explained(overlapping(0, known=False)).remedy


def test_the_text_around_the_place_where_a_prompt_leaves() -> None:
    def context(overlap: int, **others: Any) -> str:
        return explained(overlapping(overlap, **others), decode=lambda ids: f"{ids[0]}..{ids[-1]}").context

    assert context(50) == "42..57" and context(3) == "0..10" and context(99) == "91..99"
    assert context(100) == "" == context(0, known=False) and context(0) == "0..7"
    assert explained(overlapping(50)).context == ""


def test_the_deepest_place_where_any_tier_leaves_is_told_unless_more_is_shared() -> None:
    def leaves(*at: int) -> Any:
        departures = [Departure(one, np.asarray([9], dtype=np.int32), False) for one in at]
        return explained(overlapping(50), departures=departures).difference

    assert leaves(50) == Difference(50, 50, 9) and leaves(20, 60, 55) == Difference(60, 60, 9) and leaves(49) is None
