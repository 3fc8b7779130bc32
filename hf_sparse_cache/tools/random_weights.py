"""Seeded random weights under which a model depends on everything it carries from token to token.

With the usual initialisation (standard deviation 0.02, tied embeddings) the logits hardly notice a lost state, and a
check of exactness cannot fail. Here every matrix is drawn from N(0, 1 / fan_in), so activations and logits keep a
standard deviation near 1, and every decay is slow enough for a state to matter hundreds of tokens later.
"""

import math
import zlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.families import kept_in_float32


# Step sizes of the state space layers and gates of the delta rules, log-uniform as in Mamba (arXiv 2312.00752, 3.6).
STEP_MIN, STEP_MAX = 1e-3, 1e-1
# Rates A of the layers that have one per head or channel, and not one per state: A = exp(A_log).
RATE_MIN, RATE_MAX = 1.0, 4.0


def draw_weights(model: PreTrainedModel, seed: int = 0, embedding_scale: float = 1.0) -> PreTrainedModel:
    """Redraw the weights of `model` in place.

    Every parameter has its own generator, seeded by `seed` and the parameter's name, so the values depend neither on
    the order of construction nor on the global generator.

    Args:
        model (`PreTrainedModel`): any language model, in any floating dtype.
        seed (`int`): the same seed gives the same weights.
        embedding_scale (`float`): standard deviation of the input embeddings.

    Returns:
        `PreTrainedModel`: the model itself.
    """
    inputs = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            value = _draw(name, parameter, generator)
            if parameter is inputs:
                value = torch.randn(parameter.shape, generator=generator) * embedding_scale
            if value is not None:
                parameter.copy_(value)
    return model


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast a model in place as `from_pretrained(dtype=...)` does: what its class keeps in float32 stays there.

    Args:
        model (`PreTrainedModel`): a model in float32.
        dtype (`torch.dtype`): a floating dtype.

    Returns:
        `PreTrainedModel`: the model itself.
    """
    kept = kept_in_float32(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():  # without the rotary frequencies, which stay float32
        if tensor.is_floating_point() and not any(f".{module}." in f".{name}." for module in kept):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor | None:
    """New float32 values for one parameter, or None where the architecture's own initial values are right."""
    shape, last = parameter.shape, name.rsplit(".", 1)[-1]
    if last == "A_log":
        if len(shape) > 1 and shape[-1] > 1:  # Mamba-1: one rate per state, A = 1 .. N
            return torch.arange(1, shape[-1] + 1, dtype=torch.float32).log().expand(shape)
        return torch.empty(shape).uniform_(math.log(RATE_MIN), math.log(RATE_MAX), generator=generator)
    if last in ("dt_bias", "dt_proj_bias") or name.endswith("dt_proj.bias"):
        steps = torch.empty(shape).uniform_(math.log(STEP_MIN), math.log(STEP_MAX), generator=generator).exp()
        return steps + torch.log(-torch.expm1(-steps))  # inverse of softplus
    if "fgate" in name and last == "bias":  # xLSTM forgets by a sigmoid of this
        return torch.linspace(4.0, 7.0, len(parameter))
    if last == "temp":  # Zaya scales its keys by this; at its initial 0 all attention would be uniform
        return torch.ones(shape)
    if len(shape) < 2 or last == "D" or any(word in last for word in ("bias", "scale", "time_mix")) or "norm" in name:
        return None
    # Linear weights are (out, in), experts and heads (.., out, in), depthwise convolutions (channels, 1, kernel).
    fan_in = math.prod(shape[1:]) if "conv" in name else shape[-1]
    gain = 2.0 if "x_proj" in name else 1.0  # Mamba-1 makes B and C from inputs that silu has halved
    return torch.randn(shape, generator=generator) * gain / math.sqrt(fan_in)
