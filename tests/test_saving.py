"""What a save writes and a load reads, by plain payloads that only have a size and a label: no model is asked."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cutting import every
from reference_store import Blob
from sharing import KV, label, prompt, serve

from hf_sparse_cache import CheckpointStore, DamagedFileError, SparseCacheConfig, persistence
from hf_sparse_cache.manifest import Manifest
from hf_sparse_cache.models import fingerprint
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.planning.segments import Replayable, Segmenting
from hf_sparse_cache.store import files
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.unit import unit_of
from hf_sparse_cache.store.unit_files import Packing


KEY = "correct horse battery staple"
SPACE = "here"  # where the store has it, which a save does not say
PLAIN = Seal()


@dataclass
class Holder:
    """Stands in for the server of a handle: a store, and what a save says of the model."""

    store: CheckpointStore
    binding: Any
    space: Any

    def save(self, folder: Path, seal: Seal = PLAIN) -> int:
        return persistence.save(self, folder, seal)  # type: ignore[arg-type]

    def load(self, folder: Path, seal: Seal = PLAIN, mark: Callable[[Any], None] | None = None) -> None:
        announce = mark or (lambda prefix: self.store.mark(prefix, SPACE))
        persistence.load_saved(self, folder, seal, announce)  # type: ignore[arg-type]

    def held(self) -> list[tuple[int, list[int], Lineage, Any, list[Any]]]:
        """Everything stored, by what it is of."""
        found = []
        for space, tokens, checkpoint in self.store.checkpoints():
            assert space == SPACE
            chain = [(segment.span, segment.payload.label) for segment in checkpoint.chain()]
            found.append((checkpoint.position, tokens.tolist(), checkpoint.lineage, checkpoint.state.label, chain))
        return sorted(found, key=repr)


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Holder]:
    monkeypatch.setattr(fingerprint, "describe", lambda binding: dict(binding.described))
    monkeypatch.setattr(fingerprint, "config_values", lambda config: dict(config))
    monkeypatch.setattr(persistence, "LayerTensors", Blob)
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)

    def make(
        store: CheckpointStore | None = None, segmenting: Segmenting | None = None, model: str = "Tiny", **config: Any
    ) -> Holder:
        binding = SimpleNamespace(
            described={"format": 1, "model": model},
            model=SimpleNamespace(config={"layers": 3}),
            config=SparseCacheConfig(**config),
            segmenting=segmenting or every(64),
        )
        space = SimpleNamespace(now=lambda: (SPACE, False), layout=None)
        return Holder(CheckpointStore(None, "lru") if store is None else store, binding, space)

    return make


def listed(folder: Path) -> Manifest:
    return Manifest.read(folder, PLAIN)


def positions(folder: Path, names: list[str] | None = None) -> list[tuple[int, int]]:
    """First token and position of states, in the order of the manifest."""
    found = []
    for name in (listed(folder).units or []) if names is None else names:
        record, tokens = files.peek(folder / name)
        found.append((int(tokens[0]), record["position"]))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def filled(made: Holder) -> Holder:
    """Two texts of one beginning, and one of another; the second was used last."""
    serve(made.store, prompt(1, 300), (64, 128, 256), SPACE)
    serve(made.store, prompt(2, 200), (64,), SPACE)
    serve(made.store, prompt(1, 300, shared=150), (128, 192), SPACE)
    return made


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seal", [PLAIN, Seal(KEY)], ids=["plain", "keyed"])
def test_what_is_loaded_is_what_was_saved(holder: Any, tmp_path: Path, seal: Seal, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="hf_sparse_cache")
    one, other = filled(holder()), holder()
    assert one.save(tmp_path / "a" / "b", seal) == len(one.store) == 5
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    other.load(tmp_path / "a" / "b", seal)
    assert other.held() == one.held() and other.store.used_bytes == one.store.used_bytes
    other.store.verify()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert serve(other.store, prompt(1, 300), (), SPACE) == 256
    # Five states, and the keys and values of the six spans between their cuts, each in one file.
    manifest = Manifest.read(tmp_path / "a" / "b", seal)
    assert len(manifest.units or ()) == 5 and len(manifest.parts) == 6
    assert set(contents(tmp_path / "a" / "b")) == {"sparse_cache.json", *manifest.listed}
    assert {name.partition("-")[0] for name in manifest.parts} == {"kv"}


def test_only_what_the_handle_may_read_is_saved(holder: Any, tmp_path: Path) -> None:
    one = holder()
    serve(one.store, prompt(1, 100), (64,), SPACE)
    serve(one.store, prompt(2, 100), (64,), "of another")
    one.store.mark(np.asarray(prompt(3, 70), np.int32), "of another")
    assert one.save(tmp_path) == 1 and positions(tmp_path) == [(1, 64)]
    assert len(listed(tmp_path).parts) == 1


def test_the_order_of_use_comes_back(holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = filled(holder()), holder()
    serve(one.store, prompt(2, 200), (), SPACE)  # whose state is now the last that goes
    one.save(tmp_path)
    assert positions(tmp_path)[-1] == (2, 64)
    order = [(int(unit.tokens[0]), unit.position) for unit in one.store.tiers[0].units(SPACE)]
    assert positions(tmp_path) == order
    put, came = CheckpointStore.put, list[tuple[int, int]]()

    def noted(store: CheckpointStore, unit: Any, *args: Any, **options: Any) -> Any:
        came.append((int(unit.tokens[0]), unit.position))
        return put(store, unit, *args, **options)

    monkeypatch.setattr(CheckpointStore, "put", noted)
    other.load(tmp_path)
    assert came == order


def test_of_several_tiers_the_fastest_is_saved_last(holder: Any, tmp_path: Path) -> None:
    """What lies in two of them is saved once, where the faster one has it."""
    store = CheckpointStore(2 * (10 + 64 * KV), "lru", host_memory="1MiB")
    one = holder(store)
    for first in (1, 2, 3, 4):
        serve(store, prompt(first, 100), (64,), SPACE)
    serve(store, prompt(1, 100), (), SPACE)  # comes up again
    fast = [int(unit.tokens[0]) for unit in store.tiers[0].units(SPACE)]
    assert fast[-1] == 1 and len(fast) == 2 and len(store.tiers[1]) >= 2
    assert one.save(tmp_path) == 4
    assert [first for first, _ in positions(tmp_path)][-2:] == fast
    assert sorted(first for first, _ in positions(tmp_path)) == [1, 2, 3, 4]
    other = holder()
    other.load(tmp_path)
    assert len(other.store) == 4 and serve(other.store, prompt(3, 100), (), SPACE) == 64


def test_of_a_unit_in_two_tiers_the_place_of_the_faster_counts(holder: Any, tmp_path: Path) -> None:
    store = CheckpointStore(None, "lru", disk_memory="1MiB", disk_dir=tmp_path / "disk")
    store.read_with(Blob.from_bytes)
    for first in (1, 2, 3):
        serve(store, prompt(first, 100), (64,), SPACE)
    store.flush()
    serve(store, prompt(1, 100), (), SPACE)
    assert [len(tier) for tier in store.tiers] == [3, 3]
    assert holder(store).save(tmp_path / "a") == 3
    assert [first for first, _ in positions(tmp_path / "a")] == [2, 3, 1]
    assert len(list((tmp_path / "a").iterdir())) == 7
    store.close(flush=False)


def test_what_a_tier_has_lost_is_left_out(holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = filled(holder())
    tier = one.store.tiers[0]
    monkeypatch.setattr(tier, "fetch", lambda unit, spans: None if unit.position == 128 else unit)
    assert one.save(tmp_path) == 4
    assert 128 not in [position for _, position in positions(tmp_path)]


def test_keys_and_values_that_are_written_are_not_fetched_again(
    holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, asked = holder(), list[list[tuple[int, int]]]()
    serve(one.store, prompt(1, 300), (64, 128, 256), SPACE)
    monkeypatch.setattr(
        one.store.tiers[0],
        "fetch",
        lambda unit, spans: asked.append([(span.start, span.end) for span in spans]) or unit,
    )
    one.save(tmp_path)
    flat = [span for spans in asked for span in spans]
    assert len(asked) == 3 and sorted(flat) == sorted(set(flat)) and max(end for _, end in flat) == 256


# -- into a folder that holds something -------------------------------------------------------------------------------


def test_a_second_save_writes_what_is_new_and_takes_away_what_is_gone(holder: Any, tmp_path: Path) -> None:
    one = filled(holder())
    one.store.mark(np.asarray(prompt(1, 300)[:100], np.int32), SPACE)
    one.save(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    (marks,) = tmp_path.glob("marks-*")
    one.store.clear()
    serve(one.store, prompt(2, 200), (64,), SPACE)
    serve(one.store, prompt(5, 200), (64,), SPACE)
    assert one.save(tmp_path) == 2
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert set(after) == listed(tmp_path).listed and len(after) == 4 and not marks.exists()
    assert len(after.items() & before.items()) == 2  # of the second text: as they were


def test_a_folder_of_another_cache_is_refused_before_anything_is_written(holder: Any, tmp_path: Path) -> None:
    filled(holder()).save(tmp_path)
    before = contents(tmp_path)
    for other in (holder(model="Huge"), holder(namespace="b")):
        with pytest.raises(ValueError, match="This handle cannot save there; choose another folder"):
            filled(other).save(tmp_path)
        with pytest.raises(ValueError, match="make a new cache with this model instead|The model fits: leave out"):
            other.load(tmp_path)
    assert contents(tmp_path) == before and len(holder().store) == 0


def test_a_save_that_replaces_one_with_a_key_needs_none(holder: Any, tmp_path: Path) -> None:
    """Whoever saves anew does not believe what was there."""
    one = filled(holder())
    one.save(tmp_path, Seal(KEY))
    assert one.save(tmp_path, PLAIN) == 5
    assert set(contents(tmp_path)) == {"sparse_cache.json", *listed(tmp_path).listed}


def test_what_another_cache_left_stays(holder: Any, tmp_path: Path) -> None:
    """Files of another tenant or model are none of this cache's, listed or not."""
    filled(holder(namespace="b")).save(tmp_path)
    (tmp_path / "sparse_cache.json").unlink()
    others = set(contents(tmp_path))
    filled(holder()).save(tmp_path)
    assert others < set(contents(tmp_path))
    one = holder()
    serve(one.store, prompt(9, 100), (64,), SPACE)
    one.save(tmp_path)
    assert set(contents(tmp_path)) == {"sparse_cache.json", *listed(tmp_path).listed, *others}


def test_what_a_killed_save_left_is_taken_away(holder: Any, tmp_path: Path, caplog: Any) -> None:
    one = filled(holder())
    one.save(tmp_path)
    (tmp_path / "sparse_cache.json").unlink()  # it came to no manifest
    half = files.temporary_of(tmp_path / "state")
    half.write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"mine")
    one.store.clear()
    serve(one.store, prompt(2, 200), (64,), SPACE)
    assert one.save(tmp_path) == 1
    assert set(contents(tmp_path)) == {"sparse_cache.json", "mine.tmp", *listed(tmp_path).listed}
    assert not caplog.records


def test_what_a_killed_save_with_another_key_left_is_taken_away(holder: Any, tmp_path: Path) -> None:
    """It says whose it is to everybody, as long as it is not encrypted."""
    one = filled(holder())
    one.save(tmp_path, Seal(KEY))
    (tmp_path / "sparse_cache.json").unlink()
    one.save(tmp_path)
    assert set(contents(tmp_path)) == {"sparse_cache.json", *listed(tmp_path).listed}


def test_what_cannot_be_deleted_is_said_and_the_rest_goes(
    holder: Any, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = filled(holder())
    one.save(tmp_path)
    victim = min(tmp_path.glob("state-*"))
    remove = files.remove

    def stubborn(path: Path) -> None:
        if path == victim:
            raise PermissionError(f"it is {victim.name}\x1b")
        remove(path)

    monkeypatch.setattr(files, "remove", stubborn)
    one.store.clear()
    serve(one.store, prompt(5, 200), (64,), SPACE)
    assert one.save(tmp_path) == 1
    assert set(contents(tmp_path)) == {"sparse_cache.json", victim.name, *listed(tmp_path).listed}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"it is {victim.name}\\x1b" in caplog.text


def test_the_parts_of_a_save_that_lists_none_go_with_its_states(holder: Any, tmp_path: Path) -> None:
    """In the first format the files of keys and values say of no space, so those that the states name are its own."""
    one = filled(holder())
    one.save(tmp_path)
    manifest = listed(tmp_path)
    (tmp_path / "sparse_cache.json").write_bytes(replace(manifest, units=[], parts=[]).text(PLAIN))
    for name in manifest.parts:
        path = tmp_path / name
        data = path.read_bytes().replace(b'\\"space\\"', b'\\"spare\\"')
        assert data != path.read_bytes()
        path.write_bytes(data)
    one.store.clear()
    serve(one.store, prompt(5, 200), (64,), SPACE)
    one.save(tmp_path)
    assert set(contents(tmp_path)) == {"sparse_cache.json", *listed(tmp_path).listed}


def test_a_damaged_file_is_written_anew_under_another_name(holder: Any, tmp_path: Path) -> None:
    one = filled(holder())
    one.save(tmp_path)
    names = listed(tmp_path).listed
    victims = [min(tmp_path.glob(f"{kind}-*")) for kind in ("state", "kv")]
    victims[0].write_bytes(victims[0].read_bytes() + b"\0")
    victims[1].write_bytes(victims[1].read_bytes()[:-1])
    assert one.save(tmp_path) == 5
    assert len(listed(tmp_path).listed & names) < len(names)
    assert not {victim.name for victim in victims} & listed(tmp_path).listed
    other = holder()
    other.load(tmp_path)
    assert other.held() == one.held()


# -- a save that fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails", [1, 4, 8])
def test_a_save_that_fails_leaves_the_folder_as_it_was(
    holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, fails: int
) -> None:
    one = holder()
    serve(one.store, prompt(2, 200), (64,), SPACE)
    one.save(tmp_path)
    before, write, calls = contents(tmp_path), files.write, [0]

    def failing(path: Path, data: bytes, *, replace: bool = False) -> None:
        calls[0] += 1
        if calls[0] == fails:
            raise error
        write(path, data, replace=replace)

    filled(one)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", failing)
        with pytest.raises(type(error)):
            one.save(tmp_path)
    assert calls == [fails] and contents(tmp_path) == before
    assert one.save(tmp_path) == len(one.store)


def test_what_cannot_be_taken_back_does_not_hide_the_error(
    holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, write, stuck = filled(holder()), files.write, list[Path]()

    def failing(path: Path, data: bytes, *, replace: bool = False) -> None:
        if replace:
            raise OSError("No space left on device")
        write(path, data)

    def stubborn(path: Path) -> None:
        stuck.append(path)
        raise PermissionError("no") if len(stuck) % 2 else DamagedFileError("not ours")

    monkeypatch.setattr(files, "write", failing)
    monkeypatch.setattr(files, "remove", stubborn)
    with pytest.raises(OSError, match="No space left"):
        one.save(tmp_path)
    assert sorted(stuck) == sorted(tmp_path.iterdir()) and len(stuck) == 11


def test_files_of_a_manifest_that_is_in_its_place_stay(
    holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the error comes once the new manifest is there, it needs its files."""
    one, other, write = filled(holder()), holder(), files.write

    def late(path: Path, data: bytes, *, replace: bool = False) -> None:
        write(path, data, replace=replace)
        if replace:
            raise OSError("the folder cannot be flushed")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", late)
        with pytest.raises(OSError, match="cannot be flushed"):
            one.save(tmp_path)
    other.load(tmp_path)
    assert other.held() == one.held()


# -- loading ----------------------------------------------------------------------------------------------------------


def test_marks_come_back_and_what_they_keep_comes_first(holder: Any, tmp_path: Path) -> None:
    one = filled(holder())
    marked = np.asarray(prompt(1, 300)[:128], np.int32)
    one.store.mark(marked, SPACE)
    one.save(tmp_path)
    assert [name for name in listed(tmp_path).parts if name.startswith("marks-")]
    other, put, events = holder(), CheckpointStore.put, list[Any]()

    def noted(store: CheckpointStore, unit: Any, *args: Any, **options: Any) -> Any:
        events.append((int(unit.tokens[0]), unit.position))
        assert unit.space == SPACE and options == {"urgent": True}
        return put(store, unit, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "put", noted)
        other.load(tmp_path, mark=lambda prefix: events.append(prefix.tolist()))
    assert events.index(marked.tolist()) == 2 and set(events[:2]) == {(1, 64), (1, 128)} and len(events) == 6
    rest = [event for event in positions(tmp_path) if event not in events[:2]]
    assert events[3:] == rest


def test_a_mark_that_is_none_here_is_said_and_the_rest_is_loaded(holder: Any, tmp_path: Path, caplog: Any) -> None:
    one, other = filled(holder()), holder()
    one.store.mark(np.asarray(prompt(1, 300)[:128], np.int32), SPACE)
    one.save(tmp_path)

    def refuses(prefix: Any) -> None:
        raise ValueError("it is too short")

    other.load(tmp_path, mark=refuses)
    assert other.held() == one.held()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "sparse_cache.json cannot be used: it is too short." in said


def test_marks_that_hold_too_much_are_left_out(holder: Any, tmp_path: Path, caplog: Any) -> None:
    one = holder()
    for first in (1, 2):
        one.store.mark(np.asarray(prompt(first, 70), np.int32), SPACE)
    serve(one.store, prompt(5, 100), (64,), SPACE)
    one.save(tmp_path)
    marks = next(name for name in listed(tmp_path).parts if name.startswith("marks-"))
    asked: list[Any] = []
    read = persistence.read_marks
    for most in (None, 1000):
        other = holder(CheckpointStore(None, "lru", max_remembered=most))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(persistence, "read_marks", lambda *args: asked.append(args[1:]) or read(*args))
            other.load(tmp_path)
        assert [len(prefix) for prefix in other.store.marks.prefixes(SPACE)] == [70, 70]
    space = listed(tmp_path).space
    assert asked == [(space, PLAIN, None), (space, PLAIN, 1000)] and not caplog.records
    (tmp_path / marks).write_bytes((tmp_path / marks).read_bytes() + b"\0")
    other = holder()
    other.load(tmp_path)
    assert not other.store.marks.prefixes(SPACE) and len(other.store) == 1
    assert len(caplog.records) == 1 and marks in caplog.text


@pytest.mark.parametrize("kind", ["state", "kv"])
def test_one_that_is_damaged_is_named_once_and_the_others_are_counted(
    holder: Any, tmp_path: Path, caplog: Any, kind: str
) -> None:
    one = holder()
    for first in range(1, 6):
        serve(one.store, prompt(first, 100), (64,), SPACE)
    one.save(tmp_path)
    victims = sorted(tmp_path.glob(f"{kind}-*"))[:3]
    for count in range(4):
        caplog.clear()
        for victim in victims[:count]:
            data = bytearray(victim.read_bytes())
            data[-1] ^= 4
            victim.write_bytes(data)
        other = holder()
        caplog.set_level(logging.INFO, logger="hf_sparse_cache")
        other.load(tmp_path)
        assert len(other.store) == 5 - count
        for victim in victims[:count]:  # as they were
            data = bytearray(victim.read_bytes())
            data[-1] ^= 4
            victim.write_bytes(data)
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        more = {1: "", 2: "; and 1 more files", 3: "; and 2 more files"}
        assert len(said) == (count > 0) and (not count or any(str(victim) in said[0] for victim in victims))
        if count:
            assert said[0].startswith("A stored state is lost, as ")
            assert said[0].endswith(f"does not match its checksum{more[count]}{' are left out' if count > 1 else ''}.")
        assert f"Loaded {5 - count} of 5 checkpoints from {tmp_path}." in caplog.text


def test_keys_and_values_that_are_lost_are_looked_at_once(
    holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Every state that builds on them is lost without another look at its own file."""
    caplog.set_level(logging.INFO, logger="hf_sparse_cache")
    one = holder()
    serve(one.store, prompt(1, 300), (64, 128, 256), SPACE)
    one.save(tmp_path)
    first = next(path for path in tmp_path.glob("kv-*") if files.peek(path)[0]["span"] == [0, 64])
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    read, opened = files.read, list[str]()
    monkeypatch.setattr(files, "read", lambda path, *args: opened.append(path.name) or read(path, *args))
    other = holder()
    other.load(tmp_path)
    assert len(other.store) == 0 and opened.count(first.name) == 1 and "Loaded 0 of 3" in caplog.text
    assert len([name for name in opened if name.startswith("state")]) == 1


def test_keys_and_values_are_read_once_for_all_that_share_them(
    holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(holder()).save(tmp_path)
    read, opened = files.read, list[str]()
    monkeypatch.setattr(files, "read", lambda path, *args: opened.append(path.name) or read(path, *args))
    holder().load(tmp_path)
    assert sorted(opened) == sorted(listed(tmp_path).listed)


def test_a_small_store_takes_what_was_used_last(holder: Any, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="hf_sparse_cache")
    one = holder()
    for first in range(1, 6):
        serve(one.store, prompt(first, 100), (64,), SPACE)
    one.save(tmp_path)
    small = holder(CheckpointStore(2 * (10 + 64 * KV), "lru"))
    small.load(tmp_path)
    assert sorted(tokens[0] for _, tokens, *_ in small.held()) == [4, 5]
    none = holder(CheckpointStore(0, "lru"))
    caplog.clear()
    none.load(tmp_path)
    assert len(none.store) == 0 and "Loaded 0 of 5" in caplog.text


def test_what_only_has_the_name_of_a_state_is_said(holder: Any, tmp_path: Path, caplog: Any) -> None:
    one, other = filled(holder()), holder()
    one.save(tmp_path)
    odd = tmp_path / files.new_name("state", b"odd")
    odd.mkdir()
    other.load(tmp_path)
    assert other.held() == one.held()
    assert len(caplog.records) == 1 and f"as {odd} cannot be used: it is a folder that was not" in caplog.text


@pytest.mark.parametrize("how", ["gone", "not listed", "without its parts", "of another space"])
def test_what_the_manifest_does_not_vouch_for_is_left_out(holder: Any, tmp_path: Path, caplog: Any, how: str) -> None:
    one, other = holder(), holder()
    for first in (1, 2):
        serve(one.store, prompt(first, 100), (64,), SPACE)
    one.save(tmp_path)
    manifest = listed(tmp_path)
    names = list(manifest.units or ())
    told = f"{names[0]} cannot be used: "
    if how == "gone":
        (tmp_path / names[0]).unlink()
        told += "it is gone, and sparse_cache.json lists it."
    elif how == "not listed":
        (tmp_path / "sparse_cache.json").write_bytes(replace(manifest, units=names[1:]).text(PLAIN))
        told += "sparse_cache.json does not list it with all that it needs."
    elif how == "without its parts":
        parts = [files.peek(tmp_path / name)[0]["kv"][0][-1] for name in names]
        (tmp_path / "sparse_cache.json").write_bytes(replace(manifest, parts=parts[1:]).text(PLAIN))
        told += "sparse_cache.json does not list it with all that it needs."
    else:
        packing, (_, _, checkpoint) = Packing(PLAIN, files.same_name), one.store.checkpoints()[0]
        name, data = packing.state(
            replace(unit_of(checkpoint), space="strange"), [files.peek(tmp_path / names[0])[0]["kv"][0][-1]]
        )
        (tmp_path / name).write_bytes(data)
        (tmp_path / names[0]).unlink()
        (tmp_path / "sparse_cache.json").write_bytes(replace(manifest, units=[name, names[1]]).text(PLAIN))
        told = f"{name} cannot be used: it is of another model or namespace than sparse_cache.json."
    other.load(tmp_path)
    assert [tokens[0] for _, tokens, *_ in other.held()] == [2]
    assert len(caplog.records) == 1 and told in caplog.text


def test_a_save_of_the_first_version_lists_nothing_and_is_read(holder: Any, tmp_path: Path, caplog: Any) -> None:
    """Its states do not say what made them: every cut of the handle that saved them did."""
    one, other = holder(grid=64), holder(grid=64)
    with_cuts = {"format": 1, "model": "Tiny", "grid": 64, "cut ids": [3]}
    one.binding.described = with_cuts
    ids = prompt(1, 150)
    ids[30] = 3  # a cut of the first handle
    serve(one.store, ids, (64, 128), SPACE)
    one.save(tmp_path)
    manifest = json.loads((tmp_path / "sparse_cache.json").read_text())
    for name in ("version", "units", "parts"):
        del manifest[name]
    (tmp_path / "sparse_cache.json").write_text(json.dumps(manifest))
    found = persistence._Source(tmp_path, Manifest.read(tmp_path, PLAIN), PLAIN)
    units = found.units()
    assert [len(unit.tokens) for unit in units] == [64, 128] and not caplog.records
    bare = [replace(unit, lineage=None) for unit in units]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(persistence, "find", lambda *args: SimpleNamespace(lost={}, stored={}, units=bare))
        read = found.units()
    # A special token is a cut as well, from which the next one has its distance.
    assert [unit.lineage for unit in read] == [Lineage([31, 64]), Lineage([31, 64, 128])]
    other.load(tmp_path)
    assert len(other.store) == 2


# -- what fits --------------------------------------------------------------------------------------------------------


def test_units_that_no_prompt_can_resume_from_are_counted(holder: Any, tmp_path: Path, caplog: Any) -> None:
    one = filled(holder())
    one.save(tmp_path)
    for segmenting, count in (
        (every(64), 0),
        (every(128), 5),
        (every(32), 5),
        (Replayable(CutRule(32), 32), 0),
    ):
        caplog.clear()
        other = holder(segmenting=segmenting)
        other.load(tmp_path)
        assert len(other.store) == 5
        assert [f"{count} of the 5 checkpoints in {tmp_path} were made with other" in caplog.text] == [count > 0]
        assert len(caplog.records) == (count > 0)


def test_the_end_of_a_prompt_fits_any_cuts(holder: Any, tmp_path: Path, caplog: Any) -> None:
    one = holder()
    serve(one.store, prompt(1, 100), (64,), SPACE)
    (_, _, checkpoint) = one.store.checkpoints()[0]
    source = persistence._Source(tmp_path, Manifest({}, "", {}, {}), PLAIN)
    unit: Any = SimpleNamespace(tokens=np.asarray(prompt(1, 64), np.int32), lineage=Lineage([64]), final=False)
    assert checkpoint.lineage == unit.lineage
    unknown = SimpleNamespace(**{**vars(unit), "lineage": None})
    final = SimpleNamespace(**{**vars(unknown), "final": True})
    decoded = SimpleNamespace(**{**vars(unit), "lineage": Lineage([32]).decoded(64)})
    for one_unit, fits in ((unit, True), (unknown, False), (final, True), (decoded, False)):
        caplog.clear()
        source.warn_of_other_cuts([one_unit], every(64))
        assert len(caplog.records) == (not fits)
        assert persistence._fits(one_unit, every(64)) is fits
        assert persistence._fits(one_unit, Replayable(CutRule(64), 64))


@pytest.mark.parametrize(
    ("prefix", "tokens", "begins"),
    [([1, 2, 3], [1, 2], True), ([1, 2], [1, 2], True), ([1, 2], [1, 2, 3], False), ([1, 2, 3], [1, 3], False)],
)
def test_a_mark_keeps_what_it_begins_with(prefix: list[int], tokens: list[int], begins: bool) -> None:
    assert persistence._begins(np.asarray(prefix, np.int32), np.asarray(tokens, np.int32)) is begins


# -- the settings of a save -------------------------------------------------------------------------------------------


def test_a_handle_is_made_with_the_settings_of_the_save(holder: Any, tmp_path: Path) -> None:
    one = holder(namespace="b", grid=64, max_checkpoints=3, exactness="bitwise", cut_after=("x",))
    one.store.resize("1MiB")
    one.save(tmp_path)
    found = persistence.settings(tmp_path, {}, PLAIN)
    assert found == {
        "namespace": "b",
        "grid": 64,
        "max_checkpoints": 3,
        "exactness": "bitwise",
        "cut_after": ("x",),
        "max_memory": 2**20,
        "pieces": None,
    }
    store = CheckpointStore(None)
    given = persistence.settings(str(tmp_path), {"store": store, "grid": 32, "namespace": "c"}, PLAIN)
    assert given == {**{k: v for k, v in found.items() if k != "max_memory"}, "store": store, "grid": 32} | {
        "namespace": "c"
    }
    assert persistence.settings(tmp_path, {"store": None}, PLAIN)["max_memory"] == 2**20
    with pytest.raises(DamagedFileError, match="nobody vouches"):
        persistence.settings(tmp_path, {}, Seal(KEY))
    with pytest.raises(ValueError, match="save_directory must be a path, got 7"):
        persistence.settings(7, {}, PLAIN)  # type: ignore[arg-type]
    for call in (one.save, one.load):
        with pytest.raises(ValueError, match="save_directory is ''"):
            call("")


def test_a_save_may_be_copied_anywhere(holder: Any, tmp_path: Path) -> None:
    one, other = filled(holder()), holder()
    one.save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    other.load(os.fspath(tmp_path / "b"))
    assert other.held() == one.held()
    assert label(prompt(2, 200), 64) in [each[3] for each in other.held()]
