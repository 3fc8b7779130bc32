"""Faults planted in the core, one at a time, and whether the tests notice: `make mutants`, hours.

`cosmic-ray` knows how to plant them. A seed draws the sample, evenly from the rooms of `[tool.mutants]` in
pyproject.toml, which says what tests look at each. Everything happens in a copy of the checkout. What the tests do not
notice is written as a diff; each is either a hole or a change that changes nothing, which only a reader can tell.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkItem


ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutants"]


def copy_checkout(into: Path) -> None:
    """What git knows or would add, and what was compiled."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    compiled = [path.relative_to(ROOT) for path in (ROOT / "hf_sparse_cache").glob("_planner.*") if path.is_file()]
    for name in {*map(Path, filter(None, names)), *compiled}:
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)


def command(tests: list[str]) -> str:
    """What runs the tests of a room, up to the first that fails."""
    return f"{sys.executable} -m pytest -x -q -p no:cacheprovider {' '.join(f'tests/{name}.py' for name in tests)}"


def modules_of(room: dict[str, Any]) -> list[Path]:
    """The modules of a room, below the current folder."""
    found = {path for pattern in room["modules"] for path in Path("hf_sparse_cache").glob(pattern)}
    return sorted(path for path in found if path.name != "__init__.py")


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
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield node


def _within(item: WorkItem, node: Any) -> bool:
    start, end = item.mutations[0].start_pos, item.mutations[0].end_pos
    return (node.lineno, node.col_offset) <= start and end <= (node.end_lineno, node.end_col_offset)


def sample(found: dict[str, list[WorkItem]], count: int, seed: int) -> list[tuple[str, WorkItem]]:
    """As many faults of every room, drawn by the seed."""
    draw = random.Random(seed)
    share = -(-count // len(found))
    return [(room, item) for room, items in found.items() for item in draw.sample(items, min(share, len(items)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="faults to plant, evenly in the rooms")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--room", choices=SETTINGS["rooms"], action="append", help="some of the rooms; repeat")
    parser.add_argument("--timeout", type=float, default=900, help="seconds after which tests hang, which is noticed")
    options = parser.parse_args()
    rooms = {name: SETTINGS["rooms"][name] for name in options.room or SETTINGS["rooms"]}
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_checkout(folder / "checkout")
        os.chdir(folder / "checkout")
        os.environ.update(PYTHONPATH=os.getcwd(), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        found = {room: planted(modules_of(settings), folder / f"{room}.sqlite") for room, settings in rooms.items()}
        for room, settings in rooms.items():
            outcome, output = run_tests(command(settings["tests"]), options.timeout)
            if outcome != TestOutcome.SURVIVED:
                sys.exit(f"the tests of {room} fail without any fault:\n{output[-3000:]}")
        report(sample(found, options.count, options.seed), rooms, options)


def report(chosen: list[tuple[str, WorkItem]], rooms: dict[str, Any], options: Any) -> None:
    """Plant each fault, say what became of it, and sum up by module."""
    print(f"seed {options.seed}: {len(chosen)} faults in {', '.join(rooms)}", flush=True)
    noticed: dict[str, list[bool]] = defaultdict(list)
    survivors: list[str] = []
    for room, item in chosen:
        result = mutate_and_test(item.mutations, command(rooms[room]["tests"]), options.timeout)
        module = str(item.mutations[0].module_path)
        noticed[module].append(result.is_killed)
        where = f"{module}:{item.mutations[0].start_pos[0]} {_how(item)}"
        print(f"{'noticed    ' if result.is_killed else 'NOT NOTICED'} {where}", flush=True)
        if not result.is_killed:
            survivors.append(f"{where}\n{result.diff}")
    print("\n| module | planted | noticed |\n|---|---|---|")
    for module, outcomes in sorted(noticed.items()):
        print(f"| {module} | {len(outcomes)} | {sum(outcomes)} |")
    total = [outcome for outcomes in noticed.values() for outcome in outcomes]
    print(f"\nnoticed {sum(total)} of {len(total)}; not noticed:\n")
    print("\n\n".join(survivors))


if __name__ == "__main__":
    main()
