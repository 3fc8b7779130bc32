"""The Mamba-1 scan resumed from a state equals the scan that never stopped."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, random_ids
from transformers.models.mamba import modeling_mamba

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, UnsupportedModelError, check_exactness
from hf_sparse_cache.models import mamba1
from hf_sparse_cache.planning.policies import Balanced
from hf_sparse_cache.planning.policy import Prompt


STOCK = modeling_mamba.mamba_selective_scan


def arguments(length: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """One scan's inputs: 2 rows, 6 channels, 4 states."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "x": draw(2, 6, length),
        "dt": draw(2, 6, length),
        "A": -torch.rand(6, 4, generator=generator) * 4,
        "B": draw(2, 4, length),
        "C": draw(2, 4, length),
        "D": draw(6).float(),
        "z": draw(2, 6, length),
        "delta_bias": draw(6).float() - 1,
    }


def scan(function, given, part=slice(None), **extra):  # type: ignore[no-untyped-def]
    cut = {name: value[..., part] if value.dim() == 3 else value for name, value in given.items()}
    positional = [cut.pop(name) for name in ("x", "dt", "A", "B", "C")]
    return function(*positional, **cut, delta_softplus=True, return_last_state=True, **extra)


RESUMES = {"loop": mamba1.scan_from, "around the kernel": mamba1.around_kernel(STOCK)}


@pytest.mark.parametrize("how", RESUMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 150, 198])
def test_resumed_scan_equals_one_shot(how: str, dtype: torch.dtype, tolerance: float, cut: int) -> None:
    given = arguments(200, dtype)
    whole, last = scan(STOCK, given)
    _, state = scan(STOCK, given, slice(0, cut))
    before = state.clone()
    rest, resumed_last = scan(lambda *a, **k: RESUMES[how](state, *a, **k), given, slice(cut, None))
    torch.testing.assert_close(rest, whole[..., cut:], rtol=0, atol=tolerance)
    torch.testing.assert_close(resumed_last, last, rtol=0, atol=tolerance)
    assert torch.equal(state, before)
    wiped, _ = scan(lambda *a, **k: RESUMES[how](torch.zeros_like(state), *a, **k), given, slice(cut, None))
    assert (wiped - whole[..., cut:]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_state_is_as_exact_as_a_kernel_has_it(dtype: torch.dtype) -> None:
    """A kernel adds up the steps in float32, and takes inputs in 16 bits; so does the way around it."""
    given = arguments(200, dtype)

    def kernel(*inputs: Any, **options: Any) -> Any:
        wide = {name: value.float() if torch.is_tensor(value) else value for name, value in options.items()}
        y, last = STOCK(*(value.float() for value in inputs), **wide)
        return y.to(dtype), last

    whole, last = scan(kernel, given)
    _, state = scan(kernel, given, slice(0, 196))
    around = mamba1.around_kernel(kernel)
    rest, resumed = scan(lambda *a, **k: around(state, *a, **k), given, slice(196, None))
    assert (resumed - last).abs().max() <= 1e-6 * last.abs().max()
    assert (rest.float() - whole[..., 196:].float()).abs().max() <= torch.finfo(dtype).eps * whole.abs().max()
    own = mamba1._step_sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba1, "_step_sizes", lambda dt, *rest: own(dt.to(dtype), *rest).float())
        _, rounded = scan(lambda *a, **k: around(state, *a, **k), given, slice(196, None))
    assert (rounded - last).abs().max() > 100 * (resumed - last).abs().max()


def test_the_way_is_chosen_by_whether_the_scan_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def dispatched(implementation: Any) -> Any:
        @functools.wraps(STOCK)
        def call(*inputs: Any, **options: Any) -> Any:
            return implementation(*inputs, **options)

        return call

    assert mamba1.is_kernel(STOCK) is False and mamba1.is_kernel(lambda *inputs, **options: None) is None
    assert mamba1.is_kernel(dispatched(STOCK)) is False and mamba1.is_kernel(dispatched(torch.add)) is True
    used = []
    monkeypatch.setattr(mamba1, "scan_from", lambda *inputs, **options: used.append("loop"))
    monkeypatch.setattr(mamba1, "around_kernel", lambda stock: lambda *inputs, **options: used.append("around"))
    given, state = arguments(8, torch.float32), torch.zeros(2, 6, 4)
    for kernel in (False, True, None):
        monkeypatch.setattr(mamba1, "is_kernel", lambda scan, kernel=kernel: kernel)
        for device in ("cpu", "meta"):
            mamba1.announce(state)
            there = {name: value.to(device) for name, value in given.items()}
            scan(mamba1._resuming(lambda *inputs, **options: None), there)
    assert used == ["loop", "loop", "around", "around", "loop", "around"]


def test_one_scan_a_head() -> None:
    """Zamba announces (B, heads, D, N) and scans head by head."""
    heads = [arguments(20, torch.float64, seed) for seed in range(3)]
    states = torch.stack([scan(STOCK, head, slice(0, 12))[1] for head in heads], dim=1)
    hooked = mamba1._resuming(STOCK)
    mamba1.announce(states)
    try:
        for head in heads:
            rest, _ = scan(hooked, head, slice(12, None))
            torch.testing.assert_close(rest, scan(STOCK, head)[0][..., 12:], rtol=0, atol=1e-12)
    finally:
        mamba1.announce(None)
    assert torch.equal(scan(hooked, heads[0])[0], scan(STOCK, heads[0])[0])  # nothing announced: the stock scan


def test_the_modeling_file_is_given_back() -> None:
    scan = mamba1.Scan(build("Mamba"))
    scan.hold()
    with mamba1.held(build("Mamba")):
        assert modeling_mamba.mamba_selective_scan is not STOCK
        scan.release()
        assert modeling_mamba.mamba_selective_scan is not STOCK
    assert modeling_mamba.mamba_selective_scan is STOCK


def test_a_state_that_no_scan_takes_is_an_error() -> None:
    mamba1.announce(torch.zeros(1, 2, 3))
    with pytest.raises(UnsupportedModelError, match="its scan did not take it"):
        mamba1.settled()
    mamba1.settled()  # said once, and forgotten


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """transformers' file for Mamba under another module name, edited, as remote code or a fork has it."""
    copy = tmp_path / "fork.py"
    copy.write_text(EDITS[request.param](Path(modeling_mamba.__file__).read_text()))
    spec = importlib.util.spec_from_file_location("transformers.models.mamba.fork", copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


EDITS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "another name": lambda text: text.replace("mamba_selective_scan", "my_scan"),
    "called through an alias": lambda text: (
        text.replace("scan_result = mamba_selective_scan(", "scan_result = alias(")
        + "\n\nalias = mamba_selective_scan\n"
    ),
}


@pytest.mark.parametrize("fork", EDITS, indirect=True)
def test_a_copy_of_the_modeling_file(fork: Any) -> None:
    original = build("Mamba")
    model = fork.MambaForCausalLM(original.config).eval()
    model.load_state_dict(original.state_dict())
    with SparsePrefixCache(
        original, grid=16, policy="balanced", exactness="bitwise"
    ) as other:  # both files are bound, each for its model
        with SparsePrefixCache(model, grid=16, policy="balanced", exactness="bitwise") as cache:
            report = check_exactness(model, [random_ids(60, seed=1)], cache=cache, max_new_tokens=2)
        assert report.passed, str(report)
        assert check_exactness(original, [random_ids(60, seed=1)], cache=other, max_new_tokens=2).passed
    assert modeling_mamba.mamba_selective_scan is STOCK
    assert not mamba1._bound


LEAVING: dict[str, Callable[[SparsePrefixCache], None]] = {
    "detached": lambda cache: cache.detach(),
    "left": lambda cache: cache.__exit__(),
    "collected": lambda cache: cache._finalizer() and None,  # on whichever thread collects
}


@pytest.mark.parametrize("family", ["Jamba", "Mamba", "Zamba"])
@pytest.mark.parametrize("how", LEAVING)
def test_a_handle_that_goes_while_a_prompt_is_computed(family: str, how: str) -> None:
    model, ids, store = build(family), random_ids(120, seed=1), CheckpointStore("1GiB")

    def run(cache: SparsePrefixCache) -> torch.Tensor:
        options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
        return torch.stack(model.generate(ids, past_key_values=cache, **options).logits)

    class Leaving(Balanced):
        """Lets go of the handle between the match and the first forward of the request that `armed` is set for."""

        armed = False

        def place(self, prompt: Prompt) -> Any:
            if self.armed:
                self.armed = False
                LEAVING[how](handles[0])
            return super().place(prompt)

    policy = Leaving()
    handles = [SparsePrefixCache(model, grid=16, policy=policy, store=store, exactness="bitwise")]
    cold = run(handles[0])
    policy.armed = True
    warm = run(handles[0])
    assert handles[0].last_request.resumed_tokens > 0 and not policy.armed
    assert torch.equal(warm, cold)
    assert all(name not in model.__dict__ for name in ("_prefill", "_prepare_cache_for_generation"))
    assert not mamba1._bound
    with SparsePrefixCache(model, grid=16, store=store, policy="balanced", exactness="bitwise") as later:
        assert torch.equal(run(later), cold) and later.last_request.resumed_tokens > 0
