"""Exact sparse prefix caching for recurrent and hybrid language models.

Importing it is cheap: a public name brings its module, and torch and transformers with it, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .cache import SparsePrefixCache
    from .config import SparseCacheConfig
    from .errors import UnsupportedModelError
    from .exactness import ExactnessReport, check_exactness
    from .planner import CheckpointPlan, plan_checkpoints
    from .simulator import SimulationResult, simulate
    from .store import CheckpointStore


__version__ = "0.1.0"

__all__ = [
    "CheckpointPlan",
    "CheckpointStore",
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
    "CheckpointPlan": "planner",
    "CheckpointStore": "store",
    "ExactnessReport": "exactness",
    "SimulationResult": "simulator",
    "SparseCacheConfig": "config",
    "SparsePrefixCache": "cache",
    "UnsupportedModelError": "errors",
    "check_exactness": "exactness",
    "plan_checkpoints": "planner",
    "simulate": "simulator",
}


if not TYPE_CHECKING:  # for a type checker the imports above are all there is, so that it finds misspelt names

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
