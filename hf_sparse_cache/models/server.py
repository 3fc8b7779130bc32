"""What `generate()` asks of a handle: the prefill of a request's prompts, from whatever is stored of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from .. import forks
from ..explain import WEIGHTS_CHANGED, frequent, remedy
from ..planning.cuts import Positions, Tokens, with_free_cuts
from ..planning.policies import NoCheckpoints, Policy
from ..request import open_request
from ..stats import Recorder, RequestInfo
from ..store.store import CheckpointStore
from . import prefill
from .binding import Binding
from .inputs import check_ids, input_device, unpadded_rows
from .live import LiveCache
from .space import Space


logger = logging.get_logger(__name__)


class Server:
    """Serves the requests of one model from one store.

    Attributes:
        binding: the model.
        store: what is kept.
        policy: where checkpoints go.
        recorder: counts the requests.
        space: where the model's prompts live in the store.
        on_prefill: called with the live cache at the end of each prefill; `check_exactness` looks at the states there.
    """

    def __init__(self, binding: Binding, store: CheckpointStore, policy: Policy, recorder: Recorder) -> None:
        self.binding, self.store, self.policy, self.recorder = binding, store, policy, recorder
        self.space = Space(binding, store)
        self.on_prefill: Callable[[LiveCache], None] | None = None
        forks.starts_clean(self)

    def after_fork(self) -> None:
        """In a child process: counted from zero, with locks of its own."""
        self.recorder = Recorder()
        self.space.after_fork()
        self.policy.lock = threading.Lock()

    def live_cache(self) -> LiveCache:
        """The live cache for a request that begins."""
        return self.binding.live_cache()

    def uncached(self, input_ids: torch.Tensor | None, why: str) -> None:
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
        model = self.binding.model
        check_ids(input_ids, model.get_input_embeddings().num_embeddings)
        rows = unpadded_rows(input_ids, model_kwargs.get("attention_mask"))
        kwargs: dict[str, Any] = {
            name: model_kwargs[name] for name in ("use_cache", "logits_to_keep") if name in model_kwargs
        }
        distinct: dict[bytes, int] = {}
        order = [distinct.setdefault(row.cpu().numpy().tobytes(), len(distinct)) for row in rows]
        alone = len(rows) == 1 and len(rows[0]) == input_ids.shape[1]
        caches = [live] if alone else [self.binding.live_cache() for _ in distinct]
        positions = model_kwargs.get("position_ids")
        dims = () if positions is None else tuple(positions.shape[:-2])
        outputs = [
            self.serve_row(caches[index], rows[order.index(index)].to(input_device(model)), kwargs, dims)
            for index in range(len(distinct))
        ]
        if self.on_prefill is not None:
            self.on_prefill(caches[-1])
        if alone:
            return outputs[0]
        return prefill.join_rows(self.binding.family.cache_name, live, caches, outputs, order, input_ids.shape[1])

    def serve_row(
        self, live: LiveCache, ids: torch.Tensor, kwargs: dict[str, Any], position_dims: tuple[int, ...]
    ) -> Any:
        """Run the prefill of one prompt `(length,)` on a fresh live cache; returns the model's last output."""
        started = time.perf_counter()
        tokens = ids.to("cpu", torch.int32).numpy()
        space, changed = self.space.now(told=True)
        cuts = self.cuts(tokens, space)
        opened = time.perf_counter()
        limit = self.binding.config.max_checkpoints
        with open_request(self.store, self.policy, tokens, cuts, space=space, max_checkpoints=limit) as request:
            output, timing = prefill.prefill_row(self.binding, live, ids, cuts, request, kwargs, position_dims)
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

    def cuts(self, tokens: Tokens, space: str, marked: int = 0) -> Positions:
        """Where a prompt is cut. In numerical mode also where earlier prompts, and marks such as `marked`, end."""
        cuts = self.binding.cuts(tokens)
        if self.binding.config.exactness == "bitwise":
            return cuts
        with self.store.lock:
            free = {self.store.match(tokens, space).overlap, len(tokens), *self.store.marks.lengths(tokens, space)}
        return with_free_cuts(cuts, free | ({marked} if marked else set()), len(tokens))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _note(self, info: RequestInfo, **seconds: float) -> None:
        """Count one finished request; say so, once, when none of the first ones resumed anything."""
        misses = self.recorder.add(info, **seconds)
        if misses and not isinstance(self.policy, NoCheckpoints):
            reason, count = frequent([miss.reason for miss in misses])
            advice = remedy(reason, self.binding.config.namespace)
            logger.warning(
                f"{len(misses)} requests and nothing was resumed. Most frequent reason ({count} of {len(misses)}): "
                f"{reason}. {advice} cache.explain(prompt) tells for any prompt."
            )
