"""What decides bits on an accelerator is in a model's name, and no setting of torch makes a request fail."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import build

from hf_sparse_cache.config import SparseCacheConfig
from hf_sparse_cache.models import arithmetic, fingerprint, streams
from hf_sparse_cache.models.binding import Binding


SWITCHES: list[tuple[Any, str, Any]] = [
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
    (torch.backends.cudnn, "benchmark", True),
    (torch.backends.cudnn, "deterministic", True),
]


@pytest.mark.parametrize(("place", "name", "value"), SWITCHES)
def test_a_switch_of_the_accelerator_gives_another_name_there(place: Any, name: str, value: Any) -> None:
    there, here, before = arithmetic.modes("cuda"), arithmetic.modes("cpu"), getattr(place, name)
    setattr(place, name, value)
    try:
        assert arithmetic.modes("cuda") != there and arithmetic.modes("cpu") == here
    finally:
        setattr(place, name, before)
    assert arithmetic.modes("cuda") == there


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor keeps denormal numbers always")
def test_flushed_denormals_give_another_name() -> None:
    usual = arithmetic.modes("cpu")
    try:
        assert torch.set_flush_denormal(True)
        assert "denormals flushed" in arithmetic.modes("cpu") != usual
    finally:
        torch.set_flush_denormal(False)
    assert "denormals flushed" not in usual == arithmetic.modes("cpu")


def test_attention_of_cudnn_switched_off() -> None:
    there = arithmetic.modes("cuda")
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        assert "no attention of cudnn" in arithmetic.modes("cuda") != there
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


# torch refuses to tell by its older names what was set by its newer ones, for as long as the process lives.
NEWER = """
import sys, torch
from hf_sparse_cache.models import arithmetic
names = [arithmetic.modes("cpu")]
if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    sys.exit()
for precision in ("tf32", "ieee"):
    torch.backends.cuda.matmul.fp32_precision = precision
    names.append(arithmetic.modes("cpu"))
torch.backends.fp32_precision = "tf32"
names.append(arithmetic.modes("cpu"))
assert names[0] == names[2] and len(set(names)) == 3, names  # "ieee" is what it was at first
"""


def test_precision_by_the_newer_names_of_torch() -> None:
    subprocess.run([sys.executable, "-c", NEWER], check=True)


def test_libraries_and_driver_are_named_where_a_gpu_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    arithmetic._driver.cache_clear()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Kernel Module  570.86.15  Thu Jan 23\n")
    monkeypatch.setattr(arithmetic, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(arithmetic, "_packages", lambda: {"nvidia-cublas-cu12": "12.8.4.1"})
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    binding = Binding.of(build("Mamba2"), None, SparseCacheConfig())
    assert "libraries" not in fingerprint.describe(binding)
    monkeypatch.setattr(fingerprint, "_on_cuda", lambda model: True)
    before = fingerprint.describe(binding)
    told = before["libraries"]
    assert (told["driver"], told["cuda"], told["nvidia-cublas-cu12"]) == ("570.86.15", "12.8", "12.8.4.1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert fingerprint.different(before, fingerprint.describe(binding)) == ["libraries"]
    arithmetic._driver.cache_clear()


# Sizes beside powers of two lose the most to rounding.
_NEAR = st.builds(lambda power, beside: max(0, (1 << power) + beside), st.integers(0, 24), st.integers(-1, 1))


@given(st.lists(_NEAR | st.integers(0, 1 << 24), min_size=1, max_size=90))
@example([1, 262144, 524289])
@example([524289] * 40)
@example([8192, 524333, 511, 524333, 15890])
def test_every_tensor_is_in_one_block_and_little_is_pinned_in_vain(sizes: list[int]) -> None:
    blocks = streams.blocks_of(sizes)
    assert sorted(index for block in blocks for index in block) == list(range(len(sizes)))
    total = sum(sizes)
    pinned = sum(streams._rounded(sum(sizes[index] for index in block)) for block in blocks)
    alone = sum(map(streams._rounded, sizes))
    assert total <= pinned <= min(alone, streams._rounded(total))
    assert len(blocks) <= 2 + sum(size > total / 4 for size in sizes) + total.bit_length()


def test_layers_of_one_size_lose_nothing() -> None:
    sizes = [2 << 20] * 38
    pinned = [streams._rounded(sum(sizes[index] for index in block)) >> 20 for block in streams.blocks_of(sizes)]
    assert pinned == [64, 8, 4]
