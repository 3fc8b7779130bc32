"""A process of its own on a shared store: `python shared_worker.py PLACE FAMILY:MODE:SEED ...` asks and leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

import tiny_models
import torch
from persisting import GRID, handle, logits, question

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.models import prefill
from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.planning.lineage import Lineage


def model(family: str) -> Any:
    """The same weights in every process."""
    torch.set_num_threads(1)
    return tiny_models.build(family)


def ask(folder: str, family: str, mode: str, seed: str) -> None:
    """Answers one question, and leaves what it read in the shared store."""
    made = model(family)
    store = CheckpointStore(shared=folder)
    with handle(made, store=store, exactness=mode) as cache:
        logits(made, question(int(seed)), cache)
        assert cache.last_request is not None and cache.last_request.captured
    store.flush()
    assert store.shared is not None and store.shared.counts["written"] > 0, store.shared.counts
    store.close()


def replayed(cache: SparsePrefixCache, ids: torch.Tensor, segments: Any) -> torch.Tensor:
    """Logits behind the prompt of a run from nothing over the same segments."""
    binding = cache.server.binding
    with torch.no_grad():
        row = Row(ids[0], {"use_cache": True, "logits_to_keep": 1})
        output = prefill.replay(binding, binding.live_cache(), row, Lineage.from_ends(segments))
    return output.logits[:, -1]


if __name__ == "__main__":
    assert GRID
    for asked in sys.argv[2:]:
        family, mode, seed = asked.split(":")
        ask(f"{sys.argv[1]}/{family}-{mode}", family, mode, seed)
