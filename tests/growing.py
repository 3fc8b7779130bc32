"""Trees of prompts that grow without a store, and checkpoints that are hung on them."""

from __future__ import annotations

import numpy as np
from reference_store import Blob

from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store.forest import Forest
from hf_sparse_cache.store.tree import Account, Checkpoint, Node
from hf_sparse_cache.store.unit import holder


def ids_of(*tokens: int) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def grown(forest: Forest, tokens: tuple[int, ...], now: int = 0, space: str = "") -> list[Node]:
    """The path of a prompt that came now."""
    path = forest.insert(ids_of(*tokens), space, now)
    for node in path:
        node.last_used = now
    return path


def hung(path: list[Node], position: int, lineage: Lineage | None = None) -> Checkpoint:
    """A checkpoint on a path, in its order."""
    made = Checkpoint(lineage or Lineage([position]), Blob(10), holder(path, position), Account(), 0)
    made.node.checkpoints = sorted([*made.node.checkpoints, made], key=lambda item: item.position)
    return made
