"""Importing the package and asking the command line for help bring no torch, and work where a platform has less."""

import subprocess
import sys

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


def in_a_new_process(code: str, **options: str) -> str:
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


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="SparsePrefixCash"):
        _ = hf_sparse_cache.SparsePrefixCash
