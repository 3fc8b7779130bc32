"""The store with all its tiers against the naive list, whatever happens in whatever order."""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prompting import GRID, begin
from reference_store import LIVE, Blob, NaiveStore, Prefix

from hf_sparse_cache.request import Request
from hf_sparse_cache.store.eviction import FIFO, LRU
from hf_sparse_cache.store.store import CheckpointStore


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=14)
SPACES = st.sampled_from(["", "b"])


class StoreMachine(RuleBasedStateMachine):
    """Top tier, host tier, disk tier; any of the lower two may be missing."""

    @initialize(
        budget=st.integers(10, 120),
        host=st.none() | st.integers(10, 120),
        disk=st.booleans(),
        lru=st.booleans(),
        kv=st.sampled_from([0, 0, 1, 3]),
    )
    def start(self, budget: int, host: int | None, disk: bool, lru: bool, kv: int) -> None:
        self.sync = mock.patch("hf_sparse_cache.store.files.os.fsync")
        self.sync.start()
        self.folder = Path(tempfile.mkdtemp()) if disk else None
        self.budget, self.host, self.lru, self.kv = budget, host, lru, kv
        self.open: list[tuple[Request, Prefix]] = []
        self.below = NaiveStore(math.inf, True, 10, kv) if disk else None
        self.naive_disk = self.below
        if host is not None:
            self.below = NaiveStore(host, True, 10, kv, self.below)
        self.naive = NaiveStore(budget, lru, 10, kv, self.below)
        self.make()

    def make(self) -> None:
        gc.collect()
        LIVE.clear()
        disk = {"disk_memory": "1GiB", "disk_dir": self.folder} if self.folder else {}
        order = LRU() if self.lru else FIFO()
        self.store = CheckpointStore(self.budget, order, None, host_memory=self.host, **disk)
        for tier in self.store.tiers:
            tier.reader = Blob.from_bytes

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.sync.stop()
            self.store.close(flush=False)
            if self.folder:
                shutil.rmtree(self.folder)

    def begin(self, key: Prefix) -> Request:
        self.naive.promote(key)
        request = begin(self.store, list(key[1]), key[0])
        assert request.overlap_tokens == self.naive.overlap(key)
        assert request.resumed_tokens == self.naive.deepest(key)
        if request.checkpoint is not None:
            prefix = (key[0], key[1][: request.resumed_tokens])
            self.naive.pins.append(prefix)
            self.naive.held.append(prefix)
            self.naive.use(prefix)
            assert request.checkpoint.state.label == prefix
            covered = [payload.label for payload in request.kv_payloads()]
            assert covered == [(prefix[1][:end], start) for start, end in self.naive.spans[prefix]]
        return request

    def end(self, request: Request, key: Prefix, added: list[Prefix]) -> None:
        prefix = (key[0], key[1][: request.resumed_tokens])
        if prefix[1]:
            self.naive.pins.remove(prefix)
            self.naive.held.remove(prefix)
        for held in added:
            self.naive.held.remove(held)

    @rule(ids=PROMPTS, space=SPACES, picks=st.sets(st.integers(1, 6)))
    def serve(self, ids: list[int], space: str, picks: set[int]) -> None:
        key: Prefix = (space, tuple(ids))
        request, added = self.begin(key), []
        kv = (lambda a, b: Blob(self.kv * (b - a), (key[1][:b], a))) if self.kv else None
        for position in sorted(GRID * pick for pick in picks):
            if request.resumed_tokens < position <= len(ids) - 2:
                prefix = (space, key[1][:position])
                spans = [(p - GRID, p) for p in range(GRID, position + 1, GRID)] if self.kv else []
                stored = request.add(position, Blob(10, prefix), kv)
                assert stored == self.naive.add(prefix, key, spans)
                added += [prefix] if stored else []
        request.close()
        self.naive.seen.append(key)
        self.end(request, key, added)

    @precondition(lambda self: len(self.open) < 3)
    @rule(ids=PROMPTS, space=SPACES)
    def hold(self, ids: list[int], space: str) -> None:
        key: Prefix = (space, tuple(ids))
        self.open.append((self.begin(key), key))

    @precondition(lambda self: self.open)
    @rule()
    def fail(self) -> None:
        request, key = self.open.pop(0)
        with pytest.raises(KeyError), request:
            raise KeyError
        self.end(request, key, [])

    @precondition(lambda self: not self.open)
    @rule()
    def clear(self) -> None:
        self.store.clear()
        tier: NaiveStore | None = self.naive
        while tier is not None:
            tier.entries, tier.seen, tier = [], [], tier.below
        assert all(tier.remembered_tokens == 0 and not tier.forest.roots for tier in self.store.tiers)

    @precondition(lambda self: not self.open)
    @rule(budget=st.integers(10, 120))
    def resize(self, budget: int) -> None:
        self.budget = self.naive.max_memory = budget
        self.naive.shrink([], 0)
        self.store.resize(budget)

    @precondition(lambda self: not self.open and self.folder is not None)
    @rule()
    def restart(self) -> None:
        self.store.close(flush=False)
        del self.store
        tier: NaiveStore | None = self.naive
        while tier is not self.naive_disk and tier is not None:
            tier.entries, tier.seen, tier = [], [], tier.below
        self.make()

    @precondition(lambda self: self.folder is not None)
    @rule()
    def flush(self) -> None:
        self.store.flush()
        tier: NaiveStore | None = self.naive
        while tier is not self.naive_disk and tier is not None:
            for key in tier.entries:
                self.naive_disk.accept(key, tier.spans[key])
            tier = tier.below

    @invariant()
    def same_bytes(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.verify()
        tier: NaiveStore | None = self.naive
        for real in self.store.tiers:
            assert tier is not None
            stored = sorted((space, tuple(path.tolist())) for space, path, _ in real.checkpoints())
            assert stored == sorted(tier.entries)
            assert len(real) == len(stored)
            assert real.reserved_bytes == 0
            if real.durable:
                files = [path.stat().st_size for path in self.folder.rglob("*.safetensors")]
                assert real.used_bytes == sum(files)
            else:
                assert real.used_bytes == tier.used() <= tier.max_memory
            tier = tier.below
        in_memory = sum(real.used_bytes for real in self.store.tiers if not real.durable)
        assert sum(blob.nbytes for blob in LIVE) == in_memory


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
