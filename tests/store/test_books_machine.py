"""Whatever happens in whatever order, requests open meanwhile, the books of every tier agree with what is."""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from cutting import Anywhere
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference_store import LIVE, Blob

from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.policies import make_policy
from hf_sparse_cache.request import Request, open_request
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.tree import TOKEN_BYTES


PROMPTS = st.lists(st.integers(0, 2), min_size=2, max_size=14)
SPACES = st.sampled_from(["m\x1fa", "m\x1fb", "n\x1fb"])


class BooksMachine(RuleBasedStateMachine):
    """Cuts anywhere, as in replayable mode, tenants with budgets, marks, tiers; no oracle but the books themselves."""

    @initialize(
        budget=st.none() | st.integers(10, 120),
        tenant=st.none() | st.integers(10, 60),
        host=st.none() | st.integers(10, 120),
        disk=st.booleans(),
        eviction=st.sampled_from(["learned", "lru", "fifo"]),
        kv=st.sampled_from([0, 1, 3]),
        # From less than one path takes to some dozens of them.
        remembered=st.none() | st.integers(14, 60) | st.integers(14 * TOKEN_BYTES, 40_000),
    )
    def start(self, budget, tenant, host, disk, eviction, kv, remembered) -> None:  # type: ignore[no-untyped-def]
        self.sync = mock.patch("hf_sparse_cache.store.files.os.fsync")
        self.sync.start()
        gc.collect()
        LIVE.clear()
        self.folder = Path(tempfile.mkdtemp()) if disk else None
        self.kv, self.remembered, self.policy = kv, remembered, make_policy("learned")
        self.open: list[tuple[Request, np.ndarray]] = []
        lower = {"disk_memory": 4000, "disk_dir": self.folder} if self.folder else {}
        tenants = {} if tenant is None else {"b": tenant}
        self.store = CheckpointStore(budget, eviction, remembered, namespace_memory=tenants, host_memory=host, **lower)
        for tier in self.store.tiers:
            tier.reader = Blob.from_bytes

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        while self.open:
            self.open.pop()[0].close()
        self.store.clear()
        self.store.verify()
        for tier in self.store.tiers:
            assert (tier.used_bytes, len(tier), tier.tree_bytes, tier.reserved_bytes) == (0, 0, 0, 0)
        assert not any(tier.forest._leaves or tier.forest.leaving or tier.ledger.pinned for tier in self.store.tiers)
        self.store.close()
        self.sync.stop()
        if self.folder:
            shutil.rmtree(self.folder)

    @precondition(lambda self: len(self.open) < 4)
    @rule(ids=PROMPTS, space=SPACES, picks=st.sets(st.integers(2, 12)))
    def begin(self, ids: list[int], space: str, picks: set[int]) -> None:
        tokens = np.asarray(ids, dtype=np.int32)
        cuts = sorted(pick for pick in picks if pick <= len(ids))
        request = open_request(self.store, self.policy, tokens, Anywhere(CutRule(1), cuts), space=space)
        assert request.checkpoint is None or request.checkpoint.state.label == (
            space,
            tuple(ids)[: request.resumed_tokens],
        )
        below = [payload.label for payload in request.kv_payloads()]
        assert all(label[:2] == (space, tuple(ids)[: label[3]]) for label in below)
        assert [label[2] for label in below] == [0, *(label[3] for label in below)][: len(below)]
        self.open.append((request, cuts))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 3), pick=st.integers(0, 12))
    def add(self, which: int, pick: int) -> None:
        request, cuts = self.open[which % len(self.open)]
        ahead = [cut for cut in cuts if cut > request.resumed_tokens]
        if not ahead:
            return
        position = ahead[pick % len(ahead)]
        space, ids = request._visit.space, tuple(request._prompt.ids.tolist())
        kv = (lambda a, b: Blob(self.kv * (b - a), (space, ids[:b], a, b))) if self.kv else None
        before = len(request.captured)
        stored = request.add(position, Blob(10, (space, ids[:position])), kv)
        assert len(request.captured) == before + stored

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 3), fails=st.booleans())
    def end(self, which: int, fails: bool) -> None:
        request, _ = self.open.pop(which % len(self.open))
        if fails:
            request.__exit__(KeyError, KeyError(), None)
        else:
            request.close()

    @rule(ids=PROMPTS, space=SPACES, cut=st.integers(1, 12))
    def mark(self, ids: list[int], space: str, cut: int) -> None:
        if self.remembered is None or TOKEN_BYTES * (self.store.marks.tokens + len(ids)) <= self.remembered:
            self.store.mark(np.asarray(ids, dtype=np.int32)[: max(cut, 1)], space)

    @rule(space=st.none() | SPACES)
    def clear(self, space: str | None) -> None:
        self.store.clear(space)
        gone = [name for tier in self.store.tiers for name in tier.forest.trees if space in (None, name)]
        assert not gone and (space is not None or self.store.remembered_tokens == 0 or self.open)

    @rule(space=SPACES)
    def drop(self, space: str) -> None:
        self.store.drop(space)

    @rule(budget=st.none() | st.integers(1, 120))
    def resize(self, budget: int | None) -> None:
        self.store.resize(budget)

    @rule()
    def give_back(self) -> None:
        self.store.give_back()

    @rule()
    def flush(self) -> None:
        self.store.flush()

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.verify()
        tenant = self.store.account("b")
        assert tenant.limit is None or tenant.used_bytes <= tenant.limit
        in_memory = sum(tier.used_bytes for tier in self.store.tiers if not tier.durable)
        assert sum(blob.nbytes for blob in LIVE) == in_memory


TestBooksMachine = BooksMachine.TestCase
TestBooksMachine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
