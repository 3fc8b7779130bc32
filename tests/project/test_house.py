"""The house keeps its size: few modules at the top, no function longer than a screen."""

import ast
from pathlib import Path

import pytest

import hf_sparse_cache


PACKAGE = Path(hf_sparse_cache.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 60
MOST_MODULES = 14


def long_functions(source: str) -> list[str]:
    """Names of functions that take too many lines, those of their docstring not counted."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = node.body[0] if ast.get_docstring(node) else None
            lines = _lines(node) - (_lines(said) if said is not None else 0)
            found += [node.name] * (lines > MOST_LINES)
    return found


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def test_few_modules_lie_at_the_top() -> None:
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert len(names) <= MOST_MODULES, sorted(names)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_function_fits_on_a_screen(module: Path) -> None:
    assert long_functions(module.read_text(encoding="utf-8")) == []


def test_a_long_function_is_noticed() -> None:
    for lines in (MOST_LINES, MOST_LINES + 1):
        source = "class A:\n async def f(self):\n  '''Says\n  little.'''\n" + "  pass\n" * (lines - 1)
        assert long_functions(source) == ["f"] * (lines > MOST_LINES)
