"""What of a process and its machine decides how torch rounds, beside the model: switches, libraries, devices."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch


# Packages whose kernels replace torch's own in these models; another version may round differently.
KERNEL_PACKAGES = (
    "mamba-ssm", "causal-conv1d", "flash-linear-attention", "fla-core", "kernels", "flash-attn", "flash-attn-3",
    "triton", "xformers", "mambapy", "tilelang", "liger-kernel",
)  # fmt: skip
# Packages that bring libraries of CUDA, whatever release of CUDA their names end with.
_LIBRARIES = ("nvidia-cublas", "nvidia-cudnn", "nvidia-cuda-nvrtc")
# Variables of the environment under which those libraries and Triton choose other kernels.
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT", "TRITON_CACHE_AUTOTUNING", "TRITON_F32_DEFAULT",
)  # fmt: skip
_DRIVER = Path("/proc/driver/nvidia/version")

# Where the newer of torch's two ways keeps the precision of products in float32.
_PLACES = ("", "cuda.matmul.", "cudnn.", "cudnn.conv.", "mkldnn.", "mkldnn.matmul.")
_cuda: Any = torch.backends.cuda
# Switches of torch that choose other kernels, as they are unless somebody has set them: on every device,
_SWITCHES: list[tuple[str, Any, Callable[[], Any]]] = [
    ("no flash attention", True, _cuda.flash_sdp_enabled),
    ("no memory-efficient attention", True, _cuda.mem_efficient_sdp_enabled),
    ("no plain attention kernel", True, _cuda.math_sdp_enabled),
    ("deterministic algorithms", False, torch.are_deterministic_algorithms_enabled),
    ("no mkldnn", True, lambda: bool(torch.backends.mkldnn.enabled)),
    ("no cudnn", True, lambda: bool(torch.backends.cudnn.enabled)),
    ("no TF32 in cudnn", True, lambda: bool(torch.backends.cudnn.allow_tf32)),
    ("denormals flushed", False, lambda: bool(torch.tensor(1e-40).mul(1.0) == 0)),
]
# and on an accelerator alone.
_THERE: list[tuple[str, Any, Callable[[], Any]]] = [
    ("no attention of cudnn", True, lambda: _cuda.cudnn_sdp_enabled()),
    ("reduced precision in the plain attention kernel", False, lambda: _cuda.fp16_bf16_reduction_math_sdp_allowed()),
    ("no reduced precision in bfloat16", True, lambda: _cuda.matmul.allow_bf16_reduced_precision_reduction),
    ("no reduced precision in float16", True, lambda: _cuda.matmul.allow_fp16_reduced_precision_reduction),
    ("sums in float16", False, lambda: _cuda.matmul.allow_fp16_accumulation),
    ("cudnn chosen by timing", False, lambda: bool(torch.backends.cudnn.benchmark)),
    ("cudnn deterministic", False, lambda: bool(torch.backends.cudnn.deterministic)),
]


def modes(kind: str) -> str:
    """Switches of the process under which the same weights compute something else, on devices of one kind."""
    autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"
    unusual = []
    for name, usual, switch in _SWITCHES if kind == "cpu" else [*_SWITCHES, *_THERE]:
        found = _read(switch)
        if found not in (usual, None):
            unusual.append(name if isinstance(found, bool) else f"{name} {found}")
    return ", ".join([f"autocast {autocast}, matmul precision {_precision()}", *unusual, *_told(kind)])


def _precision() -> str:
    """Of products in float32, by the names of whichever of torch's two ways to set it the process has used."""
    known = _read(torch.get_float32_matmul_precision)
    if known is not None:
        return str(known)
    return "/".join(str(_read(partial(attrgetter(f"{name}fp32_precision"), torch.backends))) for name in _PLACES)


def _told(kind: str) -> list[str]:
    """What is set in words, not by a switch."""
    if kind != "cuda":
        return []
    library = str(_read(_cuda.preferred_blas_library)).rpartition(".")[2]
    return [] if library in ("Default", "Cublas", "None") else [f"products by {library}"]


def _read(switch: Callable[[], Any]) -> Any:
    """A switch; None where this torch does not have it, or refuses, as it was set in the newer of two ways."""
    try:
        return switch()
    except (AttributeError, RuntimeError):
        return None


def device_name(device: torch.device) -> str:
    """A device, with all that decides how its kernels split their work."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{device} {found.name} {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors"
    return f"{device} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def kernels() -> dict[str, str]:
    """Installed packages whose kernels may be used, with their versions."""
    return {name: version for name in KERNEL_PACKAGES if (version := _version(name))}


def libraries() -> dict[str, str]:
    """What computes on a GPU beside torch and these packages: its libraries, its driver, and what they are told."""
    found: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "hip": getattr(torch.version, "hip", None),
        "cudnn": _read(torch.backends.cudnn.version),
        "driver": _driver(),
        **_packages(),
        **{name: os.environ.get(name) for name in _VARIABLES},
    }
    return {name: str(value) for name, value in found.items() if value is not None}


@functools.cache
def _packages() -> dict[str, str]:
    names = (distribution.metadata["Name"] or "" for distribution in importlib.metadata.distributions())
    chosen = sorted({name for name in names if name.startswith(_LIBRARIES)})
    return {name: version for name in chosen if (version := _version(name))}


@functools.cache
def _driver() -> str | None:
    """The release of the driver, as its module in the kernel says it."""
    try:
        return next(word for word in _DRIVER.read_text().split() if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
