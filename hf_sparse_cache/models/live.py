"""The live cache: what one request's `generate()` works on, from prefill to the last token.

A `DynamicCache` of the model's own layer classes, which therefore decodes just as an uncached run does. It adds what
transformers leaves open for models without full attention, and it tells the Mamba-1 scan from which state to start.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from . import mamba1
from .calls import Call
from .weights import Identity


class LiveCache(DynamicCache):
    """The cache of one request.

    Args:
        config: of the model's text part.
        repeated: the layers of which there are further ones, for each of those (see `Family.repeated`).

    Attributes:
        call: the call whose prompt is to be prefilled, until that has been done; None afterwards.
        origin: the handle that it was made for, as long as that is there.
        found: the model's name when the call was looked at; None where nobody has looked.
        length: tokens consumed by the prefill; where `recurrent_only`, by all forwards since.
        rounded: of so many tokens keys and values are rounded values (see `rounding`).
        text: what was prefilled, `(length,)`, where the cache is in a user's hands (see `handed`); None elsewhere.
        last_logits: of the last token of that text, `(1, 1, vocabulary)`.
        turn: what the answer to the prompt goes on from, until the call takes it.
        unfinished: whether a forward on it has begun and not ended, so that its layers may hold different tokens.
        recurrent_only: whether no layer keeps keys and values, so that nothing in it counts the tokens decoded since.
        full_attention_layers: how many layers keep keys and values of every token.
    """

    def __init__(self, config: Any, repeated: Sequence[int] = ()) -> None:
        super().__init__(config=config)
        # As the model's first forward would add them, which does so only where they are missing.
        self.layers += [copy.deepcopy(self.layers[index]) for index in repeated]
        self.call: Call | None = None
        self.origin: weakref.ref[Cache] | None = None
        self.found: Identity | None = None
        self.length = self.rounded = 0
        self.text: torch.Tensor | None = None
        self.last_logits: torch.Tensor | None = None
        self.turn: Any = None
        self.unfinished = False
        self.recurrent_only = not any(isinstance(layer, CacheLayerMixin) for layer in self.layers)
        self.full_attention_layers = sum(
            isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer)
            for layer in self.layers
        )
        self._scan_forgets = mamba1.needs_hook(config.get_text_config(decoder=True).model_type)

    def start_anew(self, fresh: "LiveCache") -> None:
        """Take the place of a fresh cache for the same model: nothing that was half done is left."""
        self.__dict__.update(fresh.__dict__)

    def as_stock(self) -> None:
        """Forget what a cache of transformers forgets: the call runs as if there were no handle.

        A Mamba-1 scan of several tokens then starts from nothing, while decoding too, as peft's prompt tuning has it.
        """
        self._scan_forgets = False

    @property
    def is_compileable(self) -> bool:
        # Layers of fixed size alone would send generate() down its auto-compile path, with 4-D masks.
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.recurrent_only:
            return self.length
        return int(super().get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.recurrent_only:
            return self.length + query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The one call that every multi-token pass makes just before its scan; decoding does not come here.
        if self._scan_forgets:
            layer: Any = self.layers[layer_idx]
            mamba1.announce(layer.recurrent_states[0] if layer.has_previous_state[0] else None)
        states: torch.Tensor = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self._scan_forgets:
            mamba1.settled()
        states: torch.Tensor = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return states
