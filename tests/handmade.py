"""Caches made by hand: a layer of every class, filled with whatever values, without a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)


WINDOW = 6
MAKE: dict[str, Any] = {
    "linear": lambda: LinearAttentionLayer(number_of_states=2),
    "full": DynamicLayer,
    "window": lambda: DynamicSlidingWindowLayer(WINDOW),
    "indexed": DynamicIndexedLayer,
    "linear and full": LinearAttentionAndFullAttentionLayer,
    "linear and window": lambda: LinearAttentionAndSlidingWindowAttentionLayer(WINDOW),
    "dummy": DummyLayer,
}


def empty(*kinds: str) -> Any:
    """A fresh cache with layers of these kinds, or of all."""
    cache = DynamicCache()
    cache.layers = [MAKE[kind]() for kind in kinds or MAKE]
    return cache


def feed(cache: Any, tokens: int, seed: int = 0) -> Any:
    """As the forward of a model with all these layers does it, with whatever values."""
    draw = torch.Generator().manual_seed(seed)
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            layer.update_conv_state(torch.randn(1, 6, 4, generator=draw), 0)
            for index in range(layer.number_of_states):  # the second one, where there is one, is recurrent alone
                layer.update_recurrent_state(torch.randn(1, 2, 3, 16, generator=draw), state_idx=index)
                layer.has_previous_state[index] = True
        if isinstance(layer, DynamicLayer):
            layer.update(*torch.randn(2, 1, 2, tokens, 16, generator=draw))
        if isinstance(layer, DynamicIndexedLayer):
            before = layer.indexer_keys.shape[1] if layer.is_indexer_initialized else 0
            layer.update_indexer(torch.randn(1, tokens, 16, generator=draw))
            layer.indexer_position_ids = torch.arange(before + tokens).expand(3, 1, -1).clone()
    return cache
