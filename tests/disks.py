"""Shared by the tests of the disk tier: a store over a folder, and prompts that it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompting import begin
from reference_store import Blob

from hf_sparse_cache.store.disk import DiskTier
from hf_sparse_cache.store.store import CheckpointStore


KV = 5  # bytes of keys and values a token
UNIT = 10 + 4 * KV


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., CheckpointStore]]:
    stores: list[CheckpointStore] = []

    def make(max_memory: int = UNIT, disk_memory: int | str = "1GiB") -> CheckpointStore:
        for store in stores:
            store.close(flush=False)
        stores.append(CheckpointStore(max_memory, "lru", disk_memory=disk_memory, disk_dir=tmp_path / "tier"))
        for tier in stores[-1].tiers:
            tier.reader = Blob.from_bytes
        return stores[-1]

    yield make
    for store in stores:
        store.close(flush=False)


def prompt(first: int) -> list[int]:
    return [first, *range(100, 109)]


def serve(store: CheckpointStore, first: int, positions: tuple[int, ...] = (4,)) -> int:
    """Serves one prompt and returns the tokens it resumed; what it resumed from is checked."""
    with begin(store, ids := prompt(first)) as request:
        if request.checkpoint is not None:
            assert request.checkpoint.state.label == (first, request.resumed_tokens)
            assert [blob.label for blob in request.kv_payloads()] == [
                (first, end) for end in range(2, request.resumed_tokens + 1, 2)
            ]
        for position in positions:
            if position > request.resumed_tokens:
                request.add(position, Blob(10, (first, position)), lambda a, b: Blob(KV * (b - a), (ids[0], b)))
        assert store.used_bytes <= (store.max_memory or 0)
    store.verify()
    for tier in store.tiers:
        assert tier.max_memory is None or tier.used_bytes + tier.reserved_bytes <= tier.max_memory
    return request.resumed_tokens


def disk_of(store: CheckpointStore) -> DiskTier:
    tier = store.tiers[-1]
    assert isinstance(tier, DiskTier)
    return tier


def files_of(store: CheckpointStore, kind: str = "") -> list[Path]:
    return sorted(disk_of(store).folder.rglob(f"{kind}*.safetensors"))
