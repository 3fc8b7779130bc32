"""Sizes, tables, totals: what a handle reports, and what reads it."""

from __future__ import annotations

import pickle
import random
from collections import deque
from typing import Any

import pytest

from hf_sparse_cache import stats
from hf_sparse_cache.stats import (
    PATIENCE,
    CacheStats,
    Cause,
    Reason,
    Recorder,
    RequestInfo,
    abridged,
    counted,
    format_bytes,
    html_table,
    parse_bytes,
    table,
)


RESUMED = Reason(Cause.RESUMED)


def info(prompt: int = 10, overlap: int = 6, resumed: int = 4, **others: Any) -> RequestInfo:
    return RequestInfo(prompt, overlap, resumed, prompt - resumed, reason=RESUMED, **others)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1024.0 KiB"),
        (2**20, "1.0 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**30, "1.0 GiB"),
        (5000 * 2**30, "5000.0 GiB"),
    ],
)
def test_bytes_as_people_read_them(count: int, said: str) -> None:
    assert format_bytes(count) == said


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, None),
        (0, 0),
        (7, 7),
        (7.0, 7),
        ("0", 0),
        ("12", 12),
        ("12.0", 12),
        (" 12 B ", 12),
        ("3kb", 3000),
        ("3 MB", 3 * 10**6),
        ("3GB", 3 * 10**9),
        ("3TB", 3 * 10**12),
        ("3KiB", 3 * 2**10),
        ("3MiB", 3 * 2**20),
        ("3GiB", 3 * 2**30),
        ("3TiB", 3 * 2**40),
        ("1.5KiB", 1536),
        ("2.25 kb", 2250),
        ("0.5GiB", 2**29),
        ("9" * 30, 10**30 - 1),
    ],
)
def test_a_size_is_read(given: Any, read: int | None) -> None:
    assert parse_bytes(given) == read


@pytest.mark.parametrize("given", ["", "GiB", "-1", "1 PiB", "1.5", "1.5B", "1,5GiB", "1GiB!", "9" * 31, "1e3", "1 2"])
def test_what_is_no_size_is_refused_by_the_name_of_its_argument(given: str) -> None:
    with pytest.raises(
        ValueError, match=r"^disk_memory='.*' is not a size; write bytes as a number or e\.g\. '2GiB'$"
    ):
        parse_bytes(given, "disk_memory")


@pytest.mark.parametrize("given", [-1, 1.5, True, False, float("inf"), float("nan"), [], {}, 1j])
def test_what_is_no_whole_number_of_bytes_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="^max_memory=.* must be a whole number of bytes, at least 0"):
        parse_bytes(given)


def test_numbers_and_what_they_count() -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_is_aligned_and_its_rule_is_as_wide() -> None:
    found = table(("a", "long name"), [("longest", "x"), ("", "yy")])
    assert found.split("\n") == [
        "| a       | long name |",
        "|---------|-----------|",
        "| longest | x         |",
        "|         | yy        |",
    ]
    assert table(("a",), []) == "| a |\n|---|"


def test_a_table_with_a_row_too_short_is_an_error() -> None:
    with pytest.raises((ValueError, IndexError)):
        table(("a", "b"), [("x",)])


def sides(made: str) -> list[str]:
    return [part.partition("'")[0] for part in made.split("text-align:")[1:]]


def test_a_table_of_a_notebook() -> None:
    made = html_table(("<a>", "b", "c"), [("1", "2", "&3")], title="T<", note="N>", words=(2,))
    assert made.startswith("<div><p><b>T&lt;</b></p><table ") and made.endswith("</table><p>N&gt;</p></div>")
    assert made.count("<tr>") == made.count("</tr>") == 2 and made.count("<th ") == made.count("</th>") == 3
    assert made.count("<td ") == made.count("</td>") == 3 and "&lt;a&gt;" in made and "&amp;3" in made
    assert sides(made) == ["left", "right", "left"] * 2


def test_a_table_of_a_notebook_without_the_parts_that_are_not_given() -> None:
    made = html_table((), [("1", "2")])
    assert made.startswith("<div><table ") and made.endswith("</table></div>")
    assert "<p>" not in made and "<th" not in made and made.count("<tr>") == 1
    assert sides(made) == ["left", "right"]


def test_a_long_list_is_told_by_its_ends() -> None:
    letters = list("abcdefghij")
    assert abridged([]) == "none" and abridged(letters[:1]) == "a"
    assert abridged(letters[:8]) == " · ".join(letters[:8])
    assert abridged(letters[:9]) == "a · b · c · d · … · f · g · h · i"
    assert abridged(letters, 4) == "a · b · … · i · j"


# -- one request ------------------------------------------------------------------------------------------------------


def test_a_reason_survives_pickling_with_its_cause_and_values() -> None:
    reason = Reason(Cause.BEFORE_FIRST, tokens=5, position=8)
    again = pickle.loads(pickle.dumps(reason))
    assert again == reason == "overlap of 5 tokens ends before the first checkpoint at 8"
    assert type(again) is Reason and again.cause is reason.cause and again.values == {"tokens": 5, "position": 8}
    assert reason.kind == Reason(Cause.BEFORE_FIRST, tokens=7, position=9).kind == (Cause.BEFORE_FIRST, "")
    one, other = (Reason(Cause.NOT_SUPPORTED, why=why) for why in ("a", "b"))
    assert one.kind == (Cause.NOT_SUPPORTED, "a") != other.kind


@pytest.mark.parametrize(
    ("segments", "batched"),
    [
        ((), False),
        ((4, 9), False),
        (((4, 5),), False),
        (((4, 4),), False),
        (((0, 9, 2),), True),
        ((4, (4, 9, 3)), True),
    ],
)
def test_a_request_is_batched_where_a_forward_had_rows_of_others(segments: Any, batched: bool) -> None:
    assert info(segments=segments).batched is batched


def test_what_was_shared_and_run_all_the_same() -> None:
    assert info(overlap=6, resumed=4).recomputed_tokens == 2
    assert info(overlap=4, resumed=4).recomputed_tokens == 0
    assert info(overlap=2, resumed=4).recomputed_tokens == 0  # a rounded state may lie deeper than what is remembered


def test_nothing_is_said_to_have_happened_by_default() -> None:
    bare = RequestInfo(3, reason=RESUMED)
    assert (bare.overlap_tokens, bare.resumed_tokens, bare.computed_tokens) == (0, 0, 0)
    assert bare.captured == bare.segments == ()


def cells(html: str) -> dict[str, str]:
    rows = [row.split("</td>") for row in html.split("<tr>")[1:]]
    return {row[0].rpartition(">")[2]: row[1].rpartition(">")[2] for row in rows}


def test_a_notebook_shows_a_request() -> None:
    told = cells(info(5000, 3000, 2000, captured=(1000, 4000), segments=(1500, (1500, 1502), (2, 9, 3)))._repr_html_())
    assert told == {
        "tokens of the prompt": "5,000",
        "shared with earlier prompts": "3,000",
        "resumed": "2,000",
        "computed": "3,000",
        "checkpoints captured at": "1,000 · 4,000",
        "segments end at": "1,500 · 1,500 to 1,502 · 2 to 9",
        "why not more was resumed": "resumed",
    }
    assert ">The request<" in info()._repr_html_()


# -- totals -----------------------------------------------------------------------------------------------------------


def test_totals_are_written_as_a_line_and_shown_as_a_table() -> None:
    assert str(CacheStats()) == (
        "0 requests · prompts 0 tokens · resumed 0 (0.0 %) · computed 0 · 0 checkpoints, 0 B · 0 evictions"
    )
    found = CacheStats(
        requests=1,
        prompt_tokens=4000,
        overlap_tokens=2000,
        resumed_tokens=1000,
        computed_tokens=3000,
        checkpoints=1200,
        checkpoint_bytes=1024,
        kv_bytes=512,
        evictions=1,
        tree_bytes=2048,
        prefill_seconds=9.5,
        match_seconds=1.25,
        plan_seconds=2.5,
        capture_seconds=0.5,
        restore_seconds=0.125,
        proved=True,
        shared={"read": 1300},
    )
    assert str(found) == (
        "1 request · prompts 4,000 tokens · resumed 1,000 (25.0 %) · computed 3,000 · 1,200 checkpoints, 1.5 KiB · "
        "1 eviction"
    )
    assert cells(found._repr_html_()) == {
        "requests": "1",
        "tokens of their prompts": "4,000",
        "shared with earlier prompts": "2,000",
        "resumed": "1,000 (25.0%)",
        "computed": "3,000",
        "checkpoints stored": "1,200",
        "bytes of states": "1.0 KiB",
        "bytes of keys and values": "512 B",
        "evictions": "1",
        "bytes of remembered prompts": "2.0 KiB",
        "seconds of prefill": "9.500",
        "of them, matching and planning": "3.750",
        "of them, capture and restore": "0.625",
        "binding proved": "yes",
        "shared store: read": "1,300",
    }
    assert found.to_dict()["shared"] == {"read": 1300} and found.to_dict()["kv_bytes"] == 512


def test_totals_of_nothing_are_nothing() -> None:
    empty = CacheStats()
    assert empty.max_remembered is None and empty.shared == {} and not empty.proved
    assert {value for name, value in empty.to_dict().items() if name not in ("max_remembered", "shared")} == {0}
    told = cells(CacheStats(tree_bytes=2048, max_remembered=4096)._repr_html_())
    assert told["bytes of remembered prompts"] == "2.0 KiB of 4.0 KiB"
    assert told["resumed"] == "0 (0.0%)" and told["binding proved"] == "no"


# -- the recorder -----------------------------------------------------------------------------------------------------


class Noted:
    """A lock that says whether it is held."""

    def __init__(self) -> None:
        self.held = False

    def __enter__(self) -> None:
        assert not self.held
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False


class Watched(Recorder):
    """A recorder whose totals change, and whose latest requests are read, only while its lock is held."""

    watching = False

    def __init__(self) -> None:
        super().__init__()
        self._lock, lock = Noted(), self  # type: ignore[assignment]

        class Recent(deque[RequestInfo]):
            def append(self, item: RequestInfo) -> None:
                assert lock._lock.held
                super().append(item)

            def __iter__(self) -> Any:
                assert lock._lock.held
                return super().__iter__()

            def __setitem__(self, index: Any, item: Any) -> None:
                assert lock._lock.held
                super().__setitem__(index, item)

        self._recent = Recent(maxlen=PATIENCE)
        self.watching = True

    def __setattr__(self, name: str, value: Any) -> None:
        assert not self.watching or self._lock.held, name
        super().__setattr__(name, value)


def test_what_threads_share_changes_under_a_lock() -> None:
    recorder, entry = Watched(), info()
    recorder.add(entry, prefill_seconds=1.0)
    recorder.called()
    recorder.amend(entry, info(prompt=11))
    assert recorder.recent == [recorder.last] and recorder.last.prompt_tokens == 11


def test_requests_add_up() -> None:
    recorder, draw = Recorder(), random.Random(0)
    assert recorder.last is None and recorder.recent == [] and recorder.totals() == CacheStats()
    given: list[RequestInfo] = []
    for index in range(PATIENCE + 5):
        numbers = [draw.randrange(100) for _ in range(4)]
        given.append(RequestInfo(*numbers, reason=RESUMED))
        recorder.add(given[-1], prefill_seconds=index + 1.0, match_seconds=0.5)
        assert recorder.last is given[-1]
        assert recorder.recent == given[-PATIENCE:]
    names = ("prompt_tokens", "overlap_tokens", "resumed_tokens", "computed_tokens")
    totals = recorder.totals(checkpoints=3)
    assert [getattr(totals, name) for name in names] == [sum(getattr(one, name) for one in given) for name in names]
    assert (totals.requests, totals.checkpoints, totals.plan_seconds) == (len(given), 3, 0.0)
    assert totals.prefill_seconds == sum(range(1, len(given) + 1)) and totals.match_seconds == 0.5 * len(given)
    recorder.start_anew()
    assert recorder.totals() == CacheStats() and recorder.recent == []


def test_the_latest_are_told_at_one_call_and_only_where_none_resumed() -> None:
    recorder = Recorder()
    for _ in range(PATIENCE - 1):
        recorder.add(info(resumed=0))
        assert recorder.called() == []
    recorder.add(info(resumed=0))
    assert len(recorder.called()) == PATIENCE
    assert recorder.called() == []
    recorder.start_anew()  # and counts calls anew
    recorder.add(info(resumed=1))
    assert [recorder.called() for _ in range(PATIENCE)] == [[]] * PATIENCE
    recorder.start_anew()
    recorder.add(info(resumed=0))
    assert [bool(recorder.called()) for _ in range(PATIENCE + 1)] == [*[False] * (PATIENCE - 1), True, False]


def test_a_block_is_told_what_its_own_recorder_tells_while_it_is_open() -> None:
    recorder, other = Recorder(), Recorder()
    one, two = info(), info(prompt=20)
    with recorder.block() as outer:
        recorder.tell([one, one])
        with recorder.block() as inner:
            other.tell([two])
            recorder.tell([two])
        recorder.tell([one])
        assert (outer, inner) == ([one, one, two, one], [two])
        assert len(stats._blocks.get()) == 1
    recorder.tell([two])
    assert outer == [one, one, two, one] and stats._blocks.get() == ()


def test_what_is_known_later_takes_the_place_of_that_very_entry() -> None:
    recorder, other = Recorder(), Recorder()
    entry, twin, later = info(), info(), info(captured=(12,))
    with recorder.block() as found, other.block() as apart:
        for each in (entry, twin, entry):
            recorder.add(each)
        recorder.tell([twin, entry, entry])
        other.tell([entry])
        recorder.amend(entry, later)
        assert [each is later for each in found] == [False, True, True] and found[0] is twin
        assert apart == [entry] and apart[0] is entry
    assert [each is later for each in recorder.recent] == [True, False, True]


def test_a_block_that_is_left_by_an_error_is_closed() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError), recorder.block() as found:
        raise KeyError
    recorder.tell([info()])
    assert found == [] and stats._blocks.get() == ()
