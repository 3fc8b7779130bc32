"""The house keeps its size and its names: few modules at the top, no function longer than a screen, few parameters,
and no name of a file, or of what a module offers, that stands for two things.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import hf_sparse_cache


PACKAGE = Path(hf_sparse_cache.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 60
MOST_MODULES = 14
MOST_PARAMETERS = 5
# What may take more, and why no object carries them.
_CONTRACT = "public: users give settings by keyword"
_COMMAND = "typer makes an option of each parameter"
_UPSTREAM = "takes the place of upstream's function, whose parameters these are"
MANY_PARAMETERS = {
    "cache.py: SparsePrefixCache.__init__": _CONTRACT,
    "simulator.py: simulate": _CONTRACT,
    "store/store.py: CheckpointStore.__init__": _CONTRACT,
    "planning/overlap.py: shape_of": "public: docs/extending.md shows how a view is tried with it",
    "cli/__init__.py: demo": _COMMAND,
    "cli/__init__.py: verify": _COMMAND,
    "cli/__init__.py: plan": _COMMAND,
    "cli/__init__.py: simulate": _COMMAND,
    "cli/benching.py: bench": _COMMAND,
    "cli/hosting.py: serve": _COMMAND,
    "cli/__init__.py: tune": _COMMAND,
    "evaluation/harness.py: SparseLM.__init__": "public: lm_eval's model_args are keywords",
    "models/mamba1.py: scan_from": _UPSTREAM,
    "models/mamba1.py: around_kernel.resume": _UPSTREAM,
    "serving/inference.py: Generation.generate_streaming": _UPSTREAM,
}
# Names that several modules may use, and why one thing is meant.
SHARED_NAMES = {
    "logger": "each module's own, as logging has it",
    "run": "the work of a command, which has a module of its own in cli/",
    "simulate": "the command, and the function that it is the command of",
}
SHARED_FILES = {
    "__init__.py": "Python's",
    "__main__.py": "Python's: -m hf_sparse_cache, and -m hf_sparse_cache.cli, which brings no torch",
}


def long_functions(source: str) -> list[str]:
    """Names of functions that take too many lines, those of their docstring not counted."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = node.body[0] if ast.get_docstring(node) else None
            lines = _lines(node) - (_lines(said) if said is not None else 0)
            found += [node.name] * (lines > MOST_LINES)
    return found


def overloaded(source: str) -> list[str]:
    """Functions that take too many parameters, with the classes and functions around them; `self` and `cls` and what
    is gathered by stars do not count."""
    found: list[str] = []
    waiting: list[tuple[ast.AST, str]] = [(ast.parse(source), "")]
    while waiting:
        node, around = waiting.pop()
        for child in ast.iter_child_nodes(node):
            name = around
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{around}.{child.name}".lstrip(".")
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                taken = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                bound = bool(taken) and taken[0].arg in ("self", "cls")
                found += [name] * (len(taken) - bound > MOST_PARAMETERS)
            waiting.append((child, name))
    return sorted(found)


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


def test_a_function_takes_few_parameters() -> None:
    """Else an object that exists carries them; of those that may, none is listed any longer than it needs."""
    found = {
        f"{module.relative_to(PACKAGE).as_posix()}: {name}"
        for module in MODULES
        for name in overloaded(module.read_text(encoding="utf-8"))
    }
    assert sorted(found - MANY_PARAMETERS.keys()) == [], "find the object, or give the reason"
    assert sorted(MANY_PARAMETERS.keys() - found) == [], "no longer needs to be listed"


def test_many_parameters_are_noticed() -> None:
    for count in (MOST_PARAMETERS, MOST_PARAMETERS + 1):
        names = [f"a{number}" for number in range(count)]
        plain, keywords = ", ".join(names), ", ".join([*names[:2], "*", *names[2:]])
        source = (
            f"def f({plain}, *rest, **more): pass\n"
            f"class A:\n def g(self, {keywords}): pass\n @classmethod\n def h(cls, {plain}):\n"
            f"  async def inner({plain}): pass\n"
        )
        assert overloaded(source) == ["A.g", "A.h", "A.h.inner", "f"] * (count > MOST_PARAMETERS)


def offered(source: str) -> Iterator[str]:
    """The public names that a module itself defines at its top."""
    for node in ast.parse(source).body:
        names: list[ast.expr | str] = []
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [part for target in node.targets for part in getattr(target, "elts", [target])]
        elif isinstance(node, ast.AnnAssign):
            names = [node.target]
        for name in names:
            text = name.id if isinstance(name, ast.Name) else name
            if isinstance(text, str) and not text.startswith("_"):
                yield text


def doubles(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Names that more than one module offers, with those modules."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module, source in sources.items():
        for name in dict.fromkeys(offered(source)):
            homes[name].append(module)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_one_thing_has_one_name() -> None:
    """Else the less known of the two is called what it is; what may be shared is listed no longer than it is."""
    sources = {module.relative_to(PACKAGE).as_posix(): module.read_text(encoding="utf-8") for module in MODULES}
    found = doubles(sources)
    assert {name: modules for name, modules in found.items() if name not in SHARED_NAMES} == {}
    assert sorted(SHARED_NAMES.keys() - found.keys()) == [], "no longer needs to be listed"
    assert [module for module in found["run"] if not module.startswith("cli/")] == []
    assert found["simulate"] == ["cli/__init__.py", "simulator.py"]


def test_files_have_names_of_their_own() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        homes[module.name].append(module.relative_to(PACKAGE).as_posix())
    found = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert {name: modules for name, modules in found.items() if name not in SHARED_FILES} == {}
    assert sorted(SHARED_FILES.keys() - found.keys()) == [], "no longer needs to be listed"


def test_a_second_name_is_noticed() -> None:
    one = "import a\nfrom b import Taken\nclass Unit: pass\n_private = 1\nLEFT, right = 1, 2\nif a:\n hidden = 1\n"
    two = "def Unit(): Taken = 1\n_private = 1\nTaken: int = 1\nasync def right(): pass\nhidden = 1\n"
    assert doubles({"one": one, "two": two}) == {"Unit": ["one", "two"], "right": ["one", "two"]}
    assert doubles({"one": one, "two": one.replace("LEFT", "Left")}).keys() == {"Unit", "right"}
    assert doubles({"one": one}) == {}
