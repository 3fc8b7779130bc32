"""The budget of the disk tier, by the byte: whatever lies in its folder, unfinished files too, at every write."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import UNIT, disk_of, files_of, prompt, serve
from prompting import begin
from reference_store import Blob
from test_disk import failing

from hf_sparse_cache import CheckpointStore
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store import files
from hf_sparse_cache.store.unit import Unit


def on_disk(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # deleted meanwhile
            continue
    return total


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, folder: Path, budget: int) -> Iterator[list[int]]:
    """Looks at the whole folder before every write, which must fit."""
    own, most, lock = os.write, [0], threading.Lock()

    def write(descriptor: int, data: Any) -> int:
        with lock:
            most[0] = max(most[0], on_disk(folder) + len(data))
            return own(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", write)
        yield most
    assert 0 < most[0] <= budget


def serve_in(store: CheckpointStore, space: str, first: int) -> int:
    with begin(store, ids := prompt(first), space) as request:
        request.add(4, Blob(10, (first, 4)), lambda a, b: Blob(5 * (b - a), (ids[0], b)))
    return request.resumed_tokens


def one_unit(store: CheckpointStore) -> int:
    serve(store, 90)
    serve(store, 91)
    size = disk_of(store).used_bytes
    store.clear()
    return size


def test_the_order_of_use_outlives_a_clock_that_stands(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a file system ticks every few milliseconds, in which many files are written."""
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    store = opened()
    for first in (3, 1, 4, 0, 5, 9, 2, 6):
        serve(store, first)
    assert serve(store, 4) == 4  # from disk, so that it was used after all others
    kept = [int(tokens[0]) for _, tokens, _ in disk_of(opened()).checkpoints()]
    assert kept == [3, 1, 0, 5, 9, 2, 4, 6]


def test_several_spaces_are_opened_under_a_smaller_budget(opened: Any, tmp_path: Path) -> None:
    store = opened()
    for first in range(4):
        for space in "abc":
            serve_in(store, space, first)
    full = on_disk(tmp_path)
    assert len(disk_of(store)) == 11
    for part in (2, 5, 40):
        store = opened(disk_memory=full // part)
        tier = disk_of(store)
        assert on_disk(tmp_path) == tier.used_bytes <= full // part and tier.reserved_bytes == 0
        assert len(tier) == 11 // part or part == 2
        # What was used last stays, whatever its space is.
        kept = [(space, int(tokens[0])) for space, tokens, _ in tier.checkpoints()]
        assert kept == sorted(kept) and all(first >= 3 - 3 // part - 1 for _, first in kept)


def test_what_was_evicted_before_room_making_gave_up_is_gone(opened: Any, tmp_path: Path) -> None:
    store = opened()
    one = one_unit(store)
    store = opened(disk_memory=4 * one + 10)
    for first in range(5):
        serve(store, first)
    tier = disk_of(store)
    held = tier.stored()[-1]
    tier.ledger.pin(held)  # it cannot go, so that room for a large unit is sought in vain
    before = len(tier)
    with begin(store, ids := prompt(77)) as request:
        request.add(4, Blob(10, (77, 4)), lambda a, b: Blob(5 * (b - a), (ids[0], b)))
    large = 4 * one
    assert not tier._claim(large)
    assert on_disk(tmp_path) == tier.used_bytes and tier.reserved_bytes == 0 and len(tier) < before
    tier.ledger.unpin(held)


def test_no_write_comes_before_its_room_is_free(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads, and deletions that take their time: what is no longer counted is gone before others write."""
    store = opened()
    budget = 3 * one_unit(store) + 50
    store = opened(disk_memory=budget)
    own = os.unlink

    def slowly(path: Any, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.002)
        own(path, *args, **kwargs)

    def work(number: int) -> None:
        for first in range(number * 100, number * 100 + 12):
            serve_in(store, "", first)

    with watched(monkeypatch, tmp_path / "tier", budget) as most, monkeypatch.context() as patch:
        patch.setattr(files.os, "unlink", slowly)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most[0] > budget // 2  # it was tight
    assert on_disk(tmp_path) == disk_of(store).used_bytes and disk_of(store).reserved_bytes == 0


def test_room_that_another_thread_makes_is_not_used_before_it_is_there(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large unit is evicted for a small one; until its files are gone, a second small one has to wait."""
    store = opened()
    budget = 3 * one_unit(store)
    store = opened(disk_memory=budget)
    large = Unit("", np.array(prompt(80), dtype=np.int32), Lineage([4]), Blob(budget - 500, (80, 4)))
    assert disk_of(store).write(large) and disk_of(store).used_bytes > budget * 2 // 3
    own, stopped, go = os.unlink, threading.Event(), threading.Event()

    def held_up(path: Any, *args: Any, **kwargs: Any) -> None:
        stopped.set()
        assert go.wait(30)
        own(path, *args, **kwargs)

    def write(first: int) -> None:
        assert disk_of(store).write(
            Unit("", np.array(prompt(first), dtype=np.int32), Lineage([4]), Blob(10, (first, 4)))
        )

    with watched(monkeypatch, tmp_path / "tier", budget), monkeypatch.context() as patch:
        patch.setattr(files.os, "unlink", held_up)
        threads = [threading.Thread(target=write, args=(first,)) for first in (1, 2)]
        threads[0].start()
        assert stopped.wait(30)
        threads[1].start()
        threads[1].join(0.3)
        go.set()
        for thread in threads:
            thread.join()
    assert len(disk_of(store)) == 2 and on_disk(tmp_path) == disk_of(store).used_bytes


def test_an_unfinished_file_counts_until_it_is_gone(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened()
    one = one_unit(store)
    left = files.temporary_of(disk_of(store).folder_of("") / files.new_name("kv", b""))
    left.write_bytes(bytes(2 * one))
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "unlink", failing(errno.EACCES))
        store = opened(disk_memory=3 * one)
        assert disk_of(store).reserved_bytes == 2 * one and "still counts" in caplog.text
        for first in range(4):
            serve(store, first)
        assert len(disk_of(store)) == 1 and on_disk(tmp_path) <= 3 * one
    for first in range(4, 8):
        serve(store, first)
    assert not left.exists() and len(disk_of(store)) == 3 and disk_of(store).reserved_bytes == 0


def test_nothing_that_was_cleared_is_found_by_the_next_process(opened: Any, tmp_path: Path) -> None:
    """Cleared while it is being brought up: the request gets it, and it is in no tier from then on."""
    store = opened()
    for first in range(3):
        serve(store, first)
    fetch, tier = disk_of(store).fetch, disk_of(store)

    def cleared_meanwhile(*args: Any) -> Any:
        found = fetch(*args)
        store.clear()
        return found

    tier.fetch = cleared_meanwhile  # type: ignore[method-assign]
    with begin(store, prompt(0)):
        pass
    del tier.fetch
    assert files_of(store) == [] and len(store) == len(tier) == 0
    store = opened()
    assert len(disk_of(store)) == 0 and [serve(store, first) for first in range(3)] == [0] * 3


def test_a_clear_of_one_space_leaves_the_files_of_others(opened: Any) -> None:
    store = opened()
    for space in "aab":
        for first in range(3):
            serve_in(store, space, first)
    store.clear("a")
    store = opened()
    assert {space for space, _, _ in disk_of(store).checkpoints()} == {"b"}
    assert on_disk(disk_of(store).folder) == disk_of(store).used_bytes


def test_flush_looks_and_pins_under_the_lock(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at what is stored and its pin nothing may leave: a unit is made of it under the lock."""
    from hf_sparse_cache.store import ledger

    store = opened(max_memory=3 * UNIT)
    for first in range(3):
        serve(store, first)
    own, held = ledger.unit_of, []

    def unit_of(checkpoint: Any) -> Any:
        held.append(store.tiers[0].lock._is_owned() and not checkpoint.pins)
        return own(checkpoint)

    monkeypatch.setattr(ledger, "unit_of", unit_of)
    monkeypatch.setattr(disk_of(store), "accept", lambda unit: held.append(pinned(store, unit)) or True)
    store.flush()
    assert held == [True] * 6


def pinned(store: CheckpointStore, unit: Any) -> bool:
    (found,) = [item for _, tokens, item in store.checkpoints() if tokens[0] == unit.tokens[0]]
    return bool(found.pins) and not store.tiers[0].lock._is_owned()  # type: ignore[attr-defined]


class Guarded(list[Any]):
    """A list that changes under a lock alone."""

    def __init__(self, tier: Any, items: Any) -> None:
        super().__init__(items)
        self.tier = tier

    def append(self, item: Any) -> None:
        assert self.tier.lock._is_owned()
        super().append(item)

    def pop(self, index: Any = -1) -> Any:
        assert self.tier.lock._is_owned()
        return super().pop(index)


def test_what_takes_room_beside_the_books_changes_under_the_lock(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(disk_memory="1GiB")
    tier = disk_of(store)
    for first in range(3):
        serve(store, first)
    ledger, own = tier.ledger, type(tier.ledger).__setattr__

    def watched_set(self: Any, name: str, value: Any) -> None:
        if self is ledger and name in ("reserved_bytes", "freed"):
            assert tier.lock._is_owned(), name
        own(self, name, value)

    monkeypatch.setattr(type(ledger), "__setattr__", watched_set, raising=False)
    held: list[bool] = []
    for name in ("make_room", "missing_spans", "insert"):
        call = getattr(ledger, name)

        def watched_call(*given: Any, call: Any = call, **named: Any) -> Any:
            held.append(tier.lock._is_owned())  # type: ignore[attr-defined]
            return call(*given, **named)

        monkeypatch.setattr(ledger, name, watched_call)
    tier._stuck, tier._aside = Guarded(tier, []), Guarded(tier, [])
    serve(store, 3)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "unlink", failing(errno.EACCES))
        tier.evict(tier.stored()[0])
        tier.tidy()
        assert tier._stuck and tier.reserved_bytes == sum(item.nbytes for item in tier._stuck)
        with patch.context() as inner:
            inner.setattr(files.os, "replace", failing(errno.ENOSPC))
            serve(store, 4)
    assert held and all(held)
    aside = tier.stored()[0].state
    tier._put_aside(aside)
    assert tier._aside == [aside] and tier.reserved_bytes >= aside.nbytes
    tier.clear("other")
    assert tier._aside == [aside]
    tier.clear()
    assert tier._aside == [] and not aside.path.exists()
    assert tier.reserved_bytes == sum(item.nbytes for item in tier._stuck)  # which a later write tries again


def test_files_of_another_key_go_first_and_no_more_of_them_than_must(opened: Any) -> None:
    store = opened()
    for first in range(4):
        serve_in(store, "a", first)
    tier = disk_of(store)
    one = tier.used_bytes // len(tier)
    checkpoints = tier.stored()
    items = [checkpoint.state for checkpoint in checkpoints[:2]]
    for checkpoint in checkpoints[:2]:
        for segment in checkpoint.chain():
            segment.payload.path.unlink()
    paths = [item.path for item in items]
    data = [path.read_bytes() for path in paths]
    for checkpoint in checkpoints[:2]:
        tier.evict(checkpoint)
    tier.sweep()
    for path, text in zip(paths, data, strict=True):
        path.write_bytes(text)
    before = tier.used_bytes
    for item in items:
        tier._put_aside(item)
    assert tier.reserved_bytes == sum(item.nbytes for item in items) and len(tier._aside) == 2
    tier.ledger.max_memory = before + tier.reserved_bytes
    assert tier._claim(10) and [path.exists() for path in paths] == [False, True] and len(tier._aside) == 1
    assert tier.reserved_bytes == items[1].nbytes + 10 and tier.used_bytes == before
    large = items[1]
    tier.ledger.max_memory = tier.used_bytes + tier.reserved_bytes
    tier._put_aside(items[1])  # no room for it
    assert not large.path.exists() and one
    with tier.lock:
        tier.ledger.reserved_bytes -= 10
