"""Faults planted in the core, one at a time, and whether the tests notice: `make mutants`, minutes to hours.

A seed draws the sample (`faults.py`) in the rooms of `[tool.mutants]` in pyproject.toml, which says what tests look at
each. Those of all rooms that are asked for run once with `coverage`, which says which test runs which line: a fault is
then shown to the tests that run its line, the quick ones first (`planting.py`). Everything happens in a copy of the
checkout. What the tests do not notice is written as a diff; each is either a hole or a change that changes nothing,
which only a reader can tell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from coverage import CoverageData
from faults import Fault, faults_in, sample
from planting import OPTIONS, Hot, Trial, cold, noticed, written
from transformers import GenerationMixin


ROOT = Path(__file__).resolve().parents[1]
LOADED = (torch, GenerationMixin)  # once for all children
TOOLS = ("mutants.py", "planting.py", "faults.py")
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutants"]


def copy_checkout(into: Path) -> str:
    """What git knows or would add, and what was compiled; returns a digest of what is tested and of the tests."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    package = ROOT / "hf_sparse_cache"
    compiled = {path.relative_to(ROOT) for part in ("_planner", "_codec") for path in package.glob(f"{part}.*")}
    digest = hashlib.sha256()
    for name in sorted({*map(Path, filter(None, names)), *compiled}):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
            told = name.parts[0] in ("hf_sparse_cache", "tests") and name.name not in TOOLS
            digest.update(f"{name}\n".encode() + (ROOT / name).read_bytes() if told else b"")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Coverage:
    """Which test runs which line, and how long each takes."""

    file: Path
    seconds: dict[str, float]
    _by_module: dict[str, dict[int, list[str]]] = field(default_factory=dict)  # each takes a second to ask for

    @classmethod
    def measured(cls, tests: list[str], file: Path) -> Coverage:
        """Run the tests without any fault; what fails then is named and not asked later.

        Args:
            tests: their files.
            file: where it is kept; what it has from before of this very checkout is taken.
        """
        said = file.parent / "tests.json"
        if not said.exists():
            said.write_text(json.dumps(_measured(tests, file)), encoding="utf-8")
        found = json.loads(said.read_text(encoding="utf-8"))
        if found["failed"]:
            print(f"fail without any fault, and are not asked: {', '.join(found['failed'])}", flush=True)
        return cls(file, {test: took for test, took in found["seconds"].items() if test not in found["failed"]})

    @cached_property
    def _data(self) -> CoverageData:
        data = CoverageData(str(self.file))
        data.read()
        return data

    def _contexts(self, module: str) -> dict[int, list[str]]:
        if module not in self._by_module:
            self._by_module[module] = self._data.contexts_by_lineno(module)
        return self._by_module[module]

    def trial(self, fault: Fault, most_seconds: float) -> Trial:
        """The tests that run the statement with the fault, the quick ones first; where it runs at import, all of them
        that run anything of the module. They hang when they take thrice as long as they did."""
        by_line = self._contexts(str(fault.module))
        contexts = {context for line in fault.lines for context in by_line.get(line, ())}
        if contexts == {""}:
            contexts = {context for found in by_line.values() for context in found}
        chosen: list[str] = []
        for test in self._sorted({context.rpartition("|")[0] for context in contexts}):
            most_seconds -= self.seconds[test]
            if chosen and most_seconds < 0:
                break
            chosen.append(test)
        return Trial(fault, chosen, 10 + 3 * sum(self.seconds[test] for test in chosen))

    def quickest(self, count: int) -> list[str]:
        """Some of the tests."""
        return self._sorted(self.seconds)[:count]

    def _sorted(self, tests: Iterable[str]) -> list[str]:
        return sorted((test for test in tests if test in self.seconds), key=lambda test: (self.seconds[test], test))


def _measured(tests: list[str], file: Path) -> dict[str, Any]:
    """How long each test of some files takes, and which of them fail, while `file` learns which line they run.

    A test that interrupts something, or nests to the limit, may end all measuring in its process. Files with tests
    that seem to run no line run once more, as long as that helps.
    """
    (file.parent / "relative").write_text("[run]\nrelative_files = true\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--durations=0", "--durations-min=0", "-rfE"]
    command += ["-p", "no:cacheprovider", "--cov=hf_sparse_cache", "--cov-context=test", "--cov-report="]
    command += [f"--cov-config={file.parent / 'relative'}"]
    seconds: dict[str, float] = {}
    failed: set[str] = set()
    before, missing = 0, set(tests)
    while missing and len(missing) != before:
        again = ["--cov-append"] if before else []
        variables = {**os.environ, "COVERAGE_FILE": str(file)}
        done = subprocess.run([*command, *again, *sorted(missing)], env=variables, capture_output=True, text=True)
        took: dict[str, float] = defaultdict(float)
        for each, test in re.findall(r"^([\d.]+)s (?:call|setup) +(\S.*)$", done.stdout, re.MULTILINE):
            took[test] += float(each)
        if not took:
            sys.exit(f"no test ran:\n{done.stdout[-3000:]}")
        seconds |= took
        failed |= set(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE))
        data = CoverageData(str(file))
        data.read()
        seen = {context.rpartition("|")[0] for context in data.measured_contexts()}
        before, missing = len(missing), {test.partition("::")[0] for test in took if test not in seen}
    return {"seconds": seconds, "failed": sorted(failed)}


def modules_of(room: dict[str, Any]) -> list[Path]:
    """The modules of a room, below the current folder."""
    found = {path for pattern in room["modules"] for path in Path("hf_sparse_cache").glob(pattern)}
    return sorted(path for path in found if path.name != "__init__.py")


def tests_of(rooms: list[str]) -> list[str]:
    """The test files of rooms, below the current folder; a pattern with a minus before it leaves some out."""
    patterns = [pattern for room in rooms for pattern in SETTINGS["rooms"][room]["tests"]]
    without = {path for pattern in patterns if pattern[0] == "-" for path in Path("tests").glob(pattern[1:])}
    found = {path for pattern in patterns if pattern[0] != "-" for path in Path("tests").glob(pattern)}
    return sorted(map(str, found - without))


def judge(trials: list[Trial], room: Path) -> list[bool]:
    """Plant the faults of a room; whether each was noticed.

    Args:
        trials: the faults, with their tests.
        room: a folder, for what a process that collects the tests once has to tell.
    """
    outcomes: dict[str, bool] = {}
    voice = os.dup(1)  # of children as well, whose output is silenced

    def told(trial: Trial, seen: bool) -> None:
        word = "noticed    " if seen else "NOT NOTICED"
        os.write(voice, f"{word} {trial.fault}, {len(trial.tests)} tests\n".encode())
        outcomes[str(trial.fault)] = seen

    said = room / "outcomes.json"
    files = sorted({test.partition("::")[0] for trial in trials for test in trial.tests})

    def collect() -> bool:
        done = pytest.main([*OPTIONS, *files], plugins=[Hot([trial for trial in trials if trial.tests], told)])
        said.write_text(json.dumps(outcomes), encoding="utf-8")
        return done not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)

    if noticed(collect, math.inf):
        sys.exit("the process that plants faults has failed")
    outcomes |= json.loads(said.read_text(encoding="utf-8"))
    for trial in trials:
        if str(trial.fault) not in outcomes:
            with written(trial.fault):
                told(trial, bool(trial.tests) and noticed(partial(cold, trial.tests), trial.patience))
    return [outcomes[str(trial.fault)] for trial in trials]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="faults to plant, evenly in the rooms")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--room", choices=SETTINGS["rooms"], action="append", help="some of the rooms; repeat")
    parser.add_argument("--module", default="", help="only faults in modules with this in their path")
    parser.add_argument("--seconds", type=float, default=3600, help="how long the tests of one fault may take")
    parser.add_argument("--coverage", type=Path, help="folder that keeps which test runs which line, for a second run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        digest = copy_checkout(folder / "checkout")
        kept = options.coverage.absolute() if options.coverage else folder
        os.chdir(folder / "checkout")
        os.environ.update(PYTHONPATH=os.getcwd(), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        sys.path.insert(0, os.getcwd())
        counts: dict[str, list[bool]] = defaultdict(list)
        survivors: list[Fault] = []
        rooms = options.room or list(SETTINGS["rooms"])
        measured = kept / f"{'-'.join(rooms)}-{digest}"
        measured.mkdir(parents=True, exist_ok=True)
        coverage = Coverage.measured(tests_of(rooms), measured / "coverage")
        if noticed(partial(cold, coverage.quickest(20)), math.inf):
            sys.exit("tests that pass by themselves fail in a child without any fault")
        for room in rooms:
            faults = faults_in([path for path in modules_of(SETTINGS["rooms"][room]) if options.module in str(path)])
            drawn = sample(faults, -(-options.count // len(rooms)), options.seed)
            print(f"seed {options.seed}: {len(drawn)} of {len(faults)} faults in {room}", flush=True)
            seen = judge([coverage.trial(fault, options.seconds) for fault in drawn], folder)
            for fault, outcome in zip(drawn, seen, strict=True):
                counts[str(fault.module)].append(outcome)
            survivors += [fault for fault, outcome in zip(drawn, seen, strict=True) if not outcome]
        report(counts, survivors)


def report(noticed: dict[str, list[bool]], survivors: list[Fault]) -> None:
    """Sum up by module."""
    print("\n| module | planted | noticed |\n|---|---|---|")
    for module, outcomes in sorted(noticed.items()):
        print(f"| {module} | {len(outcomes)} | {sum(outcomes)} |")
    total = [outcome for outcomes in noticed.values() for outcome in outcomes]
    print(f"\nnoticed {sum(total)} of {len(total)}; not noticed:\n")
    print("\n\n".join(f"{fault}\n{fault.diff}" for fault in survivors))


if __name__ == "__main__":
    main()
