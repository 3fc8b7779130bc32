"""Whether what is stored is what its lineage says that it is."""

from __future__ import annotations

from typing import Any

import torch

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models import prefill, states
from hf_sparse_cache.models.inputs import Row


def differing(cache: SparsePrefixCache) -> list[str]:
    """Every stored checkpoint whose state is not, to the bit, that of a run from nothing over its lineage.

    What is kept of that run is compared, rounded or not: a run that rounds elsewhere keeps other numbers.
    """
    found, kept = [], cache.server.binding.rounding
    for _, tokens, checkpoint in cache.store.checkpoints():
        live = cache.server.binding.live_cache()
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            prefill.replay(cache.server.binding, live, Row(ids, {"use_cache": True}), checkpoint.lineage)
        state: Any = checkpoint.state
        for index, layer in enumerate(states.capture_state(live, kept).layers):
            for name, value in layer.items():
                stored = state.layers[index][name]
                if not (torch.equal(stored, value) if torch.is_tensor(value) else stored == value):
                    found.append(f"{name} of layer {index} at {checkpoint.position} ({checkpoint.lineage})")
        for segment in checkpoint.chain():
            payload: Any = segment.payload
            for index, layer in enumerate(states.capture_kv(live, segment.start, segment.end, kept).layers):
                found += [
                    f"{name} of layer {index} from {segment.start} to {segment.end}"
                    for name, value in layer.items()
                    if not torch.equal(payload.layers[index][name], value)
                ]
    return found
