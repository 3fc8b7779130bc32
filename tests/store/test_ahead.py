"""Files that are read, proved and unpacked at once; what is handed on before it is proved; and what is hashed once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_store import PledgedBlob
from sharing import files_in, joined, prompt, serve, written

from hf_sparse_cache.errors import DamagedFileError, UnprovedError
from hf_sparse_cache.store import ahead, files, planes, storage
from hf_sparse_cache.store.addresses import Text
from hf_sparse_cache.store.hands import Hands
from hf_sparse_cache.store.headers import canonical
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.storage import Folder
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.unit import MovablePayload


assert joined
Joined = Callable[..., CheckpointStore]
PART = 4096


class OpenBlob(PledgedBlob):
    """One whose label may be looked at before it is proved."""

    shy = False


# -- files ------------------------------------------------------------------------------------------------------------


def a_file(numbers: int, packs: bool, keyed: str = "") -> bytes:
    """A safetensors file, packed or as it is."""
    draw = np.random.default_rng(numbers)
    data = draw.standard_normal(numbers).astype(np.float32) if packs else draw.integers(0, 256, numbers, np.uint8)
    record = json.dumps({"format": 3, **({"keyed": keyed} if keyed else {})})
    tensors = {"tokens": np.zeros(0, np.int32), "data": data}
    plain = canonical(safetensors.numpy.save(tensors, {"unit": record}))
    packed = planes.packed(plain)
    assert (packed != plain) is packs
    return packed


def read(folder: Path, data: bytes, seal: Seal, name: str = "") -> bytes:
    """What `Ahead` makes of a file, once it is proved."""
    name = name or files.same_name("kv", data, seal)
    (folder / name).write_bytes(data)
    one = ahead.Ahead(Hands(2, "test"), seal, time.monotonic() + 60)
    one.begin(name, lambda: Folder(folder).parts(name, None))
    found = bytes(one.plain(name, None))
    one.prove(name)
    assert one.seen(name) == data
    return found


@pytest.mark.parametrize("seal", [Seal(), Seal("a secret of sixteen bytes")], ids=["checksum", "key"])
@pytest.mark.parametrize("numbers", [1, 1000, 3000, 40_000])
@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
def test_a_file_in_parts_is_the_file_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seal: Seal, numbers: int, packs: bool
) -> None:
    monkeypatch.setattr(storage, "_PART_BYTES", PART)
    data = a_file(max(numbers, 1000) if packs else numbers, packs, seal.keyed)
    assert read(tmp_path, data, seal) == bytes(planes.unpacked(data))


@pytest.mark.parametrize("size", [PART - 1, PART, PART + 1, 3 * PART])
@pytest.mark.parametrize("place", [0, 8, PART - 2, -1])
def test_a_changed_byte_in_any_part_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, place: int
) -> None:
    monkeypatch.setattr(storage, "_PART_BYTES", PART)
    data = next(data for numbers in range(size - 300, size) if len(data := a_file(numbers, False)) == size)
    name = files.same_name("kv", data)
    assert read(tmp_path, data, Seal(), name)
    changed = bytearray(data)
    changed[place] ^= 1
    with pytest.raises(DamagedFileError):
        read(tmp_path, bytes(changed), Seal(), name)


@settings(max_examples=30, deadline=None)
@given(st.integers(1000, 60_000), st.integers(0, 3))
def test_nothing_is_unpacked_that_has_not_come(numbers: int, behind: int) -> None:
    """Bytes that were not waited for are zeros here; the twin, for which they come too late, is noticed."""
    data = a_file(numbers, True)
    memory = bytearray(len(data))
    memory[: files.header_bytes(data[:8], len(data)) + 8] = data[: files.header_bytes(data[:8], len(data)) + 8]

    def there(end: int) -> None:
        end = max(0, end - behind)
        memory[:end] = data[:end]

    plain = bytes(planes.unpacked(data))
    try:
        found = bytes(planes.unpacked(memoryview(memory), None, there))
    except DamagedFileError:
        found = b""
    assert (found == plain) is (behind == 0) or (behind and data[-behind:] == bytes(behind))


def test_a_file_that_is_larger_than_what_it_is_for_or_cut_short_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PART_BYTES", PART)
    (tmp_path / "file").write_bytes(bytes(3 * PART))
    folder = Folder(tmp_path)
    assert [count for _, count in folder.parts("file", 3 * PART)] == [0, PART, 2 * PART, 3 * PART]
    with pytest.raises(DamagedFileError, match="more than the"):
        next(folder.parts("file", 3 * PART - 1))
    parts = folder.parts("file", None)
    next(parts)
    (tmp_path / "file").write_bytes(bytes(PART))
    with pytest.raises(DamagedFileError, match="cut short"):
        list(parts)
    with pytest.raises(FileNotFoundError):
        next(folder.parts("nothing", None))


def test_what_fails_while_it_is_read_is_no_file(tmp_path: Path) -> None:
    """Whatever of it has come."""

    def breaking() -> Iterator[tuple[bytes, int]]:
        yield bytes(16), 8
        raise ValueError("broken")

    one = ahead._Coming()
    one.fill(breaking)
    with pytest.raises(ValueError, match="broken"):
        one.upto(8, time.monotonic() + 60)
    assert one.whole is None
    whole = ahead._Coming()
    whole.fill(lambda: iter([(b"abcd", 2), (b"abcd", 4)]))
    assert whole.upto(None, 0.0) == (b"abcd", 4) and whole.whole == b"abcd"
    begun = ahead._Coming()
    begun._data, begun._count = b"abcd", 2
    assert begun.upto(2, 0.0) == (b"abcd", 2) == begun.upto(1, 0.0) and begun.whole is None
    with pytest.raises(TimeoutError):
        begun.upto(3, 0.0)


def test_reading_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    release = threading.Event()

    def hangs() -> Iterator[tuple[bytes, int]]:
        release.wait(60)
        yield b"", 0

    one = ahead.Ahead(Hands(2, "test"), Seal(), time.monotonic() + 0.1)
    one.begin("kv", hangs)
    try:
        for ask in (lambda: one.plain("kv", None), lambda: one.prove("kv")):
            with pytest.raises(ahead.StorageFailedError):
                ask()
        assert one.seen("kv") is None
    finally:
        release.set()


# -- pledges ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What the proof of the first keys and values waits for."""
    release, prove = threading.Event(), files.prove

    def late(path: Path, data: Any, *rest: Any) -> None:
        if path.name.startswith("kv-") and files.record_of(data)[0]["span"][0] == 0:
            assert release.wait(60)
        prove(path, data, *rest)

    monkeypatch.setattr(ahead.files, "prove", late)
    yield release
    release.set()


def filled(joined: Joined, tmp_path: Path, damaged: bool) -> Any:
    """A store that takes pledges, on a place where somebody left two units, of damaged keys and values or whole."""
    serve(store := joined(), prompt(1, 1300), (512, 1024))
    written(store)
    for path in files_in(tmp_path / "shared", "kv-") if damaged else ():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    other = joined(disk_dir=tmp_path / "disk", disk_memory="1GiB")
    other.read_with(OpenBlob.from_bytes)
    return other


def on_disk(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "disk").rglob("*.safetensors"))


def test_what_is_handed_on_is_proved_before_it_goes_anywhere_else(
    joined: Joined, tmp_path: Path, held: threading.Event
) -> None:
    other = filled(joined, tmp_path, damaged=False)
    assert serve(other, prompt(1, 1300)) == 1024 and len(other) == 1, "while it is being proved"
    assert "resumed from" not in other.shared.counts
    flushing = threading.Thread(target=other.flush)
    flushing.start()
    flushing.join(0.3)
    assert flushing.is_alive() and not on_disk(tmp_path)
    held.set()
    flushing.join(60)
    assert on_disk(tmp_path) and other.shared.counts["resumed from"] == 1
    other.verify()
    assert serve(other, prompt(1, 1300)) == 1024


def test_what_turns_out_to_be_damaged_leaves_memory_and_reaches_no_disk(
    joined: Joined, tmp_path: Path, held: threading.Event
) -> None:
    ids = prompt(1, 1300)
    other = filled(joined, tmp_path, damaged=True)
    other.mark(np.asarray(ids[:1024], np.int32))
    assert serve(other, ids) == 1024
    ((_, _, checkpoint),) = other.checkpoints()
    payloads = [segment.payload for segment in checkpoint.chain()]
    assert {payload.pledge for payload in payloads} != {None}
    held.set()
    for payload in payloads:
        with pytest.raises(UnprovedError, match="checksum"):
            payload.pledge()
    assert len(other) == 0 and other.used_bytes == 0
    other.verify()
    other.flush()
    assert not on_disk(tmp_path)
    for payload in payloads:
        with pytest.raises(UnprovedError, match="checksum"):
            payload.pledge()
    counts = other.shared.counts
    assert "resumed from" not in counts and any("put aside" in what for what in counts)
    assert serve(other, ids, (512, 1024)) == 0
    written(other)
    assert serve(joined(), ids) == 1024, "what was computed in its place was written whole, keys and values too"


def test_what_builds_on_what_is_damaged_is_of_no_use_either(
    joined: Joined, tmp_path: Path, held: threading.Event
) -> None:
    """Another request stores what it computed on the keys and values that it finds in memory."""
    ids = prompt(1, 1300)
    other = filled(joined, tmp_path, damaged=True)
    assert serve(other, ids, (1280,)) == 1024 and len(other) == 2
    held.set()
    until = time.monotonic() + 60
    while len(other) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(other) == 0
    other.verify()
    assert serve(other, ids) == 0


def test_what_is_found_to_be_damaged_before_it_is_in_memory_does_not_stay_there(
    joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = filled(joined, tmp_path, damaged=True)
    put = other.tiers[0].put

    def late(unit: Any, *rest: Any, **more: Any) -> Any:
        for payload in unit.kv.values():
            if getattr(payload, "pledge", None) is not None:
                with pytest.raises(UnprovedError):
                    payload.pledge()
        return put(unit, *rest, **more)

    monkeypatch.setattr(other.tiers[0], "put", late)
    assert serve(other, prompt(1, 1300)) == 0 and len(other) == 0
    other.verify()


def test_with_a_key_nothing_is_handed_on_before_it_is_proved(joined: Joined) -> None:
    key = "a secret of more than sixteen bytes"
    serve(store := joined(key=key), prompt(1, 1300), (1024,))
    written(store)
    other = joined(key=key)
    other.read_with(OpenBlob.from_bytes)
    assert serve(other, prompt(1, 1300)) == 1024
    ((_, _, checkpoint),) = other.checkpoints()
    assert all(segment.payload.pledge is None for segment in checkpoint.chain())
    assert isinstance(checkpoint.state, MovablePayload)


# -- names ------------------------------------------------------------------------------------------------------------


class CountingSeal(Seal):
    """Counts the tokens that are hashed."""

    tokens = 0

    def hasher(self, use: bytes) -> Any:
        return _Counting(self, super().hasher(use))


class _Counting:
    def __init__(self, seal: CountingSeal, inner: Any) -> None:
        self._seal, self._inner = seal, inner

    def update(self, data: Any) -> None:
        self._seal.tokens += len(data) if isinstance(data, np.ndarray) else 0
        self._inner.update(data)

    def copy(self) -> _Counting:
        return _Counting(self._seal, self._inner.copy())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20_000), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_a_text_has_the_same_names_in_whatever_order_they_are_asked_for(length: int, parts: list[float]) -> None:
    ids = np.random.default_rng(length).integers(0, 9000, length).astype(np.int32)
    text = Text(Seal(), "s", ids)
    for part in parts:
        position = int(part * length)
        assert text.digest(position) == Text(Seal(), "s", ids[:position]).digest(position)


@pytest.mark.parametrize(
    ("length", "steps"), [(255, []), (256, [1]), (1279, [4, 2, 1]), (1 << 16, [256 >> n for n in range(9)])]
)
def test_a_search_steps_no_further_than_the_text_goes(length: int, steps: list[int]) -> None:
    text = Text(Seal(), "s", np.zeros(length, np.int32))
    assert [*text.steps()] == steps


def test_a_header_is_read_when_all_of_it_has_come(tmp_path: Path) -> None:
    """Its last byte comes late."""
    data = a_file(3000, False)
    end = 8 + files.header_bytes(data[:8], len(data))
    memory, late = bytearray(len(data)), threading.Event()

    def parts() -> Iterator[tuple[bytearray, int]]:
        memory[: end - 1] = data[: end - 1]
        yield memory, end - 1
        late.wait(60)
        memory[:] = data
        yield memory, len(data)

    one = ahead.Ahead(Hands(2, "test"), Seal(), time.monotonic() + 60)
    name = files.same_name("kv", data)
    one.begin(name, parts)
    threading.Timer(0.2, late.set).start()
    assert bytes(one.plain(name, None)) == data


@pytest.mark.parametrize("reached", [(), (65_536,), (65_536, 98_304)])
def test_a_search_hashes_no_token_twice(reached: tuple[int, ...]) -> None:
    """Also where it steps back, again and again, as nothing is there."""
    seal = CountingSeal()
    text = Text(seal, "s", np.zeros(100_000, np.int32))
    seal.tokens = at = 0
    for step in text.steps():
        position = (at + step) * 256
        if position <= 100_000:
            text.folder(at + step)
            at += step if position in reached else 0
    assert 0 < seal.tokens <= 100_000


def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    hands, busy, read = Hands(1, "test"), threading.Event(), []
    hands.begin(lambda: busy.wait(60))
    coming = ahead.Ahead(hands, Seal(), time.monotonic() + 60)
    coming.begin("kept", lambda: read.append(1) or iter([(b"abcd", 4)]))
    coming.give_up()
    busy.set()
    assert hands.begin(lambda: 7).result(60) == 7 and not read  # the thread took them all in their order


# -- threads that read ------------------------------------------------------------------------------------------------


def test_a_job_is_waited_for_until_its_time_and_not_longer() -> None:
    hands, done = Hands(1, "test"), threading.Event()
    late = hands.begin(lambda: done.wait(60))
    with mock.patch.object(late, "result", side_effect=late.result) as waited:
        with pytest.raises(TimeoutError):
            hands.wait(late, time.monotonic() + 0.1)
        with pytest.raises(TimeoutError):
            hands.wait(late, time.monotonic() - 5)
        done.set()
        assert hands.wait(late, time.monotonic() + 1000)  # the twin: in time
    short, none, long = (call.args[0] for call in waited.call_args_list)
    assert 0 <= short <= 0.1 and none == 0 and 500 < long <= 1000


def test_there_are_no_more_threads_than_jobs_at_once_or_than_allowed() -> None:
    hands, done = Hands(2, "counted"), threading.Event()

    def threads() -> int:
        return sum(thread.name == "counted" for thread in threading.enumerate())

    assert hands.begin(lambda: 1).result(60) == 1 and threads() == 1
    jobs = [hands.begin(lambda: done.wait(60)) for _ in range(5)]
    assert threads() == 2
    done.set()
    assert all(job.result(60) for job in jobs) and threads() == 2


# -- what is promised of bytes that are handed on ---------------------------------------------------------------------


def test_what_was_proved_once_is_not_waited_for_again() -> None:
    hands = Hands(1, "test")
    kept, broken = (ahead.Pledge(hands, time.monotonic() + 1000) for _ in range(2))
    kept.begin(lambda: "")
    broken.begin(lambda: "it is torn")
    with mock.patch.object(hands, "wait", side_effect=hands.wait) as waited:
        kept(), kept()
        assert waited.call_count == 1 and not kept.broken
        for _ in range(2):  # the twin: what is wrong stays so
            with pytest.raises(UnprovedError, match="it is torn"):
                broken()
            assert broken.broken


def test_what_cannot_be_proved_in_time_is_not_believed() -> None:
    hands, done = Hands(1, "test"), threading.Event()
    pledge = ahead.Pledge(hands, time.monotonic() - 1)
    pledge.begin(lambda: str(done.wait(60))[:0])
    with pytest.raises(UnprovedError, match="it was not proved in time"):
        pledge()
    assert pledge.broken
    done.set()
