"""Stand-ins for the compiled kernels of causal_conv1d and mamba_ssm that refuse what those refuse.

They compute in float32 and round once, as the kernels do, and raise on layouts, widths, dtypes and shapes that the
kernels were not written for: what passes here can be given to them. The convolution sums its taps in another order
where channels lie next to each other in memory, as there the real one is another kernel: a resumed run that is given
another layout than a cold one is no longer equal to it.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_WIDTHS = (2, 3, 4)
_CHANNELS_AT_ONCE = 8
_MOST_STATES = 256
# How often each ran.
ran: Counter[str] = Counter()


def check(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"the kernel refuses this: {what}")


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """As of causal_conv1d 1.4 and later, without what transformers does not ask for."""
    ran["causal_conv1d_fn"] += 1
    check(seq_idx is None and initial_states is None and not return_final_states, "states belong to transformers here")
    check(final_states_out is None, "states belong to transformers here")
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    _check_weights(x, weight, bias, activation)
    dim, length = x.shape[1:]
    channels_last = x.stride(1) == 1 and x.stride(2) > 1
    if channels_last:
        check(dim % _CHANNELS_AT_ONCE == 0, f"{dim} channels, not a multiple of {_CHANNELS_AT_ONCE}")
        aligned = x.stride(2) % _CHANNELS_AT_ONCE == 0 and x.stride(0) % _CHANNELS_AT_ONCE == 0
        check(aligned, f"strides {x.stride()}, not multiples of {_CHANNELS_AT_ONCE}")
    width = weight.shape[1]
    padded, taps = F.pad(x.float(), (width - 1, 0)), range(width)
    summed = sum(
        padded[..., tap : tap + length] * weight[:, tap, None].float()
        for tap in (taps if channels_last else taps[::-1])
    )
    return _finished(summed, bias, activation, x.dtype)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One token, or a few; the state is changed in place."""
    ran["causal_conv1d_update"] += 1
    check(cache_seqlens is None and conv_state_indices is None, "not asked for by transformers")
    given = x.unsqueeze(-1) if x.dim() == 2 else x
    _check_weights(given, weight, bias, activation)
    check(conv_state.dtype == x.dtype, f"a state in {conv_state.dtype} for {x.dtype}")
    check(conv_state.shape[:2] == given.shape[:2], f"a state of {tuple(conv_state.shape)} for {tuple(x.shape)}")
    width, length = weight.shape[1], given.shape[-1]
    check(conv_state.shape[2] >= width - 1, f"a state of {conv_state.shape[2]} tokens for a width of {width}")
    past = torch.cat([conv_state, given], dim=-1)
    conv_state.copy_(past[..., -conv_state.shape[2] :])
    windows = past[..., -(length + width - 1) :].float()
    summed = sum(windows[..., tap : tap + length] * weight[:, tap, None].float() for tap in range(width))
    return _finished(summed, bias, activation, x.dtype).view(x.shape)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """As of mamba_ssm 2: from a state of zeros, always; it takes no other."""
    ran["selective_scan_fn"] += 1
    check(u.dim() == 3 and u.dtype in _FLOATS, f"u of {tuple(u.shape)} in {u.dtype}")
    batch, dim, length = u.shape
    states = A.shape[-1]
    check(A.dtype == torch.float32 and A.shape == (dim, states), f"A of {tuple(A.shape)} in {A.dtype}")
    check(states <= _MOST_STATES, f"{states} states, more than {_MOST_STATES}")
    for name, value, shape in (("delta", delta, u.shape), ("z", z, u.shape), *_grouped(B, C, (batch, states, length))):
        if value is not None:
            check(value.dtype == u.dtype, f"{name} in {value.dtype} beside u in {u.dtype}")
            check(value.shape == shape, f"{name} of {tuple(value.shape)}, not {tuple(shape)}")
    for name, value in (("D", D), ("delta_bias", delta_bias)):
        if value is not None:
            check(value.dtype == torch.float32, f"{name} in {value.dtype}, not float32")
            check(value.shape == (dim,), f"{name} of {tuple(value.shape)}, not {(dim,)}")
    check(delta_bias is None or delta_bias.stride(-1) == 1, "delta_bias is not contiguous")
    step = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    h, outputs = u.new_zeros(batch, dim, states, dtype=torch.float32), []
    for t in range(length):
        added = step[..., t, None] * B[:, None, :, t].float() * u[..., t, None].float()
        h = torch.exp(step[..., t, None] * A) * h + added
        outputs.append((h * C[:, None, :, t].float()).sum(-1))
    y = torch.stack(outputs, dim=-1)
    y = y if D is None else y + D[:, None] * u.float()
    y = (y if z is None else y * F.silu(z.float())).to(u.dtype)
    # The kernel hands out a view into what it has kept of every block.
    return (y, torch.stack([h, h], dim=-1)[..., 1]) if return_last_state else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the scan; the state is changed in place. The kernel, in Triton, takes any strides and dtypes."""
    ran["selective_state_update"] += 1
    check(state.dim() == 3 and x.shape == dt.shape == state.shape[:2], f"a state of {tuple(state.shape)}")
    check(A.shape == state.shape[1:] and B.shape == C.shape == (len(x), A.shape[1]), "A, B and C of other shapes")
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    added = step[..., None] * B[:, None].float() * x[..., None].float()
    h = torch.exp(step[..., None] * A.float()) * state.float() + added
    state.copy_(h)
    y = (h * C[:, None].float()).sum(-1)
    y = y if D is None else y + D.float() * x.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def _grouped(B: Tensor, C: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    yield "B", B, shape
    yield "C", C, shape


def _check_weights(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check(activation in (None, "silu", "swish"), f"activation {activation}")
    check(x.dim() == 3 and x.dtype in _FLOATS, f"x of {tuple(x.shape)} in {x.dtype}")
    check(weight.dtype in _FLOATS and weight.dim() == 2, f"weight of {tuple(weight.shape)} in {weight.dtype}")
    check(weight.shape[0] == x.shape[1], f"weight of {tuple(weight.shape)} for {x.shape[1]} channels")
    check(weight.shape[1] in _WIDTHS, f"width {weight.shape[1]}, not 2 to 4")
    if bias is not None:
        check(bias.dtype == weight.dtype, f"bias in {bias.dtype} beside weight in {weight.dtype}")
        check(bias.shape == weight.shape[:1] and bias.stride(-1) == 1, f"bias of {tuple(bias.shape)}")


def _finished(summed: Any, bias: Tensor | None, activation: str | None, dtype: torch.dtype) -> Tensor:
    summed = summed if bias is None else summed + bias.float()[:, None]
    result: Tensor = (F.silu(summed) if activation else summed).to(dtype)
    return result


# -- in the place of the reference ------------------------------------------------------------------------------------

_INSTEAD: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_selective_scan": selective_scan_fn,
    "mamba_selective_state_update": selective_state_update,
}


@contextmanager
def strict(model: torch.nn.Module) -> Iterator[Counter[str]]:
    """Let a model's modeling files run these, as transformers does where the packages are installed.

    Returns:
        How often each ran.
    """
    ran.clear()
    before: list[tuple[CellType, Any]] = []
    try:
        for module in {sys.modules[type(part).__module__] for part in model.modules()}:
            for name, function in _INSTEAD.items():
                chosen = getattr(module, name, None)
                if chosen is not None:
                    before += _put(chosen, function)
        assert before, "transformers chooses its kernels in another way than it did"
        yield ran
    finally:
        for cell, value in before:
            cell.cell_contents = value


def _put(chosen: Any, function: Callable[..., Any]) -> Iterator[tuple[CellType, Any]]:
    """Change the choice that a function of transformers holds; gives each cell with what it held."""
    while "implementation" not in chosen.__code__.co_freevars:
        chosen = chosen.__wrapped__
    held = dict(zip(chosen.__code__.co_freevars, chosen.__closure__, strict=True))
    values = {
        "implementation": function,
        "applicable_params": tuple(inspect.signature(function).parameters),
        "is_new_implementation": True,
    }
    for name, value in values.items():
        if name in held:  # the last one is not in transformers 5.15
            yield held[name], held[name].cell_contents
            held[name].cell_contents = value
