"""What an argument must be, at the edges of every range, and what the error says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_sparse_cache import checks, jsontext
from hf_sparse_cache.errors import out_of_memory


@pytest.mark.parametrize(
    ("value", "least", "most", "whole"),
    [
        (3, 3, None, True),
        (2, 3, None, False),
        (3, 0, 3, True),
        (4, 0, 3, False),
        (np.int64(3), 3, 3, True),
        (10**30, 0, None, True),
        (-1, -1, 0, True),
        (True, 0, 3, False),
        (False, 0, None, False),
        (3.0, 0, None, False),
        ("3", 0, None, False),
        (None, 0, None, False),
    ],
)
def test_whole_numbers_of_a_range(value: Any, least: int, most: int | None, whole: bool) -> None:
    assert checks.is_whole(value, least, most) is whole
    if whole:
        found = checks.whole_number("size", value, least, "give one", most)
        assert type(found) is int and found == value
        return
    span = f"at least {least}" if most is None else f"from {least} to {most}"
    with pytest.raises(ValueError, match=f"^size must be a whole number, {span}, got .*; give one$"):
        checks.whole_number("size", value, least, "give one", most)


MOST = 2**31 - 1
IDS: list[Any] = [
    [0, 5, MOST],
    (0, 5, MOST),
    [[0, 5, MOST]],
    np.array([0, 5, MOST]),
    np.array([[0, 5, MOST]], dtype=np.uint64),
    np.array([0, 5, MOST], dtype=np.int32),
    torch.tensor([[0, 5, MOST]]),
    torch.tensor([0, 5, MOST]),
    torch.tensor([0, 5, MOST], requires_grad=False),
    [np.int64(0), np.int32(5), MOST],
]


@pytest.mark.parametrize("ids", IDS, ids=range(len(IDS)))
def test_ids_of_any_kind_become_the_same(ids: Any) -> None:
    found = checks.token_ids(ids, "line 3")
    assert found.dtype == np.int32 and found.tolist() == [0, 5, MOST]
    assert checks.token_ids(ids, "line 3", empty=True).tolist() == [0, 5, MOST]


def test_ids_that_are_stored_already_are_not_copied() -> None:
    own = np.arange(5, dtype=np.int32)
    assert checks.token_ids(own, "it") is own


WRONG: list[tuple[Any, str]] = [
    ([[1, 2], [3]], "a prompt of nested lists; give integer token ids"),
    ([[1, 2], [3, 4]], r"a prompt of int64 \(2, 2\)"),
    ([[[1]]], r"a prompt of int64 \(1, 1, 1\)"),
    (5, r"a prompt of int64 \(\)"),
    ([1, True], "a prompt with truth values"),
    ((False, 1), "a prompt with truth values"),
    (np.array([True]), r"a prompt of bool \(1,\)"),
    ([1.0, 2.0], r"a prompt of float64 \(2,\)"),
    (torch.tensor([1.0, 2.0]), r"a prompt of float32 \(2,\)"),
    (torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True), r"a prompt of float32 \(2,\)"),
    (["a"], "a prompt of <U1"),
    ([1, None], "a prompt of object"),
    ([-1, 3], "the token id -1; ids go from 0 to 2,147,483,647"),
    ([3, 2**31, 1], "the token id 2147483648"),
    ([-1, 2**31], "the token id -1"),
    ([3, 2**70], "the token id 1180591620717411303424"),
    ([3, 2**63], "the token id 9223372036854775808"),
    ([-(2**70), 3], "the token id -1180591620717411303424"),
    (np.array([2**63], dtype=np.uint64), "the token id 9223372036854775808"),
]


@pytest.mark.parametrize(("ids", "named"), WRONG, ids=range(len(WRONG)))
def test_ids_that_cannot_be_are_named(ids: Any, named: str) -> None:
    for empty in (False, True):
        with pytest.raises(ValueError, match=f"^line 3 has .*{named}"):
            checks.token_ids(ids, "line 3", empty=empty)


@pytest.mark.parametrize("ids", [[], (), [[]], np.zeros((1, 0)), torch.zeros(0)])
def test_no_ids_are_some_only_where_there_may_be_none(ids: Any) -> None:
    found = checks.token_ids(ids, "it", empty=True)
    assert found.shape == (0,) and found.dtype == np.int32
    with pytest.raises(ValueError, match="it has an empty prompt, which has nothing to match; leave it out"):
        checks.token_ids(ids, "it")


def test_text_is_what_utf_8_can_hold() -> None:
    for fine in ("", "a", "é\0\n", "\U0001f600"):
        assert checks.text("name", fine, "give one") is fine
    for wrong in (7, None, b"a"):
        with pytest.raises(ValueError, match="^name must be a string, got .*; give one$"):
            checks.text("name", wrong, "give one")
    with pytest.raises(ValueError, match=r"^name is 'ab\\ud800', whose character 2 is half of .*; give one$") as found:
        checks.text("name", "ab\ud800", "give one")
    assert found.value.__suppress_context__


def test_a_path_is_one_that_something_can_be_called(tmp_path: Path) -> None:
    assert checks.path_of("folder", "a") == Path("a") and checks.path_of("folder", tmp_path) == tmp_path

    class Bytes:
        def __fspath__(self) -> bytes:
            return b"a"

    for wrong in (7, None, b"a", Bytes()):
        with pytest.raises(ValueError, match="^folder must be a path, got .*; give a string"):
            checks.path_of("folder", wrong)
    for nothing in ("", "  ", "\n", "a\0b"):
        with pytest.raises(ValueError, match="^folder is .*, which nothing can be called; give the path"):
            checks.path_of("folder", nothing)


def test_a_value_is_shown_short_and_on_one_line() -> None:
    assert checks.shown("a") == "'a'" and checks.shown([1, 2]) == "[1, 2]"
    assert checks.shown("x" * 58) == repr("x" * 58) and checks.shown("x" * 59) == "'" + "x" * 59 + "…"

    class Odd:
        def __repr__(self) -> str:
            return "two\nlines\x1b[2J"

    class Worse:
        def __repr__(self) -> str:
            raise KeyError("no")

    assert checks.shown(Odd()) == "two lines\\x1b[2J"
    assert checks.shown(Worse()) == "a Worse that cannot be shown (KeyError)"


def test_what_would_steer_a_terminal_is_spelt_out() -> None:
    for plain in ("", "abc ~", "é\U0001f600", "a\n\tb"):
        assert checks.printable(plain) == plain
    found = {"\x1b": "\\x1b", "\r": "\\r", "\u202e": "\\u202e", "\ud800": "\\ud800", "\x9b": "\\x9b", "\x7f": "\\x7f"}
    for char, spelt in found.items():
        assert checks.printable(f"é{char}\n") == f"é{spelt}\n" and checks.printable(f"a{char}") == f"a{spelt}"


class OutOfMemoryError(Exception):
    """As torch calls its own."""


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (OutOfMemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: Out Of Memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("not enough memory: you tried"), True),
        (RuntimeError("Cannot allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
        (KeyError("x"), False),
    ],
)
def test_errors_of_memory_are_told_from_faults(error: Exception, memory: bool) -> None:
    assert out_of_memory(error) is memory


def test_json_is_read_strictly(tmp_path: Path) -> None:
    long = json.dumps("x" * 99)
    for kind in (str, str.encode):
        assert jsontext.parse(kind('{"a": [1, "é"]}'), "it") == {"a": [1, "é"]}
        for wrong, named in (
            ("{", "it is not JSON in UTF-8 .*; mend it"),
            ('{"a": 1, "b": 2, "a": 3}', "the key 'a' comes twice"),
            (f"{{{long}: 1, {long}: 3}}", f"the key '{'x' * 60}' comes twice"),
            ("[NaN]", "NaN is no number of JSON"),
            ("-Infinity", "-Infinity is no number of JSON"),
            ("[" * 100_000, "it is not JSON that can be read: it is nested too deep; mend it"),
        ):
            with pytest.raises(ValueError, match=named):
                jsontext.parse(kind(wrong), "it")
        assert jsontext.parse(kind("[Infinity]"), "it", constants=True) == [float("inf")]
    with pytest.raises(ValueError, match="it is not JSON in UTF-8"):
        jsontext.parse(b'"\xff"', "it")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n[2]\nno\n')
    read = jsontext.lines(path)
    assert [next(read), next(read)] == [(f"{path}: line 1", {"a": 1}), (f"{path}: line 4", [2])]
    with pytest.raises(ValueError, match=r"a.jsonl: line 5 is not JSON"):
        next(read)
    with pytest.raises(ValueError, match=f"{path} is not JSON"):
        jsontext.read_json(path)
    path.write_text("[1]")
    assert jsontext.read_json(path) == [1]
