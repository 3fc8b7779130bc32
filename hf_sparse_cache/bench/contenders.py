"""Ways of serving the same requests: without a cache, by the documented recipes, and with the cache's policies.

A contender is one small class with one verb, `serve`. What it needs before the clock starts goes into `prepare`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from ..cache import SparsePrefixCache
from ..exactness import Replay
from ..models import prefill, states
from ..models.families import cache_name_of
from ..models.inputs import Row
from ..models.lazy_kv import settle
from ..models.live import LiveCache
from ..models.server import Server
from ..models.sitting import Served as ServedRow
from ..planning.cuts import MIN_SUFFIX_TOKENS
from ..planning.lineage import Lineage
from ..planning.policies import Policy, Prompt
from ..store.slabs import taken
from ..store.store import CheckpointStore
from ..store.tree import Checkpoint
from .clock import Timed, timed
from .workloads import WorkloadRequest


class Contender:
    """One way of serving. Without a cache by default: stock `generate()`."""

    name = "stock"

    def __init__(self, model: Any) -> None:
        self.model = model

    def prepare(self, asked: WorkloadRequest) -> None:
        """Called before every request, for all contenders before any of them serves; not timed."""

    def serve(self, asked: WorkloadRequest, max_new_tokens: int, logits: bool) -> Timed | None:
        """Serves one request; None where this contender has nothing to measure."""
        return timed(self.model, self.ids(asked), max_new_tokens, logits=logits)

    def ids(self, asked: WorkloadRequest) -> torch.Tensor:
        return torch.from_numpy(asked.ids).long()[None].to(self.model.device)

    def held_bytes(self) -> int:
        """Bytes of all tensors that this contender keeps between requests, by their storages."""
        return 0

    def peak_bytes(self) -> int:
        """Most bytes it has kept so far, by its own account."""
        return 0

    def tier_bytes(self) -> dict[str, int]:
        """Bytes of every tier it keeps them in."""
        return {}

    def close(self) -> None:
        """Gives the model back as it was."""


class Chunked(Contender):
    """Stock `generate()` with the `prefill_chunk_size` that the cache's grid has: the same work, nothing kept."""

    name = "chunked"

    def __init__(self, model: Any, grid: int) -> None:
        super().__init__(model)
        self.grid = grid

    def serve(self, asked: WorkloadRequest, max_new_tokens: int, logits: bool) -> Timed | None:
        ids = self.ids(asked)
        # One chunk is what stock does, and longer than the prompt is refused by some releases.
        chunk = {"prefill_chunk_size": self.grid} if ids.shape[1] > self.grid else {}
        return timed(self.model, ids, max_new_tokens, logits=logits, **chunk)


class DeepCopy(Contender):
    """The recipe of the transformers documentation: `copy.deepcopy` of a cache pre-filled with the common prefix.

    It knows what all prompts of a group will share, which no cache knows beforehand. A group's first request pays for
    the prefix; every group's cache is kept for good.
    """

    name = "deepcopy"

    def __init__(self, model: Any, prefixes: dict[str, int]) -> None:
        super().__init__(model)
        self._prefixes = prefixes
        self._caches: dict[str, DynamicCache] = {}
        self._cache_name = cache_name_of(model)

    def serve(self, asked: WorkloadRequest, max_new_tokens: int, logits: bool) -> Timed | None:
        ids = self.ids(asked)
        length = min(self._prefixes.get(asked.group, 0), ids.shape[1] - MIN_SUFFIX_TOKENS)
        if length < 1:
            return timed(self.model, ids, max_new_tokens, logits=logits)
        started = time.perf_counter()
        known = asked.group in self._caches
        if not known:
            cache = DynamicCache(config=self.model.config)
            with torch.no_grad():
                self.model(ids[:, :length], **{self._cache_name: cache}, use_cache=True, logits_to_keep=1)
            self._caches[asked.group] = cache
        mine = copy.deepcopy(self._caches[asked.group])
        spent = time.perf_counter() - started
        served = timed(self.model, ids, max_new_tokens, logits=logits, **{self._cache_name: mine})
        return replace(
            served,
            first_token_seconds=served.first_token_seconds + spent,
            total_seconds=served.total_seconds + spent,
            resumed_tokens=length if known else 0,
            computed_tokens=ids.shape[1] - (length if known else 0),
            kv_bytes=self.held_bytes(),
        )

    def held_bytes(self) -> int:
        return _storage_bytes([vars(layer) for cache in self._caches.values() for layer in cache.layers])

    def peak_bytes(self) -> int:
        return self.held_bytes()


class EveryCut(Policy):
    """A checkpoint at every cut: the dense limit."""

    def place(self, prompt: Prompt) -> list[int]:
        cuts: list[int] = prompt.open_cuts.tolist()
        return cuts


class Cached(Contender):
    """A `SparsePrefixCache` with one policy.

    Args:
        name: for tables: the policy's, or "dense".
        options: for the handle.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, policy: str | Policy, **options: Any) -> None:
        super().__init__(model)
        self.name = name
        self.handle = SparsePrefixCache(model, tokenizer, policy=policy, **options)
        self._evicting = _timed_eviction(self.handle.store)

    def serve(self, asked: WorkloadRequest, max_new_tokens: int, logits: bool) -> Timed | None:
        # Not `stats()`, which looks at the model's weights: a client that asks a question does not call it.
        recorder, store, name = self.handle.server.recorder, self.handle.store, self.handle.config.namespace
        before, evicted, evicting = recorder.totals(), store.account(name).evictions, self._evicting()
        served = timed(self.model, self.ids(asked), max_new_tokens, logits=logits, past_key_values=self.handle)
        after, held, info = recorder.totals(), store.account(name), recorder.last
        assert info is not None
        evicting = self._evicting() - evicting
        return replace(
            served,
            overlap_tokens=info.overlap_tokens,
            resumed_tokens=info.resumed_tokens,
            computed_tokens=info.computed_tokens,
            prefill_seconds=after.prefill_seconds - before.prefill_seconds,
            match_seconds=after.match_seconds - before.match_seconds,
            plan_seconds=after.plan_seconds - before.plan_seconds,
            capture_seconds=max(0.0, after.capture_seconds - before.capture_seconds - evicting),
            restore_seconds=after.restore_seconds - before.restore_seconds,
            eviction_seconds=evicting,
            captured=info.captured,
            segments=info.segments,
            checkpoints=held.checkpoints,
            checkpoint_bytes=held.checkpoint_bytes,
            kv_bytes=held.kv_bytes,
            evictions=held.evictions - evicted,
            reason=info.reason,
        )

    def held_bytes(self) -> int:
        layers: list[dict[str, Any]] = []
        for _, _, checkpoint in self.handle.store.checkpoints():
            payloads: list[Any] = [checkpoint.state, *_spans(checkpoint)]
            for payload in payloads:
                layers += payload.layers
        return _storage_bytes(layers, self.handle.size.page_bytes)

    def peak_bytes(self) -> int:
        return self.handle.store.peak_bytes

    def tier_bytes(self) -> dict[str, int]:
        store = self.handle.store
        device = {
            f"{kind} on {self.model.device.type}": getattr(store, f"{kind}_bytes") for kind in ("checkpoint", "kv")
        }
        return {**device, **{tier.name: tier.used_bytes for tier in store.tiers[1:]}}

    def close(self) -> None:
        self.handle.clear()
        self.handle.detach()


class Replayed(Contender):
    """From nothing, over the segments behind another run's result: what that run must equal bit for bit."""

    name = "cold"

    def __init__(self, follows: Cached) -> None:
        super().__init__(follows.model)
        self._handle = SparsePrefixCache(follows.model, max_memory=None, policy="none", prove=False)
        self._server = self._handle.server

    def replay(self, asked: WorkloadRequest, served: Timed, max_new_tokens: int) -> Timed:
        """Serves a request once more, cold, and as it was served."""
        self._handle.server = Replay(self._server, Lineage.from_ends(served.segments))
        return timed(self.model, self.ids(asked), max_new_tokens, logits=True, past_key_values=self._handle)

    def close(self) -> None:
        self._handle.detach()


class Limit(Contender):
    """What no cache can beat: `generate()` on a live cache that is ready, at the position from which another resumes.

    Only the tokens that `follows` will compute are run, in the same segments; matching, planning, restoring and
    capturing are left out. Requests that resume nothing are not measured.
    """

    name = "limit"

    def __init__(self, follows: Cached) -> None:
        super().__init__(follows.model)
        self._follows = follows
        handle = follows.handle
        self._handle = SparsePrefixCache(
            handle.model, handle.tokenizer, max_memory=None, grid=handle.grid, exactness=handle.config.exactness
        )
        self._server = self._handle.server = _Ready(self._handle.server)

    def prepare(self, asked: WorkloadRequest) -> None:
        server = self._follows.handle.server
        space, segmenting = server.space.now()[0], server.binding.segmenting
        cuts = segmenting.cuts(asked.ids, server.store.marks.lengths(asked.ids, space))
        expected, match = segmenting.expected(cuts, len(asked.ids)), server.store.match(asked.ids, space)
        fitting = match.fitting(len(asked.ids), expected)
        stored = next((found for found in fitting if found.position < len(asked.ids)), None)
        self._server.ready = None
        if stored is not None:
            state: Any = stored.state
            live = self._server.ready = server.binding.live_cache()
            self._server.resumed_tokens = stored.position
            self._server.segments = segmenting.segments(stored.position, [], cuts, len(asked.ids)).tolist()
            spans: list[Any] = [segment.payload for segment in stored.chain()]
            states.restore(live, state, spans, server.binding.rounding)
            settle(live.layers)

    def serve(self, asked: WorkloadRequest, max_new_tokens: int, logits: bool) -> Timed | None:
        if self._server.ready is None:
            return None
        start = self._server.resumed_tokens
        served = timed(self.model, self.ids(asked), max_new_tokens, logits=logits, past_key_values=self._handle)
        return replace(served, resumed_tokens=start, computed_tokens=len(asked.ids) - start)

    def close(self) -> None:
        self._handle.detach()


class _Ready(Server):
    """Serves on a live cache made beforehand, and stands for the request as well."""

    # What `prefill_row` asks of a request.
    checkpoint = None
    planned = junctions = ()
    segments: Sequence[int] = ()

    def __init__(self, server: Server) -> None:
        super().__init__(server.binding, server.store, server.policy, server.recorder)
        self.ready: LiveCache | None = None
        self.resumed_tokens = 0

    def live_cache(self) -> LiveCache:
        assert self.ready is not None
        return self.ready

    def steps(self) -> Sequence[int]:
        """As a request has it."""
        return self.segments

    def rounds_at(self, position: int) -> bool:
        """Nowhere: nothing is kept of it."""
        return False

    def serve_row(self, live: LiveCache, row: Row) -> ServedRow:
        request: Any = self
        return ServedRow(prefill.prefill_row(self.binding, live, row, request)[0])


def _spans(checkpoint: Checkpoint) -> list[Any]:
    """Payloads of the KV segments below a checkpoint, shallow to deep."""
    spans: list[Any] = []
    segment = checkpoint.kv
    while segment is not None:
        spans.append(segment.payload)
        segment = segment.parent
    return spans[::-1]


def _timed_eviction(store: CheckpointStore) -> Callable[[], float]:
    """Times choosing and freeing in this store from now on; returns the clock."""
    spent = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - started

        return call

    store.eviction.victim = timed(store.eviction.victim)  # type: ignore[method-assign]
    store.evict = timed(store.evict)  # type: ignore[method-assign]
    return lambda: spent[0]


def _storage_bytes(holders: list[dict[str, Any]], page_bytes: int = 1) -> int:
    """Bytes behind all tensors in these dicts, lists inside included; storages that are shared count once.

    Args:
        page_bytes: of which large storages take multiples.
    """
    found: dict[int, int] = {}
    values = [value for holder in holders for value in holder.values()]
    while values:
        value = values.pop()
        if torch.is_tensor(value):
            found[value.untyped_storage().data_ptr()] = taken(value.untyped_storage().nbytes(), page_bytes)
        elif isinstance(value, (list, tuple)):
            values.extend(value)
        elif isinstance(value, dict):
            values.extend(value.values())
    return sum(found.values())
