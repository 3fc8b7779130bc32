"""What `generate()` asks of a handle: a live cache for each request, and the prefill of its prompts."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.utils import logging

from ..config import SparseCacheConfig
from ..explain import WEIGHTS_CHANGED, frequent, remedy
from ..planning.cuts import Positions, Tokens, cut_positions, with_free_cuts
from ..planning.policies import NoCheckpoints, Policy
from ..request import open_request
from ..stats import Recorder, RequestInfo
from ..store.store import CheckpointStore
from . import fingerprint, prefill
from .families import Family
from .inputs import as_ids, check_ids, input_device, unpadded_rows
from .live import LiveCache
from .weights import identity


if TYPE_CHECKING:
    from ..cache import SparsePrefixCache

logger = logging.get_logger(__name__)


class Serving:
    """The part of a handle that works during a request; `SparsePrefixCache` sets its attributes."""

    model: Any
    tokenizer: Any
    family: Family
    config: SparseCacheConfig
    store: CheckpointStore
    policy: Policy
    grid: int
    # Called with the live cache at the end of each prefill; `check_exactness` looks at the states there.
    on_prefill: Callable[[LiveCache], None] | None
    _config: Any
    _cut_ids: Collection[int]
    _weights: str
    _space_name: str
    _changed: bool
    _lock: threading.Lock
    _recorder: Recorder
    _finalizer: weakref.finalize[..., Any]

    def check_model(self, model: Any) -> None:
        """Refuse a model other than the handle's own, and a detached handle."""
        if model is not self.model:
            raise ValueError(
                f"past_key_values is a SparsePrefixCache made for another model ({type(self.model).__name__} object "
                f"{id(self.model):#x}, not {type(model).__name__} object {id(model):#x}). Make one with "
                "SparsePrefixCache(model) for each model; they may share a store."
            )
        if not self._finalizer.alive:
            raise ValueError(
                "past_key_values is a SparsePrefixCache that was detached. Make a new one, with its store."
            )

    @property
    def attached_to(self) -> str:
        state = "is attached to" if self._finalizer.alive else "was detached from"
        return f"{state} a {type(self.model).__name__} object"

    def open_live_cache(self) -> LiveCache:
        """A fresh live cache that will ask this handle for its prefix."""
        live = LiveCache(self._config)
        live.handle = cast("SparsePrefixCache", self)
        return live

    def note_unsupported(self, input_ids: torch.Tensor | None, why: str) -> None:
        """Record a request that runs as if there were no handle, and say so once."""
        logger.warning_once(f"SparsePrefixCache is not used by this call, which runs uncached: {why}.")
        tokens = 0 if input_ids is None else input_ids.numel()
        self._note(RequestInfo(tokens, computed_tokens=tokens, reason=f"call not supported: {why}"))

    def serve(self, live: LiveCache, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Run the prefill of a request, reusing what is stored; returns the model's output with the live cache in it.

        Args:
            live: the request's live cache, filled in place.
            input_ids: `(batch, width)`, left-padded.
            model_kwargs: those of `generate()`, the mask among them.
        """
        check_ids(input_ids, self.model.get_input_embeddings().num_embeddings)
        rows = unpadded_rows(input_ids, model_kwargs.get("attention_mask"))
        kwargs: dict[str, Any] = {
            name: model_kwargs[name] for name in ("use_cache", "logits_to_keep") if name in model_kwargs
        }
        distinct: dict[bytes, int] = {}
        order = [distinct.setdefault(row.cpu().numpy().tobytes(), len(distinct)) for row in rows]
        alone = len(rows) == 1 and len(rows[0]) == input_ids.shape[1]
        caches = [live] if alone else [LiveCache(self._config) for _ in distinct]
        positions = model_kwargs.get("position_ids")
        dims = () if positions is None else tuple(positions.shape[:-2])
        outputs = [
            self._serve_row(caches[index], rows[order.index(index)].to(input_device(self.model)), kwargs, dims)
            for index in range(len(distinct))
        ]
        if self.on_prefill is not None:
            self.on_prefill(caches[-1])
        if alone:
            return outputs[0]
        return prefill.join_rows(self.family.cache_name, live, caches, outputs, order, input_ids.shape[1])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _serve_row(
        self, live: LiveCache, ids: torch.Tensor, kwargs: dict[str, Any], position_dims: tuple[int, ...]
    ) -> Any:
        started = time.perf_counter()
        tokens = ids.to("cpu", torch.int32).numpy()
        space, changed = self._space(told=True)
        cuts = self._cuts(tokens, space)
        opened = time.perf_counter()
        with open_request(
            self.store, self.policy, tokens, cuts, space=space, max_checkpoints=self.config.max_checkpoints
        ) as request:
            output, timing = prefill.prefill_row(
                self.model, self.family.cache_name, live, ids, cuts, request, kwargs, position_dims
            )
            served = time.perf_counter()
        info = request.info(WEIGHTS_CHANGED if changed and not request.resumed_tokens else "")
        closed = time.perf_counter()
        self._note(
            info,
            prefill_seconds=closed - started,
            match_seconds=opened - started + request.match_seconds,
            plan_seconds=request.plan_seconds + closed - served,
            capture_seconds=timing.capture_seconds,
            restore_seconds=timing.restore_seconds,
        )
        return output

    def _note(self, info: RequestInfo, **seconds: float) -> None:
        """Count one finished request; say so, once, when none of the first ones resumed anything."""
        misses = self._recorder.add(info, **seconds)
        if misses and not isinstance(self.policy, NoCheckpoints):
            reason, count = frequent([miss.reason for miss in misses])
            logger.warning(
                f"{len(misses)} requests and nothing was resumed. Most frequent reason ({count} of {len(misses)}): "
                f"{reason}. {remedy(reason, self.config.namespace)} cache.explain(prompt) tells for any prompt."
            )

    def _cuts(self, tokens: Tokens, space: str, marked: int = 0) -> Positions:
        cuts = cut_positions(tokens, self.grid, self._cut_ids)
        if self.config.exactness == "bitwise":
            return cuts
        with self.store.lock:
            free = {self.store.match(tokens, space).overlap, len(tokens), *self.store.marks.lengths(tokens, space)}
        return with_free_cuts(cuts, free | ({marked} if marked else set()), len(tokens))

    def _tokens_of(self, ids: torch.Tensor | str) -> Tokens:
        return as_ids(ids, self.tokenizer)[0].to("cpu", torch.int32).numpy()

    def _space(self, told: bool = False) -> tuple[str, bool]:
        """Where this handle's prompts live in the store, and whether weights changed since a request was `told`."""
        weights = identity(self.model)
        with self._lock:
            before, self._weights = self._weights, weights
            old, self._space_name = self._space_name, fingerprint.space_of(cast("SparsePrefixCache", self), weights)
            new = self._space_name
            changed = self._changed or before != weights
            self._changed = changed and not told
        if before != weights:
            self.store.drop(old)
            logger.warning_once("The model's weights changed: what SparsePrefixCache had stored of it was dropped.")
        return new, changed

    def _latest_space(self) -> str:
        """The space of the latest prompt. Unlike `_space` it notices nothing, and it never reads all weights."""
        if self._space_name or self.store.outlives_process:
            return self._space_name
        return fingerprint.space_of(cast("SparsePrefixCache", self), identity(self.model))
