"""The stubs of the compiled modules say what the modules are."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["_planner", "_codec"])
def test_the_stub_matches(name: str, tmp_path: Path) -> None:
    """Both in a folder of their own, so that only they are checked: seconds instead of minutes."""
    compiled = Path(str(importlib.import_module(f"hf_sparse_cache.{name}").__file__))
    stub = Path(__file__).parents[2] / "hf_sparse_cache" / f"{name}.pyi"
    for path in (compiled, stub):
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "mypy.stubtest", name]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
