"""Mamba-1 around kernels as strict as the compiled ones: nothing they refuse, and a resumed run equals a cold one."""

from typing import Any

import pytest
import strict_kernels as kernels
import torch
from matrix import BITWISE, REPLAYABLE, Bench, left_padded
from tiny_models import build

from hf_sparse_cache import check_exactness
from hf_sparse_cache.models import mamba1


FAMILIES = ["Mamba", "FalconMamba", "Jamba", "Zamba"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUN_BY_ALL = {"causal_conv1d_fn", "causal_conv1d_update", "selective_scan_fn", "selective_state_update"}


def bench(label: str, dtype: torch.dtype = torch.float32, mode: str = BITWISE) -> Bench:
    return Bench(label, model=build(label, dtype), mode=mode)


def report(on: Bench, *seeds: int) -> Any:
    with on.handle() as handle:
        return check_exactness(on.model, [on.prompt(seed) for seed in seeds], cache=handle, max_new_tokens=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).partition(".")[2])
@pytest.mark.parametrize("label", FAMILIES)
def test_resumed_equals_cold(label: str, dtype: torch.dtype) -> None:
    for mode, seeds in ((BITWISE, (0, 1, 2)), (REPLAYABLE, (0, 9, 1))):
        on = bench(label, dtype, mode)
        with kernels.strict(on.model) as ran:
            found = report(on, *seeds)
        assert found.passed and found.rows[-1].resumed_tokens, str(found)
        assert set(ran) == RUN_BY_ALL


@pytest.mark.parametrize("label", FAMILIES)
def test_a_batch(label: str) -> None:
    on = bench(label)
    given = left_padded([on.prompt(seed) for seed in (3, 4, 3)])
    with kernels.strict(on.model) as ran:
        stock = on.generate(given["input_ids"], None, attention_mask=given["attention_mask"])
        with on.handle() as handle:
            on.warm(handle)
            warm = on.generate(given["input_ids"], handle, attention_mask=given["attention_mask"])
            assert handle.last_request.resumed_tokens
    assert torch.equal(warm.tokens, stock.tokens) and warm.distance(stock) < 1e-4 and ran["selective_scan_fn"]


def test_the_reference_is_back_behind_them() -> None:
    on = bench("Mamba")
    with kernels.strict(on.model):
        pass
    kernels.ran.clear()
    assert report(on, 0, 1).passed and not kernels.ran


# -- the twins --------------------------------------------------------------------------------------------------------


def test_what_the_real_ones_refuse_is_refused() -> None:
    u, weight = torch.randn(2, 16, 12), torch.randn(16, 4)
    scan = {"delta": u, "A": -torch.rand(16, 4), "B": torch.randn(2, 4, 12), "C": torch.randn(2, 4, 12)}
    last = u.transpose(1, 2).contiguous().transpose(1, 2)
    kernels.causal_conv1d_fn(u, weight), kernels.causal_conv1d_fn(last, weight)
    kernels.selective_scan_fn(u, **scan)
    refused = {
        "width 5": lambda: kernels.causal_conv1d_fn(u, torch.randn(16, 5)),
        "12 channels": lambda: kernels.causal_conv1d_fn(last[:, :12], weight[:12]),
        "not multiples of 8": lambda: kernels.causal_conv1d_fn(
            torch.randn(2, 12, 20).transpose(1, 2)[:, 2:18], weight
        ),
        "bias in": lambda: kernels.causal_conv1d_fn(u, weight, torch.randn(16).bfloat16()),
        "activation gelu": lambda: kernels.causal_conv1d_fn(u, weight, activation="gelu"),
        "a state in": lambda: kernels.causal_conv1d_update(u[..., 0].half(), torch.zeros(2, 16, 4), weight),
        "a state of 2 tokens": lambda: kernels.causal_conv1d_update(u[..., 0], torch.zeros(2, 16, 2), weight),
        "delta in torch.float32 beside u in torch.bfloat16": lambda: kernels.selective_scan_fn(u.bfloat16(), **scan),
        "A of .16, 4. in torch.bfloat16": lambda: kernels.selective_scan_fn(
            u, **{**scan, "A": -u[0, :, :4].bfloat16()}
        ),
        "D in": lambda: kernels.selective_scan_fn(u, **scan, D=torch.ones(16).half()),
        "more than 256": lambda: kernels.selective_scan_fn(u, **{**scan, "A": -torch.rand(16, 300)}),
        "z of": lambda: kernels.selective_scan_fn(u, **scan, z=u[..., 1:]),
    }
    for said, call in refused.items():
        with pytest.raises(RuntimeError, match=said):
            call()
    with pytest.raises(TypeError, match="h"):
        kernels.selective_scan_fn(u, **scan, h=torch.zeros(2, 16, 4))  # type: ignore[call-arg]


def test_wide_step_sizes_given_to_the_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be the shortest way to step sizes in float32."""
    own = mamba1.around_kernel

    def around(stock: Any) -> Any:
        inner = own(stock)
        return lambda h, x, dt, *rest, **options: inner(h, x, dt.float(), *rest, **options)

    monkeypatch.setattr(mamba1, "around_kernel", around)
    on = bench("Jamba", torch.bfloat16)
    with (
        kernels.strict(on.model),
        pytest.raises(Exception, match=r"delta in torch.float32 beside u in torch.bfloat16"),
    ):
        report(on, 0, 1)


@pytest.mark.parametrize("label", FAMILIES)
def test_a_state_that_is_left_out_is_seen(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on = bench(label)
    with kernels.strict(on.model), on.handle() as handle:
        on.warm(handle)
        monkeypatch.setattr(mamba1, "scan_from", None)  # the way of the reference, which is not taken
        for _, _, checkpoint in handle.store.checkpoints():
            for layer in checkpoint.state.layers:
                for name, value in layer.items():
                    if name.startswith("recurrent"):
                        value.zero_()
        found = check_exactness(on.model, [on.prompt(1)], cache=handle, max_new_tokens=3)
    assert found.resumed_tokens and not found.bitwise and found.max_abs_logit_diff > 1e-3


def test_another_layout_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution is another kernel where channels lie next to each other."""
    u, weight = torch.randn(1, 64, 400), torch.randn(64, 4)
    last = u.transpose(1, 2).contiguous().transpose(1, 2)
    one, other = (kernels.causal_conv1d_fn(x, weight) for x in (u, last))
    assert torch.allclose(one, other, atol=1e-5) and not torch.equal(one, other)
