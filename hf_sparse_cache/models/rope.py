"""Rotary positions whose frequencies depend on the length of a prompt: `dynamic`, and `longrope` beyond its training.

In one piece every token sees the frequencies of the whole prompt; in segments it would see those of its segment's end.
Up to the trained length both are the same, from there on such prompts run uncached. transformers keeps the frequencies
of the longest prompt so far on the module, so that the same call can give other answers the second time; `as_loaded`
takes them back.
"""

from collections.abc import Iterator
from typing import Any

import torch


# What the forward of such a module sets anew.
_SET_BY_FORWARD = ("inv_freq", "max_seq_len_cached", "attention_scaling")
# What a multimodal model keeps of the prompt it saw last.
_OF_A_PROMPT = "rope_deltas"


def length_limit(model: torch.nn.Module) -> int:
    """The first prompt length at which the frequencies depend on the length; 0 where they never do."""
    limits = (limit for module in model.modules() for _, _, limit in _by_length(module))
    return min(limits, default=0)


def set_by_forward(module: torch.nn.Module, name: str) -> bool:
    """Whether an attribute of a module is set by its forward, from the length of what it is given."""
    return name == _OF_A_PROMPT or (name.endswith(_SET_BY_FORWARD) and any(_by_length(module)))


def as_loaded(model: torch.nn.Module) -> None:
    """Take back what earlier prompts have left, so that the next one sees the frequencies of its own length."""
    for module in model.modules():
        for prefix, kind, _ in _by_length(module):
            if "dynamic" in kind:
                module.register_buffer(
                    f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"), persistent=False
                )
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _by_length(module: Any) -> Iterator[tuple[str, str, int]]:
    """The prefix of its names, the kind and the limit of each set of frequencies that depends on the length."""
    kinds = vars(module).get("rope_type")
    if kinds is None:
        return
    for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [("", kinds)]:
        if "dynamic" in kind or kind == "longrope":
            parameters = getattr(module.config, "rope_parameters", None) or {}
            own = parameters.get(layer_type, parameters)
            trained = own.get("original_max_position_embeddings") or module.config.max_position_embeddings
            trained = min(trained, getattr(module, "original_max_seq_len", trained))
            yield f"{layer_type}_" if layer_type else "", kind, trained if "dynamic" in kind else trained + 1
