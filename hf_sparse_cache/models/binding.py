"""Everything that is known of one model, as far as its states go: what a handle is bound to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from ..checks import shown
from ..config import SparseCacheConfig
from ..errors import UnsupportedModelError, out_of_memory
from ..explain import ModelFacts
from ..planning.cuts import CutRule, TextEnds, Tokens
from ..planning.segments import Bitwise, Replayable, Segmenting
from . import states
from .cost import prefill_cost
from .deviation import INT8, UNKNOWN
from .families import Family, cache_name_of, family_of, unwrapped
from .inputs import as_ids, check_ids, input_device
from .live import LiveCache
from .methods import require_methods
from .rounding import PARTS, Rounding, rounding_of
from .states import StateSize
from .versions import check_version


logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Binding:
    """One model with the settings under which its prompts are cut.

    Attributes:
        model: the transformers model itself, without the wrappers of PEFT and `torch.compile`.
        tokenizer: turns strings into ids; None when there is none.
        config: the settings.
        family: what a prefill in segments must know about such models.
        cache_name: the keyword under which the model's forward takes its cache.
        text_config: the configuration of the model's text part.
        grid: tokens between regular cuts.
        cut_ids: token ids after which a prompt may also be cut, ascending.
        segmenting: how its prompts become segments.
        prefill_cost: G(t) of this model, what policies weigh.
        rounding: how its states are kept.
        size: bytes that its states take.
        output_type: class of its forward's output.
    """

    model: Any
    tokenizer: Any
    config: SparseCacheConfig
    family: Family
    cache_name: str
    text_config: Any
    grid: int
    cut_ids: tuple[int, ...]
    segmenting: Segmenting
    prefill_cost: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    rounding: Rounding
    size: StateSize
    output_type: Callable[..., Any]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, config: SparseCacheConfig) -> Self:
        """Look at a model, and run two tokens through it to see what its states take.

        Raises:
            UnsupportedModelError: The model's state cannot be captured exactly.
        """
        check_version()
        model = unwrapped(model)
        family = family_of(model)
        require_methods(model)
        text_config = model.config.get_text_config(decoder=True)
        cache_name = cache_name_of(model)
        probe = LiveCache(text_config, family.repeated(text_config))
        states.check_layers(probe, type(model).__name__)
        output = _probed(model, probe, cache_name)
        grid = _grid(model, family, text_config, config.grid)
        rounding = _rounding(text_config, config)
        cut_ids = tuple(sorted(set(tokenizer.all_special_ids))) if tokenizer is not None else ()
        return cls(
            model=model,
            tokenizer=tokenizer,
            config=config,
            family=family,
            cache_name=cache_name,
            text_config=text_config,
            grid=grid,
            cut_ids=cut_ids,
            segmenting=_segmenting(model, family, CutRule(grid, cut_ids, _text_ends(tokenizer, config)), config),
            prefill_cost=prefill_cost(model, probe.full_attention_layers),
            rounding=rounding,
            size=states.measure(probe, output, rounding),
            output_type=type(output),
        )

    @property
    def chunk(self) -> int:
        """Tokens to which the kernels pad a segment."""
        return self.family.chunk(self.text_config)

    @property
    def facts(self) -> ModelFacts:
        """What advice needs to know of the model."""
        decode = None if self.tokenizer is None else self.tokenizer.decode
        size = self.size
        return ModelFacts(size.state_bytes, size.kv_bytes_per_token, self.smaller_grid, decode, size.page_bytes)

    def live_cache(self) -> LiveCache:
        """A fresh live cache for one request, or for one row of it."""
        live = LiveCache(self.text_config, self.family.repeated(self.text_config))
        states.place_windows(live, self.model)
        return live

    def tokens_of(self, ids: torch.Tensor | str) -> Tokens:
        """One prompt, given as ids or as a string, as int32 of shape `(length,)`.

        Raises:
            ValueError: They are no ids of this model, or it is a string and there is no tokenizer.
        """
        given = as_ids(ids, self.tokenizer)
        check_ids(given, self.model.get_input_embeddings().num_embeddings, "ids")
        return given[0].to("cpu", torch.int32).numpy()

    def logits_to_keep(self, tokens: int) -> dict[str, int]:
        """The keyword with which the forward gives logits for its last tokens alone; none where it gives all."""
        takes = "logits_to_keep" in inspect.signature(type(self.model).forward).parameters
        return {"logits_to_keep": tokens} if takes else {}

    def output(self, logits: torch.Tensor, live: LiveCache) -> Any:
        """The model's output for logits `(batch, 1, vocabulary)` that are known, and the live cache behind them."""
        return self.output_type(logits=logits, **{self.cache_name: live})

    def smaller_grid(self, tokens: int) -> int:
        """The grid halved until a prefix of so many tokens has a cut, in whole kernel chunks; 0 where none does."""
        grid = self.grid
        while grid > min(max(tokens, 0), self.grid - 1):
            grid //= 2
        grid -= grid % self.chunk
        return grid if grid >= 2 else 0


def _probed(model: Any, probe: LiveCache, cache_name: str) -> Any:
    """The output for a few tokens, which fill the probe.

    Raises:
        UnsupportedModelError: The model cannot be called as models of its family are.
    """
    try:
        return states.probe(model, probe, cache_name)
    except Exception as error:
        if out_of_memory(error) or isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be called as models of its family are: two tokens with a fresh cache end "
            f"in {type(error).__name__}: {error}"
        ) from error


def _grid(model: Any, family: Family, text_config: Any, asked: int | None) -> int:
    """Tokens between regular cuts: as asked for, or the family's own."""
    if asked is None:
        return family.grid(text_config, input_device(model).type)
    chunk = family.chunk(text_config)
    if asked % chunk:
        logger.warning_once(
            f"grid={asked} is not a multiple of the kernel chunk of {chunk} tokens of {type(model).__name__}: "
            "still exact, but every segment is padded to the chunk and costs as much."
        )
    return asked


def _rounding(text_config: Any, config: SparseCacheConfig) -> Rounding:
    """How states are kept: in 8 bits what may be, or all where nothing may and the user insists (see `proof`)."""
    measured = INT8.get(text_config.model_type, UNKNOWN)
    return rounding_of(config.storage, measured.parts or PARTS)


def _text_ends(tokenizer: Any, config: SparseCacheConfig) -> TextEnds | None:
    """What finds the ends of the strings after which prompts are cut.

    Raises:
        ValueError: There are such strings, and no tokenizer.
    """
    if not config.cut_after:
        return None
    if tokenizer is None:
        raise ValueError(
            f"cut_after={shown(config.cut_after)} needs a tokenizer to find these strings: SparsePrefixCache(model, "
            "tokenizer, ...)."
        )

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return TextEnds(config.cut_after, decode)


def _segmenting(model: Any, family: Family, rule: CutRule, config: SparseCacheConfig) -> Segmenting:
    rounds = rounding_of(config.storage).rounds
    if config.exactness == "bitwise":
        return Bitwise(rule, rounds=rounds)
    text_config, device = model.config.get_text_config(decoder=True), input_device(model).type
    pieces = [config.pieces, rule.grid if family.scans and device == "cpu" else None]
    piece = min((size for size in pieces if size is not None), default=None)
    weights = sum(parameter.numel() for parameter in model.parameters()) or 1
    cut = family.cut_tokens(text_config, device) if config.cut_tokens is None else float(config.cut_tokens)
    forward = family.forward_tokens(text_config, device, weights)
    return Replayable(rule, family.step(text_config), piece, cut, forward, device != "cpu", rounds=rounds)
