"""Where captured tensors lie: one slot for all of them, which lives as long as any tensor or view that reads it."""

import copy
import gc
import itertools
import json
import sys
from collections import Counter, deque

import numpy as np
import pytest
import safetensors.torch
import torch

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, simulate
from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.models import slotted
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.store import slabs
from hf_sparse_cache.tools.builtin import build_model


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory comes from numpy")
DTYPES = (torch.uint8, torch.float64, torch.bfloat16, torch.float32, torch.int8, torch.float16, torch.int64)


def layers(value=1, scale=1):
    """Of odd sizes and all widths, one of them no dense tensor; a whole number, and a tensor of nothing."""
    found = [{f"{i}": torch.full((3, 7001 * scale + i), value, dtype=dtype)} for i, dtype in enumerate(DTYPES)]
    wide = torch.arange(40_000, dtype=torch.float32).reshape(200, 200)
    found[1] |= {"turned": wide.T[:, ::2], "keys": wide[None, None, 5:9], "seen": 7, "none": torch.empty(0)}
    return found


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    """Slabs of this test alone: what other tests have stored may go whenever it is collected."""
    gc.collect()
    monkeypatch.setattr(slabs, "_slabs", {})
    monkeypatch.setattr(slabs, "_warm", deque())


def held_slots():
    """Bytes of all slots that somebody holds, by the size of a slot."""
    living = [slab for refs in slabs._slabs.values() for ref in refs if (slab := ref()) is not None]
    found = Counter()
    for slab in living:
        found[slab.slot_bytes] += slab.slot_bytes * (slab.slots - len(slab.warm) - len(slab.free))
    return found


def slot_of(payload):
    values = [value for value in payload.tensors() if value.numel()]
    first = min(value.data_ptr() for value in values)
    last = max(value.data_ptr() + value.nbytes for value in values)
    return first, last


@pytest.mark.parametrize("scale", [1, 20])
def test_what_is_captured_is_the_same_lies_together_and_shares_nothing(scale):
    given = layers(scale=scale)
    payload = LayerTensors.captured(given)
    assert payload.layers[1]["seen"] == 7
    values = [(layer[name], kept[name]) for layer, kept in zip(given, payload.layers, strict=True) for name in layer]
    values = [pair for pair in values if torch.is_tensor(pair[0])]
    before = [value.clone() for value, _ in values]
    for value, _ in values:
        value.zero_()
    for expected, (_, kept) in zip(before, values, strict=True):
        assert torch.equal(kept, expected) and kept.dtype == expected.dtype and kept.is_contiguous()
        assert not kept.numel() or kept.data_ptr() % kept.element_size() == 0
    first, last = slot_of(payload)
    assert last - first == sum(value.nbytes for _, value in values)  # without gaps
    assert payload.nbytes == sum(held_slots().values()) == -(-(last - first) // slabs.PAGE_BYTES) * slabs.PAGE_BYTES


def test_what_is_small_has_memory_of_its_own():
    before = {size: len(refs) for size, refs in slabs._slabs.items()}
    payload = LayerTensors.captured([{"a": torch.ones(1000), "b": torch.ones(1000)}])
    assert payload.nbytes == 8000 and {size: len(refs) for size, refs in slabs._slabs.items()} == before


def test_later_layers_join_earlier_ones_where_they_lie():
    state = LayerTensors.captured(layers())
    both = LayerTensors.captured([{"logits": torch.ones(1, 1, 50_000)}], state.layers)
    assert both.layers[0]["0"].data_ptr() == state.layers[0]["0"].data_ptr()
    assert len(both.layers) == len(state.layers) + 1 and both.nbytes == state.nbytes + slabs.taken(200_000)
    assert both.nbytes == sum(held_slots().values())
    assert bool(both.layers[-1]["logits"].eq(1).all()) and both.layers[1:2][0]["seen"] == 7


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_device_has_one_allocation_for_all_of_them(device):
    """As on accelerators, which are not at hand: see `test_standin` for whole requests."""
    given = [{name: moved(value, device) for name, value in one.items()} for one in layers()]
    found = slotted.blocked(given, (), torch.device(device))
    expected = copy.deepcopy(given)
    for value in itertools.chain(*map(tensors_in, given)):
        value.zero_()  # nothing is shared with it
    storages = {value.untyped_storage()._cdata: value for layer in found for value in tensors_in(layer)}
    assert len(storages) == 1
    offsets = []
    for one, other in zip(expected, found, strict=True):
        assert list(one) == list(other) and one.get("seen") == other.get("seen")
        for before, kept in zip(tensors_in(one), tensors_in(other), strict=True):
            assert (kept.shape, kept.dtype, kept.device) == (before.shape, before.dtype, before.device)
            assert kept.is_contiguous() and kept.storage_offset() * kept.element_size() % slotted.BLOCK_BYTES == 0
            assert device == "meta" or torch.equal(kept, before)
            offsets += [kept.storage_offset() * kept.element_size()] if kept.numel() else []
    assert len(set(offsets)) == len(offsets) == 9
    assert found.nbytes == next(iter(storages.values())).untyped_storage().nbytes()
    both = slotted.blocked([{"logits": torch.ones(1, 1, 500, device=device)}], found, torch.device(device))
    assert both[:-1] == found and both.nbytes == found.nbytes + 2048


def moved(value, device):
    return value.to(device) if torch.is_tensor(value) else value


def tensors_in(layer):
    return [value for value in layer.values() if torch.is_tensor(value)]


HOLDERS = {
    "a tensor": lambda payload: payload.layers[3]["3"],
    "a view of a part": lambda payload: payload.layers[3]["3"][1:2, 5:90],
    "a view of a view as bytes": lambda payload: payload.layers[3]["3"].view(torch.uint8)[:, 8:],
    "a numpy array": lambda payload: torch.from_numpy(payload.layers[3]["3"].numpy()),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("scale", [1, 20])
def test_a_slot_stays_with_whoever_holds_anything_of_it(holder, scale):
    held = HOLDERS[holder](LayerTensors.captured(layers(1, scale)))
    before = held.clone()
    gc.collect()
    others = [LayerTensors.captured(layers(2, scale)) for _ in range(8)]
    assert torch.equal(held, before) and others


def test_without_a_holder_the_next_capture_gets_the_slot():
    """The twin of the test above: the memory of what nobody holds is another one's."""
    held = [LayerTensors.captured(layers(1)) for _ in range(8)]
    place = slot_of(held[5])[0]
    del held[5]
    assert slot_of(LayerTensors.captured(layers(2)))[0] == place


def test_a_file_that_was_not_packed_is_read_into_a_slot():
    payload = LayerTensors.captured(layers())
    data = payload.to_bytes("{}", np.arange(4, dtype=np.int32))
    read = LayerTensors.from_bytes(data)
    first, last = slot_of(read)
    assert last - first == sum(value.nbytes for value in payload.tensors()) and read.nbytes == payload.nbytes
    for one, other in zip(payload.layers, read.layers, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one if name != "seen")


def unpacked(change=lambda header: None):
    """A file of layers in memory of its own, and the layers."""
    payload = LayerTensors.captured(
        [{name: value for name, value in layer.items() if name != "none"} for layer in layers()]
    )
    data = payload.to_bytes("{}", np.arange(4, dtype=np.int32))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return payload, memoryview(bytearray(len(text).to_bytes(8, "little") + text + data[8 + length :]))


def test_what_was_unpacked_is_read_where_it_lies(monkeypatch):
    payload, data = unpacked()
    monkeypatch.setattr(safetensors.torch, "load", None)
    read = LayerTensors.from_bytes(data)
    assert read.nbytes == payload.nbytes
    for one, other in zip(payload.layers, read.layers, strict=True):
        assert one.keys() == other.keys() and all(
            torch.equal(one[name], other[name]) for name in one if name != "seen"
        )
    before = read.layers[3]["3"].clone()
    data[len(data) // 4 :] = bytes(len(data) - len(data) // 4)
    assert any(not value.any() for value in read.tensors()) and before.any()


@pytest.mark.parametrize(
    "shape", [[3, 7003], [3, 7005], [4, 7004], [7004], [3, 7004, 2], [3, -7004], [3, 7004.0], [0]]
)
def test_a_shape_that_is_not_the_size_of_its_place_is_refused(shape):
    """Also where it lies within the file, in the bytes of another tensor."""

    def other_shape(header):
        header["3.3"]["shape"] = shape

    assert LayerTensors.from_bytes(unpacked()[1]).layers[3]["3"].shape == (3, 7004)
    with pytest.raises(DamagedFileError):
        LayerTensors.from_bytes(unpacked(other_shape)[1])


def memory_of(store):
    """Bytes of the slots that are held, and of keys and values of a few tokens, which have none."""
    segments = {segment for _, _, checkpoint in store.checkpoints() for segment in checkpoint.chain()}
    small = [segment.nbytes for segment in segments if segment.nbytes < slabs.LEAST_BYTES]
    return sum(held_slots().values()) + sum(small)


@pytest.fixture(scope="module")
def model():
    """Of whose logits, keys and values few make whole pages."""
    return build_model("jamba-30m", vocab_size=8201)


def prompts():
    """Some behind each other, some alike, with 70 new tokens or more."""
    draw = np.random.RandomState(5)
    first, second, third = (draw.randint(3, 8201, length) for length in (215, 70, 203))
    return [first, np.concatenate([first[:141], second]), third, first, np.concatenate([third, second])]


def served(model, **options):
    """A store that has served the prompts, and what `simulate` has to know."""
    store = CheckpointStore(options.pop("max_memory", None))
    with SparsePrefixCache(model, grid=64, store=store, prove=False, **options) as cache:
        for ids in prompts():
            cache.prefill(torch.from_numpy(ids))
        known = cache.simulation()
    gc.collect()
    return store, known


@pytest.mark.parametrize(
    "options", [{}, {"exactness": "bitwise"}, {"storage": "int8"}, {"max_memory": "1MiB"}], ids=str
)
def test_the_budget_counts_the_slots_and_so_does_simulate(model, options):
    store, known = served(model, **options)
    assert store.used_bytes == memory_of(store) > 2**19 and len(+held_slots()) >= 3
    told = simulate(prompts(), **known)
    assert told.peak_bytes == store.peak_bytes and told.evictions == store.evictions
    assert bool(store.evictions) == ("max_memory" in options)
    blind = simulate(prompts(), **{**known, "page_bytes": 1})  # the twin: of tensors' bytes, as on other systems
    assert blind.peak_bytes < told.peak_bytes


def test_a_budget_that_counts_tensors_is_noticed(model, monkeypatch):
    """The twin: a ledger that knows nothing of pages says less than the slots that are held."""
    monkeypatch.setattr(slotted, "taken", lambda nbytes: nbytes)
    store, _ = served(model)
    assert store.used_bytes < memory_of(store)


def test_what_is_read_from_files_counts_its_slots(model, tmp_path):
    store, _ = served(model)
    with SparsePrefixCache(model, grid=64, store=store, prove=False) as cache:
        cache.save_pretrained(tmp_path)
    store.clear()
    del store, cache
    gc.collect()
    assert not +held_slots()
    with SparsePrefixCache.from_pretrained(tmp_path, model) as cache:
        gc.collect()
        assert cache.store.used_bytes == memory_of(cache.store) > 2**19
