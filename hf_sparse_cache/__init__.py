"""Exact sparse prefix caching for recurrent and hybrid language models."""

from .cache import SparsePrefixCache
from .config import SparseCacheConfig
from .errors import UnsupportedModelError
from .exactness import ExactnessReport, check_exactness
from .store import CheckpointStore


__version__ = "0.1.0"

__all__ = [
    "CheckpointStore",
    "ExactnessReport",
    "SparseCacheConfig",
    "SparsePrefixCache",
    "UnsupportedModelError",
    "check_exactness",
]
