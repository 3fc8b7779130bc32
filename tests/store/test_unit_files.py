"""One unit as files: written, found and read back, and refused where anything of it is another's."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_store import Blob

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store import files
from hf_sparse_cache.store.headers import RefusedFileError
from hf_sparse_cache.store.seal import Seal, same_digits
from hf_sparse_cache.store.unit import Unit, movable
from hf_sparse_cache.store.unit_files import Found, Packing, StoredFile, UnitFiles, UnitReader, find, read_marks


SECRET = "0123456789abcdef0"
KEY, HIDING = Seal(SECRET), Seal(SECRET, encrypt=True)
TOKENS = np.arange(9, dtype=np.int32)
LINEAGE = Lineage([2, 4])


def unit(space: str = "s", final: bool = False) -> Unit:
    spans = LINEAGE.spans(0, [2, 4])
    kv = {span: Blob(20, ["kv", *span]) for span in spans}
    return Unit(space, TOKENS, LINEAGE, Blob(30, ["state"]), spans, kv, final=final)


def written(folder: Path, own: Unit, seal: Seal = files.CHECKSUMS) -> list[Path]:
    """The files of a unit, its state last."""
    packing = Packing(seal)
    parts = [packing.kv(own.kv[span], span, own.space) for span in own.spans]
    parts.append(packing.state(own, [name for name, _ in parts]))
    for name, data in parts:
        (folder / name).write_bytes(data)
    return [folder / name for name, _ in parts]


def only(found: Found) -> UnitFiles:
    assert not found.lost
    (one,) = found.units
    return one


@pytest.mark.parametrize("seal", [files.CHECKSUMS, KEY, HIDING], ids=repr)
@pytest.mark.parametrize("final", [False, True])
def test_a_unit_is_found_and_read_as_it_was_written(tmp_path: Path, seal: Seal, final: bool) -> None:
    own = unit(final=final)
    paths = written(tmp_path, own, seal)
    os.utime(paths[-1], ns=(7, 12345))
    found = only(find(tmp_path, seal))
    assert (found.space, found.lineage, found.final, found.used) == ("s", LINEAGE, final, 12345)
    assert found.tokens.tolist() == [0, 1, 2, 3] and list(found.kv) == own.spans
    stored = [*found.kv.values(), found.state]
    assert [(file.path, file.nbytes) for file in stored] == [(path, path.stat().st_size) for path in paths]
    read = UnitReader(Blob.from_bytes, seal).read(found, own.spans[1:])
    assert (read.space, read.lineage, read.final, read.position) == ("s", LINEAGE, final, 4)
    assert read.state.label == ("state",) and [blob.label for blob in read.kv.values()] == [("kv", 2, 4)]
    assert list(read.kv) == own.spans[1:] and read.spans == own.spans
    bare = found.unit()
    assert bare.state is found.state and bare.kv is found.kv and bare.final is final
    record = files.peek(paths[-1], seal)[0]
    assert record["format"] == 3 and ("keyed" in record) == bool(seal.keyed) and ("final" in record) is final
    assert files.peek(paths[0], seal)[0]["span"] == [0, 2]


def test_units_come_in_the_order_of_use_with_all_else_that_lies_there(tmp_path: Path) -> None:
    states = []
    for number in range(3):
        states.append(written(tmp_path, unit(f"s{number}"))[-1])
    for path, used in zip(states, (5, 3, 5), strict=True):
        os.utime(path, ns=(used, used))
    left = files.temporary_of(states[0])
    left.write_bytes(b"12")
    (odd := tmp_path / "kv-1.safetensors").write_text("")
    (tmp_path / files.new_name("state", b"")).write_text("")
    found = find(tmp_path, files.CHECKSUMS)
    later = sorted((states[0], states[2]), key=lambda path: path.name)
    assert [each.state.path for each in found.units] == [states[1], *later]
    assert len(found.stored) == 10 and [(each.path, each.nbytes) for each in found.unfinished] == [(left, 2)]
    assert len(found.lost) == 2 and str(found.lost[odd]) == "it is a file that was not written here"
    assert isinstance(found.units[0].state, StoredFile) and found.stored[states[1].name] is found.units[0].state


def test_a_unit_without_its_keys_and_values_or_its_key_is_lost(tmp_path: Path) -> None:
    paths = written(tmp_path, unit())
    paths[1].unlink()
    (reason,) = find(tmp_path, files.CHECKSUMS).lost.values()
    assert str(reason) == "keys and values it builds on are gone"
    (reason,) = find(tmp_path, KEY).lost.values()
    assert isinstance(reason, RefusedFileError)
    state = Packing(files.CHECKSUMS).state(unit(), [paths[0].name, "state-" + paths[0].name[3:]])
    (tmp_path / ("state-" + paths[0].name[3:])).write_bytes(b"")
    (tmp_path / state[0]).write_bytes(state[1])
    assert str(find(tmp_path, files.CHECKSUMS).lost[tmp_path / state[0]]) == "keys and values it builds on are gone"


class Expecting:
    """What a model would say of its states, with a note of what it was asked."""

    has_kv = True

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.state, self.kv = 1000, 500

    def state_bytes(self, position: int, final: bool) -> int:
        return self.state + final

    def kv_bytes(self, start: int, end: int) -> int:
        return self.kv + end - start

    def check_state(self, payload: Any, position: int, final: bool) -> None:
        self.asked.append((payload.label, position, final))

    def check_kv(self, payload: Any, start: int, end: int) -> None:
        self.asked.append((payload.label, start, end))


def test_what_is_read_is_held_against_what_is_expected(tmp_path: Path) -> None:
    own, expected = unit(final=True), Expecting()
    written(tmp_path, own)
    found = only(find(tmp_path, files.CHECKSUMS))
    reader = UnitReader(Blob.from_bytes, files.CHECKSUMS, expected)  # type: ignore[arg-type]
    reader.read(found, own.spans)
    assert expected.asked == [(("state",), 4, True), (("kv", 0, 2), 0, 2), (("kv", 2, 4), 2, 4)]
    assert reader.most(4, None) == 1000 + 2**20 + 256 * 4 and reader.most(4, None, True) == 1001 + 2**20 + 256 * 4
    assert reader.most(0, own.spans[1]) == 502 + 2**20
    assert UnitReader(Blob.from_bytes, files.CHECKSUMS).most(4, None) is None
    asked: list[tuple[str, int | None]] = []

    def fetch(file: StoredFile, most: int | None) -> bytes:
        asked.append((file.path.name.partition("-")[0], most))
        return file.path.read_bytes()

    replace(reader, fetch=fetch).read(found, own.spans[:1])
    assert asked == [("state", 1001 + 2**20 + 1024), ("kv", 502 + 2**20)]
    expected.state = -(2**20) - 1024
    with pytest.raises(DamagedFileError, match="what it is for has at most") as refused:
        reader.read(found, [])
    assert refused.value.path == found.state.path
    expected.state, expected.has_kv = 1000, False
    with pytest.raises(DamagedFileError, match="keys and values where the model has none"):
        reader.read(found, [])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    own = unit()
    paths = written(tmp_path, own)
    found = only(find(tmp_path, files.CHECKSUMS))
    reader = UnitReader(Blob.from_bytes, files.CHECKSUMS)
    paths[1].unlink()
    assert reader.read(found, own.spans[:1]).state.label == ("state",)
    for path, spans in ((paths[1], own.spans), (paths[2], [])):
        path.unlink(missing_ok=True)
        with pytest.raises(DamagedFileError, match="No such file") as refused:
            reader.read(found, spans)
        assert refused.value.path == path and isinstance(refused.value.__cause__, OSError)


def test_a_state_of_before_says_nothing_of_what_made_it(tmp_path: Path) -> None:
    own = unit()
    written(tmp_path, own)
    bare = replace(only(find(tmp_path, files.CHECKSUMS)), lineage=None)
    with pytest.raises(DamagedFileError, match="written before states named the segments"):
        bare.unit()


@pytest.mark.parametrize(
    "change",
    [
        {"space": "other"},
        {"final": True},
        {"lineage": Lineage([1, 2, 4])},
        {"tokens": np.array([0, 1, 2, 4], dtype=np.int32)},
        {"kv": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_state_of_another_prompt_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    written(tmp_path, unit())
    found = only(find(tmp_path, files.CHECKSUMS))
    with pytest.raises(DamagedFileError, match="belongs to another prompt than its folder says"):
        UnitReader(Blob.from_bytes, files.CHECKSUMS).read(replace(found, **change), [])


def test_keys_and_values_of_others_are_refused(tmp_path: Path) -> None:
    own = unit()
    written(tmp_path, own)
    found = only(find(tmp_path, files.CHECKSUMS))
    first, second = own.spans
    swapped = replace(found, kv={first: found.kv[second], second: found.kv[first]})
    reader = UnitReader(Blob.from_bytes, files.CHECKSUMS)
    with pytest.raises(DamagedFileError, match="other keys and values than those of tokens 0 to 2"):
        reader._kv("s", first, files.read(swapped.kv[first].path))
    with pytest.raises(DamagedFileError, match="belong to another model or namespace"):
        reader._kv("other", first, files.read(found.kv[first].path))
    for record, read in (
        ({"format": 1, "span": [0, 2]}, True),
        ({"format": 1, "span": [0, 2], "space": "s"}, True),
        ({"format": 1, "span": [0, 2], "space": "other"}, False),
        ({"format": 2, "span": [0, 2]}, False),
        ({"format": 2, "span": [0, 2], "space": "s"}, True),
        ({"format": 4, "span": [0, 2], "space": "s"}, False),
        ({"format": 0, "span": [0, 2], "space": "s"}, False),
    ):
        data = Blob(5, "x").to_bytes(json.dumps(record), TOKENS[:0])
        if read:
            assert reader._kv("s", first, data).label == "x"
            continue
        with pytest.raises(DamagedFileError, match="keys and values"):
            reader._kv("s", first, data)


@pytest.mark.parametrize("seal", [files.CHECKSUMS, KEY, HIDING], ids=repr)
def test_marks_are_read_as_they_were_written(tmp_path: Path, seal: Seal) -> None:
    for number, prefixes in enumerate(([], [TOKENS[:3]], [TOKENS[:3], TOKENS, TOKENS[:1]])):
        name, data = Packing(seal).marks(prefixes, "s")
        (tmp_path / name).write_bytes(data)
        for most in (None, 100):
            found = read_marks(tmp_path / name, "s", seal, most)
            assert [each.tolist() for each in found] == [each.tolist() for each in prefixes], number
    with pytest.raises(DamagedFileError, match="marks belong to another model or namespace"):
        read_marks(tmp_path / name, "other", seal, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lengths": [3, 5]}, "do not add up to its 9 tokens"),
        ({"lengths": [10, -1]}, "do not add up to its 9 tokens"),
        ({"lengths": "9"}, "do not add up to its 9 tokens"),
        ({"lengths": [9.0]}, "do not add up to its 9 tokens"),
        ({"lengths": None}, "do not add up to its 9 tokens"),
        ({"format": 4}, "it has format 4, and formats"),
        ({"space": 7}, "another model or namespace"),
    ],
)
def test_marks_that_cannot_be_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    data = Blob(5).to_bytes(json.dumps({"format": 3, "space": "s", "lengths": [9], **changes}), TOKENS)
    path = tmp_path / files.new_name("marks", data)
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=named) as refused:
        read_marks(path, "s", files.CHECKSUMS, None)
    assert isinstance(refused.value, RefusedFileError) == ("format" in changes)


def test_marks_are_bounded_by_what_may_be_remembered(tmp_path: Path) -> None:
    name, data = Packing(files.CHECKSUMS).marks([np.zeros(300_000, np.int32), TOKENS], "s")
    long = Packing(files.CHECKSUMS).marks([np.arange(400_000, dtype=np.int32)], "s")
    (tmp_path / name).write_bytes(data), (tmp_path / long[0]).write_bytes(long[1])
    assert len(read_marks(tmp_path / long[0], "s", files.CHECKSUMS, len(long[1]) // 4)) == 1
    with pytest.raises(DamagedFileError, match="at most"):
        read_marks(tmp_path / long[0], "s", files.CHECKSUMS, 10_000)


# -- what proves and hides them ---------------------------------------------------------------------------------------


def test_a_key_is_a_secret_of_some_length() -> None:
    assert Seal("x" * 16).keyed == Seal(b"x" * 16).keyed != Seal("x" * 17).keyed and len(Seal(b"x" * 16).keyed) == 16
    for wrong, named in (("x" * 15, "key has 15 bytes and must have at least 16"), (7, "must be a string or bytes")):
        with pytest.raises(ValueError, match=named):
            Seal(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="encrypt=True needs a key"):
        Seal(encrypt=True)
    assert [repr(each) for each in (Seal(), KEY, HIDING)] == [
        "Seal(checksums)",
        "Seal(keyed)",
        "Seal(keyed, encrypted)",
    ]
    assert (Seal().keyed, Seal().encrypts, KEY.encrypts, HIDING.encrypts) == ("", False, False, True)


def test_a_key_comes_from_the_argument_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_SPARSE_CACHE_KEY", raising=False)
    assert Seal.of(None).keyed == "" and Seal.of(SECRET).keyed == KEY.keyed and Seal.of(SECRET, True).encrypts
    monkeypatch.setenv("HF_SPARSE_CACHE_KEY", SECRET)
    assert Seal.of(None).keyed == KEY.keyed and Seal.of(None, True).encrypts and not Seal.of(None).encrypts
    assert Seal.of("y" * 16).keyed == Seal("y" * 16).keyed
    monkeypatch.setenv("HF_SPARSE_CACHE_KEY", "short")
    with pytest.raises(ValueError, match="^HF_SPARSE_CACHE_KEY: key has 5 bytes.*; or unset it$"):
        Seal.of(None)
    assert KEY.instead(None, None) is KEY
    for key, encrypt, other in ((None, True, HIDING), ("y" * 16, None, Seal("y" * 16)), (SECRET, True, HIDING)):
        found = KEY.instead(key, encrypt)
        assert (found.keyed, found.encrypts) == (other.keyed, other.encrypts)
    assert HIDING.instead("y" * 16, None).encrypts and not HIDING.instead(None, False).encrypts


def test_checksums_and_names_depend_on_the_key() -> None:
    for one, other in ((Seal(), KEY), (KEY, Seal("y" * 16))):
        assert one.checksum(b"data") != other.checksum(b"data") and len(one.checksum(b"data")) == 32
        assert one.fits(b"data", one.checksum(b"data")) and not one.fits(b"data", other.checksum(b"data"))
        assert one.hasher(b"use").hexdigest() != other.hasher(b"use").hexdigest() != other.hasher(b"two").hexdigest()
    assert KEY.checksum(b"data") == HIDING.checksum(b"data") and len(KEY.hasher(b"a").digest()) == 16
    hashing = KEY.hashing()
    hashing.update(b"da"), hashing.update(b"ta")
    assert hashing.hexdigest() == KEY.checksum(b"data")
    assert same_digits("a\ud800", "a?") and same_digits("a", "a") and not same_digits("a", "b")


def test_who_may_read_which_file() -> None:
    for seal, record, named in (
        (Seal(), {}, None),
        (Seal(), {"keyed": KEY.keyed}, "it was written with a key; give key="),
        (Seal(), {"keyed": ""}, "it was written with a key; give key="),
        (KEY, {"keyed": KEY.keyed}, None),
        (KEY, {}, "it was written without a key, and a key is given"),
        (KEY, {"keyed": Seal("y" * 16).keyed}, "it was written with another key"),
        (KEY, {"keyed": True}, "it was written with another key"),
    ):
        found = seal.refusal(record)
        assert found is None if named is None else str(found).startswith(named)


def test_what_is_hidden_is_shown_to_its_key_alone() -> None:
    data, record = Blob(50, "x").to_bytes('{"format": 3}', TOKENS), {"format": 3, "own": 1}
    steady = [HIDING.closed(data, record, TOKENS, steady=True) for _ in range(2)]
    fresh = [HIDING.closed(data, record, TOKENS) for _ in range(2)]
    bodies = [files.Header.parse(each, len(each)).place("body", "U8", 1) for each in (*steady, *fresh)]
    one, two, three, four = (each[slice(*place)] for each, place in zip((*steady, *fresh), bodies, strict=True))
    assert one == two and len({one, three, four}) == 3 and data not in steady[0]
    other = HIDING.closed(data + b"x", record, TOKENS, steady=True)
    place = files.Header.parse(other, len(other)).place("body", "U8", 1)
    assert other[slice(*place)][:12] != one[:12]
    for each in (*steady, *fresh):
        assert HIDING.opened(each) == data == KEY.opened(each)
        told = files.Header.parse(each, len(each)).record()
        assert told == {"format": 3, "keyed": KEY.keyed, "encrypted": True}
        with pytest.raises(DamagedFileError, match="cannot be decrypted with this key"):
            Seal("y" * 16).opened(each)
        with pytest.raises(RefusedFileError, match="it is encrypted; give key="):
            Seal().opened(each)
    assert KEY.closed(data, record, TOKENS) is data and HIDING.opened(data) is data
    head = files.Header.parse(steady[0], len(steady[0])).place("head", "U8", 1)
    found, tokens = KEY.head(steady[0][slice(*head)])
    assert found == record and tokens.tolist() == TOKENS.tolist()
    with pytest.raises(DamagedFileError, match="cannot be decrypted"):
        KEY.head(steady[0][slice(*bodies[0])])  # the one part for the other
    with pytest.raises(DamagedFileError, match="cannot be decrypted"):
        KEY.head(b"short")


def test_equal_units_have_equal_files_in_every_save(tmp_path: Path) -> None:
    for seal in (files.CHECKSUMS, KEY, HIDING):
        one, two = (
            Packing(seal, files.same_name, steady=True).kv(Blob(9, "x"), unit().spans[0], "s")[0] for _ in range(2)
        )
        assert one == two and files.proves_itself(one)
        new = Packing(seal).kv(Blob(9, "x"), unit().spans[0], "s")[0]
        assert not files.proves_itself(new)


def test_a_payload_that_only_knows_its_size_stays_in_memory() -> None:
    class Size:
        nbytes = 7

    with pytest.raises(TypeError, match="a Size cannot leave memory, as it has no moved_to and to_bytes"):
        movable(Size())
    blob = Blob(1)
    assert movable(blob) is blob
    for length, position in ((4, 4), (4, 1)):
        assert Unit("", TOKENS[:length], Lineage([position]), blob).position == position
    for length, lineage in ((4, Lineage([5])), (4, Lineage())):
        with pytest.raises(ValueError, match=f"between 1 and the prompt's 4 tokens, got {lineage.end}"):
            Unit("", TOKENS[:length], lineage, blob)
