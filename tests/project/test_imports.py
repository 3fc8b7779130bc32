"""Importing the package and asking the command line for help bring no torch, and work where a platform has less."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_sparse_cache


HEAVY = ("torch", "transformers", "numpy", "hf_sparse_cache.cache")
ASK = """
import sys
from hf_sparse_cache import cli
sys.argv = ["hf-sparse-cache", {option!r}]
try:
    cli.main()
except SystemExit as left:
    assert not left.code
    assert not {heavy!r} & set(sys.modules)
"""


def in_a_new_process(code: str, **options: Any) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("first", ["import hf_sparse_cache", "import hf_sparse_cache; dir(hf_sparse_cache)"])
def test_importing_is_cheap(first: str) -> None:
    in_a_new_process(f"{first}\nimport sys\nassert not {set(HEAVY)!r} & set(sys.modules), list(sys.modules)")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_asking_the_command_line_is_cheap(option: str) -> None:
    out = in_a_new_process(ASK.format(option=option, heavy=set(HEAVY)))
    assert "simulate" in out if option == "--help" else out.strip() == hf_sparse_cache.__version__


def test_every_public_name_is_where_it_is_said_to_be() -> None:
    assert sorted(hf_sparse_cache._HOMES) == sorted(hf_sparse_cache.__all__)
    for name, home in hf_sparse_cache._HOMES.items():
        assert getattr(hf_sparse_cache, name).__module__ == f"hf_sparse_cache.{home}"
    assert set(hf_sparse_cache.__all__) <= set(dir(hf_sparse_cache))
    names: dict[str, object] = {}
    exec("from hf_sparse_cache import *", names)
    assert set(hf_sparse_cache.__all__) == set(names) - {"__builtins__"}


@pytest.mark.parametrize("use", ["hf_sparse_cache.SparsePrefixCache", "hf_sparse_cache.simulate"])
def test_the_source_folder_is_named_at_once_where_nothing_is_compiled(tmp_path: Path, use: str) -> None:
    """Python started in a clone imports the folder there, which hides what `pip install .` compiled."""
    package = Path(hf_sparse_cache.__file__).parent
    without = shutil.ignore_patterns("_planner.*.so", "_planner.*.pyd", "__pycache__")
    shutil.copytree(package, tmp_path / "hf_sparse_cache", ignore=without)
    code = (
        # An editable install finds the compiled part wherever the package was imported from.
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        f"import hf_sparse_cache\ntry:\n    {use}\nexcept ImportError as error:\n"
        "    print(error, error.__suppress_context__, error.__cause__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert "install hf_sparse_cache anew" in in_a_new_process(code, env=environment, cwd=str(tmp_path))
    (tmp_path / "_planner.pyx").touch()
    (said,) = in_a_new_process(code, env=environment, cwd=str(tmp_path)).splitlines()
    assert f"you are in the source folder {tmp_path}, which hides" in said and said.endswith(" True None")


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="SparsePrefixCash"):
        _ = hf_sparse_cache.SparsePrefixCash


def test_a_module_that_moved_is_found_under_its_old_name() -> None:
    for old, new in hf_sparse_cache._MOVED.items():
        module = importlib.import_module(f"hf_sparse_cache.{old}")
        assert module is importlib.import_module(f"hf_sparse_cache.{new}")
        assert module.__name__ == module.__spec__.name == f"hf_sparse_cache.{new}"
