"""Writes docs/api.md from the docstrings: python docs/make_api.py

It reads the source rather than the imported package, so the page is the same with every version of Python and of the
dependencies. A new public name is one row in `PUBLIC`; a test fails when the page is stale or a name is missing.
"""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
INTRODUCTION = """# API reference

Written by `make api` from the docstrings; edit those. Names without a module are imported from `hf_sparse_cache`.
"""
SHARED = "save_pretrained from_pretrained push_to_hub"
# Heading, name, module, and the members to show: each from the class itself or the module behind the colon.
PUBLIC = (
    (
        "The handle",
        "SparsePrefixCache",
        "cache",
        "stats last_request record prefill loglikelihood loglikelihood_rolling explain mark simulation clear detach "
        "save_pretrained from_pretrained",
    ),
    ("The handle", "SparseCacheConfig", "config", ""),
    ("The handle", "CheckpointStore", "store.store", "resize clear flush close"),
    ("The handle", "UnsupportedModelError", "errors", ""),
    ("The handle", "DamagedFileError", "errors", ""),
    ("What it reports", "CacheStats", "stats", ""),
    ("What it reports", "RequestInfo", "stats", ""),
    ("What it reports", "Explanation", "explain", ""),
    ("What it reports", "Prefilled", "models.handed", "cache"),
    ("Planning", "plan_checkpoints", "planning.planner", ""),
    ("Planning", "CheckpointPlan", "planning.planner", ""),
    ("Planning", "simulate", "simulator", ""),
    ("Planning", "SimulationResult", "simulator", "resume_rate capture_rate recomputed_tokens"),
    ("Planning", "Fleet", "routing.fleet", ""),
    ("Planning", "Arrival", "routing.fleet", ""),
    ("Planning", "FleetTimes", "routing.fleet", ""),
    ("Planning", "Rules", "routing.router", ""),
    ("Planning", "Shareable", "hub", SHARED),
    ("Exactness", "check_exactness", "exactness", ""),
    ("Exactness", "ExactnessReport", "exactness", "passed bitwise max_abs_logit_diff tokens_equal resumed_tokens"),
    ("Exactness", "ExactnessRow", "exactness", ""),
    ("Extending", "Policy", "planning.policy", "place observe"),
    ("Extending", "Prompt", "planning.policy", "open_cuts snap"),
    ("Extending", "View", "planning.views", "below learn"),
    ("Extending", "Shape", "planning.views", ""),
    ("Extending", "Family", "models.families", ""),
)
# Classes that people meet only as what others inherit from.
TITLES = {
    "Shareable": "SparseCacheConfig and CheckpointPlan: saving, loading and sharing",
}
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Source):(.*)$")
ITEM = re.compile(r"^([\w, ]+?(?: \(`[^`]*`(?: or `[^`]*`)?\))?): (.*)$")


def page() -> str:
    """The whole page."""
    parts, heading = [INTRODUCTION], ""
    for title, name, module, members in PUBLIC:
        if title != heading:
            parts.append(f"## {title}\n")
            heading = title
        parts.append(_entry(name, module, members.split()))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _entry(name: str, module: str, members: list[str]) -> str:
    tree = ast.parse((ROOT / "hf_sparse_cache" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    node = _named(tree, name)
    public = name in _exported()
    where = "" if public or name in TITLES else f"hf_sparse_cache.{module}."
    text = f"### {TITLES.get(name, f'`{name}`')}\n\n"
    if isinstance(node, ast.FunctionDef):
        return text + _fenced(where, node) + _documented(node)
    if name not in TITLES:
        made = _constructor(node)
        bases = ", ".join(map(ast.unparse, node.bases))
        signature = _wrapped(where + name, made) if made else f"class {where}{name}({bases})"
        text += f"```text\n{signature.removesuffix('()')}\n```\n\n" + _documented(node)
    for member in members:
        found = _named(node, member)
        owner = "" if name in TITLES else f"{name}."
        if "property" in map(ast.unparse, found.decorator_list):
            returns = f": {ast.unparse(found.returns)}" if found.returns else ""
            text += f"**`.{member}`**{returns and f' `{returns[2:]}`'}. {_documented(found)}"
        else:
            text += _fenced(owner and ".", found) + _documented(found)
    return text


def _exported() -> list[str]:
    tree = ast.parse((ROOT / "hf_sparse_cache" / "__init__.py").read_text(encoding="utf-8"))
    names = next(node.value for node in tree.body if isinstance(node, ast.Assign) and _target(node) == "__all__")
    exported: list[str] = ast.literal_eval(names)
    return exported


def _target(node: ast.Assign) -> str:
    return ast.unparse(node.targets[0])


def _named(tree: ast.AST, name: str) -> ast.FunctionDef | ast.ClassDef:
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    if not found:
        raise LookupError(f"{name} is not in {getattr(tree, 'name', 'the module')}: mend PUBLIC in docs/make_api.py")
    return found[-1]


def _parameters(function: ast.FunctionDef) -> list[str]:
    """Parameters as written, less `self` and `cls`."""
    own, keywords = function.args, []
    positional = [*own.posonlyargs, *own.args]
    defaults = [None] * (len(positional) - len(own.defaults)) + list(own.defaults)
    shown = [_parameter(arg, value) for arg, value in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls"):
        shown = shown[1:]
    if own.kwonlyargs:
        keywords = ["*" if own.vararg is None else f"*{own.vararg.arg}"]
        keywords += [_parameter(arg, value) for arg, value in zip(own.kwonlyargs, own.kw_defaults, strict=True)]
    return [*shown, *keywords, *([f"**{own.kwarg.arg}"] if own.kwarg else [])]


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
    return f"{arg.arg}{kind}" + ("" if default is None else f"{' = ' if kind else '='}{_quoted(default)}")


def _quoted(value: ast.expr) -> str:
    return re.sub(r"^'(.*)'$", r'"\1"', ast.unparse(value))


def _constructor(node: ast.ClassDef) -> list[str]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _parameters(item)
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item)]
    return [
        f"{ast.unparse(item.target)}: {ast.unparse(item.annotation)}"
        + ("" if item.value is None else f" = {_quoted(item.value)}")
        for item in fields
    ]


def _fenced(owner: str, function: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(function.returns).strip(chr(39))}" if function.returns else ""
    return f"```text\n{_wrapped(owner + function.name, _parameters(function), returns)}\n```\n\n"


def _wrapped(name: str, parameters: list[str], returns: str = "") -> str:
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returns}"


def _documented(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The docstring with its sections as lists."""
    lines, out, item_indent = (ast.get_docstring(node) or "").splitlines(), [], 0
    in_section = False
    for number, line in enumerate(lines):
        section = SECTION.match(line)
        if section:
            in_section = section[1] != "Source"
            out += ["", f"*{section[1]}*{':' + section[2] if section[2] else ''}", ""]
            item_indent = 0
            continue
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if in_section and stripped:
            item_indent = item_indent or indent
            match = ITEM.match(stripped)
            if indent == item_indent and match:
                line = f"- {', '.join(f'`{part}`' for part in match[1].split(', '))}: {match[2]}"
                line = re.sub(r"^- `(\w+) \((.*)\)`:", r"- `\1` (\2):", line)
            else:
                line = ("  " if indent > item_indent else "") + stripped
        elif in_section and not stripped:
            # A section ends at a blank line, unless what follows is set in like its items.
            in_section = len(re.match(r" *", next(filter(str.strip, lines[number:]), ""))[0]) >= item_indent > 0
            if in_section:
                continue
        out.append(line)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()
    return f"{text}\n\n" if text else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
