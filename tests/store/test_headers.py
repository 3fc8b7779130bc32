"""What a file says of itself, field by field: what is right is read as it is, what is a little wrong is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store import headers
from hf_sparse_cache.store.headers import MAX_HEADER_BYTES, MAX_POSITION, Header, StateRecord, header_bytes, is_count


def headed(value: Any, behind: int = 0) -> bytes:
    """A file with a header of any JSON, and zeros behind it."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + bytes(behind)


def entry(begin: Any, end: Any, **other: Any) -> dict[str, Any]:
    return {"dtype": "I32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **other}


@pytest.mark.parametrize(
    ("value", "most", "counts"),
    [
        (0, 5, True),
        (5, 5, True),
        (6, 5, False),
        (-1, 5, False),
        (1.0, 5, False),
        (True, 5, False),
        (False, 5, False),
        ("1", 5, False),
        (None, 5, False),
        (2**62, None, True),
        (2**62 + 1, None, False),
    ],
)
def test_a_count_is_a_whole_number_up_to_a_most(value: Any, most: int | None, counts: bool) -> None:
    assert (is_count(value) if most is None else is_count(value, most)) is counts


@pytest.mark.parametrize(
    ("length", "size", "known", "fits"),
    [
        (2, 10, 8, True),
        (1, 10, 8, False),
        (0, 10, 8, False),
        (3, 10, 8, False),
        (2, 9, 8, False),
        (2, 10, 7, False),
        (2, 10, 20, True),
        (MAX_HEADER_BYTES, 2**40, 8, True),
        (MAX_HEADER_BYTES + 1, 2**40, 8, False),
    ],
)
def test_a_header_is_as_long_as_its_file_and_the_library_allow(length: int, size: int, known: int, fits: bool) -> None:
    head = (length.to_bytes(8, "little") + bytes(12))[:known]
    if fits:
        assert header_bytes(head, size) == length
        return
    with pytest.raises(DamagedFileError, match=f"promise a header of {length} bytes, in a file of {size}"):
        header_bytes(head, size)


def test_a_header_says_what_lies_where() -> None:
    own = {"b": entry(0, 8), "a": entry(8, 12), "c": entry(0, 0), "__metadata__": {"x": "1"}}
    data = headed(own, 12)
    found = Header.parse(data, len(data))
    assert found.start == len(data) - 12 and found.metadata == {"x": "1"} and set(found.entries) == {"a", "b", "c"}
    assert found.place("b", "I32", 4) == (found.start, found.start + 8)
    assert found.place("a", "I32", 4) == (found.start + 8, found.start + 12)
    assert found.place("c", "I32", 4) == (found.start, found.start)
    begun = Header.parse(data[:-12], len(data) + 5, whole=False)  # of a file that goes on
    assert begun.entries == found.entries
    bare = headed({"a": entry(0, 4)}, 4)
    assert Header.parse(bare, len(bare)).metadata == {} and Header.parse(headed({}), len(headed({}))).entries == {}


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([], "no object"),
        ({"__metadata__": []}, "metadata are not strings"),
        ({"__metadata__": {"x": 1}}, "metadata are not strings"),
        ({"__metadata__": {"x": "1", "y": None}}, "metadata are not strings"),
        ({"a": [0, 4]}, "no place for the tensor 'a'"),
        ({"a": {}}, "no place for the tensor 'a'"),
        ({"a": {"data_offsets": {"0": 0, "1": 4}}}, "no place for the tensor 'a'"),
        ({"a": {"data_offsets": [4]}}, "no place for the tensor 'a'"),
        ({"a": {"data_offsets": [0, 4, 4]}}, "no place for the tensor 'a'"),
        ({"a": {"data_offsets": [0, True]}}, "no place for the tensor 'a'"),
        ({"a": {"data_offsets": [0.0, 4]}}, "no place for the tensor 'a'"),
        ({"a": {"data_offsets": [-4, 4]}}, "no place for the tensor 'a'"),
        ({"a": {"data_offsets": [5, 4]}}, "no place for the tensor 'a'"),
        ({"a" * 41: {}}, "no place for the tensor 'a{40}'"),
        ({"a": entry(0, 4), "b": entry(4, 8)}, "bytes, its header promises"),
        ({}, "bytes, its header promises"),
    ],
)
def test_a_header_that_cannot_be_is_named(value: Any, named: str) -> None:
    data = headed(value, 4)
    with pytest.raises(DamagedFileError, match=named):
        Header.parse(data, len(data))
    right = headed({"a": entry(0, 4)}, 4)
    Header.parse(right, len(right))


@pytest.mark.parametrize("other", [-1, 1])
def test_a_file_of_another_size_than_its_header_promises_says_both(other: int) -> None:
    data = headed({"a": entry(0, 4)}, 4)
    with pytest.raises(DamagedFileError, match=f"has {len(data) + other} bytes, its header promises {len(data)}"):
        Header.parse(data, len(data) + other)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "U8"}, "no tensor 'a' of type I32"),
        ({"dtype": None}, "no tensor 'a' of type I32"),
        ({"shape": [2]}, "shape of its tensor 'a'"),
        ({"shape": [1, 1]}, "shape of its tensor 'a'"),
        ({"shape": 1}, "shape of its tensor 'a'"),
        ({"data_offsets": [0, 5]}, "shape of its tensor 'a'"),
        ({"data_offsets": [0, 3], "shape": [0]}, "shape of its tensor 'a'"),
    ],
)
def test_a_tensor_of_another_kind_than_it_must_be_has_no_place(changes: Any, named: str) -> None:
    own = entry(0, 4, **changes)
    data = headed({"a": own}, own["data_offsets"][1])
    with pytest.raises(DamagedFileError, match=named):
        Header.parse(data, len(data)).place("a", "I32", 4)
    with pytest.raises(DamagedFileError, match="no tensor 'b' of type I32"):
        Header.parse(data, len(data)).place("b", "I32", 4)


@pytest.mark.parametrize("record", [None, "[]", "7", "{}", '{"format": true}', '{"format": -1}', '{"format": "3"}'])
def test_a_record_is_an_object_with_a_format(record: str | None) -> None:
    for text, fits in ((record, False), ('{"format": 0, "a": [1]}', True)):
        data = headed({} if text is None else {"__metadata__": {"unit": text}})
        found = Header.parse(data, len(data))
        if fits:
            assert found.record() == {"format": 0, "a": [1]}
            continue
        with pytest.raises(DamagedFileError, match="does not describe a unit"):
            found.record()


def test_json_is_read_from_text_and_bytes_of_any_kind() -> None:
    for kind in (str, str.encode, lambda text: memoryview(text.encode())):
        assert headers.parse_json(kind('{"a": [1, "\\u0041é"]}')) == {"a": [1, "Aé"]}
        assert headers.parse_json(kind("Infinity"), constants=True) == float("inf")
        with pytest.raises(DamagedFileError, match="Infinity is no number of JSON"):
            headers.parse_json(kind("Infinity"))
        for half in ('"\\ud800"', '{"\\udc00": 1}'):
            with pytest.raises(DamagedFileError, match="surrogates not allowed"):
                headers.parse_json(kind(half))
        assert headers.parse_json(kind('"\\ud83d\\ude00"')) == "\U0001f600"
        with pytest.raises(DamagedFileError, match=r"^it is not JSON in UTF-8 \(.*\)$"):  # and no remedy of files
            headers.parse_json(kind("{no"))


def test_tokens_come_out_as_they_went_in() -> None:
    own = np.array([0, 1, 256, 2**31 - 1], dtype=np.int32)
    found = headers.tokens_from(own.astype("<i4").tobytes())
    assert found.dtype == np.int32 and np.array_equal(found, own) and found.flags.writeable


def test_equal_content_gives_equal_bytes_whatever_the_order() -> None:
    tensors = {"b": np.arange(3, dtype=np.int32), "a": np.ones(5)}
    for length in range(9):
        metadata = {"z": "é" * length, "b": "2"}
        found = headers.canonical(safetensors.numpy.save(tensors, metadata))
        assert found == headers.canonical(found)
        size = int.from_bytes(found[:8], "little")
        text = found[8 : 8 + size].rstrip(b" ")
        value = json.loads(text)
        assert text == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        assert size % 8 == 0 and size - len(text) < 8 and value["__metadata__"] == metadata
        read = safetensors.numpy.load(found)
        assert set(read) == {"a", "b"} and all(np.array_equal(read[name], tensors[name]) for name in tensors)


# -- what a state says of itself --------------------------------------------------------------------------------------


def state(**changes: Any) -> dict[str, Any]:
    own = {"format": 3, "space": "s", "position": 8, "lineage": [4, 8], "kv": [[0, 4, "a"], [4, 8, "b"]]}
    return {name: value for name, value in {**own, **changes}.items() if value != "left out"}


EIGHT = np.arange(8, dtype=np.int32)


def test_a_state_is_read_as_it_was_written() -> None:
    found = StateRecord.parse(state(), EIGHT)
    assert (found.format, found.space, found.final) == (3, "s", False) and found.tokens is EIGHT
    assert found.lineage == Lineage([4, 8]) and found.kv == (((0, 4), "a"), ((4, 8), "b"))
    assert (found.kv[1][0].start, found.kv[1][0].end) == (4, 8)
    assert StateRecord.parse(state(final=True), EIGHT).final is True
    bare = StateRecord.parse(state(kv=[]), EIGHT)
    assert bare.kv == () and bare.lineage == Lineage([4, 8])
    assert StateRecord.parse(state(kv=[[0, 4, 8, "a"]]), EIGHT).kv == (((0, 4, 8), "a"),)
    rounded = StateRecord.parse(state(lineage=[4, 8, [8, 8]]), EIGHT)  # which is in no span
    assert rounded.lineage == Lineage([4, 8, 8])
    decoded = StateRecord.parse(state(lineage=[4, [4, 8]], kv=[[0, 4, "a"], [4, -8, "b"]]), EIGHT)
    assert decoded.lineage == Lineage([4]).decoded(8)


def test_a_state_of_format_1_is_made_by_the_segments_of_its_keys_and_values() -> None:
    found = StateRecord.parse(state(format=1, lineage="left out"), EIGHT)
    assert found.lineage == Lineage([4, 8])
    assert StateRecord.parse(state(format=1, lineage="left out", kv=[]), EIGHT).lineage is None
    with pytest.raises(DamagedFileError, match="a lineage is a list"):
        StateRecord.parse(state(lineage="left out"), EIGHT)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"space": 7}, "lacks its space, its position or its keys"),
        ({"space": "left out"}, "lacks its space, its position or its keys"),
        ({"position": "left out"}, "lacks its space, its position or its keys"),
        ({"position": 8.0}, "lacks its space, its position or its keys"),
        ({"position": True}, "lacks its space, its position or its keys"),
        ({"position": MAX_POSITION + 1}, "lacks its space, its position or its keys"),
        ({"position": MAX_POSITION}, f"says position {MAX_POSITION} and holds 8 tokens"),
        ({"kv": "left out"}, "lacks its space, its position or its keys"),
        ({"kv": {}}, "lacks its space, its position or its keys"),
        ({"position": 7}, "says position 7 and holds 8 tokens"),
        ({"position": 9}, "says position 9 and holds 8 tokens"),
        ({"kv": [[0, 4, "a"]]}, "end at 4, not at its position 8"),
        ({"kv": [[0, 4, "a"], [4, 9, "b"]]}, "end at 9, not at its position 8"),
        ({"lineage": [4]}, "segments are not those"),
        ({"lineage": [4], "kv": []}, "segments are not those"),
        ({"lineage": [4, 9], "kv": []}, "segments are not those"),
        ({"lineage": [8]}, "segments are not those"),
        ({"lineage": [4, [4, 8]]}, "segments are not those"),
        ({"lineage": [4, [4, 4], 8]}, "segments are not those"),
        ({"lineage": [8, 4]}, "does not continue a lineage at position 8"),
        ({"final": 1}, "does not say whether it stands at the end"),
        ({"final": None}, "does not say whether it stands at the end"),
    ],
)
def test_a_state_that_cannot_be_is_named(changes: Any, named: str) -> None:
    with pytest.raises(DamagedFileError, match=named):
        StateRecord.parse(state(**changes), EIGHT)


def test_a_state_of_nothing_is_none() -> None:
    nothing = state(position=0, lineage=[], kv=[])
    with pytest.raises(DamagedFileError, match="says position 0 and holds 0 tokens"):
        StateRecord.parse(nothing, EIGHT[:0])


def as_lineage(items: list[Any]) -> Any:
    """The same forwards as a lineage of JSON has them; None where the spans do not follow each other."""
    position, found = 0, []
    for start, *ends, _ in items:
        if type(start) is not int or start != position or not ends:
            return None
        for end in ends:
            if type(end) is not int or end == -position or abs(end) > MAX_POSITION:
                return None
            found.append([position, end] if end == position else [position, -end] if end < 0 else end)
            position = abs(end)
        if position == start or position == abs(ends[-2] if len(ends) > 1 else start):
            return None  # nothing of it is kept, or a rounding that is part of what comes behind
    return found


def test_spans_are_read_where_a_lineage_of_the_same_forwards_is() -> None:
    """Two readers of the same: what the one takes for gapless the other does, too, but for bounds and ends."""
    draw, read, refused = random.Random(3), 0, 0
    for _ in range(4000):
        items: list[Any] = []
        position = 0
        for index in range(draw.randint(0, 3)):
            start, ends = position + draw.choice((0, 0, 0, 0, 0, 0, 0, 1, -1)), []
            for _ in range(draw.choice((1, 1, 2, 3))):
                step = draw.choice((0, 1, 2, 3, 1, 2, 3, 4, -1))
                position += step
                ends.append(position * draw.choice((1, 1, 1, -1)))
            items.append([start, *ends, f"f{index}"])
        try:
            spans, names = headers._spans(items)
        except DamagedFileError as error:
            assert "keys and values are not gapless at" in str(error)
            spans = None
        try:
            wanted = as_lineage(items)
            lineage = None if wanted is None else Lineage.from_json(wanted)
        except ValueError:
            lineage = None
        assert (spans is None) == (lineage is None), items
        if lineage is None or spans is None:
            refused += 1
            continue
        assert Lineage.of(spans) == lineage and names == [item[-1] for item in items]
        assert [tuple(span) for span in spans] == [tuple(item[:-1]) for item in items]
        read += 1
    assert read > 400 and refused > 400


@pytest.mark.parametrize("end", [MAX_POSITION, -MAX_POSITION])
def test_spans_reach_as_far_as_any_position(end: int) -> None:
    assert [span.end for span in headers._spans([[0, end, "a"]])[0]] == [MAX_POSITION]
    with pytest.raises(DamagedFileError, match="not gapless at 0"):
        headers._spans([[0, end + (1 if end > 0 else -1), "a"]])


@pytest.mark.parametrize(
    "item", [7, "0,4,a", [], [0, "a"], [0, 4], [0, 4, 7], [0, 4, None], [0, 4.0, "a"], [0, True, "a"], [False, 4, "a"]]
)
def test_spans_that_are_none_are_refused(item: Any) -> None:
    for items in ([item], [[0, 4, "a"], item]):
        with pytest.raises(DamagedFileError, match="keys and values are not gapless at [04]"):
            headers._spans(items)
