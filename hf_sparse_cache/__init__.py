"""Exact sparse prefix caching for recurrent and hybrid language models.

Importing it is cheap: a public name brings its module, and torch and transformers with it, when it is first used.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .cache import SparsePrefixCache
    from .config import SparseCacheConfig
    from .errors import DamagedFileError, UnsupportedModelError
    from .exactness import ExactnessReport, check_exactness
    from .planning.planner import CheckpointPlan, plan_checkpoints
    from .simulator import SimulationResult, simulate
    from .store import CheckpointStore


__version__ = "0.1.0"

__all__ = [
    "CheckpointPlan",
    "CheckpointStore",
    "DamagedFileError",
    "ExactnessReport",
    "SimulationResult",
    "SparseCacheConfig",
    "SparsePrefixCache",
    "UnsupportedModelError",
    "check_exactness",
    "plan_checkpoints",
    "simulate",
]

_HOMES = {
    "CheckpointPlan": "planning.planner",
    "CheckpointStore": "store.store",
    "DamagedFileError": "errors",
    "ExactnessReport": "exactness",
    "SimulationResult": "simulator",
    "SparseCacheConfig": "config",
    "SparsePrefixCache": "cache",
    "UnsupportedModelError": "errors",
    "check_exactness": "exactness",
    "plan_checkpoints": "planning.planner",
    "simulate": "simulator",
}


# Modules that had another place in version 0.1.0: their old names go on working, as names of the same modules.
_MOVED = {
    "builtin": "tools.builtin",
    "builtin_sizes": "tools.builtin_sizes",
    "calls": "models.inputs",
    "cost": "models.cost",
    "disk": "store.disk",
    "eviction": "store.evictions",
    "families": "models.families",
    "files": "store.files",
    "fingerprint": "models.fingerprint",
    "generation": "models.generation",
    "ledger": "store.ledger",
    "live": "models.live",
    "machine": "tools.machine",
    "mamba1": "models.mamba1",
    "notebook": "tools.notebook",
    "outline": "tools.outline",
    "overlap": "planning.overlap",
    "payloads": "models.tensors",
    "planner": "planning.planner",
    "policies": "planning.policies",
    "prefill": "models.prefill",
    "prompt": "planning.policy",
    "random_weights": "tools.random_weights",
    "segmentation": "planning.cuts",
    "states": "models.states",
    "survival": "store.survival",
    "tiers": "store.tier",
    "traces": "tools.traces",
    "tree": "store.tree",
    "units": "store.unit",
    "values": "store.value",
    "views": "planning.views",
    "waiting": "models.lazy_kv",
    "weights": "models.weights",
}


class _OldNames(MetaPathFinder, Loader):
    """Finds a module under the name that it had before it moved."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        return ModuleSpec(name, self) if package == __name__ and module in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f".{_MOVED[spec.name.rpartition('.')[2]]}", __name__)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just given the module the old name's spec.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_OldNames())


if not TYPE_CHECKING:  # for a type checker the imports above are all there is, so that it finds misspelt names

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
