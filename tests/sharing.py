"""Shared by the tests of the shared store: stores on one place, prompts that they serve, storage that fails."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cutting import every
from reference_store import Blob

from hf_sparse_cache.planning.lineage import Lineage, Span
from hf_sparse_cache.planning.policies import NoCheckpoints
from hf_sparse_cache.planning.segments import Segmenting
from hf_sparse_cache.request import Request, open_request
from hf_sparse_cache.store import behind, files, shared
from hf_sparse_cache.store.addresses import Text
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.storage import Folder, ListedFile, open_storage
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.unit import Unit
from hf_sparse_cache.store.unit_files import Packing


KV = 5  # bytes of keys and values a token
STEP = 64


def begin(store: CheckpointStore, ids: list[int], space: str = "", rule: Segmenting | None = None) -> Request:
    tokens = np.asarray(ids, dtype=np.int32)
    return open_request(store, NoCheckpoints(), tokens, rule or every(STEP), space=space)


class Faulty:
    """A folder whose calls do something first: wait, hang or raise. `rule` is told the verb and the name."""

    def __init__(self, root: Path, rule: Callable[[str, str], None]) -> None:
        self._inner, self.rule = Folder(root), rule
        self.where, self.least_tokens = self._inner.where, self._inner.least_tokens

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        self.rule("read", name)
        return self._inner.read(name, start, end)

    def parts(self, name: str, most: int | None) -> Iterator[tuple[Any, int]]:
        self.rule("read", name)
        return self._inner.parts(name, most)

    def put(self, name: str, data: bytes) -> None:
        self.rule("put", name)
        self._inner.put(name, data)

    def list(self, folder: str) -> list[ListedFile]:
        self.rule("list", folder)
        return self._inner.list(folder)

    def walk(self) -> Iterator[ListedFile]:
        self.rule("walk", "")
        return self._inner.walk()

    def size(self, name: str) -> int | None:
        self.rule("size", name)
        return self._inner.size(name)

    def remove(self, name: str) -> None:
        self.rule("remove", name)
        self._inner.remove(name)

    def after_fork(self) -> None:
        self._inner.after_fork()


class Memory:
    """A storage in memory that notes what is asked of it; its clock is set."""

    def __init__(self) -> None:
        self.where, self.least_tokens, self.now = "memory", 2, 0.0
        self.files: dict[str, tuple[bytes, float]] = {}
        self.calls: list[tuple[str, str]] = []

    def asked(self, verb: str) -> list[str]:
        """Of what names; they are forgotten."""
        found = [name for called, name in self.calls if called == verb]
        self.calls = [call for call in self.calls if call[0] != verb]
        return found

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        self.calls.append(("read", name))
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name][0][start:end]

    def parts(self, name: str, most: int | None) -> Iterator[tuple[Any, int]]:
        data = self.read(name)
        yield data, len(data)

    def put(self, name: str, data: bytes) -> None:
        self.calls.append(("put", name))
        self.files[name] = data, self.now

    def _listed(self, name: str) -> ListedFile:
        return ListedFile(name, len(self.files[name][0]), self.files[name][1])

    def list(self, folder: str) -> list[ListedFile]:
        self.calls.append(("list", folder))
        return [self._listed(name) for name in self.files if name.rpartition("/")[0] == folder]

    def walk(self) -> Iterator[ListedFile]:
        yield from map(self._listed, tuple(self.files))

    def size(self, name: str) -> int | None:
        self.calls.append(("size", name))
        return len(self.files[name][0]) if name in self.files else None

    def remove(self, name: str) -> None:
        self.calls.append(("remove", name))
        self.files.pop(name, None)

    def after_fork(self) -> None:
        self.calls.append(("after_fork", ""))


class NotedLock:
    """A lock that knows whether it is held, and containers that are changed only while it is."""

    def __init__(self) -> None:
        self._lock, self.held = threading.RLock(), False

    def __enter__(self) -> None:
        self._lock.acquire()
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False
        self._lock.release()

    def guards(self, kept: Any) -> Any:
        """An empty container of the same type, that is changed, or counted, only while the lock is held."""

        def guarded(name: str) -> Callable[..., Any]:
            def method(this: Any, *args: Any, **options: Any) -> Any:
                assert self.held, name
                return getattr(type(kept), name)(this, *args, **options)

            return method

        names = [name for name in ("__setitem__", "__delitem__", "pop", "popitem", "values") if hasattr(kept, name)]
        return type("Guarded", (type(kept),), {name: guarded(name) for name in names})()


def waiting(condition: threading.Condition, steps: list[Callable[[], object]]) -> list[float]:
    """Lets something happen each time somebody waits; returns for how long each was going to."""
    waited: list[float] = []

    def wait_for(done: Callable[[], bool], seconds: float | None = None) -> bool:
        assert seconds is not None and not done()
        waited.append(seconds)
        steps.pop(0)()
        return done()

    condition.wait_for = wait_for  # type: ignore[method-assign]
    return waited


def stored_unit(storage: Any, seal: Seal, position: int = 700, space: str = "s") -> tuple[str, str]:
    """Files a unit without its traces, with one file of keys and values; returns the names of both."""
    tokens, packing = np.arange(position, dtype=np.int32), Packing(seal, files.same_name, steady=True)
    text, lineage, span = Text(seal, space, tokens), Lineage([position]), Span((0, position))
    name, data = packing.kv(Blob(40), span, space)
    unit = Unit(space, tokens, lineage, Blob(10), [span], {span: Blob(40)})
    state, packed = packing.state(unit, [name])
    storage.put(text.kv(name), data)
    storage.put(text.name(lineage, False, state), packed)
    return text.name(lineage, False, state), text.kv(name)


def failing(code: int, *verbs: str) -> Callable[[str, str], None]:
    def rule(verb: str, name: str) -> None:
        if verb in verbs:
            raise OSError(code, errno.errorcode[code], name)

    return rule


def hanging(*verbs: str) -> tuple[Callable[[str, str], None], threading.Event]:
    release = threading.Event()

    def rule(verb: str, name: str) -> None:
        if verb in verbs:
            release.wait(60)

    return rule, release


def slow(seconds: float) -> Callable[[str, str], None]:
    return lambda verb, name: time.sleep(seconds)


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CheckpointStore]]:
    """Makes stores that share one place, as so many processes would; a busy machine is no storage that fails."""
    monkeypatch.setattr(shared, "LOOK_SECONDS", 60.0)
    monkeypatch.setattr(shared, "READ_SECONDS", 60.0)
    monkeypatch.setattr(behind, "_STALLED_SECONDS", 300.0)  # the machine may be held for a minute
    made: list[CheckpointStore] = []

    def make(
        where: Any = None, *, rule: Callable[[str, str], None] | None = None, max_memory: Any = "1GiB", **options: Any
    ) -> CheckpointStore:
        store = CheckpointStore(max_memory, "lru", shared=where or tmp_path / "shared", **options)
        store.read_with(Blob.from_bytes)
        if rule is not None:
            assert store.shared is not None
            store.shared.tier.storage = Faulty(tmp_path / "shared", rule)
            store.shared.after_fork()  # all that has the storage
        made.append(store)
        return store

    yield make
    for store in made:
        store.close(flush=False)


def prompt(first: int, length: int, shared: int | None = None, other: int = 0) -> list[int]:
    """Tokens of one text; behind `shared` of them those of another."""
    ids = [first, *range(100, 99 + length)]
    return ids if shared is None else [*ids[:shared], *[10_000 + other] * (length - shared)]


def serve(store: CheckpointStore, ids: list[int], positions: tuple[int, ...] = (), space: str = "") -> int:
    """Serves one prompt and returns the tokens it resumed; what it resumed from is checked, label by label."""
    with begin(store, ids, space) as request:
        resumed = request.resumed_tokens
        if request.checkpoint is not None:
            assert request.checkpoint.state.label == label(ids, resumed)
            ends = [segment.span.end for segment in request.checkpoint.chain()]
            assert [blob.label for blob in request.kv_payloads()] == [label(ids, end) for end in ends]
            assert sum(blob.nbytes for blob in request.kv_payloads()) == KV * resumed
        for position in positions:
            if position > resumed:
                request.add(position, Blob(10, label(ids, position)), lambda a, b: Blob(KV * (b - a), label(ids, b)))
    store.verify()
    return resumed


def label(ids: list[int], position: int) -> tuple[int, int, int]:
    """What a state or keys and values at a position must say: a stand-in for what a model would compute."""
    return (ids[0], position, hash(tuple(ids[:position])) % 1_000_003)


def written(store: CheckpointStore) -> dict[str, int]:
    """What became of everything, once it is written."""
    assert store.shared is not None
    store.flush()
    return store.shared.counts


def drained(store: CheckpointStore) -> None:
    """Waits until nothing waits to be written."""
    assert store.shared is not None and store.shared.writer.gets_on(0)


def files_in(root: Path, kind: str = "") -> list[Path]:
    """Files outside of the quarantine, while others delete what they like."""
    found = (Path(folder, name) for folder, _, names in os.walk(root) for name in names if kind in name)
    return sorted(path for path in found if "quarantine" not in path.parts)


def storage_of(where: Any) -> Any:
    return open_storage(where)


def peek(path: Path) -> Any:
    return files.peek(path)
