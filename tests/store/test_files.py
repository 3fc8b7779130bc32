"""Files as they are written and found: names, kinds, modes and bounds, each at its edge."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from reference_store import Blob
from test_disk import failing
from test_own_files import dangling

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.store import files
from hf_sparse_cache.store.headers import MAX_POSITION, RefusedFileError, canonical
from hf_sparse_cache.store.planes import packed
from hf_sparse_cache.store.seal import Seal


KEY = Seal("0123456789abcdef0")
TOKENS = np.arange(5, dtype=np.int32)


def unit(tokens: np.ndarray = TOKENS, **record: Any) -> bytes:
    return canonical(Blob(40, "x").to_bytes(json.dumps({"format": 3, **record}), tokens))


def stored(folder: Path, kind: str = "state", data: bytes | None = None, seal: Seal = files.CHECKSUMS) -> Path:
    data = unit() if data is None else data
    path = folder / files.new_name(kind, data, seal)
    files.write(path, data)
    return path


def test_a_folder_is_made_for_the_user_alone_and_one_that_is_there_stays(tmp_path: Path) -> None:
    made = tmp_path / "a" / "b" / "c"
    assert files.private_folder(made) == made and stat.S_IMODE(made.stat().st_mode) == 0o700
    made.chmod(0o755)
    assert files.private_folder(made) == made and stat.S_IMODE(made.stat().st_mode) == 0o755
    (tmp_path / "f").write_text("")
    with pytest.raises(FileExistsError):
        files.private_folder(tmp_path / "f")


def test_a_folder_is_used_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (tmp_path / name for name in files.LOCKS)
    assert files.lock_of(tmp_path) == first
    held = files.take_over(tmp_path)
    assert held is not None and stat.S_IMODE(first.stat().st_mode) == 0o600 and not os.get_inheritable(held)
    assert files.lock_of(tmp_path) == first and files.take_over(tmp_path) is None
    os.close(held)
    closed: list[int] = []
    own = os.close
    monkeypatch.setattr(files.os, "close", lambda descriptor: closed.append(descriptor) or own(descriptor))
    held = files.take_over(tmp_path)
    assert held is not None and closed == []
    assert files.take_over(tmp_path) is None and len(closed) == 1  # whose descriptor is not kept
    os.close(held)
    monkeypatch.setattr(files, "_lock", failing(errno.ENOLCK))
    with pytest.raises(OSError, match="No locks"):
        files.take_over(tmp_path)
    assert len(closed) == 3
    first.unlink(), dangling(first)
    assert files.lock_of(tmp_path) == second
    second.mkdir()
    with pytest.raises(OSError, match=f"{first} is a link, and so is {second.name}; remove them"):
        files.lock_of(tmp_path)


def test_what_lies_at_a_path_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    dangling(tmp_path / "link")
    (tmp_path / "to").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    found = {name: files.kind_of(tmp_path / name) for name in ("file", "folder", "link", "to", "pipe", "none")}
    assert found == {
        "file": "a file",
        "folder": "a folder",
        "link": "a link",
        "to": "a link",
        "pipe": "a pipe, a socket or a device",
        "none": None,
    }


def test_a_name_says_its_kind_and_its_checksum() -> None:
    for seal in (files.CHECKSUMS, KEY):
        for kind in ("state", "kv", "marks"):
            new, again = (files.new_name(kind, b"data", seal) for _ in range(2))
            same = files.same_name(kind, b"data", seal)
            assert new != again and same == files.same_name(kind, b"data", seal) != files.same_name(kind, b"", seal)
            for name in (new, again, same):
                assert name.startswith(f"{kind}-") and name.endswith(f"-{seal.checksum(b'data')}.safetensors")
                assert files.is_name(name) and files.is_name(name, kind) and not files.is_name(name, "other")
            assert files.proves_itself(same) and not files.proves_itself(new)
            other = "0" if same[len(kind) + 1] != "0" else "1"
            assert not files.proves_itself(same[: len(kind) + 1] + other + same[len(kind) + 2 :])
            assert not files.proves_itself(same.removesuffix(".safetensors"))
    assert not files.is_name("kv-0123456789ab-" + "0" * 31 + ".safetensors")
    assert not files.is_name("kv-0123456789ab-" + "0" * 32 + ".safetensors\n")
    assert not files.is_name("other-0123456789ab-" + "0" * 32 + ".safetensors")


def test_a_name_that_proves_itself_stays_as_it_was() -> None:
    """Saves and shared stores hold such names."""
    assert files.own_tag("a") == files._tag("a") and len(files.own_tag("a")) == 32 != files.own_tag("b")
    digits = "0" * 32
    assert (
        files.same_name("kv", b"x")
        == f"kv-{files.own_tag(Seal().checksum(b'x'))[:12]}-{Seal().checksum(b'x')}.safetensors"
    )
    assert files.proves_itself(f"kv-{files.own_tag(digits)[:12]}-{digits}.safetensors")


def test_an_unfinished_file_is_known_by_its_name_or_by_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / files.new_name("kv", unit())
    one, two = files.temporary_of(path), files.temporary_of(path)
    assert one != two and one.parent == tmp_path and one.name.startswith(path.name) and one.suffix == ".tmp"
    assert not files.is_temporary(one)  # it is not there
    one.write_bytes(b"")
    assert files.is_temporary(one) and not files.is_ours(one)
    changed = one.with_name("x" + one.name)
    changed.write_bytes(b"")
    assert not files.is_temporary(changed)
    other = one.with_name(one.name.removesuffix(".tmp") + ".bak")
    other.write_bytes(b"")
    assert not files.is_temporary(other)
    two.mkdir()
    assert not files.is_temporary(two)
    before = path.with_name(path.name + ".tmp")  # as earlier versions named it
    before.write_bytes(unit())
    assert files.is_temporary(before)
    before.write_bytes(b"mine")
    assert not files.is_temporary(before)
    mine = tmp_path / "mine.tmp"
    mine.write_bytes(unit())
    assert not files.is_temporary(mine)


def test_a_file_of_a_unit_is_known_where_its_header_is_damaged(tmp_path: Path) -> None:
    data = unit()
    path = tmp_path / files.new_name("kv", data)
    assert files._MARK in data
    path.write_bytes(data[:-20])
    assert files.is_ours(path)  # cut short
    path.write_bytes(bytes(100) + files._MARK)
    assert files.is_ours(path)  # its first bytes are gone
    path.write_bytes(bytes(2**16) + files._MARK)
    assert not files.is_ours(path)
    turned = safetensors.numpy.save({"tokens": TOKENS}, {"unit": '{"a": 1, "format": 3}'})  # as nobody writes it
    assert files._MARK not in turned
    path.write_bytes(turned)
    assert files.is_ours(path)
    path.write_bytes(turned[:-3])
    assert files.is_ours(path)
    path.write_bytes(safetensors.numpy.save({"tokens": TOKENS}, {"unit": '{"a": 1}'}))
    assert not files.is_ours(path)
    path.rename(tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").write_bytes(data)
    assert not files.is_ours(tmp_path / "other.safetensors")


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path)
    with files.open_regular(path) as file:
        assert file.read() == unit() and not os.get_inheritable(file.fileno())
    (tmp_path / "to").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("to", "a link"), ("pipe", "a pipe, a socket or a device"), (".", "a folder")):
        with pytest.raises(DamagedFileError, match=f"is {kind}, not a file that was written here"):
            files.open_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "none")
    monkeypatch.setattr(files, "kind_of", lambda path: "a file")  # it was put there since
    opened: list[int] = []
    own = os.open
    monkeypatch.setattr(files.os, "open", lambda *given: opened.append(own(*given)) or opened[-1])
    with pytest.raises(DamagedFileError, match="pipe is not a regular file"):
        files.open_regular(tmp_path / "pipe")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
    with pytest.raises(OSError, match="[Ll]evels of symbolic links|[Tt]oo many"):
        files.open_regular(tmp_path / "to")


def test_a_file_is_written_whole_and_in_the_place_of_another_only_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: own(descriptor, data[:3]))  # a few at a time
    path = tmp_path / "a"
    files.write(path, b"0123456789")
    assert path.read_bytes() == b"0123456789" and stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError, match="a is there already"):
        files.write(path, b"other")
    dangling(tmp_path / "link")
    with pytest.raises(FileExistsError):
        files.write(tmp_path / "link", b"other")
    files.write(path, b"other", replace=True)
    assert path.read_bytes() == b"other" and {each.name for each in tmp_path.iterdir()} == {"a", "link"}
    monkeypatch.setattr(files, "_flush_folder", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.write(path, b"third", replace=True)
    assert path.read_bytes() == b"third"  # it took the place of another, which is gone
    with pytest.raises(OSError, match="Input/output"):
        files.write(tmp_path / "b", b"new")
    assert {each.name for each in tmp_path.iterdir()} == {"a", "link"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no"), KeyboardInterrupt()])
def test_whatever_ends_a_write_leaves_no_descriptor_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    closed: list[int] = []
    own = os.close

    def fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    monkeypatch.setattr(files.os, "close", lambda descriptor: closed.append(descriptor) or own(descriptor))
    with pytest.raises(type(error)):
        files.write(tmp_path / "a", b"0")
    assert len(closed) == 1 and list(tmp_path.iterdir()) == []
    with pytest.raises(type(error)):
        files._flush_folder(tmp_path)
    assert len(closed) == 2
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "unlink", failing(errno.EACCES))
        with pytest.raises(type(error)):  # what was the matter is said, not that nothing could be tidied up
            files.write(tmp_path / "a", b"0")


def test_times_of_use_are_in_the_order_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(b"")
    now = max(files._last_used[0], time.time_ns()) + 10**9
    alone: list[bool] = []
    monkeypatch.setattr(time, "time_ns", lambda: alone.append(files._last_used_lock.locked()) or now)
    for path in paths[:3]:
        files.mark_used(path)
    assert alone == [True] * 3
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**12)
    files.mark_used(paths[3])
    assert [path.stat().st_mtime_ns - now for path in paths] == [0, 1000, 2000, 10**12]
    (tmp_path / "link").symlink_to(paths[0])
    files.mark_used(tmp_path / "link")
    assert paths[0].stat().st_mtime_ns == now
    files.mark_used(tmp_path / "none")
    monkeypatch.setattr(files, "_last_used", [0])  # that of other tests goes on


def test_a_file_is_read_up_to_what_it_may_have(tmp_path: Path) -> None:
    data = unit()
    path = stored(tmp_path, data=data)
    for most in (None, len(data), len(data) + 1):
        assert files.read(path, most=most) == data
    with pytest.raises(DamagedFileError, match=f"has {len(data)} bytes; what it is for has at most {len(data) - 1}"):
        files.read(path, most=len(data) - 1)
    path.write_bytes(data + b"x")
    with pytest.raises(DamagedFileError, match="does not match its checksum"):
        files.read(path)


def test_a_packed_file_unpacks_to_no_more_than_it_may(tmp_path: Path) -> None:
    floats = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    plain = safetensors.numpy.save({"tokens": TOKENS, "n": floats}, {"unit": '{"format": 3}'})
    small = packed(canonical(plain))
    path = stored(tmp_path, data=small)
    assert len(small) < len(plain) - 500
    for reading in (
        lambda most: files.read(path, most=most),
        lambda most: files.proved(path, small, most=most),
        lambda most: files.unsealed(small, most=most),
    ):
        assert np.array_equal(safetensors.numpy.load(bytes(reading(12_020)))["n"], floats)
        with pytest.raises(DamagedFileError, match="may to 12019 at most"):
            reading(12_019)
    asked: list[int] = []
    files.unsealed(small, there=asked.append)
    assert asked and asked[-1] <= len(small)


def test_a_file_is_proved_by_the_checksum_in_its_name_and_by_its_key(tmp_path: Path) -> None:
    data, keyed = unit(), unit(keyed=KEY.keyed)
    path, other = tmp_path / files.new_name("kv", data), tmp_path / files.new_name("kv", keyed, KEY)
    files.prove(path, data)
    files.prove(path, data, checksum=files.CHECKSUMS.checksum(data))
    files.prove(other, keyed, KEY)
    for given in ({"data": data + b"x"}, {"data": data, "checksum": "0" * 32}):
        with pytest.raises(DamagedFileError, match="does not match its checksum") as found:
            files.prove(path, **given)
        assert not isinstance(found.value, RefusedFileError)
    with pytest.raises(RefusedFileError, match=f"{path} is refused: it was written without a key"):
        files.prove(path, data, KEY)
    with pytest.raises(RefusedFileError, match="is refused: it was written with a key"):
        files.prove(other, keyed)
    with pytest.raises(DamagedFileError, match="does not match its checksum"):
        files.prove(path, b"no header")
    assert files.proved(path, data) == data
    with pytest.raises(DamagedFileError, match="does not match its checksum"):
        files.proved(path, data + b"x")


def test_a_folder_is_listed_by_what_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = unit()
    own = [stored(tmp_path, kind, data) for kind in ("kv", "state", "marks")]
    left = files.temporary_of(own[0])
    left.write_bytes(b"123")
    before = tmp_path / (files.new_name("kv", data) + ".tmp")
    before.write_bytes(data)
    folder, link = (tmp_path / files.new_name("kv", text) for text in (b"1", b"2"))
    folder.mkdir(), link.symlink_to(own[0])
    like = tmp_path / "state-1.safetensors"
    like.write_text("")
    (tmp_path / "mine.safetensors").write_text("")
    (tmp_path / "mine.tmp").write_text("")
    found = files.units_in(tmp_path)
    assert found.units == {path.name: len(data) for path in own} and list(found.units) == sorted(found.units)
    assert found.unfinished == {left: 3, before: len(data)} and found.odd == sorted([folder, link, like])
    monkeypatch.setattr(files.os, "lstat", failing(errno.ENOENT))  # gone while it is looked at
    gone = files.units_in(tmp_path)
    assert gone.units == {} and gone.unfinished == {}


def test_only_what_is_ours_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path)
    left = files.temporary_of(path)
    left.write_bytes(b"")
    for each in (path, left):
        files.remove(each)
        assert not each.exists()
        files.remove(each)  # gone already
    path.write_bytes(b"mine")
    with pytest.raises(DamagedFileError, match="is not, or no longer, a file that was written here"):
        files.remove(path)
    assert path.read_bytes() == b"mine"
    path.write_bytes(unit())
    monkeypatch.setattr(files.os, "unlink", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        files.remove(path)


# -- a look at a file without its states ------------------------------------------------------------------------------


def looked(data: bytes, seal: Seal = files.CHECKSUMS, **options: Any) -> tuple[Any, Any, list[tuple[int, int]]]:
    asked: list[tuple[int, int]] = []

    def part(start: int, end: int) -> bytes:
        asked.append((start, end))
        return data[start:end]

    return *files.peek_parts(part, len(data), seal, **options), asked


def large(tokens: int, words: int = 0) -> bytes:
    drawn = np.zeros(2**17, np.uint8)
    ids = np.arange(tokens, dtype=np.int32)
    record = json.dumps({"format": 3, "words": "x" * words})
    return safetensors.numpy.save({"tokens": ids, "data": drawn}, {"unit": record})


def test_no_more_of_a_file_is_read_than_its_head_and_its_tokens(tmp_path: Path) -> None:
    record, tokens, asked = looked(unit())
    assert record == {"format": 3} and np.array_equal(tokens, TOKENS) and asked == [(0, len(unit()))]
    data = large(5)
    record, tokens, asked = looked(data)
    assert np.array_equal(tokens, TOKENS) and asked == [(0, 2**16)]
    data = large(20_000)
    record, tokens, asked = looked(data)
    assert np.array_equal(tokens, np.arange(20_000))
    begin, end = files.Header.parse(data, len(data)).place("tokens", "I32", 4)
    assert asked == [(0, 2**16), (begin, end)]
    data = large(5, 2**16)
    length = int.from_bytes(data[:8], "little")
    record, tokens, asked = looked(data)
    assert len(record["words"]) == 2**16 and asked[:2] == [(0, 2**16), (2**16, 8 + length)]
    assert np.array_equal(tokens, TOKENS)
    path = stored(tmp_path, data=data)
    assert files.peek(path)[0] == record and np.array_equal(files.record_of(data)[1], TOKENS)
    assert files.record_of(data)[0] == record


def promising(count: int, name: str = "tokens", **record: Any) -> tuple[bytes, int]:
    """The beginning of a file that promises so many tokens, or so many bytes of a head, and its size."""
    each = {"dtype": "I32", "shape": [count], "data_offsets": [0, 4 * count]}
    if name == "head":
        each = {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}
    value = {name: each, "__metadata__": {"unit": json.dumps({"format": 3, **record})}}
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + each["data_offsets"][1]


def test_a_promise_of_more_tokens_than_there_can_be_is_not_read() -> None:
    read: list[int] = []

    def part(data: bytes, start: int, end: int) -> bytes:
        read.append(end - start)
        return data[start:end] if start < len(data) else b""

    for count, named in ((MAX_POSITION + 1, f"promises {4 * MAX_POSITION + 4} bytes of tokens"), (MAX_POSITION, "")):
        data, size = promising(count)
        if named:
            with pytest.raises(DamagedFileError, match=named):
                files.peek_parts(lambda start, end, data=data: part(data, start, end), size)
            assert max(read) <= 2**16
        else:
            files.peek_parts(lambda start, end, data=data: part(data, start, end), size)
            assert read[-1] == 4 * MAX_POSITION
    data, size = promising(16 * MAX_POSITION + 1, "head", encrypted=True, keyed=KEY.keyed)
    with pytest.raises(DamagedFileError, match=f"promises {16 * MAX_POSITION + 1} bytes of tokens"):
        files.peek_parts(lambda start, end: part(data, start, end), size, KEY)


def test_files_of_another_key_are_looked_at_only_where_asked(tmp_path: Path) -> None:
    keyed = unit(keyed=KEY.keyed)
    path = stored(tmp_path, data=keyed, seal=KEY)
    assert files.peek(path, KEY)[0] == {"format": 3, "keyed": KEY.keyed}
    with pytest.raises(RefusedFileError, match="^it was written with a key; give key="):
        files.peek(path)
    assert np.array_equal(files.peek(path, any_key=True)[1], TOKENS)
    plain = stored(tmp_path)
    with pytest.raises(RefusedFileError, match="^it was written without a key"):
        files.peek(plain, KEY)
    assert files.peek(plain, KEY, any_key=True)[0] == {"format": 3}


def test_the_head_of_an_encrypted_file_is_shown_to_its_key() -> None:
    hiding = Seal("0123456789abcdef0", encrypt=True)
    hidden = hiding.closed(unit(keyed=hiding.keyed), {"format": 3, "own": 1}, TOKENS)
    record, tokens, _ = looked(hidden, hiding)
    assert record == {"format": 3, "own": 1} and np.array_equal(tokens, TOKENS)
    assert looked(hidden, KEY)[0] == record  # the same key, though it writes without hiding
    with pytest.raises(DamagedFileError, match="it is encrypted; give key="):
        looked(hidden, any_key=True)
