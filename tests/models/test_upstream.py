"""Which private parts of transformers, torch, accelerate and PEFT are used: all by `models/`, and all still there."""

import ast
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging import version
from tiny_models import build, prefill, random_ids
from transformers import DynamicCache

import hf_sparse_cache
from hf_sparse_cache.models import states
from hf_sparse_cache.models.lazy_kv import settle


PACKAGE = Path(hf_sparse_cache.__file__).parent
ROOM = PACKAGE / "models"
# A private method of transformers' mixin for the Hub, overridden where there is no model: of no concern to any state.
ELSEWHERE = {
    "_upload_modified_files": "hub.py",
    "_StreamError": "inference.py",
    "_normalize_tools": "prompts.py",  # the server's own handlers, whose parents make the prompt of a response so
    "_normalize_input": "prompts.py",
}
GENERATION, CACHES = "transformers.generation.utils", "transformers.cache_utils"
CONFIGURATION, MODELS = "transformers.configuration_utils", "transformers.modeling_utils"
MODULE, COMPILER = "torch.nn.modules.module", "torch._dynamo.eval_frame"
# Name -> module that has it, and the releases (first as far as it matters, and last) in which it was seen there.
PRIVATE: dict[str, tuple[str, str, str]] = {
    "_prefill": (GENERATION, "5.15", "5.24.0"),
    "_prepare_cache_for_generation": (GENERATION, "5.15", "5.24.0"),
    "_validate_model_kwargs": (GENERATION, "5.15", "5.24.0"),
    "_is_user_defined": (GENERATION, "5.23", "5.24.0"),
    "_layer_type": (CACHES, "5.23", "5.24.0"),
    "_sliding_window_tensor": (CACHES, "5.15", "5.24.0"),
    "_dynamo": (CACHES, "5.15", "5.24.0"),
    "_attn_implementation": (CONFIGURATION, "5.15", "5.24.0"),
    "_experts_implementation": (CONFIGURATION, "5.15", "5.24.0"),
    "_name_or_path": (CONFIGURATION, "5.15", "5.24.0"),
    "_commit_hash": (CONFIGURATION, "5.15", "5.24.0"),
    "_auto_class": (CONFIGURATION, "5.15", "5.24.0"),
    "_keep_in_fp32_modules": (MODELS, "5.15", "5.24.0"),
    "_keep_in_fp32_modules_strict": (MODELS, "5.15", "5.24.0"),
    "_is_hf_initialized": (MODELS, "5.15", "5.24.0"),
    "_hf_peft_config_loaded": ("transformers.integrations.peft", "5.15", "5.24.0"),
    "_output_capturing_hooks_installed": ("transformers.utils.output_capturing", "5.15", "5.24.0"),
    "_hf_hook": ("accelerate.hooks", "1.1", "1.15.0"),
    "_old_forward": ("accelerate.hooks", "1.1", "1.15.0"),
    "_active_adapter": ("peft.tuners.tuners_utils", "0.1", "0.19"),
    "_disable_adapters": ("peft.tuners.tuners_utils", "0.1", "0.19"),
    "_buffers": (MODULE, "2.5", "2.13.0"),
    "_parameters": (MODULE, "2.5", "2.13.0"),
    "_modules": (MODULE, "2.5", "2.13.0"),
    "_call_impl": (MODULE, "2.5", "2.13.0"),
    "_compiled_call_impl": (MODULE, "2.5", "2.13.0"),
    "_forward_hooks": (MODULE, "2.5", "2.13.0"),
    "_forward_pre_hooks": (MODULE, "2.5", "2.13.0"),
    "_global_forward_hooks": (MODULE, "2.5", "2.13.0"),
    "_global_forward_pre_hooks": (MODULE, "2.5", "2.13.0"),
    "_orig_mod": (COMPILER, "2.5", "2.13.0"),
    "_torchdynamo_orig_callable": (COMPILER, "2.5", "2.13.0"),
}
STANDARD_LIBRARY = {"_replace", "_fields", "_asdict"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def own_names(tree: ast.AST) -> frozenset[str]:
    """What a file gives a name to: functions, classes, variables and attributes."""
    return frozenset(_own_names(tree))


def _own_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def named(tree: ast.AST, own: set[str]) -> Iterator[tuple[str, int]]:
    """Private names that a file uses and that nobody in the package has made, or that are listed here; with lines."""
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Attribute) and (node.attr not in own or node.attr in PRIVATE):
            found = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [word for word in (node.value,) if word in PRIVATE or word in ELSEWHERE]
        elif isinstance(node, ast.FunctionDef) and (node.name in PRIVATE or node.name in ELSEWHERE):
            found = [node.name]
        for name in found:
            if is_private(name) and name not in STANDARD_LIBRARY:
                yield name, getattr(node, "lineno", 0)


def violations(files: dict[Path, ast.Module]) -> list[str]:
    own = {name for tree in files.values() for name in own_names(tree)}
    found = []
    for path, tree in files.items():
        inside = ROOM in path.parents or path == PACKAGE / "bench" / "upstream.py"
        for name, line in named(tree, own):
            if not inside and ELSEWHERE.get(name) != path.name:
                found.append(f"{path.name}:{line} names {name}: such names belong in models/")
            elif inside and name not in PRIVATE:
                found.append(f"{path.name}:{line} names {name}: list it in PRIVATE of this test")
    return found


def test_private_names_are_in_one_room_and_listed() -> None:
    assert violations(trees()) == []


@pytest.mark.parametrize(
    ("code", "where"),
    [
        ("model._prefill(ids)", "cache.py"),
        ("from transformers.generation.utils import _secret", "request.py"),
        ("import_module('x'); getattr(model, '_hf_hook')", "explain.py"),
        ("model._brand_new(ids)", "models/live.py"),
        ("from torch._inductor import config", "models/live.py"),
        ("class Mine:\n    def _validate_model_kwargs(self): pass", "exactness.py"),
    ],
)
def test_a_new_one_is_noticed(code: str, where: str) -> None:
    (said,) = violations({**trees(), PACKAGE / where: ast.parse(code)})
    assert said.startswith(where.rpartition("/")[2])


@pytest.mark.parametrize("name", PRIVATE)
def test_it_is_still_there(name: str) -> None:
    where, since, seen = PRIVATE[name]
    library = where.partition(".")[0]
    try:
        installed = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    if version.parse(installed) < version.parse(since):
        pytest.skip(f"{library} {installed} is older than {since}")
    source = inspect.getsource(importlib.import_module(where))
    assert re.search(rf"\b{name}\b", source), (
        f"{where} of {library} {installed} has no {name} any more (it was seen in {seen}): look for what takes its "
        "place, and at every use of it in hf_sparse_cache/models"
    )


@pytest.mark.parametrize("name", ["_normalize_tools", "_normalize_input"])
def test_the_handler_of_responses_still_has_it(name: str) -> None:
    handlers = pytest.importorskip("transformers.cli.serving.response")
    assert callable(getattr(handlers.ResponseHandler, name, None)), f"serving/prompts.py calls ResponseHandler.{name}"


def test_every_listed_name_is_used() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in ROOM.glob("*.py"))
    assert [name for name in PRIVATE if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "Jamba", "LFM2"])
def test_a_restored_layer_is_as_transformers_fills_one(family: str) -> None:
    """States are put there in place of the zeros that `lazy_initialization` makes: with all that it notes besides."""
    model = build(family)
    _, cache = prefill(model, random_ids(70))
    fresh = DynamicCache(config=model.config)
    states.restore(fresh, states.capture_state(cache), [states.capture_kv(cache, 0, 70)])
    settle(fresh.layers)
    for found, stock in zip(fresh.layers, cache.layers, strict=True):
        assert type(found) is type(stock) and vars(found).keys() == vars(stock).keys()
        for name, expected in vars(stock).items():
            assert alike(getattr(found, name), expected), name


def alike(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[key], expected[key]) for key in expected)
    if not torch.is_tensor(expected):
        return bool(found == expected)
    static = [getattr(each, "_dynamo_static_input_type", None) for each in (found, expected)]
    return torch.equal(found, expected) and found.dtype == expected.dtype and static[0] == static[1]
