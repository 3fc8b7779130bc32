"""How a Mamba-1 scan is found, bound, given a state and given back; each step by itself, without a model."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import CellType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from guarded import Guarded, Held

from hf_sparse_cache import UnsupportedModelError
from hf_sparse_cache.models import mamba1


Patch = pytest.MonkeyPatch


def some_scan(
    *inputs: Any, A: Any = None, B: Any = None, C: Any = None, D: Any = None, z: Any = None, **_: Any
) -> Any:
    return "stock"


some_scan.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in mamba1._SCAN_PARAMETERS]
)


def mamba_selective_scan(*inputs: Any) -> Any:
    return "named"


def unrelated(A: Any, B: Any, C: Any) -> Any:
    return None


class Callable_:
    """Has the name of a scan, as a compiled kernel does; no function."""

    __name__ = "mamba_selective_scan"

    def __call__(self, *inputs: Any) -> Any:
        return None


def test_what_is_taken_for_a_scan() -> None:
    found = mamba1._is_scan
    assert found("anything", some_scan) and found("anything", mamba_selective_scan)
    assert found("mamba_selective_scan", unrelated) and found("anything", Callable_())
    assert found("anything", functools.wraps(some_scan)(lambda *inputs: None))
    assert not found("anything", unrelated) and not found("anything", None) and not found("anything", 3)
    assert not found("mamba_selective_scan", None) and not found("mamba_selective_scan", "a word")
    assert not found("mamba_selective_scan", type("mamba_selective_scan", (), {})) and not found("anything", len)
    assert not found("anything", type("Kind", (), {"__init__": some_scan}))
    assert not found("anything", functools.partial(some_scan))


def names_in(source: str) -> list[str]:
    return list(mamba1._names(compile(source, "file", "exec")))


def test_names_are_read_in_functions_within_functions() -> None:
    assert {"outer", "inner"} <= set(names_in("outer()\ndef f():\n  def g():\n    return inner()\n  return g"))


def test_what_decorators_wrap_is_found_whether_or_not_they_say_so() -> None:
    def own() -> None: ...

    def silent() -> Any:
        return own()

    @functools.wraps(own)
    def telling() -> Any: ...

    class Kind:
        @classmethod
        def method(cls) -> None: ...

    def found(method: Any) -> list[Any]:
        return list(mamba1._unwrapped(method))

    assert found(silent) == [silent, own] and found(telling) == [telling, own]
    assert found(vars(Kind)["method"]) == [Kind.method.__func__]  # type: ignore[attr-defined]
    assert found(3) == [] and found(len) == []

    def recursive() -> Any:
        return recursive() or later()

    assert found(recursive) == [recursive]  # ends, and a name without a value is nothing
    if False:
        later = own


def kind_of(source: str, module: str = "somebody.modeling", **names: Any) -> tuple[type, dict[str, Any]]:
    """A class of modules whose file has these names."""
    space: dict[str, Any] = {"torch": torch, "__name__": module, **names}
    exec(source, space)
    return space["Kind"], space


USES = "class Kind(torch.nn.Module):\n  def forward(self, x):\n    return {name}(x)\n"


def test_scans_are_found_by_what_the_methods_of_a_class_read() -> None:
    kind, space = kind_of(USES.format(name="scan"), scan=some_scan, other=some_scan, unrelated=unrelated)
    assert mamba1._scans_of(kind) == [(space, "scan")]
    assert mamba1._scans_of(kind) is mamba1._scans_of(kind)
    plain, _ = kind_of(USES.format(name="unrelated"), unrelated=unrelated)
    assert mamba1._scans_of(plain) == []
    heir = type("Heir", (kind,), {})
    assert mamba1._scans_of(heir) == [(space, "scan")]
    of_torch, _ = kind_of(USES.format(name="scan"), module="torch.nn.somewhere", scan=some_scan)
    assert mamba1._scans_of(of_torch) == []
    absent, _ = kind_of(USES.format(name="scan"))
    assert mamba1._scans_of(absent) == []


def model_of(kind: type, model_type: str = "mamba") -> Any:
    model = torch.nn.ModuleList([kind(), kind()])
    model.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(model_type=model_type))  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba", "zamba"])
def test_a_scan_is_bound_until_its_last_user_lets_go(model_type: str) -> None:
    kind, space = kind_of(USES.format(name="scan"), scan=some_scan)
    first, second = mamba1.Scan(model_of(kind, model_type)), mamba1.Scan(model_of(kind, model_type))
    assert space["scan"] is some_scan
    first.hold()
    bound = space["scan"]
    assert bound is not some_scan and bound.__wrapped__ is some_scan and bound() == "stock" == bound()
    second.hold()
    first.hold()
    assert space["scan"] is bound
    for scan in (first, second):
        scan.release()
        assert space["scan"] is bound
    first.release()
    assert space["scan"] is some_scan and not mamba1._bound


@pytest.mark.parametrize("model_type", ["mamba2", "zamba2", "llama"])
def test_models_that_do_not_forget_are_left_alone(model_type: str) -> None:
    kind, space = kind_of(USES.format(name="scan"), scan=some_scan)
    assert not mamba1.needs_hook(model_type)
    with mamba1.held(model_of(kind, model_type)):
        assert space["scan"] is some_scan and not mamba1._bound


def test_a_scan_that_somebody_put_there_meanwhile_stays() -> None:
    kind, space = kind_of(USES.format(name="scan"), scan=some_scan)
    with mamba1.held(model_of(kind)):
        space["scan"] = mamba_selective_scan
    assert space["scan"] is mamba_selective_scan and not mamba1._bound
    with mamba1.held(model_of(kind)):  # around ours: it goes with ours
        space["scan"] = functools.wraps(space["scan"])(lambda *inputs: None)
    assert space["scan"] is mamba_selective_scan


def test_where_scans_are_bound_changes_under_its_lock(monkeypatch: Patch) -> None:
    lock = Held()
    monkeypatch.setattr(mamba1, "_lock", lock)
    monkeypatch.setattr(mamba1, "_bound", Guarded(lock))
    kind, space = kind_of(USES.format(name="scan"), scan=some_scan)
    with mamba1.held(model_of(kind)):
        assert space["scan"] is not some_scan and lock.depth == 0
    assert space["scan"] is some_scan and lock.taken == 2 and not mamba1._bound


def test_an_error_in_a_prefill_leaves_no_state_announced() -> None:
    kind, space = kind_of(USES.format(name="scan"), scan=some_scan)
    with pytest.raises(KeyError), mamba1.held(model_of(kind)):
        mamba1.announce(torch.zeros(1, 2, 3))
        raise KeyError("interrupted")
    mamba1.settled()
    assert space["scan"] is some_scan


# -- one scan ---------------------------------------------------------------------------------------------------------


def test_states_are_announced_one_scan_each_and_for_one_thread() -> None:
    seen: list[Any] = []
    hooked = mamba1._resuming(mamba_selective_scan)
    state = torch.arange(12.0).view(1, 2, 2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba1, "around_kernel", lambda stock: lambda h, *inputs, **options: seen.append((h, options)))
        patch.setattr(mamba1, "is_kernel", lambda scan: True)
        hooked = mamba1._resuming(mamba_selective_scan)
        mamba1.announce(state)
        other: list[Any] = []
        thread = threading.Thread(target=lambda: other.append(hooked(torch.zeros(1))))
        thread.start()
        thread.join()
        assert other == ["named"]
        for head in range(2):
            hooked(torch.zeros(1), key=head)
            (found, options), seen = seen[0], seen[1:]
            assert torch.equal(found, state[:, head]) and options == {"key": head}
            if head == 0:
                with pytest.raises(UnsupportedModelError, match="did not take it"):
                    mamba1.settled()
                mamba1.announce(state)
                hooked(torch.zeros(1))
                seen.clear()
        with pytest.raises(UnsupportedModelError, match="more scans than it keeps states"):
            hooked(torch.zeros(1))
        assert hooked(torch.zeros(1)) == "named"  # said once, and forgotten
        mamba1.announce(state[:, 0])
        hooked(torch.zeros(1))
        assert torch.equal(seen[0][0], state[:, 0])
        mamba1.settled()
        assert hooked(torch.zeros(1)) == "named"
        mamba1.announce(state)
        mamba1.announce(None)
        assert hooked(torch.zeros(1)) == "named"


def dispatched(reference: Any, implementation: Any) -> Any:
    """As transformers wraps a scan since 5.16: both are held, by these names."""
    torch_function = reference

    def call(*inputs: Any) -> Any:
        return (implementation or torch_function)(*inputs)

    return call


def test_a_kernel_is_told_by_what_the_scan_holds() -> None:
    assert mamba1.is_kernel(dispatched(some_scan, some_scan)) is False
    assert mamba1.is_kernel(dispatched(some_scan, len)) is True
    assert mamba1.is_kernel(some_scan) is None
    assert mamba1.is_kernel(functools.wraps(dispatched(some_scan, len))(lambda *inputs: None)) is True

    def only_implementation(implementation: Any) -> Any:
        return lambda *inputs: implementation(*inputs)

    assert mamba1.is_kernel(only_implementation(len)) is None

    def only_reference(torch_function: Any) -> Any:
        return lambda *inputs: torch_function(*inputs)

    assert mamba1.is_kernel(only_reference(some_scan)) is None


def inputs(seed: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)  # what float32 holds as well

    return (
        draw(2, 3, 4),
        draw(2, 3, length),
        draw(2, 3, length),
        -draw(3, 4).abs(),
        draw(2, 4, length),
        draw(2, 4, length),
    )


def plainly(h: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One token after another, as the paper has it."""
    D, z, bias = (given.get(name) for name in ("D", "z", "delta_bias"))
    step = dt if bias is None else dt + bias[:, None]
    step = F.softplus(step) if given.get("delta_softplus") else step
    outputs = []
    for t in range(x.shape[-1]):
        h = torch.exp(step[:, :, t, None] * A) * h + step[:, :, t, None] * B[:, None, :, t] * x[:, :, t, None]
        y = (h * C[:, None, :, t]).sum(-1) + (0 if D is None else D * x[:, :, t])
        outputs.append(y if z is None else y * F.silu(z[:, :, t]))
    return torch.stack(outputs, -1), h


def from_nothing(x: Any, dt: Any, A: Any, B: Any, C: Any, *further: Any, **options: Any) -> Any:
    """A scan that always starts from zero."""
    named = {
        **dict(zip(("D", "z", "delta_bias", "delta_softplus", "return_last_state"), further, strict=False)),
        **options,
    }
    y, last = plainly(torch.zeros(2, 3, 4, dtype=x.dtype), x, dt, A, B, C, **named)
    return (y, last) if named.get("return_last_state") else y


WAYS: dict[str, Callable[..., Any]] = {"loop": mamba1.scan_from, "around": mamba1.around_kernel(from_nothing)}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("given", range(16))
def test_a_scan_from_a_state_with_and_without_each_option(how: str, given: int) -> None:
    h, *rest = inputs(given, 9)
    D, z, bias = torch.randn(3).double(), torch.randn(2, 3, 9).double(), torch.randn(3).double() * 0.3
    options: dict[str, Any] = {}
    for bit, (name, value) in enumerate((("D", D), ("z", z), ("delta_bias", bias), ("delta_softplus", True))):
        if given >> bit & 1:
            options[name] = value
    if "delta_softplus" not in options:
        rest[1] = rest[1].abs()
        options.pop("delta_bias", None)
    y, last = plainly(h, *rest, **options)
    before = h.clone()
    found, state = WAYS[how](h, *rest, **options, return_last_state=True)
    torch.testing.assert_close(found, y, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-10)
    assert torch.equal(h, before)
    alone = WAYS[how](h, *rest, **options)
    assert torch.is_tensor(alone) and torch.equal(alone, found)
    if given == 15:  # without names, as some callers leave them out
        found, state = WAYS[how](h, *rest, D, z, bias, True, True)
        torch.testing.assert_close(found, y, rtol=0, atol=1e-10)
        torch.testing.assert_close(state, last, rtol=0, atol=1e-10)
        assert torch.is_tensor(WAYS[how](h, *rest, D, z, bias, True, False))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
def test_a_scan_in_blocks_is_the_scan_in_one(how: str, length: int, monkeypatch: Patch) -> None:
    h, *rest = inputs(length, length)
    rest[1] = rest[1].abs()
    gate = torch.randn(2, 3, length).double()
    monkeypatch.setattr(mamba1, "_BLOCK_TOKENS", 4)
    y, last = plainly(h, *rest, z=gate)
    found, state = WAYS[how](h, *rest, z=gate, return_last_state=True)
    torch.testing.assert_close(found, y, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-10)


def test_a_state_that_is_returned_keeps_no_block_alive() -> None:
    h, *rest = inputs(0, 20)
    _, state = mamba1.scan_from(h, *rest, return_last_state=True)
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@pytest.mark.parametrize("how", WAYS)
def test_a_scan_in_16_bits_gives_outputs_in_16_bits_and_a_wide_state(how: str) -> None:
    h, *rest = inputs(1, 9, torch.float32)
    x, dt, A, B, C = rest[0].bfloat16(), rest[1].abs().bfloat16(), rest[2], rest[3].bfloat16(), rest[4].bfloat16()

    def kernel(x: Any, dt: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
        y, last = from_nothing(x.float(), dt.float(), A, B.float(), C.float(), **options)
        return y.to(x.dtype), last

    way = mamba1.scan_from if how == "loop" else mamba1.around_kernel(kernel)
    y, last = plainly(h, x.float(), dt.float(), A, B.float(), C.float())
    found, state = way(h, x, dt, A, B, C, return_last_state=True)
    assert found.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(found.float(), y, rtol=0.05, atol=0.05)
    torch.testing.assert_close(state, last, rtol=0.02, atol=0.02)


def test_steps_are_biased_and_made_positive_as_asked() -> None:
    dt, bias = torch.tensor([[[1.0, -2.0]]]), torch.tensor([0.5])
    assert torch.equal(mamba1._step_sizes(dt, None, False), dt)
    assert torch.equal(mamba1._step_sizes(dt, bias, False), dt + 0.5)
    assert torch.equal(mamba1._step_sizes(dt, bias, True), F.softplus(dt + 0.5))
    assert mamba1._step_sizes(dt.half(), bias, False).dtype == torch.float16


def test_a_cell_without_a_value_holds_nothing() -> None:
    assert mamba1._held_by(CellType()) is None and mamba1._held_by(CellType(3)) == 3
