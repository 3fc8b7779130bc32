"""Kernels written in Triton, run on the CPU by Triton's interpreter; imported before anything that has such kernels.

The interpreter computes what a kernel says, program by program, so that a mistake in what is asked of it shows. It
says nothing of speed. Autotuning would measure, so the first of a kernel's configurations is taken.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch


def _missing() -> str:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 is not set: make test-triton"
    needed = ("triton", "mamba_ssm", "fla")
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacking)} not installed: make test-triton" if lacking else ""


MISSING = _missing()
# How often each autotuned kernel ran.
ran: Counter[str] = Counter()


class _Index(int):
    """A loop's index, which a compiled kernel can give another type."""

    def to(self, dtype: Any) -> "_Index":
        return self


def _range(*bounds: Any) -> Iterator[_Index]:
    return map(_Index, range(*bounds))


def install() -> None:
    """Let the packages' kernels run here; before a modeling file of transformers is imported."""
    # Compiled code for GPUs that mamba_ssm imports beside its kernels in Triton; nothing here calls it.
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    from triton.runtime import autotuner

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran[getattr(self.fn, "__name__", "kernel")] += 1
        return self.fn.run(*args, **{**self.configs[0].kwargs, **kwargs})

    autotuner.Autotuner.run = run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        importlib.import_module("fla.ops.gated_delta_rule")
    for name, module in [*sys.modules.items()]:
        if name.startswith("fla.ops."):
            module.range = _range  # type: ignore[attr-defined]
    torch.cuda.device = lambda *args, **kwargs: contextlib.nullcontext()  # type: ignore[assignment, misc]


if not MISSING:
    install()
