"""Multi-token resume of the Mamba-1 selective scan (Mamba, FalconMamba, Jamba, Zamba).

transformers' `mamba_selective_scan` starts every call with more than one token from a zero state, so a prefill that
continues from a checkpoint silently forgets it. The layers find the scan among the globals of their modeling file,
which may be a copy of transformers' own under any name; while somebody holds it for a model (`held`: each attached
handle, each open prefill), those globals are rebound to a function that starts from the state the live cache announces
(`announce`) and that is the stock scan, untouched, whenever nothing was announced. A state that no scan takes is an
error (`settled`), never a wrong answer.

Symbols follow Gu and Dao, "Mamba" (arXiv 2312.00752), Section 2: x (B, D, L) input, dt the step, A (D, N), B and C
(B, N, L) in the kernel's layout, h (B, D, N) the state, z the gate.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import UnsupportedModelError
from ..forks import ForkSafeLock


_FORGETFUL = frozenset({"mamba", "falcon_mamba", "jamba", "zamba"})
_SCAN = "mamba_selective_scan"
# What a scan takes, under whatever name a modeling file calls it.
_SCAN_PARAMETERS = frozenset({"A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state"})
# Bounds the [block, B, D, N] temporaries; small blocks also stay in the processor's cache.
_BLOCK_TOKENS = 64
# What follows (x, dt, A, B, C), in the order of every known scan, for callers that leave the names out.
_FURTHER = ("D", "z", "delta_bias", "delta_softplus", "return_last_state")

# A compiled graph would remember the state of the call that it was traced with.
_outside_graphs: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.disable
_pending = threading.local()
_lock = ForkSafeLock()
# Where a scan is bound now: (id of a modeling file's globals, name in it).
_bound: dict[tuple[int, str], "_Place"] = {}
_places_of_class: weakref.WeakKeyDictionary[type, list[tuple[dict[str, Any], str]]] = weakref.WeakKeyDictionary()


@dataclass
class _Place:
    """A global that holds a scan, rebound while it has users."""

    namespace: dict[str, Any]
    name: str
    stock: Callable[..., Any]
    users: int = 0


def needs_hook(model_type: str) -> bool:
    """Whether models of `model_type` run the Mamba-1 scan, which forgets its state on multi-token calls."""
    return model_type in _FORGETFUL


class Scan:
    """The scan of one model's layers, in all modeling files that they come from, bound while it is held.

    Counted for each of those files, so that models and handles that share one never take the scan from each other.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
        if needs_hook(model.config.get_text_config(decoder=True).model_type):  # type: ignore[operator, union-attr]
            for kind in {type(module) for module in model.modules()}:
                found.update({(id(namespace), name): (namespace, name) for namespace, name in _scans_of(kind)})
        self._found = found

    def hold(self) -> None:
        """Bind the scan. Counted: each call needs one `release`."""
        with _lock:
            for key, (namespace, name) in self._found.items():
                place = _bound.get(key)
                if place is None:
                    place = _bound[key] = _Place(namespace, name, namespace[name])
                    namespace[name] = _resuming(place.stock)
                place.users += 1

    def release(self) -> None:
        """Give each modeling file its own scan back once its last user has gone."""
        with _lock:
            for key in self._found:
                place = _bound[key]
                place.users -= 1
                if place.users == 0:
                    del _bound[key]
                    if inspect.unwrap(place.namespace[place.name]) is inspect.unwrap(place.stock):
                        place.namespace[place.name] = place.stock  # unless somebody has put another scan there


@contextmanager
def held(model: torch.nn.Module) -> Iterator[None]:
    """Keep the scan bound for as long as a prefill runs, whatever becomes of the handle meanwhile."""
    scan = Scan(model)
    scan.hold()
    try:
        yield
    finally:
        # Interrupted between announcing a state and the scan, this thread's next scan, even a stock one, would use it.
        announce(None)
        scan.release()


def _scans_of(kind: type) -> list[tuple[dict[str, Any], str]]:
    """The globals, as (namespace, name), that hold a scan and are read by the methods of a class of modules."""
    known = _places_of_class.get(kind)
    if known is None:
        known = _places_of_class[kind] = [
            (function.__globals__, name)
            for base in kind.__mro__
            if not str(base.__module__).startswith("torch.")
            for method in vars(base).values()
            for function in _unwrapped(method)
            for name in _names(function.__code__)
            if _is_scan(name, function.__globals__.get(name))
        ]
    return known


def _unwrapped(method: Any) -> Iterator[FunctionType]:
    """A method's function and those that its decorators wrap, whether or not they say so."""
    found, ahead = set(), [getattr(method, "__func__", method)]
    while ahead:
        function = ahead.pop()
        if isinstance(function, FunctionType) and function not in found:
            found.add(function)
            yield function
            ahead += [getattr(function, "__wrapped__", None), *map(_held_by, function.__closure__ or ())]


def _held_by(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that has no value yet
        return None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_scan(name: str, value: Any) -> bool:
    if value is None or not callable(value) or isinstance(value, type):
        return False
    plain = inspect.unwrap(value)
    if name == _SCAN or getattr(plain, "__name__", "") == _SCAN:
        return True
    return isinstance(plain, FunctionType) and _SCAN_PARAMETERS.issubset(inspect.signature(plain).parameters)


@_outside_graphs
def announce(state: torch.Tensor | None) -> None:
    """Set (or with None clear) the state from which the next scan of this thread starts.

    Args:
        state: `(B, D, N)`, or `(B, heads, D, N)` for Zamba, whose layers call the scan once per head, in order.
            Read during the scan, never written.
    """
    _pending.states = None if state is None else [state] if state.dim() == 3 else list(state.unbind(1))


@_outside_graphs
def settled() -> None:
    """End what `announce` began.

    Raises:
        UnsupportedModelError: no scan took the announced state: the results would be those of a forgotten prefix.
    """
    left, _pending.states = getattr(_pending, "states", None), None
    if left:
        raise UnsupportedModelError(
            "A layer was given the state of the tokens before and its scan did not take it. Either the scan is not "
            "one that SparsePrefixCache knows (see docs/exactness.md), or its handle was detached: then make "
            "another, and pass the handle instead of the cache of an earlier call."
        )


def _resuming(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The stock scan, except that it starts from the announced state when there is one."""

    kernel = is_kernel(stock)

    @_outside_graphs
    def scan(*inputs: torch.Tensor, **options: Any) -> Any:
        states = getattr(_pending, "states", None)
        if states is None:
            return stock(*inputs, **options)
        if not states:
            _pending.states = None
            raise UnsupportedModelError(
                "A layer runs more scans than it keeps states: no exact resume is known for it."
            )
        reference = inputs[0].device.type == "cpu" if kernel is None else not kernel
        resume: Callable[..., Any] = scan_from if reference else around_kernel(stock)
        return resume(states.pop(0), *inputs, **options)

    resuming: Callable[..., Any] = scan
    resuming.__wrapped__ = stock  # type: ignore[attr-defined]
    return resuming


def is_kernel(scan: Callable[..., Any]) -> bool | None:
    """Whether a package's kernel stands behind a scan of transformers; None where the scan does not tell."""
    for function in _unwrapped(scan):
        held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        # transformers 5.15 holds the reference only as what is wrapped.
        reference = (
            _held_by(held["torch_function"]) if "torch_function" in held else getattr(function, "__wrapped__", None)
        )
        if "implementation" in held and reference is not None:
            return _held_by(held["implementation"]) is not reference
    return None


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
    never overflow. Step sizes are added up in float32 whatever the model's dtype is, as a kernel does it: rounded to
    16 bits they would put the state off by more than the model's own rounding. The arguments are those of `scan_from`.
    """

    def resume(
        h: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *further: Any,
        **options: Any,
    ) -> Any:
        options.update(zip(_FURTHER, further, strict=False))
        y, last = stock(x, dt, A, B, C, **{**options, "return_last_state": True})
        wide = torch.promote_types(dt.dtype, torch.float32)
        step = _step_sizes(dt.to(wide), options.get("delta_bias"), bool(options.get("delta_softplus")))
        elapsed = step.cumsum(-1)
        gate = options.get("z")
        y = y.clone()
        for start in range(0, x.shape[-1], _BLOCK_TOKENS):
            block = slice(start, start + _BLOCK_TOKENS)
            decay = torch.exp(elapsed[:, :, block, None] * A[None, :, None, :])  # (B, D, block, N)
            added = torch.einsum("bdln,bnl->bdl", decay * h[:, :, None, :], C[:, :, block].to(decay.dtype))
            y[:, :, block] += added if gate is None else added * F.silu(gate[:, :, block].to(wide))
        last = last + torch.exp(elapsed[:, :, -1, None] * A) * h
        return (y, last) if options.get("return_last_state") else y

    return resume
