"""Faults that can be planted in a module: those that `cosmic-ray` knows, and statements left out, which it does not.

For `make mutants`.
"""

from __future__ import annotations

import ast
import difflib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec


@dataclass(frozen=True)
class Fault:
    """One fault in one module, at a place: line and column."""

    module: Path
    place: tuple[int, int]
    how: str
    mutation: MutationSpec | None = None  # None: the statement at the place is left out

    def __str__(self) -> str:
        return f"{self.module}:{self.place[0]} {self.how}"

    @cached_property
    def right(self) -> str:
        """The module as it is."""
        return self.module.read_text(encoding="utf-8")

    @cached_property
    def wrong(self) -> str:
        """The module with the fault; as many lines."""
        if self.mutation is None:
            return _without(self.right, self.place)
        operator = get_operator(self.mutation.operator_name)(**self.mutation.operator_args)
        return str(mutate_code(self.right, operator, self.mutation.occurrence))

    @property
    def compiles(self) -> bool:
        """Whether it is a program at all: not where the two asterisks before a mapping are taken for a power."""
        try:
            ast.parse(self.wrong)
        except SyntaxError:
            return False
        return True

    @property
    def lines(self) -> range:
        """Those of the innermost statement with the fault; of one with a body, those before it."""
        end = self.mutation.end_pos[0] if self.mutation else self.place[0]
        found = (self.place[0], end)
        for node in ast.walk(ast.parse(self.right)):
            if isinstance(node, ast.stmt) and _span(node)[0] <= self.place and (end, 0) <= _span(node)[1]:
                body = getattr(node, "body", None)
                found = (node.lineno, max(end, body[0].lineno - 1) if body else node.end_lineno or end)
        return range(found[0], found[1] + 1)

    @property
    def diff(self) -> str:
        """The fault, for a reader."""
        lines = difflib.unified_diff(self.right.splitlines(), self.wrong.splitlines(), n=2, lineterm="")
        return "\n".join(list(lines)[2:])


def faults_in(modules: list[Path]) -> list[Fault]:
    """Every fault that can be planted in the modules, but for those in annotations and messages."""
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/faults", WorkDB.Mode.create) as database:
        init(modules, database, {})
        mutations = [item.mutations[0] for item in database.work_items]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules}
    idle = {path: [_span(node) for node in _idle(tree)] for path, tree in trees.items()}
    found = [
        Fault(each.module_path, each.start_pos, f"{each.operator_name} {each.occurrence}", each)
        for each in mutations
        if not any(start <= each.start_pos and each.end_pos <= end for start, end in idle[each.module_path])
    ]
    found += [Fault(path, _span(node)[0], "left out") for path, tree in trees.items() for node in _statements(tree)]
    return sorted(found, key=lambda fault: (str(fault.module), fault.place, fault.how))


def sample(faults: list[Fault], count: int, seed: int) -> list[Fault]:
    """Some of them, drawn by the seed: a place at most once, as an addition can be wrong in twelve ways."""
    draw = random.Random(seed)
    places: dict[tuple[Path, tuple[int, int]], list[Fault]] = {}
    for fault in faults:
        places.setdefault((fault.module, fault.place), []).append(fault)
    drawn = [draw.choice(ways) for ways in draw.sample(list(places.values()), min(count, len(places)))]
    return [fault for fault in drawn if fault.compiles]


def _span(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _idle(tree: ast.AST) -> Iterator[Any]:
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


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements of functions that can be left out: what is called, set, raised, returned, guarded or locked. Names
    that are bound are none of them: without one the next line fails."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found: dict[tuple[int, int], ast.stmt] = {}
    for function in functions:
        said = function.body[0] if ast.get_docstring(function) else None
        for node in ast.walk(function):
            if node is said or not isinstance(node, ast.stmt):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            sets = isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and getattr(node, "value", None)
            if (
                isinstance(node, ast.Raise | ast.Delete)
                or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await | ast.Tuple))
                or (sets and any(not isinstance(target, ast.Name) for target in targets))
                or (isinstance(node, ast.Return) and node.value is not None)
                or (isinstance(node, ast.If) and not node.orelse)
                or (isinstance(node, ast.With) and all(item.optional_vars is None for item in node.items))
            ):
                found[_span(node)[0]] = node
    return iter(found.values())


def _without(source: str, place: tuple[int, int]) -> str:
    """The source without the statement at a place; of a `with` only what it enters is left out."""
    node = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt) and _span(node)[0] == place)
    encloses = isinstance(node, ast.With)
    last = node.body[0].lineno - 1 if isinstance(node, ast.With) else node.end_lineno or node.lineno
    lines = source.split("\n")
    indent = lines[node.lineno - 1][: node.col_offset]
    lines[node.lineno - 1 : last] = [f"{indent}{'if True:' if encloses else 'pass'}", *[""] * (last - node.lineno)]
    return "\n".join(lines)
