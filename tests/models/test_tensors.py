"""What the store holds of a model: where tensors lie, how they become files and come back, and who is waited for."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.models import slotted as slots
from hf_sparse_cache.models import tensors
from hf_sparse_cache.models.slotted import Blocked, Place, Slotted, TensorViews, slotted
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.store import slabs


TOKENS = np.arange(4, dtype=np.int32)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
]


def layers() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{str(i): torch.arange(6).reshape(2, 3).to(d)} for i, d in enumerate(DTYPES)]
    found[1] |= {"seen": 7, "turned": torch.arange(12.0).reshape(3, 4).T}
    return [*found, {}, {"bytes": torch.arange(5, dtype=torch.uint8)}]


def alike(one: Any, other: Any) -> bool:
    """Whether layers hold the same under the same names."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
        for a, b in zip(one, other, strict=True)
    )


# -- files ------------------------------------------------------------------------------------------------------------


def written(payload: Any, held: dict[str, torch.Tensor]) -> list[Any]:
    """A file as it was written, and as it was unpacked into memory."""
    data = safetensors.torch.save(held, metadata={} if payload is None else {"payload": json.dumps(payload)})
    return [data, memoryview(bytearray(data))]


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_file_brings_back_what_was_written(unpacked: bool) -> None:
    payload = LayerTensors.captured(layers())
    data = payload.to_bytes("the record", TOKENS)
    found = LayerTensors.from_bytes(memoryview(bytearray(data)) if unpacked else data)
    assert len(found.layers) == len(payload.layers) and found.devices == () and isinstance(found.layers, Slotted)
    for one, other in zip(found.layers, payload.layers, strict=True):
        assert one.keys() == other.keys()
        assert all(alike([{0: one[name]}], [{0: other[name]}]) for name in one)
        assert all(one[name].dtype is value.dtype for name, value in other.items() if torch.is_tensor(value))
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert metadata["unit"] == "the record" and safetensors.torch.load(data)["tokens"].tolist() == [0, 1, 2, 3]
    told = json.loads(metadata["payload"])
    assert told == {"layers": 10, "devices": ["cpu"] * 10, "plain": {"1.seen": 7}}


def test_a_file_says_where_its_tensors_were() -> None:
    payload = LayerTensors(LayerTensors.captured(layers()[:2]).layers, ("cuda:1", "cpu"))
    found = LayerTensors.from_bytes(payload.to_bytes("{}", TOKENS))
    assert found.devices == ("cuda:1", "cpu")
    empty = LayerTensors.from_bytes(LayerTensors(({}, {"seen": 3})).to_bytes("{}", TOKENS))
    assert tuple(empty.layers) == ({}, {"seen": 3}) and not empty.devices


GOOD: dict[str, Any] = {"layers": 2, "devices": ["cpu", "cpu"], "plain": {"1.seen": 3}}
HELD = {"0.a": torch.ones(3), "tokens": torch.ones(2, dtype=torch.int32)}
WRONG: list[tuple[Any, dict[str, torch.Tensor], str]] = [
    (None, {}, "no JSON|JSON"),
    ([], {}, "it does not say what its states are"),
    ({**GOOD, "layers": -1}, {}, "how many layers"),
    ({**GOOD, "layers": True, "devices": ["cpu"]}, {}, "how many layers"),
    ({**GOOD, "layers": 2.0}, {}, "how many layers"),
    ({**GOOD, "layers": 3}, {}, "how many layers"),
    ({**GOOD, "devices": "ab"}, {}, "how many layers"),
    ({**GOOD, "devices": {"a": 1, "b": 2}}, {}, "how many layers"),
    ({**GOOD, "plain": [1]}, {}, "how many layers"),
    ({**GOOD, "plain": {"2.seen": 3}}, {}, "it names '2.seen', which is in none of its 2 layers"),
    ({**GOOD, "plain": {"-1.seen": 3}}, {}, "in none of its 2 layers"),
    ({**GOOD, "plain": {"01.seen": 3}}, {}, "in none of its 2 layers"),
    ({**GOOD, "plain": {"1x.seen": 3}}, {}, "in none of its 2 layers"),
    ({**GOOD, "plain": {"seen": 3}}, {}, "in none of its 2 layers"),
    (GOOD, {"2.a": torch.ones(1)}, "it names '2.a', which is in none"),
    (GOOD, {f"{10**6}.{'a' * 90}": torch.ones(1)}, f"it names '1000000.{'a' * 32}', which"),
    (GOOD, {"1.seen": torch.ones(1)}, "it names '1.seen' twice"),
    (GOOD, {f"1.{'b' * 60}": torch.ones(1)}, ""),
]


@pytest.mark.parametrize(("payload", "more", "said"), WRONG, ids=range(len(WRONG)))
def test_a_file_of_something_else_is_refused(payload: Any, more: dict[str, torch.Tensor], said: str) -> None:
    for data in written(GOOD, HELD):
        assert alike(LayerTensors.from_bytes(data).layers, [{"a": torch.ones(3)}, {"seen": 3}])
    for data in written(payload, {**HELD, **more}):
        if not said:
            assert len(LayerTensors.from_bytes(data).layers[1]) == 2
            continue
        with pytest.raises(DamagedFileError, match=said):
            LayerTensors.from_bytes(data)


def changed(name: str, held: dict[str, torch.Tensor] = HELD, **entry: Any) -> list[Any]:
    """A file whose header says something else of a tensor."""
    data = written(GOOD, held)[0]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name].update(entry)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text + data[8 + length :]
    return [whole, memoryview(bytearray(whole))]


@pytest.mark.parametrize(
    "entry",
    [{"dtype": "X9"}, {"dtype": 7}, {"shape": [4]}, {"shape": [2]}, {"shape": "3"}, {"shape": [3.0]}, {"shape": [-3]},
     {"shape": [True, 3]}, {"dtype": "F64"}, {"shape": [2**40, 2**40, 0]}],
    ids=str,
)  # fmt: skip
def test_a_header_that_lies_is_refused(entry: dict[str, Any]) -> None:
    for data in changed("0.a"):
        assert LayerTensors.from_bytes(data).layers[0]["a"].tolist() == [1, 1, 1]
    for data in changed("0.a", **entry):
        with pytest.raises(DamagedFileError):
            LayerTensors.from_bytes(data)


def test_one_number_has_a_shape_all_the_same() -> None:
    one = {"0.a": torch.ones(())}
    for data in changed("0.a", one):
        assert LayerTensors.from_bytes(data).layers[0]["a"].shape == ()
    for shape in ("", {}, None, False):
        for data in changed("0.a", one, shape=shape):
            with pytest.raises(DamagedFileError):
                LayerTensors.from_bytes(data)


def test_all_that_an_unpacked_file_holds_is_read_where_it_lies() -> None:
    given = [*layers(), {"large": torch.arange(700.0), "larger": torch.arange(900, dtype=torch.int64)}]
    file = memoryview(bytearray(LayerTensors.captured(given).to_bytes("{}", TOKENS)))
    found = LayerTensors.from_bytes(file)
    begin = np.frombuffer(file, np.uint8).ctypes.data
    assert alike(found.layers, given) and sum(1 for _ in found.tensors()) == 12
    assert all(begin < value.data_ptr() < begin + len(file) for value in found.tensors())


def test_a_file_may_have_many_layers() -> None:
    given: list[dict[str, Any]] = [{"seen": index} for index in range(300)]
    found = LayerTensors.from_bytes(LayerTensors.captured(given).to_bytes("{}", TOKENS))
    assert tuple(found.layers) == tuple(given)


def test_tensors_of_an_unpacked_file_are_views_where_they_can_be() -> None:
    data = written(GOOD, HELD)[1]
    found = LayerTensors.from_bytes(data).layers[0]["a"]
    places = tensors._places(data, tensors.Header.parse(data, len(data)))
    assert (
        set(places) == {"0.a"}
        and found.data_ptr() == np.frombuffer(data, np.uint8).ctypes.data + 4 * places["0.a"].start
    )
    assert tensors._places(bytes(data), tensors.Header.parse(data, len(data))) == {}
    odd = bytearray(data)
    shifted = SimpleNamespace(
        start=places["0.a"].start * 4 - 2, entries={"0.a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    )
    assert tensors._places(memoryview(odd), shifted) == {}  # type: ignore[arg-type]


# -- who is waited for ------------------------------------------------------------------------------------------------


def test_whoever_reads_waits_for_the_proof_and_for_what_was_queued() -> None:
    told: list[str] = []
    work = SimpleNamespace(wait=lambda: told.append("waited"), reached=lambda values: told.append(f"{len([*values])}"))
    plain = LayerTensors(({"a": torch.ones(1), "b": torch.ones(2)},), behind=(work, work))  # type: ignore[arg-type]
    assert plain.reached() is plain and told == ["2", "2"]
    payload = plain.pledged(lambda: told.append("proved"))
    assert payload.layers is plain.layers and payload == plain and hash(type(payload)) and plain.pledge is None
    for call, expected in (
        (payload.reached, ["proved", "2", "2"]),
        (lambda: payload.to_bytes("{}", TOKENS), ["proved", "waited", "waited"]),
        (lambda: payload.moved_to("meta"), ["proved", "2", "2"]),
    ):
        told.clear()
        call()
        assert told == expected

    def unproved() -> None:
        raise KeyError("not what was written")

    for call in (payload.pledged(unproved).reached, lambda: payload.pledged(unproved).moved_to("meta")):
        with pytest.raises(KeyError):
            call()


def test_states_are_equal_by_what_they_hold_and_stay_as_they_are() -> None:
    one = LayerTensors(({"seen": 1},), ("cpu",))
    other = LayerTensors(({"seen": 1},), ("cpu",), ("work",), 64, print)  # type: ignore[arg-type]
    assert one == other and one != LayerTensors(({"seen": 1},)) and one != LayerTensors(({"seen": 2},), ("cpu",))
    with pytest.raises(AttributeError):
        one.pinned_bytes = 3  # type: ignore[misc]
    assert (one.nbytes, other.nbytes) == (0, 64) and [*one.tensors()] == []


# -- places -----------------------------------------------------------------------------------------------------------


def test_a_payload_moves_and_knows_where_it_came_from() -> None:
    payload = LayerTensors.captured(layers())
    assert payload.moved_to("host") is payload is payload.moved_to("cpu") and payload.moved_to("device") is payload
    there = payload.moved_to("meta")
    assert {value.device.type for value in there.tensors()} == {"meta"} and there.devices == ("cpu",) * 10
    assert there.layers[1]["seen"] == 7 and [value.shape for value in there.tensors()] == [
        value.shape for value in payload.tensors()
    ]
    assert there.pinned_bytes == 0 and there.nbytes == sum(value.nbytes for value in payload.tensors())
    assert there.moved_to("meta") is there and there.moved_to("meta:0").devices == ("cpu",) * 10
    home = LayerTensors(payload.layers, ("meta",) * 9 + ("cpu",)).moved_to("device")
    assert [tensors.device_of(layer, "none") for layer in home.layers] == ["meta"] * 8 + ["none", "cpu"]
    assert home.devices == () and home.layers[9]["bytes"].data_ptr() != payload.layers[9]["bytes"].data_ptr()
    nothing = LayerTensors(({"seen": 3},))
    assert nothing.moved_to("meta") is nothing
    for wrong in ("nowhere", "cpu:x", ""):
        with pytest.raises(ValueError, match=f"place is '{wrong}': give 'host', 'device', or a device"):
            payload.moved_to(wrong)


def test_every_layer_has_a_place_to_move_to_and_every_tensor_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    held = LayerTensors.captured([{"a": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(3)}]).layers
    with pytest.raises(ValueError, match="zip"):
        LayerTensors(held, ("meta",)).moved_to("device")
    own = tensors.streams.move
    monkeypatch.setattr(tensors.streams, "move", lambda *given: tensors.streams.Moved(own(*given).tensors[:-1]))
    with pytest.raises(ValueError, match="zip"):
        LayerTensors(held).moved_to("meta")


def test_what_lies_together_on_a_device_is_counted_by_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pinned memory it is not: there its blocks are."""
    held, own = LayerTensors.captured([{"a": torch.ones(65)}, {"b": torch.ones(3)}]), tensors.streams.move
    for together, pinned, nbytes in ((True, 0, 768), (False, 0, 272), (True, 1024, 1024), (False, 2048, 2048)):
        monkeypatch.setattr(
            tensors.streams,
            "move",
            lambda *given, pinned=pinned: tensors.streams.Moved(own(*given).tensors, (), pinned),
        )
        monkeypatch.setattr(
            tensors.streams, "shared", lambda values, there=together: (len([*values]) == 2 and there) or None
        )
        there = held.moved_to("meta")
        assert isinstance(there.layers, Blocked) is (together and not pinned)
        assert (there.pinned_bytes, there.nbytes) == (pinned, nbytes)


def test_what_is_captured_waits_for_what_was_captured_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where that lies in a slot of host memory, of which nothing is read for it."""
    seen: list[int] = []
    monkeypatch.setattr(tensors.streams, "queued", lambda values: seen.append(len([*values])) or ("work",))
    first: list[dict[str, Any]] = [{"a": torch.ones(1), "b": torch.ones(2)}]
    for before, count in (((), 1), (first, 3), (slotted(first), 1)):
        found = LayerTensors.captured([{"c": torch.ones(1)}], before)  # type: ignore[arg-type]
        assert found.behind == ("work",) and len(found.layers) == 1 + len(before)  # type: ignore[arg-type]
        assert seen.pop() == count


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert tensors._device("cuda") == torch.device("cuda:3") and tensors._device("cuda:1") == torch.device("cuda:1")
    assert tensors._device("meta") == torch.device("meta") and tensors._device("cpu") == torch.device("cpu")


def test_what_a_store_gives_back_is_what_a_model_gave_it() -> None:
    payload = LayerTensors(())
    assert tensors.layer_tensors(payload) is payload
    with pytest.raises(TypeError, match="a dict is stored where this model's states are"):
        tensors.layer_tensors({})  # type: ignore[arg-type]
    assert tensors.device_of({"seen": 3}) == "cpu" and tensors.device_of({"seen": 3}, "x") == "x"
    assert tensors.device_of({"seen": 3, "a": torch.ones(1, device="meta"), "b": torch.ones(1)}) == "meta"


def test_a_copy_of_ones_own_is_dense_and_watched_by_nobody() -> None:
    given = torch.arange(12.0).reshape(3, 4).requires_grad_()
    for value in (given, given.T, given[:, ::2], given.detach()[None].expand(2, 3, 4)):
        copy = tensors.own(value)
        assert torch.equal(copy, value) and copy.is_contiguous() and not copy.requires_grad and copy.is_leaf
        assert copy.untyped_storage().nbytes() == value.numel() * 4 and copy.data_ptr() != value.data_ptr()


class Other(torch.Tensor):
    """No plain tensor."""


def test_what_cannot_lie_in_a_slot_has_memory_of_its_own() -> None:
    for value in (torch.ones(3).as_subclass(Other), torch.ones(3, device="meta")):
        given = {"a": value, "a:scale": value, "seen": 3}
        assert slotted([given, {"b": torch.ones(2)}]) is None
        before: list[dict[str, Any]] = [{"first": torch.ones(4)}]
        found = LayerTensors.captured([given], before)
        assert len(found.layers) == 2 and found.layers[0] is before[0] and list(found.layers[1]) == list(given)
        assert (
            found.layers[1]["a"] is not value and found.layers[1]["a:scale"] is value and found.layers[1]["seen"] == 3
        )
    assert slotted([{"seen": 3}, {}]) is None and slotted([]) is None
    assert LayerTensors.captured([{"seen": 3}]).layers == ({"seen": 3},)


# -- slots ------------------------------------------------------------------------------------------------------------


def test_layers_in_a_slot_are_a_sequence() -> None:
    given, first = layers(), [{"first": torch.ones(1)}, {"seen": 1}]
    for before in (first, slotted(first)):
        found = slotted(given, before)
        assert found is not None and len(found) == len(given) + 2
        whole = [*first, *given]
        assert alike(list(found), whole) and alike(found[:], whole) and alike(found[1:4], whole[1:4])
        for index in range(-12, 12):
            assert alike([found[index]], [whole[index]]), index
        for index in (12, -13):
            with pytest.raises(IndexError):
                found[index]
        lying = found.lying()
        assert len(lying) == 12 and [each.number for each in lying[2:]] == list(range(10))
        assert [each.plain for each in lying[2:5]] == [{}, {"seen": 7}, {}] and lying[3].layout is lying[2].layout
        assert all(each.reader is lying[2].reader for each in lying[2:])
        assert lying[2].reader.address == found._held.ctypes.data
        assert isinstance(lying[0], dict) is (before is first)
        assert found.nbytes == slabs.taken(len(found._held)) + slots.taken_by(before)  # type: ignore[arg-type]
    assert found._layout is slotted(layers())._layout  # type: ignore[union-attr]
    assert slots.Laid(()).pairs is None


def test_what_is_watched_is_copied_without_being_watched() -> None:
    found = slotted([{"a": torch.ones(3, requires_grad=True)}])
    assert found is not None and not found[0]["a"].requires_grad and found[0]["a"].sum() == 3
    (block,) = slots.blocked([{"a": torch.ones(3, requires_grad=True)}], (), torch.device("cpu"))
    assert not block["a"].requires_grad and block["a"].sum() == 3


def test_places_are_those_of_dense_tensors() -> None:
    for shape in ((), (3,), (2, 3), (4, 1, 5), (2, 0, 3), (1, 1)):
        for dtype in (torch.float32, torch.int8, torch.float64):
            place, like = Place.at(16, dtype, list(shape)), torch.empty(shape, dtype=dtype)
            assert place.shape == shape and place.start == 16 // dtype.itemsize and place.nbytes == like.nbytes
            if like.numel():
                assert place.strides == like.stride()
                view = TensorViews(np.zeros(400, np.uint8)).tensor(place)
                assert view.shape == shape and view.is_contiguous() and view.storage_offset() == place.start
    views = TensorViews(np.arange(13, dtype=np.uint8))
    assert (
        views[torch.float64].shape == (1,) and views[torch.int32].shape == (3,) and views[torch.uint8].shape == (13,)
    )
    assert views[torch.int32] is views[torch.int32] and views.address == 0
    assert TensorViews(np.zeros(3, np.uint8))[torch.float32].shape == (0,)


@pytest.mark.parametrize("step", [1, 256])
def test_the_widest_lie_first_and_each_begins_at_a_step(step: int) -> None:
    wanted = slots._wanted(layers())
    assert [len(layer) for layer in wanted] == [1, 2, 1, 1, 1, 1, 1, 1, 0, 1]
    layout, nbytes = slots._laid_out(wanted, step)
    assert [[name for name, _ in layer] for layer in layout] == [[name for name, _, _ in layer] for layer in wanted]
    places = sorted((place.start * place.dtype.itemsize, place) for layer in layout for _, place in layer)
    assert [place.dtype.itemsize for _, place in places] == sorted((p.dtype.itemsize for _, p in places), reverse=True)
    end = 0
    for start, place in places:
        assert start == end
        end = start + -(-place.nbytes // step) * step
    assert nbytes == end


def test_a_block_takes_whole_steps() -> None:
    found = Blocked.of([{"a": torch.ones(64), "seen": 3}, {"b": torch.ones(65), "c": torch.empty(0)}])
    assert found.nbytes == 256 + 512 == slots.taken_by(found) and isinstance(found, tuple) and len(found) == 2
    assert slots.taken_by(tuple(found)) == 4 * 129
