"""Restored keys and values wait for the first forward, so that a prefix is copied once and not twice.

Every `update` of a layer with full attention joins what the layer holds and what is new in one new tensor. To join the
stored spans when they are restored would be to copy a whole prefix only to have it copied again. A restored cache
therefore holds layers that keep their spans as they are until their first update, which joins everything at once.

Such a layer is of a class derived from the one whose place it takes, in which whatever reads or sets keys or values
before that (beam search, cropping, capture, a model that looks for itself) finds them joined. After the first forward
`settle` puts layers of the stock class back, so that tokens are decoded on what transformers made, at no cost each.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from .rounding import Packed, chained


class Waiting:
    """What a layer class is given while its keys and values are in spans of shape `(batch, heads, length, dim)`.

    Attributes:
        stock: the class itself.
        spans: by "keys" and "values", what has not been joined; the layer has no attribute of that name meanwhile.
        ready: waits until the values of the spans may be read.
    """

    stock: Any
    spans: dict[str, Sequence[torch.Tensor | Packed]]
    ready: Callable[[], object]

    def __getattr__(self, name: str) -> Any:
        spans = self.__dict__.get("spans", {})
        if name not in spans:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.ready()
        whole = chained(spans[name], -2)
        # Anew, because a shallow copy of the layer has the same dictionary.
        self.__dict__.update({name: whole, "spans": {kept: spans[kept] for kept in spans if kept != name}})
        return whole

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's own update, but for the first, which joins spans and new tokens in one copy."""
        if not (self._waits("keys") and self._waits("values")):
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(  # type: ignore[misc]
                key_states, value_states, *args, **kwargs
            )
            return updated
        self.ready()
        keys, values = (
            chained([*self.spans[name], new], -2) for name, new in (("keys", key_states), ("values", value_states))
        )
        self.keys, self.values, self.spans = keys, values, {}
        return keys, values

    def get_seq_length(self) -> int:
        """The tokens it holds; to ask joins nothing."""
        if self._waits("keys"):
            return sum(span.shape[-2] for span in self.spans["keys"])
        return int(super().get_seq_length())  # type: ignore[misc]

    def _waits(self, name: str) -> bool:
        return name not in self.__dict__


def waiting(layer: Any, keys: Sequence[torch.Tensor | Packed], values: Sequence[torch.Tensor | Packed]) -> Any:
    """A layer like a fresh one, with keys and values in spans `(batch, heads, length, dim)`, which are only read.

    Until `ready`, which may be replaced, has returned, not even that is done.
    """
    layer.lazy_initialization(keys[0], values[0])
    kind = _waiting(layer.__class__)
    held = kind.__new__(kind)
    held.__dict__.update(layer.__dict__, spans={"keys": keys, "values": values}, ready=_at_once)
    del held.keys, held.values
    return held


def settle(layers: list[Any]) -> None:
    """Join what still waits, and put layers of the stock classes in the places of those that waited."""
    for index, layer in enumerate(layers):
        if isinstance(layer, Waiting):
            _ = layer.keys, layer.values
            settled = layer.stock.__new__(layer.stock)
            settled.__dict__.update(layer.__dict__)
            del settled.spans, settled.ready
            layers[index] = settled


def _at_once() -> None:
    """What was proved before."""


@cache
def _waiting(stock: Any) -> Any:
    # Under a `_layer_type` transformers would from now on make layers of this class for everybody.
    return type(f"Waiting{stock.__name__}", (Waiting, stock), {"stock": stock, "_layer_type": None})
