"""What is looked at in every prefill: that a prompt in segments reaches the layers as it would in one piece.

Anything between `generate()` and the layers may have been replaced or hooked by a library that we did not write.
Looked at are shapes, lengths and identities, which cost nothing on an accelerator; token ids and positions are
compared where somebody has replaced the method that prepares them, and wherever they are in main memory.
"""

from typing import Any

import torch

from . import states
from .live import LiveCache


class ChangedPrefillError(Exception):
    """Segments would not compute what one piece computes; the message says why, and ends no sentence."""


class ModelChangedError(ChangedPrefillError):
    """The model is no longer the one that the prompt's first segments were computed with."""


def check_inputs(model: Any, inputs: dict[str, Any], asked: dict[str, Any], live: LiveCache) -> None:
    """Whether `prepare_inputs_for_generation` gave the segment's tokens and positions, and nothing in their place.

    Args:
        model: the model whose method it is.
        inputs: what it gave.
        asked: `input_ids` `(1, length)` of the segment, and its `position_ids` where the model takes any.
        live: the cache that the forward must work on.

    Raises:
        ChangedPrefillError: it gave something else.
    """
    if inputs.get("inputs_embeds") is not None:
        raise ChangedPrefillError("prepare_inputs_for_generation puts embeddings in the place of tokens")
    if not any(value is live for value in inputs.values()):
        raise ChangedPrefillError("prepare_inputs_for_generation puts another cache in the place of the request's own")
    foreign = "prepare_inputs_for_generation" in vars(model)
    further = [name for name, value in inputs.items() if torch.is_tensor(value) and name not in asked]
    if foreign and further:
        raise ChangedPrefillError(f"prepare_inputs_for_generation adds {further[0]}")
    for name, expected in asked.items():
        found = inputs.get(name)
        alike = torch.is_tensor(found) and found.shape[-2:] == expected.shape[-2:]
        if alike and (foreign or expected.device.type == "cpu"):
            alike = bool((found == expected).all())
        if not alike:
            raise ChangedPrefillError(f"prepare_inputs_for_generation changes {name}")


def check_filled(live: LiveCache, tokens: int) -> None:
    """Whether every layer holds keys and values of exactly the tokens that were computed.

    Raises:
        ChangedPrefillError: a layer holds others, or none.
    """
    for index, layer in enumerate(live.layers):
        for name, held, expected in states.lengths(layer, tokens):
            if held != expected:
                raise ChangedPrefillError(
                    f"layer {index} holds {name} of {held} tokens where {expected} are due, so that something, such "
                    "as a hook, takes some out or puts some in"
                )
