"""The Mamba-1 scan resumed from a state equals the scan that never stopped."""

import pytest
import torch
from transformers.models.mamba import modeling_mamba

from hf_sparse_cache.models import mamba1


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
    mamba1.install("mamba")
    mamba1.install("mamba")
    assert modeling_mamba.mamba_selective_scan is not STOCK
    mamba1.uninstall("mamba")
    assert modeling_mamba.mamba_selective_scan is not STOCK
    mamba1.uninstall("mamba")
    assert modeling_mamba.mamba_selective_scan is STOCK
