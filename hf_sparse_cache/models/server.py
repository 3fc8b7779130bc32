"""What `generate()` asks of a handle: the prefill of a request's prompts, from whatever is stored of them."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers.utils import logging

from .. import forks
from ..checks import shown
from ..explain import frequent, not_supported, remedy
from ..planning.policies import NoCheckpoints, Policy
from ..stats import PATIENCE, Cause, Recorder, RequestInfo
from ..store.store import CheckpointStore
from . import answers, mamba1, prefill
from .answers import Turn
from .binding import Binding
from .inputs import Prompts, Row, check_ids, input_device, unpadded_rows, why_uncached
from .live import LiveCache
from .proof import Proof
from .rows import Filled, Rows
from .sitting import Asked, Means, Served, serve_alone, with_room
from .space import Space
from .watch import ChangedPrefillError
from .weights import Identity, identity


logger = logging.get_logger(__name__)


class Server:
    """Serves the requests of one model from one store.

    Attributes:
        binding: the model.
        store: what is kept.
        policy: where checkpoints go.
        recorder: counts the requests.
        proof: what is proved of the binding.
        space: where the model's prompts live in the store.
        on_prefill: called with the live cache at the end of each prefill; `check_exactness` looks at the states there.
    """

    def __init__(
        self,
        binding: Binding,
        store: CheckpointStore,
        policy: Policy,
        recorder: Recorder,
        proof: Proof | None = None,
    ) -> None:
        self.binding, self.store, self.policy, self.recorder = binding, store, policy, recorder
        self.proof = Proof(binding) if proof is None else proof
        self.space = Space(binding, store)
        self.means = Means(binding, store, policy, self.space)
        self.on_prefill: Callable[[LiveCache], None] | None = None
        self._told_of_orphans = False
        forks.starts_clean(self)

    def after_fork(self) -> None:
        """In a child process: counted from zero, with locks of its own."""
        self.recorder.start_anew()
        self.space.after_fork()
        self.policy.lock = threading.Lock()

    def live_cache(self) -> LiveCache:
        """The live cache for a request that begins."""
        return self.binding.live_cache()

    def look(self, tokens: int) -> tuple[str, Identity]:
        """Why a prompt of so many tokens cannot be served on the model, "" when it can, and what the model is now."""
        found = identity(self.binding.model)
        limit = found.length_limit
        if limit and tokens >= limit:
            said = f"the frequencies of this model's RoPE depend on the length of a prompt, from {limit} tokens on"
            return said, found
        if found.by_call:
            return found.by_call, found
        known = self.proof.known(found)
        return (self.proof.shortcoming(), identity(self.binding.model)) if known is None else (known, found)

    def uncached(self, prompt_tokens: Sequence[int], why: str) -> None:
        """Record prompts that run as if there were no handle, and say so once.

        Args:
            prompt_tokens: of each prompt; where none are known, one of 0 tokens is recorded.
            why: the reason, a part of a sentence.
        """
        logger.warning_once(f"SparsePrefixCache is not used by this call, which runs uncached: {why}.")
        infos = [
            RequestInfo(tokens, computed_tokens=tokens, reason=not_supported(why)) for tokens in prompt_tokens or (0,)
        ]
        for info in infos:
            self._note(info)
        self.recorder.tell(infos)
        self._over()

    def serve(self, live: LiveCache, asked: Prompts, model_kwargs: dict[str, Any], given: int = 0) -> Any:
        """Run the prefill of a request, reusing what is stored; returns the model's output with the live cache in it.

        Args:
            live: the request's live cache, filled in place.
            asked: its prompts.
            model_kwargs: those of `generate()`.
            given: how many prompts the caller gave, each in as many rows, one below the other; 0 where nobody knows,
                and equal rows one below the other are taken for one prompt.
        """
        model, width = self.binding.model, asked.ids.shape[1]
        check_ids(asked.read, model.get_input_embeddings().num_embeddings)
        rows = unpadded_rows(asked.read, asked.mask)
        kwargs: dict[str, Any] = {
            name: model_kwargs[name] for name in ("use_cache", "logits_to_keep") if name in model_kwargs
        }
        dims = () if asked.positions is None else tuple(asked.positions.shape[:-2])
        distinct: dict[bytes, int] = {}
        order = [distinct.setdefault(row.numpy().tobytes(), len(distinct)) for row in rows]
        ids = asked.ids.to(input_device(model))
        first = [order.index(index) for index in range(len(distinct))]
        prompts = [Row(ids[row, width - len(rows[row]) :], kwargs, dims, read=rows[row]) for row in first]
        alone = len(rows) == 1 and len(rows[0]) == width
        own = live if alone else self.binding.live_cache()
        own.found = live.found
        filled, served = self._serve(prompts, own)
        self.count(served, order[:: max(1, len(order) // given)] if given else [index for index, _ in groupby(order)])
        if self.on_prefill is not None:
            self.on_prefill(filled[-1].live)
        if alone:
            replays = self.binding.config.exactness == "replayable"
            live.turn = served[0].turn(live) if replays else None
            return served[0].output
        return with_room(self.means, live, lambda _: self._joined(live, filled, order, width))

    def prefill(self, ids: torch.Tensor, tail: int) -> tuple[torch.Tensor, LiveCache]:
        """Run the prefill of one prompt by itself.

        Args:
            ids: `(1, length)`.
            tail: of how many of the last tokens the logits are wanted.

        Returns:
            The logits `(1, tail, vocabulary)`, and the live cache behind the prompt.

        Raises:
            ValueError: the prompt cannot be served on this model as it is.
        """
        model, live = self.binding.model, self.binding.live_cache()
        asked = Prompts.of(ids, {})
        why = why_uncached(model, asked, None, {})
        if not why:
            why, live.found = self.look(ids.shape[1])
        if not why:
            kwargs: dict[str, Any] = {"use_cache": True}
            if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
                kwargs["logits_to_keep"] = 1
            try:
                with torch.no_grad(), mamba1.held(model):
                    row = Row(ids[0].to(input_device(model)), kwargs, tail=tail, read=asked.read[0])
                    served = self.serve_row(live, row)
                self.count([served], [0])
                return served.output.logits[:, -tail:], live
            except ChangedPrefillError as error:
                why = str(error)
        raise ValueError(
            f"prefill cannot be exact here: {why}. generate() runs such a call as if there were no cache."
        )

    def serve_row(self, live: LiveCache, row: Row) -> Served:
        """Run the prefill of one prompt on a fresh live cache, by itself.

        Raises:
            ChangedPrefillError: Segments do not compute what one piece would.
        """
        return serve_alone(self.means, live, Asked(row))

    def answered(self, turn: Turn, result: Any) -> None:
        """Keep the state behind what `generate()` returned for a prompt."""
        answers.keep(self.binding, self.recorder, turn, result)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _serve(self, prompts: list[Row], live: LiveCache) -> tuple[list[Filled], list[Served]]:
        """Run different prompts, in caches of their own; one alone in `live`."""
        if len(prompts) == 1:
            served = self.serve_row(live, prompts[0])
            return [Filled(live, served.output, (0,))], [served]
        rows = Rows(self.means, [Asked(row) for row in prompts], live.found)
        rows.serve()
        return rows.filled, [rows.served[index] for index in range(len(prompts))]

    def _joined(self, live: LiveCache, filled: list[Filled], order: list[int], width: int) -> Any:
        """One output and one live cache, with a row for each of `order`, which names its prompt."""
        held = [prompt for each in filled for prompt in each.prompts]
        places = [held.index(prompt) for prompt in order]
        only = filled[0]
        if len(filled) == 1 and places == list(range(len(held))) and only.live.length == width:
            live.start_anew(only.live)
            return self.binding.output(only.output.logits[:, -1:], live)
        return prefill.join_rows(self.binding, live, [(each.live, each.output) for each in filled], places, width)

    def count(self, served: Sequence[Served], order: Sequence[int]) -> None:
        """Count the prompts of a call that were served, and tell which of them each of its rows is, by `order`."""
        for row in served:
            if row.info is not None:
                self._note(row.info, **row.seconds)
        infos = [served[index].info for index in order]
        self.recorder.tell([info for info in infos if info is not None])
        self._over()

    def _note(self, info: RequestInfo, **seconds: float) -> None:
        """Count one finished request; say so, once, when what is stored of it was made with other settings."""
        self.recorder.add(info, **seconds)
        if info.reason.cause is Cause.CUT_OTHERWISE and not self._told_of_orphans:
            self._told_of_orphans = True
            logger.warning(
                "What is stored of these prompts was made with another grid, cut_after, marks or exactness than this "
                f"handle's settings, so it is not resumed from. {remedy(info.reason)}"
            )
        ends = self.binding.segmenting.rule.cut_after
        if ends is not None and not ends.found and self.recorder.totals().requests == PATIENCE:
            logger.warning(
                f"None of {PATIENCE} prompts has a token that ends with one of cut_after={shown(ends.strings)}, so "
                "none is cut there. A string that ends inside a token does not cut: give the text up to the end of a "
                "token, or call cache.mark() on the shared part."
            )

    def _over(self) -> None:
        """Count a call that is over; say so, once, when none of the first ones resumed anything."""
        misses, requests = self.recorder.called(), self.recorder.totals().requests
        if misses and not isinstance(self.policy, NoCheckpoints):
            reason, count = frequent([miss.reason for miss in misses])
            calls, last = ("", "") if requests == PATIENCE else (f" in {PATIENCE} calls", "the last ")
            logger.warning(
                f"{requests} requests{calls} and nothing was resumed. Most frequent reason ({count} of {last}"
                f"{len(misses)}): {reason}. {remedy(reason, self.binding.config.namespace)} "
                "cache.explain(prompt) tells for any prompt."
            )
