"""`SparsePrefixCache`: the handle that a user passes to `generate()`.

It holds no request's state. Every call to `generate()` gets a live cache of its own, filled from the store that the
handle points to, so one handle serves any number of prompts, batches and threads.
"""

import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from . import generation, mamba1, prefill, states
from .calls import check_ids, input_device, unpadded_rows
from .config import SparseCacheConfig
from .families import Family, family_of
from .live import LiveCache
from .policies import Policy, make_policy
from .request import open_request
from .segmentation import Positions, Tokens, cut_positions, with_free_cuts
from .stats import CacheStats, Recorder, RequestInfo, format_bytes
from .store import CheckpointStore
from .weights import identity


logger = logging.get_logger(__name__)


class SparsePrefixCache(Cache):
    """Exact prefix reuse for one model: `model.generate(**inputs, past_key_values=SparsePrefixCache(model))`.

    Checkpoints of the model's state are kept at a few cuts of every prompt seen, chosen by dynamic programming over
    where prompts diverge ("Sparse Prefix Caching for Hybrid and Recurrent LLM Serving", arXiv 2605.05219, Section 3).
    A prompt resumes at the deepest checkpoint on its common prefix, proved token by token; its outputs do not change.

    Args:
        model: a causal language model of a supported family.
        tokenizer: optional; prompts may then also be cut after its special tokens, where chats and agents diverge.
        max_memory, max_checkpoints, exactness, grid, namespace: see `SparseCacheConfig`.
        policy: where checkpoints go: a name (see `policies`) or a `Policy` object.
        store: a `CheckpointStore` to share with other handles; it has a budget of its own, in place of `max_memory`.
        config: all settings at once, in place of the keywords.

    Raises:
        UnsupportedModelError: The model's state cannot be captured exactly.
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_memory: int | str | None = "2GiB",
        max_checkpoints: int | None = None,
        exactness: str = "bitwise",
        grid: int | None = None,
        policy: str | Policy = "dp",
        store: CheckpointStore | None = None,
        namespace: str = "",
        config: SparseCacheConfig | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.family: Family = family_of(model)
        name = policy if isinstance(policy, str) else type(policy).__name__
        given = SparseCacheConfig(max_memory, max_checkpoints, exactness, grid, name, namespace)
        if config is not None and given != SparseCacheConfig():
            raise ValueError("config holds all settings: give either config or single keywords, not both.")
        self.config = given if config is None else config
        self.model, self.tokenizer = model, tokenizer
        self._config = model.config.get_text_config(decoder=True)
        states.check_layers(LiveCache(self._config), type(model).__name__)
        self.grid = self._checked_grid(self.config.grid)
        self._cut_ids: Collection[int] = tuple(sorted(set(tokenizer.all_special_ids))) if tokenizer is not None else ()
        self.policy = make_policy(self.config.policy, self._cut_ids) if isinstance(policy, str) else policy
        self.store = CheckpointStore(self.config.max_memory) if store is None else store
        self.size = states.measure(model, LiveCache(self._config), self.family.cache_name)
        self._check_budget()
        # Called with the live cache at the end of each prefill; `check_exactness` looks at the states there.
        self.on_prefill: Callable[[LiveCache], None] | None = None
        self._lock = threading.Lock()
        self._weights = identity(model)
        self._recorder = Recorder()
        generation.attach(model)
        if mamba1.needs_hook(self._config.model_type):
            mamba1.install(self._config.model_type)
        self._finalizer = weakref.finalize(self, _release, model, self._config.model_type)

    # -- what a user reads ----------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Totals since the handle was made, and what its store holds now."""
        return self._recorder.totals(
            checkpoints=len(self.store),
            checkpoint_bytes=self.store.checkpoint_bytes,
            kv_bytes=self.store.kv_bytes,
            evictions=self.store.evictions,
        )

    @property
    def last_request(self) -> RequestInfo | None:
        """The prompt served last; of a batch, its last row. None before the first."""
        return self._recorder.last

    def __repr__(self) -> str:
        return f"SparsePrefixCache({type(self.model).__name__}, grid={self.grid}: {self.stats()})"

    # -- life ---------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget every prompt and free every state of the store."""
        self.store.clear()

    def detach(self) -> None:
        """Give the model its own `generate()` methods back. What is stored stays; the handle can no longer be used."""
        self._finalizer()

    def __enter__(self) -> "SparsePrefixCache":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def empty_twin(self) -> "SparsePrefixCache":
        """A handle with the same cuts and an empty store: what it serves first, it serves cold."""
        return SparsePrefixCache(self.model, self.tokenizer, max_memory=None, grid=self.grid, policy="none")

    # -- what generate() asks -------------------------------------------------------------------------------------------

    def check_model(self, model: Any) -> None:
        """Refuse a model other than the handle's own, and a detached handle."""
        if model is not self.model:
            raise ValueError(
                f"past_key_values is a SparsePrefixCache made for another model ({type(self.model).__name__} object "
                f"{id(self.model):#x}, not {type(model).__name__} object {id(model):#x}). Make one with "
                "SparsePrefixCache(model) for each model; they may share a store."
            )
        if not self._finalizer.alive:
            raise ValueError("past_key_values is a SparsePrefixCache that was detached. Make a new one, with its store.")

    def open_live_cache(self) -> LiveCache:
        """A fresh live cache that will ask this handle for its prefix."""
        live = LiveCache(self._config)
        live.handle = self
        return live

    def note_unsupported(self, input_ids: torch.Tensor | None, why: str) -> None:
        """Record a request that runs as if there were no handle, and say so once."""
        logger.warning_once(f"SparsePrefixCache is not used by this call, which runs uncached: {why}.")
        tokens = 0 if input_ids is None else input_ids.numel()
        self._recorder.add(RequestInfo(tokens, computed_tokens=tokens, reason=f"call not supported: {why}"))

    def serve(self, live: LiveCache, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Run the prefill of a request, reusing what is stored, and return the model's output with the live cache in it.

        Args:
            live: the request's live cache, filled in place.
            input_ids: `(batch, width)`, left-padded.
            model_kwargs: those of `generate()`, the mask among them.
        """
        check_ids(input_ids, self.model.get_input_embeddings().num_embeddings)
        rows = unpadded_rows(input_ids, model_kwargs.get("attention_mask"))
        kwargs = {name: model_kwargs[name] for name in ("use_cache", "logits_to_keep") if name in model_kwargs}
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

    def _serve_row(self, live: LiveCache, ids: torch.Tensor, kwargs: dict[str, Any], position_dims: tuple[int, ...]) -> Any:
        started = time.perf_counter()
        tokens = ids.to("cpu", torch.int32).numpy()
        space, changed = self._space()
        cuts = self._cuts(tokens, space)
        opened = time.perf_counter()
        with open_request(
            self.store, self.policy, tokens, cuts, space=space, max_checkpoints=self.config.max_checkpoints
        ) as request:
            output, timing = prefill.prefill_row(
                self.model, self.family.cache_name, live, ids, cuts, request, kwargs, position_dims
            )
            served = time.perf_counter()
        info = RequestInfo(
            prompt_tokens=request.prompt_tokens,
            overlap_tokens=request.overlap_tokens,
            resumed_tokens=request.resumed_tokens,
            computed_tokens=request.prompt_tokens - request.resumed_tokens,
            captured=tuple(request.captured),
            reason="weights changed: what was stored of them was dropped" if changed else request.reason,
        )
        closed = time.perf_counter()
        self._recorder.add(
            info,
            prefill_seconds=closed - started,
            match_seconds=opened - started + request.match_seconds,
            plan_seconds=request.plan_seconds + closed - served,
            capture_seconds=timing.capture_seconds,
            restore_seconds=timing.restore_seconds,
        )
        return output

    def _cuts(self, tokens: Tokens, space: str) -> Positions:
        cuts = cut_positions(tokens, self.grid, self._cut_ids)
        if self.config.exactness == "bitwise":
            return cuts
        return with_free_cuts(cuts, (self.store.match(tokens, space).overlap, len(tokens)), len(tokens))

    def _space(self) -> tuple[str, bool]:
        """Where this handle's prompts live in the store, and whether that has just changed with the weights."""
        weights = identity(self.model)
        with self._lock:
            before, self._weights = self._weights, weights
        if before != weights:
            self.store.drop(self._named(before))
            logger.warning_once("The model's weights changed: what SparsePrefixCache had stored of it was dropped.")
        return self._named(weights), before != weights

    def _named(self, weights: str) -> str:
        segmentation = f"grid {self.grid}, cut ids {self._cut_ids}"
        return "\x1f".join((weights, segmentation, self.config.exactness, self.config.namespace))

    def _checked_grid(self, grid: int | None) -> int:
        chunk = self.family.chunk(self._config)
        if grid is None:
            return self.family.grid(self._config)
        if grid % chunk:
            logger.warning_once(
                f"grid={grid} is not a multiple of the kernel chunk of {chunk} tokens of {type(self.model).__name__}: "
                "still exact, but every segment is padded to the chunk and costs as much."
            )
        return grid

    def _check_budget(self) -> None:
        needed = self.size.state_bytes + self.grid * self.size.kv_bytes_per_token
        if self.store.max_memory is not None and self.store.max_memory < needed:
            raise ValueError(
                f"max_memory is {format_bytes(self.store.max_memory)}, less than one checkpoint of this model, "
                f"{format_bytes(needed)} with the keys and values of one grid step. Give at least that."
            )

    # -- a handle holds no state of its own -----------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: a request begins with a live cache of its own."""
        return 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # generate() marks the cache that it is about to use as it is, so this model has no overrides for the handle.
        self._refuse()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse()

    update_conv_state = update_recurrent_state = update_indexer = get_mask_sizes = has_previous_state = update

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copy.copy, copy.deepcopy, pickle and torch.save all come here.
        raise TypeError(
            "A SparsePrefixCache cannot be copied or pickled, and generate() never changes the one it is given: pass the "
            "same handle to every call. For another model make SparsePrefixCache(model, store=cache.store)."
        )

    def _refuse(self) -> None:
        state = "is attached to" if self._finalizer.alive else "was detached from"
        raise ValueError(
            f"past_key_values is a SparsePrefixCache that {state} a {type(self.model).__name__} object, and only that "
            "model's generate() can use it. Make one with SparsePrefixCache(model) for the model you call."
        )


def _release(model: Any, model_type: str) -> None:
    generation.detach(model)
    if mamba1.needs_hook(model_type):
        mamba1.uninstall(model_type)
