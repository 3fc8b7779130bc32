"""`SparsePrefixCache`: the handle that a user passes to `generate()`.

It holds no request's state. Every call to `generate()` gets a live cache of its own, filled from the store that the
handle points to, so one handle serves any number of prompts, batches and threads.
"""

import math
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from . import persistence
from .checks import is_whole, shown, whole_number
from .config import SparseCacheConfig
from .explain import Explanation, ModelFacts, explain, not_supported, remedy, too_small
from .models import fingerprint, generation
from .models.ambient import claim
from .models.binding import Binding
from .models.families import learned_prompt
from .models.handed import Prefilled, hand_out
from .models.handle import Handle
from .models.inputs import Prompts, as_ids, check_ids, why_uncached
from .models.pairs import Pair, prefix_token, read_pairs, read_texts, windows
from .models.proof import Proof
from .models.scoring import Scoring
from .models.server import Server
from .models.tensors import LayerTensors
from .planning.cuts import MIN_SUFFIX_TOKENS
from .planning.policies import Policy, make_policy
from .planning.policy import check_policy
from .planning.segments import Replayable
from .stats import CacheStats, Cause, Reason, Recorder, RequestInfo, format_bytes
from .store.seal import Seal
from .store.store import CheckpointStore


logger = logging.get_logger(__name__)


class SparsePrefixCache(Handle):
    """Exact prefix reuse for one model: `model.generate(**inputs, past_key_values=SparsePrefixCache(model))`.

    Checkpoints of the model's state are kept at a few cuts of every prompt seen, chosen by dynamic programming over
    where prompts diverge ("Sparse Prefix Caching for Hybrid and Recurrent LLM Serving", arXiv 2605.05219).
    A prompt resumes at the deepest checkpoint on its common prefix, proved token by token; its outputs do not change.

    Args:
        model: a causal language model of a supported family.
        tokenizer: optional; prompts may then also be cut after its special tokens, where chats and agents diverge.
        max_memory, max_checkpoints, exactness, grid, cut_after, pieces, namespace, ambient, storage: see
            `SparseCacheConfig`.
        policy: where checkpoints go: a name (see `policies`) or a `Policy` object.
        store: a `CheckpointStore` to share with other handles; it has a budget of its own, in place of `max_memory`.
        prove: prove on a short prompt, once for each model object, that its states can be continued (see "Exactness").
        config: all settings at once, in place of the keywords.

    Raises:
        UnsupportedModelError: The model's state cannot be captured exactly.
        ValueError: An argument is out of range; the message names it.
        TypeError: `policy` is neither a name nor a `Policy` object.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_memory: int | str | None = "2GiB",
        max_checkpoints: int | None = None,
        exactness: str = "replayable",
        grid: int | None = None,
        cut_after: Sequence[str] = (),
        pieces: int | None = None,
        policy: str | Policy = "learned",
        store: CheckpointStore | None = None,
        namespace: str = "",
        ambient: bool = False,
        storage: str = "exact",
        prove: bool = True,
        config: SparseCacheConfig | None = None,
    ) -> None:
        if not isinstance(policy, str):
            check_policy(policy)
        if store is not None and not isinstance(store, CheckpointStore):
            raise ValueError(f"store is {shown(store)}: give a CheckpointStore, or leave it out for one of its own")
        if tokenizer is not None and not hasattr(tokenizer, "all_special_ids"):
            raise ValueError(f"tokenizer is {shown(tokenizer)}: give the model's tokenizer, or leave it out")
        name = policy if isinstance(policy, str) else type(policy).__name__
        strings: Any = cut_after if isinstance(cut_after, str) else tuple(cut_after)
        limits = (max_memory, max_checkpoints, exactness, grid)
        given = SparseCacheConfig(*limits, name, namespace, strings, pieces, ambient, storage=storage)
        if config is not None and given != SparseCacheConfig():
            raise ValueError("config holds all settings: give either config or single keywords, not both.")
        self.config = given if config is None else config
        binding = Binding.of(model, tokenizer, self.config)
        self._given = weakref.ref(model)  # with the wrappers that the binding takes off
        self.model, self.tokenizer, self.family = binding.model, tokenizer, binding.family
        self.grid, self.size, self.prefill_cost = binding.grid, binding.size, binding.prefill_cost
        self.policy = (
            make_policy(self.config.policy, binding.cut_ids, binding.prefill_cost)
            if isinstance(policy, str)
            else policy
        )
        self.store = CheckpointStore(self.config.max_memory) if store is None else store
        self._check_budget(binding.facts)
        self.store.read_with(LayerTensors.from_bytes)
        proof = Proof(binding, prove)
        proof.require()
        attachment = generation.attachment(binding)
        super().__init__(Server(binding, self.store, self.policy, Recorder(), proof), attachment)
        # Before anything is replaced, so that nothing stays replaced when the handle is collected or cannot be made.
        self._finalizer = weakref.finalize(self, attachment.end)
        attachment.make()
        if self.config.ambient:
            try:
                claim(self.model, self)
            except BaseException:
                self.detach()
                raise

    # -- what a user reads --------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Totals since the handle was made, and what its store holds of its namespace now, in the fastest tier."""
        held = self.store.account(self.config.namespace)
        return self.server.recorder.totals(
            proved=self.server.proof.holds,
            checkpoints=held.checkpoints,
            checkpoint_bytes=held.checkpoint_bytes,
            kv_bytes=held.kv_bytes,
            evictions=held.evictions,
            tree_bytes=self.store.ledger.tree_bytes(self.config.namespace),
            max_remembered=self.store.ledger.max_remembered,
            shared={} if self.store.shared is None else self.store.shared.counts,
        )

    @property
    def last_request(self) -> RequestInfo | None:
        """The prompt served last; of a batch, its last row. None before the first."""
        return self.server.recorder.last

    def record(self) -> AbstractContextManager[list[RequestInfo]]:
        """`with cache.record() as requests:` collects what happened to each prompt of the calls made inside.

        There is one `RequestInfo` for every row of a batch, in order; rows that are equal are computed once and share
        one, and so do the beams or the samples of one prompt. A block sees the calls of its own thread or asyncio
        task, and of tasks that were made inside of it (`asyncio.to_thread` among them); what another thread calls is
        seen by blocks of that thread alone. Blocks may be nested.

        Returns:
            A context manager that gives the list, which grows as prefills end and is complete when the block is left.
        """
        return self.server.recorder.block()

    def __repr__(self) -> str:
        most = self.store.max_memory
        limit = "without a limit" if most is None else f"of {format_bytes(most)}"
        return f"SparsePrefixCache({type(self.model).__name__}, grid={self.grid}, {limit}: {self.stats()})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the tree of what is stored in the handle's space, and the last requests."""
        from .tools import notebook

        return notebook.page(self.server, self.stats())

    def explain(self, ids: torch.Tensor | str) -> Explanation:
        """What a prompt would reuse now and why not more, without running the model; `str()` reads as a sentence.

        Args:
            ids: token ids of shape `(length,)` or `(1, length)`, or a string when the handle has a tokenizer.
        """
        tokens = self.server.binding.tokens_of(ids)
        space, changed = self.server.space.now()
        binding, row = self.server.binding, torch.from_numpy(tokens)[None]
        found = explain(self.store, tokens, binding.segmenting, space, binding.facts)
        unsupported = why_uncached(self.model, Prompts.of(row, {}), None, {}) or self.server.look(len(tokens))[0]
        if unsupported:
            reason = not_supported(unsupported)
        elif changed and not found.resumed_tokens:
            reason = Reason(Cause.WEIGHTS_CHANGED)
        else:
            others = [] if self.store.shared is None or found.resumed_tokens else self.store.shared.others(space)
            unlike = fingerprint.unlike(space, others)
            return replace(found, shared=" ".join(filter(None, (found.shared, unlike)))) if unlike else found
        return replace(found, resumed_tokens=0, reason=reason, remedy=remedy(reason))

    def prefill(self, ids: torch.Tensor | str, *, logits_to_keep: int = 1) -> Prefilled:
        """Run the prefill alone, reusing what is stored: for a loop of one's own, for scores, or ahead of a question.

        What `generate()` would have captured of the prompt is captured, so in idle time it prepares the next call: the
        shared part before the question is known, or a conversation with the answer that was just given.

        Args:
            ids: token ids of shape `(length,)` or `(1, length)`, or a string when the handle has a tokenizer.
            logits_to_keep: of how many of the last tokens the logits are wanted. What they need is computed, so a
                prompt resumes before them.

        Returns:
            `.logits` of shape `(1, logits_to_keep, vocabulary)`, and `.past_key_values`, a live cache that holds the
            prompt: `model(new_ids, past_key_values=...)` continues it (under whatever name this model has for its
            cache), and `generate()` with the prompt and what follows it. It is the caller's own, and goes with him.

        Raises:
            ValueError: The argument is out of range, the handle was detached, or the model cannot be served as it is,
                in training mode for example; the message says why.
        """
        self._check_direct("this")
        given = as_ids(ids, self.tokenizer)
        check_ids(given, self.model.get_input_embeddings().num_embeddings, "ids")
        most = given.shape[1]
        if not is_whole(logits_to_keep, 1, most):
            raise ValueError(f"logits_to_keep is {shown(logits_to_keep)}: give 1 to {most}, the tokens of the prompt.")
        logits, live = self.server.prefill(given, logits_to_keep)
        live.origin = weakref.ref(self)
        return hand_out(live, given[0], logits)

    def simulation(self) -> dict[str, Any]:
        """Keywords for `simulate` with which it reuses, captures and evicts as this cache does, less its policy."""
        binding = self.server.binding
        segmenting = binding.segmenting
        return {
            "max_memory": self.store.max_memory,
            "max_checkpoints": self.config.max_checkpoints,
            "state_bytes": self.size.state_bytes,
            "kv_bytes_per_token": self.size.kv_bytes_per_token,
            "logits_bytes": self.size.logits_bytes,
            "page_bytes": self.size.page_bytes,
            "exactness": self.config.exactness,
            "grid": segmenting.step if isinstance(segmenting, Replayable) else self.grid,
            "cut_ids": binding.cut_ids,
            "cut_tokens": segmenting.cut_tokens,
            "pieces": segmenting.piece if isinstance(segmenting, Replayable) else None,
            "prefill_cost": self.prefill_cost,
        }

    def mark(self, ids: torch.Tensor | str) -> None:
        """Announce a prefix that will come back: prompts that begin with it are cut at its very end from now on, and a
        checkpoint is kept there until `clear()`.

        It is captured when the next such prompt passes, in place of others where memory is short, and is never evicted
        from then on, unless the weights change. A warning says so when the budget cannot hold it beside what other
        marks keep.

        Args:
            ids: token ids of shape `(length,)` or `(1, length)`, or a string when the handle has a tokenizer.

        Raises:
            ValueError: The prefix has fewer than two tokens, so that no prompt can be cut there.
        """
        tokens = self.server.binding.tokens_of(ids)
        space, _ = self.server.space.now()
        position = len(tokens)
        if position < MIN_SUFFIX_TOKENS:
            raise ValueError(f"ids has {position} token, and no segment has fewer than 2: mark a longer prefix.")
        self.store.mark(tokens, space)
        need = self.server.binding.facts.bytes_of(position)
        bound = self.store.bound(tokens, position, space)
        if bound is not None and bound.kept + need > bound.limit:
            logger.warning(f"Nothing can be kept for this mark. {too_small(bound, position, need)}.")

    # -- scores -------------------------------------------------------------------------------------------------------

    def loglikelihood(
        self,
        pairs: Iterable[tuple[Any, Any]],
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        progress: bool | None = None,
    ) -> list[tuple[float, bool]]:
        """How likely each continuation is behind its context; what contexts share is computed once.

        The call knows all its pairs, so that states are kept exactly where they part, and no longer than another pair
        needs them. Only logits of continuations are computed. Every pair counts as one request.

        Args:
            pairs: of `(context, continuation)`, both strings or both token ids. White space at the end of a context
                counts as the beginning of its continuation, as in lm-evaluation-harness.
            batch_size: most continuations of one context in a forward. In bitwise mode each runs alone, and the result
                of a pair is, bit for bit, that of the pair asked alone.
            max_length: most tokens that the model may read of a pair, whose context loses its beginning beyond it;
                default the model's context window, where it has one.
            progress: whether to show a progress bar; default where standard error is a terminal.

        Returns:
            For each pair the sum of the log-probabilities of the continuation, and whether greedy decoding gives it.

        Raises:
            ValueError: something is no pair of a context and a continuation; the message names it by its index, and
                nothing was computed yet.
        """
        self._check_scored(batch_size, max_length)
        return self._scores(read_pairs(self.server.binding, pairs, self._window(max_length)), batch_size, progress)

    def loglikelihood_rolling(
        self,
        texts: Iterable[Any],
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        prefix: int | None = None,
        progress: bool | None = None,
    ) -> list[float]:
        """How likely each whole text is, for its perplexity: `exp(-value / tokens)`.

        A text that does not fit the context window is scored in windows that do not overlap, each of which sees the
        token before it, as in lm-evaluation-harness.

        Args:
            texts: strings or token ids.
            batch_size, progress: as for `loglikelihood`.
            max_length: tokens of a window; default the model's context window, or the whole text where it has none.
            prefix: the id of the token before the first one; default the tokenizer's token that begins texts, or else
                ends them.

        Returns:
            For each text the sum of the log-probabilities of its tokens.

        Raises:
            ValueError: something is no text, or there is neither `prefix` nor a tokenizer that has one.
        """
        self._check_scored(batch_size, max_length)
        binding, window = self.server.binding, self._window(max_length)
        first = prefix_token(binding, prefix)
        found = [windows(tokens, first, window or len(tokens)) for tokens in read_texts(binding, texts)]
        scores = iter(self._scores([pair for pairs in found for pair in pairs], batch_size, progress))
        return [math.fsum(next(scores)[0] for _ in pairs) for pairs in found]

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | Path, *, key: str | bytes | None = None, encrypt: bool | None = None
    ) -> int:
        """Write every checkpoint of this handle's weights and namespace, from all tiers, and its marks to a folder.

        A save replaces what an earlier one of the same cache left there, once all of it is written; one that fails
        leaves the earlier one as it was. Nothing else in the folder is touched. The files reveal the prompts; they are
        readable by their owner alone and are never pushed to the Hub.

        Args:
            save_directory: made when it is not there.
            key: authenticates the files; default the store's (see `CheckpointStore`).
            encrypt: whether to encrypt them too; default as the store does.

        Returns:
            The number of checkpoints saved.

        Raises:
            ValueError: the folder holds a cache of another model or namespace, or a file of yours by the name of ours,
                or the weights are offloaded, or the key is too short.
            OSError: a file cannot be written.
        """
        return persistence.save(self.server, save_directory, self.store.seal.instead(key, encrypt))

    @classmethod
    def from_pretrained(
        cls,
        save_directory: str | Path,
        model: Any,
        tokenizer: Any = None,
        *,
        key: str | bytes | None = None,
        **options: Any,
    ) -> Self:
        """Make a handle with the checkpoints and marks that `save_pretrained` wrote.

        A file that is damaged or gone, or cannot be a state of this model, is left out, with one warning, and so is
        what builds on it. That proves no author: checksums carry no secret, so whoever can write the folder can put
        plausible states of his own there. Load what you trust, or save and load with a key.

        Args:
            save_directory: the folder.
            model: the model the states were made with: same weights, configuration, dtype, implementations, devices.
            tokenizer: as it was when the cache was saved.
            key: must have authenticated the files; default that of `store`, or the environment variable
                HF_SPARSE_CACHE_KEY, or none.
            options: as for the class; grid, exactness, namespace and sizes default to the saved ones.

        Raises:
            ValueError: the states cannot be continued exactly by this model in this environment; names what differs.
            DamagedFileError: the folder's manifest is damaged, or not of this key; a ValueError, too.
            OSError: there is no such folder, or it cannot be read.
        """
        store = options.get("store")
        seal = Seal.of(key) if store is None else store.seal.instead(key, None)
        handle = cls(model, tokenizer, **persistence.settings(save_directory, options, seal))
        try:
            if store is None:
                handle.store.seal = seal
            persistence.load_saved(handle.server, save_directory, seal, lambda ids: handle.mark(torch.from_numpy(ids)))
        except BaseException:
            handle.detach()
            raise
        return handle

    # -- life ---------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget every prompt that this handle matches, with states and marks; a shared store keeps the others'."""
        self.store.clear(self.server.space.now(told=True)[0])

    def detach(self) -> None:
        """Give the model its own `generate()` methods back. What is stored stays; the handle can no longer be used."""
        self._finalizer()

    def __enter__(self) -> "SparsePrefixCache":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_budget(self, facts: ModelFacts) -> None:
        needed = facts.bytes_of(self.grid)
        if self.store.max_memory is not None and self.store.max_memory < needed:
            raise ValueError(
                f"max_memory is {format_bytes(self.store.max_memory)}, less than one checkpoint of this model, "
                f"{format_bytes(needed)} with the keys and values of one grid step. Give at least that."
            )

    def _check_scored(self, batch_size: int, max_length: int | None) -> None:
        """Refuse a call that can score nothing, before anything runs."""
        whole_number("batch_size", batch_size, 1, "it is the number of continuations in one forward")
        if max_length is not None:
            whole_number("max_length", max_length, 1, "it is the number of tokens that the model may read at once")
        self._check_direct("the cache")

    def _check_direct(self, name: str) -> None:
        """Refuse a call that runs the model inside the wrapper that the user gave, where that makes a difference.

        Raises:
            ValueError: The handle was detached, or the wrapper puts a learned prompt before the tokens.
        """
        self.check_call(self.model, name)
        given = self._given()
        kind = "" if given is None else learned_prompt(given)
        if kind:
            raise ValueError(
                f"model puts a learned prompt of PEFT ({kind}) before the tokens, which only its own generate() and "
                "forward do: score it with model(...) or lm-evaluation-harness's own model, without the cache."
            )

    def _window(self, max_length: int | None) -> int | None:
        window: int | None = getattr(self.server.binding.text_config, "max_position_embeddings", None)
        return window if max_length is None else max_length

    def _scores(self, pairs: list[Pair], batch_size: int, progress: bool | None) -> list[tuple[float, bool]]:
        hidden = None if progress is None else not progress  # None: where nobody looks on
        with tqdm(total=len(pairs), desc="score", unit="pair", disable=hidden, leave=False) as bar:
            return Scoring(self.server, pairs, batch_size, bar.update).run()
