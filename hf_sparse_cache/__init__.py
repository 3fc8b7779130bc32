"""Exact sparse prefix caching for recurrent and hybrid language models."""

from .cache import SparsePrefixCache
from .errors import UnsupportedModelError
from .exactness import ExactnessReport, check_exactness
from .store import CheckpointStore


__all__ = [
    "CheckpointStore",
    "ExactnessReport",
    "SparsePrefixCache",
    "UnsupportedModelError",
    "check_exactness",
]
