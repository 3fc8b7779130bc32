"""The stub of the compiled module says what the module is."""

import shutil
import subprocess
import sys
from pathlib import Path

from hf_sparse_cache import _planner


def test_the_stub_matches(tmp_path: Path) -> None:
    """Both in a folder of their own, so that only they are checked: seconds instead of minutes."""
    compiled = Path(_planner.__file__)
    stub = Path(__file__).parents[2] / "hf_sparse_cache" / "_planner.pyi"
    for path in (compiled, stub):
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "mypy.stubtest", "_planner"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
