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


# -- one by one, whatever is installed here ---------------------------------------------------------------------------


def test_a_switch_is_named_where_it_is_not_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> bool:
        raise RuntimeError

    here = [("off", True, lambda: False), ("as usual", True, lambda: True), ("not there", True, refuses)]
    there = [("level", 1, lambda: 3), ("same level", 1, lambda: 1)]
    monkeypatch.setattr(arithmetic, "_SWITCHES", here)
    monkeypatch.setattr(arithmetic, "_THERE", there)
    monkeypatch.setattr(arithmetic, "_precision", lambda: "high")
    monkeypatch.setattr(arithmetic, "_told", lambda kind: [f"told of {kind}"])
    assert arithmetic.modes("cpu") == "autocast off, matmul precision high, off, told of cpu"
    assert arithmetic.modes("cuda") == "autocast off, matmul precision high, off, level 3, told of cuda"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert arithmetic.modes("cpu").startswith("autocast torch.bfloat16, matmul")


def test_what_a_torch_does_not_have_or_refuses_is_nothing() -> None:
    def raises(error: type[Exception]) -> Any:
        def switch() -> None:
            raise error

        return switch

    assert arithmetic._read(lambda: 0) == 0
    assert arithmetic._read(raises(AttributeError)) is arithmetic._read(raises(RuntimeError)) is None
    with pytest.raises(KeyError):
        arithmetic._read(raises(KeyError))


def test_the_library_of_products_is_named_where_it_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, said in (("Cublaslt", ["products by Cublaslt"]), ("Cublas", []), ("Default", []), (None, [])):
        name = None if library is None else f"_BlasBackend.{library}"
        monkeypatch.setattr(arithmetic._cuda, "preferred_blas_library", lambda name=name: name)
        assert arithmetic._told("cuda") == said and arithmetic._told("cpu") == []


def test_precision_by_the_older_name_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert arithmetic._precision() == "medium"


def test_packages_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"nvidia-cublas-cu12": "12.8", "nvidia-cudnn": "9", "numpy": "2", "triton": "3.1"}
    found = [type("D", (), {"metadata": {"Name": name}})() for name in [*versions, "nvidia-cublas-cu11", None]]

    def version(name: str) -> str:
        if name not in versions:
            raise arithmetic.importlib.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(arithmetic.importlib.metadata, "distributions", lambda: found)
    monkeypatch.setattr(arithmetic.importlib.metadata, "version", version)
    assert arithmetic._packages.__wrapped__() == {"nvidia-cublas-cu12": "12.8", "nvidia-cudnn": "9"}
    assert arithmetic.kernels() == {"triton": "3.1"}


def test_what_is_not_there_is_not_among_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in arithmetic._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setattr(arithmetic, "_packages", dict)
    monkeypatch.setattr(arithmetic, "_driver", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90100)
    assert arithmetic.libraries() == {"cuda": "12.8", "cudnn": "90100", "NVIDIA_TF32_OVERRIDE": "0"}


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("NVRM 3 version 570.86.15  x 1.2", "570.86.15"),
        ("no release", None),
        ("v1.2 5", None),
        ("", None),
        (None, None),
    ],
)
def test_the_release_of_a_driver(text: Any, release: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    if text is not None:
        (tmp_path / "version").write_text(text)
    monkeypatch.setattr(arithmetic, "_DRIVER", tmp_path / "version")
    assert arithmetic._driver.__wrapped__() == release


def test_a_device_is_named_with_what_its_kernels_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    here = arithmetic.device_name(torch.device("cpu"))
    assert here == f"cpu {arithmetic.platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    card = type("P", (), {"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert arithmetic.device_name(torch.device("cuda:1")) == "cuda:1 H100 9.0, 132 multiprocessors"
