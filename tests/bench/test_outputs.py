"""Files that commands, examples and benchmarks are told to write: nobody else's, in full or as they were before."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.outputs import results_file, write_results
from hf_sparse_cache import SparseCacheConfig
from hf_sparse_cache.bench.results import RunFolder, RunSettings, Trial
from hf_sparse_cache.hub import replace_whole
from hf_sparse_cache.tools.machine import describe_machine


@pytest.mark.parametrize("settings", [{"theme": "dark"}, {"models": [], "seed": 1}, {}, []])
def test_results_do_not_go_into_the_folder_of_another_program(tmp_path: Path, settings: Any) -> None:
    """Many have a `config.json` with settings; what else lies there would be written over."""
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings, "command": "x", "machine": {}}))
    (tmp_path / "metrics.json").write_text("mine")
    with pytest.raises(ValueError, match=r"--out .*config.json is not that of a run; give another folder"):
        RunFolder(tmp_path, RunSettings(("m",), ("d",)), "")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "metrics.json"]


@pytest.mark.parametrize("name", ["units", "plots", "metrics.json", "requests.parquet"])
def test_results_do_not_go_where_a_link_leads(tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    trial = Trial([{"a": 1}], {"model": "m", "dataset": "d", "repeat": 0})
    RunFolder(out, RunSettings(("m",), ("d",)), "").save(trial)
    RunFolder(out, RunSettings(("m",), ("d",)), "")  # the same run goes on there
    (out / "units").rename(tmp_path / "units")
    (tmp_path / "mine").mkdir()
    (out / name).symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=f"--out .*: {name} in it is a link; remove it"):
        RunFolder(out, RunSettings(("m",), ("d",)), "")
    assert not any((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("name", ["a", "a" * 255])
def test_a_file_for_people_is_replaced_in_full_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    replace_whole(path, "the first")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, no_room)
            with pytest.raises(OSError, match="No space left"):
                replace_whole(path, b"the second")
        assert path.read_text() == "the first" and len(os.listdir(tmp_path)) == 2
    replace_whole(tmp_path / "link", b"the third")
    assert path.read_text() == "the third" and (tmp_path / "link").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640 and len(os.listdir(tmp_path)) == 2


def test_a_disk_that_is_full_leaves_no_half_of_a_card_a_picture_or_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run", RunSettings(("m",), ("d",)), "")
    folder.save(Trial([{"a": 1}], {"model": "m", "dataset": "d", "repeat": 1}))
    config = SparseCacheConfig()
    config.save_pretrained(tmp_path / "settings")
    folder.write("metrics.json", {"first": 1})
    (tmp_path / "settings" / "README.md").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "fsync", no_room)
    for write in (
        lambda: config.save_pretrained(tmp_path / "settings"),
        lambda: folder.write("metrics.json", {"second": 2}),
        lambda: folder.save(Trial([{"a": 1}], {"model": "m", "dataset": "d", "repeat": 0})),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("text", ["", "[]", "{}", "notes", '{"machine": "mine"}', '{"machine": {"cpu": 1}}', "folder"])
def test_a_benchmark_does_not_write_over_what_is_not_its_own(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.mkdir() if text == "folder" else path.write_text(text)
    with pytest.raises(argparse.ArgumentTypeError, match="was not written by a benchmark; give another name"):
        results_file(str(path))
    assert path.is_dir() or path.read_text() == text


def test_a_benchmark_goes_on_with_results(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    for content in ({"machine": describe_machine()}, {"one": {"machine": describe_machine()}, "two": 2}):
        write_results(results_file(str(path)), content)
        assert results_file(str(path)) == path and json.loads(path.read_text()) == content
    for kept in (Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"):
        if kept.name not in ("deciding.json", "process_memory.json"):  # which no option names
            assert results_file(str(kept)) == kept


def test_a_training_does_not_go_into_the_folder_of_another_model(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "train_recall.py"
    spec = importlib.util.spec_from_file_location("train_recall_for_outputs", path)
    assert spec is not None and spec.loader is not None
    training = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    assert training.own_folder(str(tmp_path / "new")) == tmp_path / "new"
    assert training.own_folder(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for name in ("", "model.safetensors"):
        with pytest.raises(argparse.ArgumentTypeError, match="holds something else, which would be replaced"):
            training.own_folder(str(tmp_path / name))
    (tmp_path / "curve.jsonl").write_text("{}")
    assert training.own_folder(str(tmp_path)) == tmp_path
