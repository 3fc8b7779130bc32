"""Nothing of the user's is lost: in any folder, only files that were written here are replaced or deleted."""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from disks import UNIT, disk_of, files_of, serve
from persisting import GRID, cold_logits, handle, logits, question, small_store
from reference_store import Blob
from test_disk import failing
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.store import files


SPACE = "0123456789abcdef" * 2  # as the folder of a space is named
TENSORS = {"tokens": np.arange(3, dtype=np.int32)}
MEASURES = safetensors.numpy.save(TENSORS, {"unit": "cm"})
THEIRS = {
    "model.safetensors": safetensors.numpy.save(TENSORS),
    "notes.tmp": b"mine",
    "state-1-2.safetensors": b"mine, too",
    "state-0123456789ab-0123456789abcdef0123456789abcdef.safetensors": b"named as yours are",
    files.new_name("kv", MEASURES): MEASURES,
    files.new_name("state", b"{}"): b"{}",
    files.new_name("state", b""): b"",
    "kv-0123456789ab-0123456789abcdef0123456789abcdef.safetensors.tmp": b"half",
    "sparse_cache.json.0123456789ab-0123456789abcdef0123456789abcdef.tmp": b"",
    "lock.bak": b"",
}


def put(folder: Path) -> dict[str, bytes]:
    """A user's files, some under names that look like ours."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in THEIRS.items():
        (folder / name).write_bytes(data)
    return THEIRS


def odd(folder: Path) -> list[Path]:
    """What is no file, under names that would be ours."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [files.new_name(kind, bytes([number])) for number in range(5) for kind in ("state", "kv")]
    paths = [folder / name for name in names]
    for path, make in zip(paths, [os.mkfifo, Path.mkdir, dangling, to_itself, listening] * 2, strict=True):
        make(path)
    return paths


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def to_itself(path: Path) -> None:
    path.symlink_to(path)


def listening(path: Path) -> None:
    short = Path(os.path.relpath(path))
    with socket.socket(socket.AF_UNIX) as held:
        try:
            held.bind(str(short))
        except OSError:  # the path is too long for a socket
            path.write_text("no socket")


def untouched(folder: Path) -> bool:
    return all((folder / name).read_bytes() == data for name, data in THEIRS.items())


@pytest.fixture
def cache(jamba: PreTrainedModel) -> Iterator[SparsePrefixCache]:
    with handle(jamba) as made:
        logits(jamba, question(2), made)
        yield made


def test_a_save_into_a_full_folder_adds_its_own_files_alone(
    cache: SparsePrefixCache, jamba: PreTrainedModel, tmp_path: Path
) -> None:
    put(tmp_path)
    strange = odd(tmp_path)
    before = set(os.listdir(tmp_path))
    for _ in range(3):
        assert cache.save_pretrained(tmp_path) == len(cache.store)
        cache.clear()
        logits(jamba, question(3), cache)
    assert untouched(tmp_path) and all(os.path.lexists(path) for path in strange)
    added = set(os.listdir(tmp_path)) - before
    assert len(added) == len(json.loads((tmp_path / "sparse_cache.json").read_text())["parts"]) + 1 + 3
    cold = cold_logits(jamba, question(3))
    with SparsePrefixCache.from_pretrained(tmp_path, jamba) as loaded:
        assert torch.equal(logits(jamba, question(3), loaded), cold)
        assert loaded.last_request is not None and loaded.last_request.resumed_tokens == 96


def test_a_disk_tier_in_a_full_folder(opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("my-finetune", SPACE):
        put(tmp_path / "tier" / name)
    strange = odd(tmp_path / "tier" / SPACE)
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere")
    (tmp_path / "tier" / ("f" * 32)).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tier" / ("e" * 32)).symlink_to("/nowhere")
    (tmp_path / "tier" / ("d" * 32)).write_text("a file where a folder would be")
    os.mkfifo(tmp_path / "tier" / ("c" * 32))
    for _ in range(2):
        store = opened()
        assert [serve(store, first) for first in range(4)] in ([0] * 4, [4, 4, 4, 0])
        store.clear()
        for first in range(4):
            serve(store, first)
    for folder in (tmp_path / "tier" / "my-finetune", tmp_path / "tier" / SPACE, tmp_path / "elsewhere"):
        assert untouched(folder)
    assert all(os.path.lexists(path) for path in strange) and len(caplog.records) == 2  # one for each opening
    assert (tmp_path / "tier" / ("d" * 32)).read_text() == "a file where a folder would be"


def test_the_folder_of_a_space_that_is_a_link_is_not_written_to(
    opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened()
    (tmp_path / "elsewhere").mkdir()
    disk_of(store).folder_of("").symlink_to(tmp_path / "elsewhere")
    assert [serve(store, first) for first in (0, 1, 0)] == [0, 0, 0]
    assert not list((tmp_path / "elsewhere").iterdir()) and "a link, not a folder" in caplog.text


@pytest.mark.parametrize("make", [dangling, to_itself, os.mkfifo, Path.mkdir])
def test_a_lock_that_is_no_file(
    opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], None]
) -> None:
    (tmp_path / "tier").mkdir()
    make(tmp_path / "tier" / "lock")
    store = opened()
    assert "lock is no file" in caplog.text
    assert [serve(store, first) for first in (0, 1, 0)] == [0, 0, 4]
    second = CheckpointStore(UNIT, "lru", disk_memory=1000, disk_dir=tmp_path / "tier")
    assert second.below is None and "in use" in caplog.text


def test_a_lock_with_words_in_it_keeps_them(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "tier").mkdir()
    (tmp_path / "tier" / "lock").write_text("of another program")
    serve(opened(), 0)
    assert (tmp_path / "tier" / "lock").read_text() == "of another program"


def test_a_store_that_is_gone_gives_its_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> CheckpointStore:
        return CheckpointStore(UNIT, "lru", disk_memory=10**6, disk_dir=tmp_path / "tier")

    store = make()
    assert store.below is not None
    del store
    gc.collect()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", failing(errno.EIO))
        half = make()
        assert half.below is None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make()
    second = make()
    assert second.below is not None
    second.close()


def interrupt(path: Path) -> None:
    raise KeyboardInterrupt


def names_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Fault:
    """A call of the system that fails from some time on, each try one time later."""

    def __init__(self, own: Callable[..., Any], name: str) -> None:
        self._own, self._name = own, name
        self.spared = self._calls = 0

    def later(self) -> None:
        self.spared, self._calls = self.spared + 1, 0

    def __call__(self, what: Any, *args: Any, **kwargs: Any) -> Any:
        if self._name != "open" or str(what).endswith(files.TEMPORARY):
            self._calls += 1
            if self._calls > self.spared:
                raise OSError(errno.ENOSPC, "No space left on device")
        return self._own(what, *args, **kwargs)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_second_save_that_fails_leaves_the_first(
    cache: SparsePrefixCache, jamba: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    cache.save_pretrained(tmp_path)
    before = names_in(tmp_path)
    cache.clear()
    logits(jamba, torch.flip(question(3), [1]), cache)
    fault = Fault(getattr(os, call), call)
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(files.os, call, fault)
            try:
                cache.save_pretrained(tmp_path)
            except OSError:
                fault.later()
            else:
                break
        if (tmp_path / "sparse_cache.json").read_bytes() == before["sparse_cache.json"]:
            assert names_in(tmp_path) == before
        else:  # the folder could not be made safe after the new manifest had come into its place
            assert call == "fsync"
        with SparsePrefixCache.from_pretrained(tmp_path, jamba) as loaded:
            assert len(loaded.store) >= len([name for name in before if name.startswith("state")])
    assert fault.spared >= 4 and not set(names_in(tmp_path)) & set(before) - {"sparse_cache.json"}


def test_an_unfinished_file_of_a_killed_save_goes_with_the_next(cache: SparsePrefixCache, tmp_path: Path) -> None:
    put(tmp_path)
    left = [files.temporary_of(tmp_path / name) for name in ("sparse_cache.json", files.new_name("kv", b""))]
    for path in left:
        path.write_bytes(b"ha")
    cache.save_pretrained(tmp_path)
    assert not any(path.exists() for path in left) and untouched(tmp_path)


@pytest.mark.parametrize("text", ['{"mine": true}', "no json", "[]", "", '{"fingerprint": {}}'])
def test_a_manifest_of_somebody_else_stays(cache: SparsePrefixCache, tmp_path: Path, text: str) -> None:
    (tmp_path / "sparse_cache.json").write_text(text)
    with pytest.raises(ValueError, match=r"sparse_cache.json is damaged or not a saved cache's.* another folder"):
        cache.save_pretrained(tmp_path)
    assert names_in(tmp_path) == {"sparse_cache.json": text.encode()}


@pytest.mark.parametrize("make", [dangling, to_itself, os.mkfifo, Path.mkdir])
def test_a_manifest_that_is_no_file_stays(
    cache: SparsePrefixCache, jamba: PreTrainedModel, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "sparse_cache.json")
    mode = (tmp_path / "sparse_cache.json").lstat().st_mode
    with pytest.raises(ValueError, match="not a file that was written here"):
        cache.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a file that was written here"):
        SparsePrefixCache.from_pretrained(tmp_path, jamba)
    assert stat.S_IFMT((tmp_path / "sparse_cache.json").lstat().st_mode) == stat.S_IFMT(mode)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_second_save_deletes_what_only_the_first_needed(
    cache: SparsePrefixCache, jamba: PreTrainedModel, tmp_path: Path
) -> None:
    cache.save_pretrained(tmp_path)
    first = set(os.listdir(tmp_path))
    cache.clear()
    other = torch.flip(question(2), [1])
    logits(jamba, other, cache)
    assert cache.save_pretrained(tmp_path) == len(cache.store)
    manifest = json.loads((tmp_path / "sparse_cache.json").read_text())
    assert set(os.listdir(tmp_path)) == {"sparse_cache.json", *manifest["units"], *manifest["parts"]}
    assert set(os.listdir(tmp_path)) & first == {"sparse_cache.json"}
    with SparsePrefixCache.from_pretrained(tmp_path, jamba) as loaded:
        logits(jamba, question(2), loaded)
        assert loaded.last_request is not None and not loaded.last_request.resumed_tokens


def test_a_file_that_was_replaced_by_the_user_is_not_deleted(opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = opened()
    for first in range(3):
        serve(store, first)
    mine = files_of(store)[0]
    mine.write_bytes(b"now mine")
    store.clear()
    assert files_of(store) == [mine] and mine.read_bytes() == b"now mine"
    assert f"{mine} is not, or no longer, a file that was written here" in caplog.text
    assert disk_of(store).reserved_bytes == disk_of(store).used_bytes == 0


def test_a_model_is_not_lost_by_the_tier_beside_it(
    jamba: PreTrainedModel, tmp_path: Path, stores: list[CheckpointStore]
) -> None:
    jamba.save_pretrained(tmp_path / SPACE)
    weights = (tmp_path / SPACE / "model.safetensors").read_bytes()
    for _ in range(2):
        stores.append(small_store(jamba, tmp_path))
        with handle(jamba, store=stores[-1]) as cache:
            logits(jamba, question(2), cache)
            cache.clear()
        stores[-1].close()
    assert (tmp_path / SPACE / "model.safetensors").read_bytes() == weights


def test_blobs_are_ours() -> None:
    data = Blob(3, "x").to_bytes('{"format": 1}', np.zeros(0, np.int32))
    assert files.is_name(files.new_name("kv", data)) and GRID == 32


def test_a_picture_or_a_report_takes_the_place_of_ours_alone(tmp_path: Path) -> None:
    from hf_sparse_cache.bench.results import RunFolder, RunSettings
    from hf_sparse_cache.cli.outputs import PNG_MARK, REPORT_MARK, check_output

    for mark, ours in ((PNG_MARK, b"\x89PNG..Software\0hf-sparse-cache.."), (REPORT_MARK, b"<html>" + REPORT_MARK)):
        path = tmp_path / "a"
        check_output(path, "--png", mark)
        path.write_bytes(ours)
        check_output(path, "--png", mark)
        for mine in (b"", b"a photograph", bytes(5000) + ours, b"hf-sparse-cache plan trace.jsonl --png plan.png"):
            path.write_bytes(mine)
            with pytest.raises(ValueError, match="--png .* was not written by this command; give another name"):
                check_output(path, "--png", mark)
            assert path.read_bytes() == mine
        path.unlink()
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match="holds files of something else"):
        RunFolder(tmp_path, RunSettings(("m",), ("d",)), "")
    assert os.listdir(tmp_path) == ["report.html"]
