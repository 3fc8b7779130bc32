"""Which kernels a model runs: those of packages, as transformers takes them up, and those that the profiler sees."""

import importlib.util
import inspect
import sys
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile


# Packages whose kernels transformers takes up by itself where they can be imported.
PACKAGES = ("mamba_ssm", "causal_conv1d", "fla", "kernels", "flash_attn", "mambapy")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "hipLaunchKernel", "hipExtModuleLaunchKernel")
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "hipStreamSynchronize", "hipEventSynchronize")
_SHOWN = 8


def hidden():
    """Make the packages impossible to import; before transformers is."""
    assert "transformers" not in sys.modules
    for name in PACKAGES:
        sys.modules[name] = None


def importable():
    """Those that can be imported."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is not None]


def environment():
    """What of this process and machine decides bits, beside the model."""
    # Not above: whoever hides packages does so before transformers is imported, which this imports.
    from hf_sparse_cache.models.arithmetic import kernels, libraries, modes

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return {"packages": kernels(), "libraries": libraries(), "modes": modes(kind)}


def taken_up(model):
    """What stands behind each function for which transformers takes a package's kernel where there is one."""
    found = {}
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        if not module.__name__.startswith("transformers.models"):
            continue
        for name, value in vars(module).items():
            implementation = _implementation(value)
            if implementation is not None:
                theirs = implementation.__module__ or type(implementation).__name__
                found[name] = "torch" if theirs == module.__name__ else theirs
    return dict(sorted(found.items()))


def _implementation(value):
    """The function that a choice of transformers holds in its closure; None of anything else."""
    seen = set()
    while inspect.isfunction(value) and id(value) not in seen:
        seen.add(id(value))
        held = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        if "implementation" in held:
            return held["implementation"].cell_contents
        value = getattr(value, "__wrapped__", None)
    return None


def profiled(call):
    """Launches and waits of the host in a call, and the operations that took the longest.

    Returns:
        `dict`: `launches`, `waits` (None without an accelerator), `operators` of torch, `longest`: name -> ms.
    """
    there = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if there else [])]
    with profile(activities=activities) as seen:
        call()
        if there:
            torch.cuda.synchronize()  # of a kind that is not counted
    counts, spent = Counter(), Counter()
    for event in seen.key_averages():
        counts[event.key] += event.count
        spent[event.key] += _microseconds(event, there) / 1e3
    return {
        "launches": _count(counts, _LAUNCHES) if there else None,
        "waits": _count(counts, _WAITS) if there else None,
        "operators": sum(count for name, count in counts.items() if name.startswith("aten::")),
        "longest": {name[:100]: round(ms, 3) for name, ms in spent.most_common(_SHOWN)},
    }


def _count(counts, names):
    return sum(count for name, count in counts.items() if name.startswith(names))


def _microseconds(event, there):
    if not there:
        return event.self_cpu_time_total
    return getattr(event, "self_device_time_total", 0)
