"""Shared by the tests of saved caches and of threads: one document, handles on it, and what they must agree with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.store.slabs import PAGE_BYTES, taken


GRID = 32
DOCUMENT = tiny_models.random_ids(96, seed=1)


@pytest.fixture(params=["Mamba", "Jamba", "Zamba2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stores() -> Iterator[list[CheckpointStore]]:
    made: list[CheckpointStore] = []
    yield made
    for store in made:
        store.close()


def question(seed: int, length: int = 20) -> torch.Tensor:
    return torch.cat([DOCUMENT, tiny_models.random_ids(length, seed=seed)], dim=1)


def logits(model: PreTrainedModel, ids: torch.Tensor, cache: SparsePrefixCache) -> torch.Tensor:
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(out.logits)


def handle(model: PreTrainedModel, **options: Any) -> SparsePrefixCache:
    return SparsePrefixCache(model, **{"grid": GRID, "policy": "balanced", "exactness": "bitwise", **options})


def cold_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with handle(model, policy="none") as cache:
        return logits(model, ids, cache)


def small_store(model: PreTrainedModel, folder: Path, **options: Any) -> CheckpointStore:
    """A store with room for about one checkpoint of the document, and a disk tier."""
    with handle(model) as cache:
        # What was read from a file has the rest of the file beside it.
        one = taken(cache.size.state_bytes + PAGE_BYTES) + 128 * cache.size.kv_bytes_per_token
    return CheckpointStore(one, "lru", disk_memory="1GiB", disk_dir=folder, **options)


def all_tensors(cache: SparsePrefixCache) -> list[torch.Tensor]:
    return [value for payload in all_payloads(cache) for value in payload.tensors()]


def counts_what_it_holds(cache: SparsePrefixCache) -> bool:
    """Whether all tensors are counted, and beside those of each payload the rest of its page, or of its file."""
    held = sum(tensor.nbytes for tensor in all_tensors(cache))
    return held <= cache.store.used_bytes <= held + len(all_payloads(cache)) * 2 * PAGE_BYTES


def all_payloads(cache: SparsePrefixCache) -> list[LayerTensors]:
    found: dict[int, LayerTensors] = {}
    for _, _, checkpoint in cache.store.checkpoints():
        found[id(checkpoint.state)] = checkpoint.state
        segment = checkpoint.kv
        while segment is not None:
            found[id(segment.payload)], segment = segment.payload, segment.parent
    return list(found.values())
