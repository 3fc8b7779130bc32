"""A tier of one's own: it needs a name, and a place that its payloads know; nothing of the models' room."""

from __future__ import annotations

import pytest
import torch
from prompting import begin
from reference_store import Blob

from hf_sparse_cache import CheckpointStore
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.store.host import HostTier


class Attic(HostTier):
    """Host memory under another name."""

    name = "attic"


class Meta(HostTier):
    """Another device that torch knows."""

    name = place = "meta"


def test_a_tier_of_any_name_takes_what_leaves_memory_and_gives_it_back() -> None:
    store = CheckpointStore(10, "lru")
    store.tiers.append(Attic(1000))
    for first in (0, 50):
        with begin(store, list(range(first, first + 12))) as request:
            request.add(4, Blob(10, first))
    assert store.below is not None and [item.state.on_host for item in store.below.stored()] == [True]
    with begin(store, list(range(12))) as request:
        assert request.resumed_tokens == 4 and request.checkpoint is not None
        assert (request.checkpoint.state.label, request.checkpoint.state.on_host) == (0, False)
    below = store.below.ledger
    assert (below.demotions, below.evictions) == (1, 0)  # it has moved, and nothing is lost
    store.verify()


def test_states_go_where_a_tier_keeps_them_and_know_where_they_came_from() -> None:
    store = CheckpointStore(16, "lru")
    store.tiers.append(Meta(1000))
    for first in (0, 50):
        with begin(store, list(range(first, first + 12))) as request:
            request.add(4, LayerTensors(({"conv": torch.ones(4)}, {})))
    assert store.below is not None
    (moved,) = (item.state for item in store.below.stored())
    assert moved.layers[0]["conv"].is_meta and moved.devices == ("cpu", "cpu") and moved.nbytes == 16
    assert moved.moved_to("meta") is moved


def test_states_are_where_they_are_asked_to_be() -> None:
    state = LayerTensors(({"conv": torch.arange(4.0)}, {}))
    assert state.moved_to("host") is state and state.moved_to("device") is state and state.moved_to("cpu") is state
    away = LayerTensors(state.layers, ("cpu", "cpu"))  # as one that was captured elsewhere
    back = away.moved_to("device")
    assert back is not away and back.devices == () and torch.equal(back.layers[0]["conv"], torch.arange(4.0))
    with pytest.raises(ValueError, match="place is 'attic': give 'host', 'device', or a device that torch knows"):
        state.moved_to("attic")
