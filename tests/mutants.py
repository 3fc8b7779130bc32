"""Faults planted in the core, one at a time, and whether the tests notice: `make mutants`, hours.

`cosmic-ray` knows how to plant them. A seed draws the sample, evenly from the rooms of `[tool.mutants]` in
pyproject.toml, which says what tests look at each. Those run once with `coverage`, which says which test runs which
line: a fault is then shown to the tests that run its line, the quick ones first, in a child of this process, in which
torch is loaded already. Everything happens in a copy of the checkout. What the tests do not notice is written as a
diff; each is either a hole or a change that changes nothing, which only a reader can tell.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cosmic_ray.commands import init
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkItem
from coverage import CoverageData
from transformers import GenerationMixin


ROOT = Path(__file__).resolve().parents[1]
LOADED = (torch, GenerationMixin)  # once for all children
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutants"]


def copy_checkout(into: Path) -> None:
    """What git knows or would add, and what was compiled."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    package = ROOT / "hf_sparse_cache"
    compiled = {path.relative_to(ROOT) for part in ("_planner", "_codec") for path in package.glob(f"{part}.*")}
    for name in {*map(Path, filter(None, names)), *compiled}:
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)


@dataclass(frozen=True)
class Coverage:
    """Which test runs which line, and how long each takes."""

    file: Path
    seconds: dict[str, float]

    @classmethod
    def measured(cls, tests: list[str], folder: Path) -> Coverage:
        """Run the tests of a room without any fault; what fails then is named and not asked later."""
        file = folder / "coverage"
        options = ["--durations=0", "--durations-min=0", "-rfE", "-p", "no:cacheprovider", "--cov=hf_sparse_cache"]
        command = [sys.executable, "-m", "pytest", *options, "--cov-context=test", "--cov-report=", *tests]
        done = subprocess.run(command, env={**os.environ, "COVERAGE_FILE": str(file)}, capture_output=True, text=True)
        failed = set(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE))
        if failed:
            print(f"fail without any fault, and are not asked: {', '.join(sorted(failed))}", flush=True)
        seconds: dict[str, float] = defaultdict(float)
        for took, test in re.findall(r"^([\d.]+)s (?:call|setup) +(\S.*)$", done.stdout, re.MULTILINE):
            seconds[test] += float(took)
        if not seconds:
            sys.exit(f"no test ran:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return cls(file, {test: took for test, took in seconds.items() if test not in failed})

    def tests_of(self, item: WorkItem, most_seconds: float) -> list[str]:
        """The tests that run the statement with the fault, the quick ones first; where it runs at import, all of them
        that run anything of the module."""
        module = item.mutations[0].module_path
        data = CoverageData(str(self.file))
        data.read()
        by_line = data.contexts_by_lineno(str(module.absolute()))
        first, last = _statement(ast.parse(module.read_text(encoding="utf-8")), item)
        contexts = {context for line in range(first, last + 1) for context in by_line.get(line, ())}
        if contexts == {""}:
            contexts = {context for found in by_line.values() for context in found}
        chosen: list[str] = []
        for test in self._sorted({context.rpartition("|")[0] for context in contexts}):
            most_seconds -= self.seconds[test]
            if chosen and most_seconds < 0:
                break
            chosen.append(test)
        return chosen

    def quickest(self, count: int) -> list[str]:
        """Some tests of the room."""
        return self._sorted(self.seconds)[:count]

    def _sorted(self, tests: Iterable[str]) -> list[str]:
        return sorted((test for test in tests if test in self.seconds), key=lambda test: (self.seconds[test], test))


def _statement(tree: ast.AST, item: WorkItem) -> tuple[int, int]:
    """The lines of the innermost statement with the fault; of one with a body, those before it."""
    lines = (item.mutations[0].start_pos[0], item.mutations[0].end_pos[0])
    found = lines
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and _within(item, node):
            body = getattr(node, "body", None)
            found = (node.lineno, max(lines[1], body[0].lineno - 1) if body else node.end_lineno or lines[1])
    return found


def modules_of(room: dict[str, Any]) -> list[Path]:
    """The modules of a room, below the current folder."""
    found = {path for pattern in room["modules"] for path in Path("hf_sparse_cache").glob(pattern)}
    return sorted(path for path in found if path.name != "__init__.py")


def tests_of(room: dict[str, Any]) -> list[str]:
    """The test files of a room, below the current folder; a pattern with a minus before it leaves some out."""
    without = {path for pattern in room["tests"] if pattern[0] == "-" for path in Path("tests").glob(pattern[1:])}
    found = {path for pattern in room["tests"] if pattern[0] != "-" for path in Path("tests").glob(pattern)}
    return sorted(map(str, found - without))


def planted(modules: list[Path], database_file: Path) -> list[WorkItem]:
    """Every fault that can be planted in the modules, but for those in annotations and messages."""
    with use_db(str(database_file), WorkDB.Mode.create) as database:
        init(modules, database, {})
        items = list(database.work_items)
    idle = {str(path): list(_idle(ast.parse(path.read_text(encoding="utf-8")))) for path in modules}
    items = [
        item for item in items if not any(_within(item, span) for span in idle[str(item.mutations[0].module_path)])
    ]
    return sorted(
        items, key=lambda item: (str(item.mutations[0].module_path), item.mutations[0].start_pos, _how(item))
    )


def _how(item: WorkItem) -> str:
    return f"{item.mutations[0].operator_name} {item.mutations[0].occurrence}"


def _idle(tree: ast.AST) -> Iterator[ast.AST]:
    """Parts that only readers and type checkers look at."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if isinstance(getattr(node, name, None), ast.AST):
                yield getattr(node, name)
        if isinstance(node, ast.Raise | ast.JoinedStr):
            yield node
        if isinstance(node, ast.FunctionDef) and node.args.kwonlyargs and not node.args.vararg:
            yield _star(node)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield node


def _star(function: ast.FunctionDef) -> Any:
    """Where the star stands in a signature, which is taken for a product."""
    args = function.args
    before = [*args.posonlyargs, *args.args, *args.defaults]
    start = max(((arg.end_lineno, arg.end_col_offset) for arg in before), default=(function.lineno, 0))
    first = args.kwonlyargs[0]
    return SimpleNamespace(
        lineno=start[0], col_offset=start[1], end_lineno=first.lineno, end_col_offset=first.col_offset
    )


def _within(item: WorkItem, node: Any) -> bool:
    start, end = item.mutations[0].start_pos, item.mutations[0].end_pos
    return (node.lineno, node.col_offset) <= start and end <= (node.end_lineno, node.end_col_offset)


def sample(items: list[WorkItem], count: int, seed: int) -> list[WorkItem]:
    """Some of the faults of a room, drawn by the seed."""
    return random.Random(seed).sample(items, min(count, len(items)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="faults to plant, evenly in the rooms")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--room", choices=SETTINGS["rooms"], action="append", help="some of the rooms; repeat")
    parser.add_argument("--timeout", type=float, default=900, help="seconds after which tests hang, which is noticed")
    parser.add_argument("--seconds", type=float, default=3600, help="how long the tests of one fault may take")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_checkout(folder / "checkout")
        os.chdir(folder / "checkout")
        os.environ.update(PYTHONPATH=os.getcwd(), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        sys.path.insert(0, os.getcwd())
        noticed: dict[str, list[bool]] = defaultdict(list)
        survivors: list[str] = []
        rooms = options.room or list(SETTINGS["rooms"])
        for room in rooms:
            (folder / room).mkdir()
            items = planted(modules_of(SETTINGS["rooms"][room]), folder / room / "faults.sqlite")
            chosen = sample(items, -(-options.count // len(rooms)), options.seed)
            coverage = Coverage.measured(tests_of(SETTINGS["rooms"][room]), folder / room)
            print(f"seed {options.seed}: {len(chosen)} of {len(items)} faults in {room}", flush=True)
            if fails(coverage.quickest(20), options.timeout):
                sys.exit(f"tests of {room} that pass by themselves fail in a child without any fault")
            for item in chosen:
                tests = coverage.tests_of(item, options.seconds)
                seen, diff = plant(item, tests, options.timeout)
                where = f"{item.mutations[0].module_path}:{item.mutations[0].start_pos[0]} {_how(item)}"
                noticed[str(item.mutations[0].module_path)].append(seen)
                survivors += [] if seen else [f"{where}\n{diff}"]
                print(f"{'noticed    ' if seen else 'NOT NOTICED'} {where}, {len(tests)} tests", flush=True)
        report(noticed, survivors)


def plant(item: WorkItem, tests: list[str], timeout: float) -> tuple[bool, str]:
    """Plants one fault; returns whether the tests noticed it, and the fault as a diff."""
    mutation = item.mutations[0]
    operator = get_operator(mutation.operator_name)(**mutation.operator_args)
    with use_mutation(mutation.module_path, operator, mutation.occurrence) as (right, wrong):
        lines = difflib.unified_diff(right.splitlines(), (wrong or "").splitlines(), n=2, lineterm="")
        return fails(tests, timeout), "\n".join(list(lines)[2:])


def fails(tests: list[str], timeout: float) -> bool:
    """Whether one of the tests fails, or hangs, in a child of this process."""
    if not tests:
        return False
    child = os.fork()
    if not child:
        try:
            os.setsid()
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True
            loaded = "ignore::pytest.PytestAssertRewriteWarning"  # a plugin that transformers has imported before
            os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov", "-W", loaded, *tests]))
        finally:
            os._exit(pytest.ExitCode.INTERNAL_ERROR)  # and touches nothing of the parent's
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def report(noticed: dict[str, list[bool]], survivors: list[str]) -> None:
    """Sum up by module."""
    print("\n| module | planted | noticed |\n|---|---|---|")
    for module, outcomes in sorted(noticed.items()):
        print(f"| {module} | {len(outcomes)} | {sum(outcomes)} |")
    total = [outcome for outcomes in noticed.values() for outcome in outcomes]
    print(f"\nnoticed {sum(total)} of {len(total)}; not noticed:\n")
    print("\n\n".join(survivors))


if __name__ == "__main__":
    main()
