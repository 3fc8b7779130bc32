"""What a measurement was made on, for reports: exactness and time hold for one machine and one set of versions."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


PACKAGES = ("hf-sparse-cache", "torch", "transformers", "numpy")
# Fast kernels that transformers takes up when they are installed, and that change the last bits of a result.
KERNELS = ("mamba-ssm", "causal-conv1d", "flash-linear-attention", "kernels")


def describe_machine() -> dict[str, str | int | list[str] | None]:
    """Versions, processor and accelerators of this machine, ready for JSON.

    Returns:
        `dict`: `python`, `platform`; one entry per package in `PACKAGES` (None where not installed); `kernels`, the
        installed ones of `KERNELS`; `cpu`, its name; `cores`, those this process may use; `threads`, those torch uses;
        `memory_bytes`, all of the machine's (None where unknown); `accelerators`, their names. Seeds are the caller's.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{package: _version(package) for package in PACKAGES},
        "kernels": [f"{package} {_version(package)}" for package in KERNELS if _version(package)],
        "cpu": _cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "accelerators": _accelerators(),
    }


def peak_process_bytes() -> int | None:
    """Most memory that this process has taken so far; None where the platform and psutil, if installed, do not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        try:
            import psutil
        except ImportError:
            return None
        found = psutil.Process().memory_info()
        return int(getattr(found, "peak_wset", found.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:  # platform.processor() is empty on most Linux systems
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what this process may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _accelerators() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return ["Apple MPS"]
    return []
