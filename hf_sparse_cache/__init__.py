"""Exact sparse prefix caching for recurrent and hybrid language models."""

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
