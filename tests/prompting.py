"""Prompts that a store serves without a model: what the tests of the store ask of it."""

from __future__ import annotations

import numpy as np
from cutting import every
from reference_store import Blob

from hf_sparse_cache.planning.policies import NoCheckpoints
from hf_sparse_cache.request import Request, open_request
from hf_sparse_cache.store.store import CheckpointStore


GRID = 2


def begin(store: CheckpointStore, ids: list[int], space: str = "") -> Request:
    tokens = np.asarray(ids, dtype=np.int32)
    return open_request(store, NoCheckpoints(), tokens, every(GRID), space=space)


def run(store: CheckpointStore, ids: list[int], positions: list[int], kv: int = 0) -> Request:
    with begin(store, ids) as request:
        for position in positions:
            if position > request.resumed_tokens:
                request.add(position, Blob(10), (lambda a, b: Blob(kv * (b - a))) if kv else None)
            store.verify()
    store.verify()
    return request
