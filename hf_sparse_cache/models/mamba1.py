"""Multi-token resume of the Mamba-1 selective scan (Mamba, FalconMamba, Jamba, Zamba).

transformers' `mamba_selective_scan` starts every call with more than one token from a zero state, so a prefill that
continues from a checkpoint silently forgets it. The scan is a module global of each modeling file; while at least one
handle is attached to a model of that family, the global is rebound to a function that starts from the state the live
cache announces (`announce`) and that is the stock scan, untouched, whenever nothing was announced.

Symbols follow Gu and Dao, "Mamba" (arXiv 2312.00752), Section 2: x (B, D, L) input, dt the step, A (D, N), B and C
(B, N, L) in the kernel's layout, h (B, D, N) the state, z the gate.
"""

import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..forks import ForkSafeLock


_MODULES = {
    "mamba": "transformers.models.mamba.modeling_mamba",
    "falcon_mamba": "transformers.models.falcon_mamba.modeling_falcon_mamba",
    "jamba": "transformers.models.jamba.modeling_jamba",
    "zamba": "transformers.models.zamba.modeling_zamba",
}
_SCAN = "mamba_selective_scan"
# Bounds the [block, B, D, N] temporaries; small blocks also stay in the processor's cache.
_BLOCK_TOKENS = 64

# A compiled graph would remember the state of the call that it was traced with.
_outside_graphs: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.disable
_pending = threading.local()
_lock = ForkSafeLock()
_users: dict[str, int] = {}
_stock: dict[str, Callable[..., Any]] = {}


def needs_hook(model_type: str) -> bool:
    """Whether models of `model_type` run the Mamba-1 scan, which forgets its state on multi-token calls."""
    return model_type in _MODULES


def install(model_type: str) -> None:
    """Rebind the scan of one modeling file. Counted: each call needs one `uninstall`."""
    with _lock:
        if _users.get(model_type, 0) == 0:
            module = importlib.import_module(_MODULES[model_type])
            _stock[model_type] = getattr(module, _SCAN)
            setattr(module, _SCAN, _resuming(_stock[model_type]))
        _users[model_type] = _users.get(model_type, 0) + 1


def uninstall(model_type: str) -> None:
    """Give the modeling file its own scan back once the last user has gone."""
    with _lock:
        _users[model_type] -= 1
        if _users[model_type] == 0:
            setattr(importlib.import_module(_MODULES[model_type]), _SCAN, _stock.pop(model_type))


@_outside_graphs
def announce(state: torch.Tensor | None) -> None:
    """Set (or with None clear) the state from which the next scan of this thread starts.

    Args:
        state: `(B, D, N)`, or `(B, heads, D, N)` for Zamba, whose layers call the scan once per head, in order.
            Read during the scan, never written.
    """
    _pending.states = None if state is None else iter((state,) if state.dim() == 3 else state.unbind(1))


def _resuming(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The stock scan, except that it starts from the announced state when there is one."""

    @_outside_graphs
    def scan(
        x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, **options: Any
    ) -> Any:
        states = getattr(_pending, "states", None)
        if states is None:
            return stock(x, dt, A, B, C, **options)
        resume = scan_from if x.device.type == "cpu" else around_kernel(stock)
        return resume(next(states), x, dt, A, B, C, **options)

    resuming: Callable[..., Any] = scan
    resuming.__wrapped__ = stock  # type: ignore[attr-defined]
    return resuming


def _step_sizes(dt: torch.Tensor, delta_bias: torch.Tensor | None, delta_softplus: bool) -> torch.Tensor:
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    return F.softplus(dt) if delta_softplus else dt


def scan_from(
    h: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The sequential scan started from a state, in the order of the stock torch loop, multiply and add fused.

    Args:
        h: state `(B, D, N)` to start from; not modified.
        x, dt: input and raw step sizes `(B, D, L)`.
        A: `(D, N)`. B, C: `(B, N, L)`.
        D, z, delta_bias: skip weights `(D,)`, gate `(B, D, L)`, step bias `(D,)`, each optional.
        delta_softplus: pass the step sizes through a softplus.
        return_last_state: also return the final state.

    Returns:
        The output `(B, D, L)`, and the final state `(B, D, N)` when asked for.
    """
    dtype = x.dtype
    step = _step_sizes(dt, delta_bias, delta_softplus).permute(2, 0, 1)  # (L, B, D)
    steps_in, B_in, C_in = x.float().permute(2, 0, 1), B.float().permute(2, 0, 1), C.permute(2, 0, 1)
    outputs = []
    for start in range(0, x.shape[-1], _BLOCK_TOKENS):
        block = slice(start, start + _BLOCK_TOKENS)
        decay = torch.exp(step[block, ..., None] * A)  # (block, B, D, N)
        states = step[block, ..., None] * B_in[block, :, None, :] * steps_in[block, ..., None]
        for now, keep in zip(states, decay, strict=True):
            h = torch.addcmul(now, keep, h, out=now)
        outputs.append(torch.matmul(states.to(dtype), C_in[block, ..., None]).squeeze(-1))
    y = torch.cat(outputs).permute(1, 2, 0)  # (B, D, L)
    if D is not None:
        y = y + x * D[None, :, None]
    if z is not None:
        y = y * F.silu(z)
    # The view into `states` would keep a whole block of states alive.
    return (y, h.clone()) if return_last_state else y


def around_kernel(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Resume with any scan that starts from zero: the scan is linear in its state, so the contribution of h₀ is added.

    `y += silu(z) · C_t · exp(A · cumsum(dt)) · h₀` and `h_T += exp(A · Σ dt) · h₀`. A is negative, so the exponentials
    never overflow. The arguments are those of `scan_from`.
    """

    def resume(
        h: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        **options: Any,
    ) -> Any:
        y, last = stock(x, dt, A, B, C, **{**options, "return_last_state": True})
        step = _step_sizes(dt, options.get("delta_bias"), bool(options.get("delta_softplus")))
        elapsed = step.to(torch.promote_types(step.dtype, torch.float32)).cumsum(-1)
        gate = options.get("z")
        y = y.clone()
        for start in range(0, x.shape[-1], _BLOCK_TOKENS):
            block = slice(start, start + _BLOCK_TOKENS)
            decay = torch.exp(elapsed[:, :, block, None] * A[None, :, None, :])  # (B, D, block, N)
            added = torch.einsum(
                "bdln,bnl->bdl", (decay * h[:, :, None, :]).to(decay.dtype), C[:, :, block].to(decay.dtype)
            )
            y[:, :, block] += (added if gate is None else added * F.silu(gate[:, :, block])).to(y.dtype)
        last = last + torch.exp(elapsed[:, :, -1, None] * A) * h
        return (y, last) if options.get("return_last_state") else y

    return resume
