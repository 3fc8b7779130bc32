"""What is shipped: the source distribution and the wheel made from it hold what they must and nothing else."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_sparse_cache


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = f"hf_sparse_cache-{PROJECT['version']}"
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "hf_sparse_cache").rglob("*")
    if path.suffix in (".py", ".pyi", ".json", ".jsonl", ".safetensors", ".md") or path.name == "py.typed"
)
TOP_LEVEL = {
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "MANIFEST.in",
    "PKG-INFO",
    "README.md",
    "_codec.pyx",
    "_planner.pyx",
    "pyproject.toml",
    "setup.cfg",  # written by setuptools
    "setup.py",
}


def build(folder: Path, what: str, into: Path, **environment: str) -> Path:
    """Runs the build backend as a frontend would, without isolation, and returns the file it made."""
    into.mkdir()
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{what}(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(into)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return into / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout in which an extension and its C source lie around, as after development."""
    checkout = tmp_path_factory.mktemp("checkout")
    kept = [*TOP_LEVEL - {"PKG-INFO", "setup.cfg"}, *MODULES]
    kept += [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    for name in kept:
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    for name in (
        "_planner.c",
        "_codec.c",
        "hf_sparse_cache/_planner.cpython-311.so",
        "hf_sparse_cache/_planner.c",
        "notes.txt",
    ):
        (checkout / name).write_text("built", encoding="utf-8")
    return build(checkout, "sdist", tmp_path_factory.mktemp("dist") / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked source distribution, so that it is known to be complete."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    quick = "-O0 -g0"  # what is compiled need not be fast here
    return build(unpacked / NAME, "wheel", tmp_path_factory.mktemp("dist") / "wheel", CFLAGS=quick)


def test_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if not name.startswith("hf_sparse_cache.egg-info/")}
    assert names == TOP_LEVEL | set(MODULES)


def test_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"{NAME}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    extensions = {name for name in names if name.endswith((".so", ".pyd"))}
    assert sorted(name.partition(".")[0] for name in extensions) == [
        "hf_sparse_cache/_codec",
        "hf_sparse_cache/_planner",
    ]
    own = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
    assert names == {*MODULES, *extensions, *own, f"{info}/licenses/LICENSE"}
    assert "hf-sparse-cache = hf_sparse_cache.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata


def test_wheel_installs_without_cython_or_compiler(wheel: Path, tmp_path: Path) -> None:
    """Into an empty environment, which borrows only the dependencies from this one."""
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = str(home / ("Scripts" if os.name == "nt" else "bin") / "python")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"),
            *("--no-index", "--no-deps", str(wheel)),
        ],
        check=True,
        env={**os.environ, "PATH": "", "CC": "none"},
    )
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    code = f"""
import sys
sys.path += {borrowed!r}
sys.modules["Cython"] = None
import hf_sparse_cache
from hf_sparse_cache import _codec, _planner
from hf_sparse_cache.planning.planner import plan_checkpoints
assert hf_sparse_cache.__file__.startswith(sys.prefix), hf_sparse_cache.__file__
assert _planner.__file__.startswith(sys.prefix), _planner.__file__
assert _codec.__file__.startswith(sys.prefix), _codec.__file__
assert plan_checkpoints([0, 0, 1, 9], 1).positions == (3,)
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_sparse_cache.tools import recall
for name in recall.MANUALS:
    folder = recall.folder(name)
    assert str(folder).startswith(sys.prefix), folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
"""
    run = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def asked_for(extra: str) -> set[str]:
    """Names of all packages that an extra brings."""
    found = set()
    for item in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(item)
        own = requirement.name == "hf_sparse_cache"
        found |= {name for each in requirement.extras for name in asked_for(each)} if own else {requirement.name}
    return found


def test_all_goes_with_the_constraints() -> None:
    """Each package of it has a version that was tried beside the others; one that none goes with is not in it."""
    constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(Requirement(line).name) for line in constraints if line}
    apart = {*asked_for("eval"), "ray"}  # which have environments of their own, over these
    assert {canonicalize_name(name) for name in asked_for("all") if name not in apart} <= pinned
    assert "s3fs" in asked_for("shared")


def test_the_version_is_the_same_everywhere() -> None:
    assert hf_sparse_cache.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {PROJECT['version']} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
