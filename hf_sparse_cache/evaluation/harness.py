"""lm-evaluation-harness with prefix reuse: its own model of transformers, of which the prompts go through a cache.

Importing this module registers the model `hf-sparse`. Tasks, templates, few-shot, metrics and reports are the
harness's; what is replaced are the three calls that run the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..cache import SparsePrefixCache
from ..models.pairs import windows


# Rows of a forward where the harness is asked to find a batch size by itself; what does not fit is halved.
AUTOMATIC_ROWS = 64
MODEL_NAME = "hf-sparse"


@register_model(MODEL_NAME)
class SparseLM(HFLM):  # type: ignore[misc]
    """`HFLM` with a `SparsePrefixCache`.

    Args:
        pretrained: as for `HFLM`.
        max_memory, exactness, grid, policy, namespace: as for `SparsePrefixCache`.
        options: as for `HFLM`.

    Raises:
        UnsupportedModelError: The model's state cannot be captured exactly.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        max_memory: int | str | None = "2GiB",
        exactness: str = "replayable",
        grid: int | None = None,
        policy: str = "learned",
        namespace: str = "",
        **options: Any,
    ) -> None:
        super().__init__(pretrained, **options)
        if self.model.training:
            self.model.eval()  # as HFLM does with the models that it loads itself
        self.cache = SparsePrefixCache(
            self.model,
            self.tokenizer,
            max_memory=max_memory,
            exactness=exactness,
            grid=grid,
            policy=policy,
            namespace=namespace,
        )

    # -- what runs the model ------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Scores pairs that are tokenised: all of them in one call, which computes what they share once."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        with self._autocast():
            found = self.cache.loglikelihood(
                pairs,
                batch_size=override_bs or self._rows,
                max_length=self.max_length,
                progress=not disable_tqdm and self.rank == 0,
            )
        for (said, *_), answer in zip(requests, found, strict=True):
            if said is not None:  # a window of a text, of which the caller keeps the sum
                self.cache_hook.add_partial("loglikelihood", said, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts in windows, as `HFLM` cuts them, all of them in one call."""
        counts: list[int] = []
        flat: list[tuple[None, list[int], list[int]]] = []
        for request in requests:
            tokens = np.asarray(self.tok_encode(request.args[0]), dtype=np.int32)
            pairs = windows(tokens, self.prefix_token_id, self.max_length)
            counts.append(len(pairs))
            flat += [(None, pair.tokens[: pair.start].tolist(), pair.tokens[pair.start :].tolist()) for pair in pairs]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        found = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: Iterable[str], **options: Any) -> Any:
        """Generates from prompts, which resume wherever an earlier one has left a checkpoint."""
        strings = list(stop)
        if strings:
            options |= {"stop_strings": strings, "tokenizer": self.tokenizer}
        return super()._model_generate(context, max_length, [], past_key_values=self.cache, **options)

    # -- what is told -------------------------------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of the model into its results, with the statistics of the cache."""
        stats = self.cache.stats().to_dict()
        settings = self.cache.config
        told = {"exactness": settings.exactness, "policy": settings.policy, "grid": self.cache.grid}
        return {**super().get_model_info(), "sparse_cache": {**told, **stats}}

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        return self.batch_size if isinstance(self.batch_size, int) else AUTOMATIC_ROWS

    def _autocast(self) -> Any:
        wanted = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=wanted, enabled=wanted is not None)
