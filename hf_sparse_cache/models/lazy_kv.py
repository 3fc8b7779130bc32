"""Restored keys and values wait for the first forward, so that a prefix is copied once and not twice.

Every `update` of a layer with full attention joins what the layer holds and what is new in one new tensor. To join the
stored spans when they are restored would be to copy a whole prefix only to have it copied again. A restored layer
therefore keeps its spans as they are until its first update, which joins everything at once.

Meanwhile the layer is of a class derived from its own, in which whatever reads or sets its keys or values (beam
search, cropping, capture, a model that looks for itself) finds them joined. From then on, as from the first update on,
it is of its stock class again: tokens are decoded on what transformers made, at no cost each.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch


def wait(layer: Any, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Give a fresh layer its keys and values in spans of shape `(batch, heads, length, dim)`, which are only read."""
    layer.lazy_initialization(keys[0], values[0])
    layer.spans = (keys, values)
    layer.__class__ = _waiting(layer.__class__)


def settle(layers: Sequence[Any]) -> None:
    """Join now what still waits in any of the layers."""
    for layer in layers:
        getattr(layer, "keys", None)


def _join(layer: Any, *new: torch.Tensor) -> Any:
    """Make a waiting layer one of its stock class, with new keys and values, if any, behind the spans."""
    ends = [[tensor] for tensor in new] or [[], []]
    keys, values = (torch.cat([*spans, *end], dim=-2) for spans, end in zip(layer.spans, ends, strict=True))
    layer.__class__ = layer.__class__.__base__
    del layer.spans
    layer.keys, layer.values = keys, values
    return layer


@cache
def _waiting(stock: Any) -> type:
    """A layer class while its keys and values are in spans, under the name of `stock`: its rule is found by that."""

    class Waiting(stock):  # type: ignore[misc]
        spans: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            layer = _join(self, key_states, value_states)
            return layer.keys, layer.values

        def get_seq_length(self) -> int:
            return sum(span.shape[-2] for span in self.spans[0])

        @property
        def keys(self) -> Any:
            return _join(self).keys

        @keys.setter
        def keys(self, tensor: torch.Tensor | None) -> None:
            _join(self).keys = tensor

        @property
        def values(self) -> Any:
            return _join(self).values

        @values.setter
        def values(self, tensor: torch.Tensor | None) -> None:
            _join(self).values = tensor

    Waiting.__name__ = stock.__name__
    return Waiting
