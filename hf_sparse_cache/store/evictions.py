"""Evictions by name: a new one has its row here."""

from .eviction import FIFO as FIFO
from .eviction import LRU as LRU
from .eviction import Eviction as Eviction
from .value import LeastValue


EVICTIONS: dict[str, type[Eviction]] = {"learned": LeastValue, "lru": LRU, "fifo": FIFO}


def make_eviction(name: str) -> Eviction:
    """Builds an eviction by name.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in EVICTIONS:
        raise ValueError(f"eviction={name!r} is unknown; choose one of {', '.join(EVICTIONS)}")
    return EVICTIONS[name]()
