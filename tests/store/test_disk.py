"""The disk tier under every failure of a file system: the request goes on, one warning, nothing else is lost."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from disks import KV, UNIT, disk_of, files_of, serve
from reference_store import Blob

from hf_sparse_cache.store import files
from hf_sparse_cache.store.store import CheckpointStore


def test_what_leaves_memory_is_found_on_disk_and_after_a_restart(opened: Any) -> None:
    store = opened()
    for first in range(5):
        assert serve(store, first) == 0
    assert (len(store), len(disk_of(store)), store.evictions, store.demotions) == (1, 4, 0, 4)
    assert [serve(store, first) for first in range(5)] == [4] * 5
    store = opened()
    assert len(disk_of(store)) == 5 and len(store) == 0
    assert [serve(store, first) for first in range(5)] == [4] * 5


def test_what_is_dropped_leaves_memory_and_stays_on_disk(opened: Any) -> None:
    store = opened(max_memory=4 * UNIT)
    for first in range(2):
        serve(store, first)
    store.flush()
    store.drop("another space")
    assert (len(store), len(disk_of(store))) == (2, 2)
    store.drop("")
    assert (len(store), len(disk_of(store))) == (0, 2)
    assert [serve(store, first) for first in range(2)] == [4] * 2
    store.verify()


def test_what_is_in_memory_is_not_fetched(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(max_memory=4 * UNIT)
    for first in range(2):
        serve(store, first)
    store.flush()
    asked: list[str] = []
    bring_up = store.bring_up
    monkeypatch.setattr(
        store, "bring_up", lambda tier, *arguments: asked.append(tier.name) or bring_up(tier, *arguments)
    )
    assert [serve(store, first) for first in (0, 1, 0)] == [4] * 3 and asked == []
    for first in range(2, 8):
        serve(store, first)
    assert serve(store, 0) == 4 and asked == ["disk"]  # the twin


def test_files_are_private(opened: Any) -> None:
    store = opened()
    serve(store, 1)
    serve(store, 2)
    for path in (disk_of(store).folder, *disk_of(store).folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.skipif(os.name != "posix", reason="a folder cannot be opened")
def test_a_file_and_its_folder_are_on_disk_before_it_counts(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that order; a name that is lost with the power is no file."""
    flushed: list[str] = []
    own = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        own(descriptor)

    store = opened()
    serve(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        serve(store, 2)  # which sends the first one to disk
    assert len(files_of(store, "state")) == 1
    assert flushed[-2:] == ["file", "folder"] and flushed.count("folder") >= flushed.count("file") // 2 > 0


def test_a_child_has_memory_of_its_own_and_no_disk(opened: Any) -> None:
    """What `os.fork` leaves in a child, looked at here: the folder stays the parent's."""
    store = opened()
    serve(store, 1), serve(store, 2)
    tiers = store.tiers
    store.after_fork()
    try:
        assert [tier.durable for tier in store.tiers] == [False] and not store.stored()
        assert serve(store, 1) == 0 and serve(store, 1) == 4
    finally:
        store.tiers = tiers


def test_the_disk_budget_holds_by_the_byte(opened: Any) -> None:
    store = opened()
    serve(store, 0)
    serve(store, 1)
    one = disk_of(store).used_bytes
    store = opened(disk_memory=3 * one)
    for first in range(2, 12):
        serve(store, first)
        assert disk_of(store).used_bytes == sum(path.stat().st_size for path in files_of(store)) <= 3 * one
    assert len(disk_of(store)) == 3
    disk_of(store).resize(one)
    assert sum(path.stat().st_size for path in files_of(store)) == disk_of(store).used_bytes <= one
    store.clear()
    assert files_of(store) == [] and serve(store, 11) == 0


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_unit_whose_chain_others_changed_is_written_again(
    times: int, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice; then it is given up, and leaves nothing behind."""
    store = opened()
    serve(store, 0)
    tier, changed = disk_of(store), [True] * times
    own = tier._enter
    monkeypatch.setattr(tier, "_enter", lambda *given: False if changed and changed.pop() else own(*given))
    serve(store, 1)  # sends the first off
    assert not changed and len(tier) == (times < 3) and tier.reserved_bytes == 0
    assert sum(path.stat().st_size for path in files_of(store)) == tier.used_bytes and bool(tier.used_bytes) == (
        times < 3
    )
    assert (store.demotions, store.evictions) == ((1, 0) if times < 3 else (0, 1))


def test_shared_keys_and_values_are_one_file(opened: Any) -> None:
    store = opened(max_memory=UNIT + 10 + 2 * KV)
    serve(store, 1, (2, 4))
    for first in range(2, 6):
        serve(store, first)
    assert len(files_of(store, "state")) >= 2
    shared = [path for path in files_of(store, "kv") if Blob.from_bytes(path.read_bytes()).label == (1, 2)]
    assert len(shared) == 1


FAULTS = [
    ("open", errno.EACCES),
    ("open", errno.EROFS),
    ("write", errno.ENOSPC),
    ("write", errno.EIO),
    ("fsync", errno.EIO),
    ("replace", errno.ENOSPC),
    ("replace", errno.EIO),
]


@pytest.mark.parametrize(("call", "code"), FAULTS)
def test_a_failing_write_loses_that_unit_only(
    opened: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, code: int
) -> None:
    store = opened()
    serve(store, 0)
    serve(store, 1)  # 0 is on disk
    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, failing(code))
        assert [serve(store, first) for first in (2, 3)] == [0, 0]  # 1 and 2 could not be written
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert list(disk_of(store).folder.rglob("*.tmp")) == []
    assert disk_of(store).reserved_bytes == 0
    assert disk_of(store).used_bytes == sum(path.stat().st_size for path in files_of(store))
    assert [serve(store, first) for first in (0, 3, 2)] == [4, 4, 0]
    store = opened()
    assert [serve(store, first) for first in (0, 1, 3)] == [4, 0, 4]


def test_a_write_cut_short_by_a_full_disk_leaves_nothing(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, own = opened(), os.write
    serve(store, 0)
    with monkeypatch.context() as patch:
        written: list[int] = []

        def write(descriptor: int, data: memoryview) -> int:
            if written:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(own(descriptor, data[:7]))
            return written[-1]

        patch.setattr(files.os, "write", write)
        assert serve(store, 1) == 0
    assert [path for path in disk_of(store).folder.rglob("*") if path.is_file() and path.name != "lock"] == []


def test_a_file_that_cannot_be_deleted_keeps_counting(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()
    serve(store, 0)
    serve(store, 1)
    one = disk_of(store).used_bytes
    disk_of(store).ledger.max_memory = 2 * one
    serve(store, 2)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "unlink", failing(errno.EACCES))
        for first in range(3, 9):
            serve(store, first)
            assert sum(path.stat().st_size for path in files_of(store)) == 2 * one
        assert len(disk_of(store)) == 1  # what cannot be deleted makes no room, so no more is given up for it
    for first in range(9, 14):
        serve(store, first)
        assert disk_of(store).reserved_bytes == 0
        assert sum(path.stat().st_size for path in files_of(store)) <= 2 * one


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE: list[Callable[[Path], None]] = [flip, truncate, Path.unlink, lambda path: path.write_bytes(b"")]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["state", "kv"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_damaged_unit_is_recomputed_and_no_other_is_lost(
    opened: Any, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], kind: str, restarted: bool
) -> None:
    store = opened()
    for first in range(4):
        serve(store, first)
    victim = next(path for path in files_of(store, kind) if Blob.from_bytes(path.read_bytes()).label[0] == 1)
    damage(victim)
    if restarted:
        serve(store, 9)  # 3 goes to disk as well
        store = opened()
    assert [serve(store, first) for first in range(4)] == [4, 0, 4, 4]
    unknown = restarted and not victim.exists() and kind == "state"  # then nothing tells that it ever was
    assert unknown or len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert serve(store, 1) == 4  # stored anew
    serve(store, 8)
    used = disk_of(store).used_bytes
    assert used == sum(path.stat().st_size for path in files_of(store))
    store = opened()
    assert disk_of(store).used_bytes == used
    assert serve(store, 1) == 4


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_read(opened: Any, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = opened()
    for first in range(3):
        serve(store, first)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", failing(code), raising=False)
        assert serve(store, 0) == 0
    assert [serve(store, first) for first in (0, 1, 2)] == [4, 4, 4]


@pytest.mark.parametrize("position", ["other tokens", "other keys and values"])
def test_a_unit_that_is_whole_but_not_the_one_asked_for_is_refused(opened: Any, position: str) -> None:
    store = opened()
    for first in range(3):
        serve(store, first)
    (found,) = [item for _, tokens, item in disk_of(store).checkpoints() if tokens[0] == 0]
    (other,) = [item for _, tokens, item in disk_of(store).checkpoints() if tokens[0] == 1]
    if position == "other tokens":
        found.state = other.state
    else:
        found.kv.payload = other.kv.payload
    assert serve(store, 0) == 0


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(code))
    store = CheckpointStore(UNIT, "lru", disk_memory=1000, disk_dir=tmp_path / "no")
    assert [serve(store, first) for first in (0, 0, 1, 0)] == [0, 4, 0, 0]
    assert len(caplog.records) == 1


def test_one_process_has_the_folder(opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = opened()
    serve(store, 0)
    serve(store, 1)
    second = CheckpointStore(UNIT, "lru", disk_memory=1000, disk_dir=tmp_path / "tier")
    assert second.below is None and "in use by another process" in caplog.text
    assert serve(store, 0) == 4


def serve_until_killed(folder: Path, budget: int) -> NoReturn:
    """Serves prompts in this process until `budget` bytes are written, and is killed at that byte."""
    own = os.write

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal budget
        done = own(descriptor, data[: max(1, min(len(data), budget))])
        budget -= done
        if budget <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    try:
        files.os.write = write
        store = CheckpointStore(UNIT, "lru", disk_memory="1GiB", disk_dir=folder)
        for first in range(50):
            serve(store, first)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_while_saving(opened: Any, tmp_path: Path) -> None:
    """A process is killed in the middle of a file; each start finds whole units and cleans up the rest."""
    for budget in (1, 300, 1000, 1500, 2500, 4000, 10000):
        child = os.fork()
        if not child:
            serve_until_killed(tmp_path / "tier", budget)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        store = opened()
        assert list(disk_of(store).folder.rglob("*.tmp")) == []
        assert disk_of(store).used_bytes == sum(path.stat().st_size for path in files_of(store))
        assert len(disk_of(store)) == len(files_of(store, "state"))
        for _, tokens, _ in disk_of(store).checkpoints():
            assert serve(store, int(tokens[0])) == 4
        store.clear()
        store.close(flush=False)


def test_a_folder_without_a_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="disk_dir=.* needs disk_memory"):
        CheckpointStore(disk_dir=tmp_path)


def failing(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def test_tokens_of_a_file_are_read_without_its_states(tmp_path: Path) -> None:
    data = Blob(1000, "x").to_bytes('{"format": 1}', np.arange(5, dtype=np.int32))
    path = tmp_path / files.new_name("state", data)
    files.write(path, data)
    record, tokens = files.peek(path)
    assert record == {"format": 1} and tokens.tolist() == [0, 1, 2, 3, 4]
    assert files.read(path) == data
