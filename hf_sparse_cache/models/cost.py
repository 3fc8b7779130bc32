"""G(t), the cost of prefilling t tokens, from a model's shape: linear, and quadratic where it has full attention."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..planning.views import Floats


def prefill_cost(model: Any, full_attention_layers: int) -> Callable[[Floats], Floats]:
    """The cost of prefilling t tokens relative to one token of a short prompt.

    A token takes two operations per weight, and in each full-attention layer four per channel of its queries for every
    token before it: `G(t) = t + (layers * channels / weights) t²`. Experts that a token does not reach are counted as
    weights, so the quadratic term is a lower bound for mixtures of experts.

    Args:
        model: the model whose weights are counted.
        full_attention_layers: layers that attend to every earlier token.

    Returns:
        A function of an array of positions, in tokens. For measured seconds, give the policy a function of your own.
    """
    config = model.config.get_text_config(decoder=True)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    width = int(getattr(config, "head_dim", 0) or getattr(config, "hidden_size", 0) // max(heads, 1))
    weights = sum(parameter.numel() for parameter in model.parameters()) or 1
    curvature = full_attention_layers * heads * width / weights

    def cost(positions: Floats) -> Floats:
        return np.asarray(positions + curvature * positions**2, dtype=np.float64)

    return cost
