"""The compiled codec and torch make the same numbers and the same floats, bit for bit, however the floats lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_cache._codec import Codec
from hf_sparse_cache.models import rounding, slotted
from hf_sparse_cache.models.rounding import Packed, chained, rounding_of
from hf_sparse_cache.models.tensors import LayerTensors


SHAPES = [(1, 2, 3, 16), (1, 4, 5, 32), (1, 5, 64), (1, 3, 7, 37), (1, 16, 3), (1, 40), (1, 2, 6, 48), (2, 3, 32)]
LAYOUTS = ["dense", "span", "turned", "gaps"]
DRAWN = st.tuples(
    st.sampled_from(["keys", "recurrent.0"]),
    st.sampled_from(SHAPES),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2**31),
)


def laid_out(dense: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in memory with others between them."""
    if layout == "span":  # as keys of a segment in those of a prompt
        place = torch.full((*dense.shape[:-2], dense.shape[-2] + 3, dense.shape[-1]), 7.0, dtype=dense.dtype)
        view = place[..., 1:-2, :]
    elif layout == "turned":
        view = torch.full_like(dense.transpose(-1, -2).contiguous(), 7.0).transpose(-1, -2)
    elif layout == "gaps":
        view = torch.full((*dense.shape[:-1], 2 * dense.shape[-1]), 7.0, dtype=dense.dtype)[..., ::2]
    else:
        view = torch.empty_like(dense)
    view.copy_(dense)
    return view


def drawn(values: Any) -> tuple[str, torch.Tensor]:
    """From denormal numbers to the largest that may be rounded, ties between two whole numbers among them."""
    name, shape, dtype, layout, seed = values
    draw = np.random.RandomState(seed)
    wide = draw.randn(*shape) * 2.0 ** draw.choice([-149, -130, -60, -46, -20, 0, 10, 22], size=shape)
    halves = (draw.randint(-255, 256, shape) + 0.5) * 2.0 ** draw.choice([-44, -6, 0, 3])
    wide = np.where(draw.rand(*shape) < draw.choice([0.0, 0.5, 1.0]), halves, wide) * (draw.rand(*shape) > 0.1)
    return name, laid_out(torch.from_numpy(wide).clamp(-9e7, 9e7).to(dtype), layout)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 1: torch.uint8}[tensor.element_size()])


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_codec", lambda *_: None)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@given(DRAWN)
@settings(deadline=None, max_examples=200)
def test_both_give_the_same_bits(storage: str, values: Any) -> None:
    name, value = drawn(values)
    kept = rounding_of(storage)
    ours = kept.kept({name: value})
    into = laid_out(value, values[3])  # what is not rounded is not written either
    kept.write_back(ours, {name: into})
    with pytest.MonkeyPatch.context() as patch:
        by_torch(patch)
        theirs = kept.kept({name: value})
        read = kept.read(theirs)[name]
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].shape == theirs[key].shape and torch.equal(bits(ours[key]), bits(theirs[key])), key
    assert torch.equal(bits(kept.read(ours)[name]), bits(read))
    assert torch.equal(bits(into), bits(read))
    if into.untyped_storage().nbytes() > value.numel() * value.element_size():
        between = into.untyped_storage().nbytes() // into.element_size() - into.numel()
        everything = torch.empty(0, dtype=into.dtype).set_(into.untyped_storage())
        assert int((everything == 7.0).sum()) - int((into == 7.0).sum()) == between


def test_a_border_one_step_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: values at the borders tell the codec from one whose borders are the next floats."""
    kept = rounding_of("int8")
    grid = rounding._grid(torch.int8, True, torch.float32, torch.device("cpu"))
    value = grid.borders[60:124].repeat_interleave(16).reshape(1, 64, 16)
    honest = kept.kept({"recurrent.0": value})
    tables = [rounding._table(torch.device("cpu"), inverse).numpy() for inverse in (False, True)]
    off = torch.nextafter(grid.borders, torch.tensor(0.0)).numpy()
    wrong = Codec(off, *tables, grid.every, grid.lowest, grid.highest, grid.limit)
    monkeypatch.setattr(rounding, "_codec", lambda *_: wrong)
    other = kept.kept({"recurrent.0": value})
    assert bool((honest["recurrent.0:scale"] != other["recurrent.0:scale"]).all())
    by_torch(monkeypatch)
    assert torch.equal(kept.kept({"recurrent.0": value})["recurrent.0:scale"], honest["recurrent.0:scale"])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_spans_are_joined_as_they_would_be_read(
    dtype: torch.dtype, storage: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        by_torch(monkeypatch)
    kept = rounding_of(storage)
    spans = [torch.randn(1, 3, length, 32, dtype=torch.float64).to(dtype) for length in (5, 1, 8)]
    packed = [kept.packed(kept.kept({"keys": span}))["keys"] for span in spans]
    read = [part.read() if isinstance(part, Packed) else part for part in packed]
    new = torch.randn(1, 3, 2, 32).to(dtype)
    assert torch.equal(chained([*packed, new], -2), torch.cat([*read, new], dim=-2))
    assert not torch.equal(chained([*packed[::-1], new], -2), torch.cat([*read, new], dim=-2))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_in_a_slot_is_read_as_its_tensors_would_be(
    dtype: torch.dtype, storage: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a view of it: state, keys and values, what is no float, and what is no tensor."""
    kept = rounding_of(storage)
    given: list[dict[str, Any]] = [
        {"conv.0": torch.randn(1, 33, 3), "recurrent.0": torch.randn(1, 4, 37), "seen": 7},
        {"keys": torch.randn(1, 3, 5, 32).to(dtype), "conv.0": torch.arange(9)[None]},
        {},
    ]
    layers = [kept.kept(layer) for layer in given]
    logits = {"logits": torch.randn(1, 1, 11_000)}
    payload = LayerTensors.captured([logits], LayerTensors.captured(layers).layers)
    unread = kept.unread(payload.layers)
    wanted = [kept.restored(layer) for layer in layers]
    packed = kept.packed(unread[1])["keys"]
    assert len(unread) == 4 and torch.equal(kept.packed(unread[3])["logits"], logits["logits"])
    del payload
    if not compiled:
        by_torch(monkeypatch)
    for one, other in zip(wanted, map(kept.restored, unread[:3]), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = value == other[name] if name == "seen" else torch.equal(value, other[name])
            assert same and (name == "seen" or value.dtype is other[name].dtype), name
    del unread
    LayerTensors.captured([kept.kept({"keys": torch.zeros(1, 3, 50, 32).to(dtype)}), *layers])  # nobody's memory
    new = torch.randn(1, 3, 2, 32).to(dtype)
    assert torch.equal(chained([packed, new, packed], -2), torch.cat([wanted[1]["keys"], new, wanted[1]["keys"]], -2))
    if isinstance(packed, Packed):
        assert torch.equal(packed.read(), wanted[1]["keys"]) and packed.shape == (1, 3, 5, 32)
        assert packed.device.type == "cpu" and packed.dtype is dtype


def test_another_place_of_scales_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: whoever reads scales one byte off reads other values."""
    kept = rounding_of("int8")
    values = {"conv.0": torch.randn(1, 64, 16), "recurrent.0": torch.randn(1, 64, 16)}
    layer = kept.kept(values)
    own = rounding._Pair.of
    monkeypatch.setattr(rounding._Pair, "of", lambda *where: (pair := own(*where))._replace(second=pair.second - 1))
    slotted._known.cache_clear()  # which know by now where the scales are
    wrong = kept.restored(kept.unread(LayerTensors.captured([layer]).layers)[0])
    slotted._known.cache_clear()
    assert not any(torch.equal(wrong[name], value) for name, value in kept.restored(layer).items())


class Watched:
    """A codec, and what it was asked for."""

    def __init__(self, codec: Codec, asked: list[str]) -> None:
        self.codec, self.asked = codec, asked

    def encode(self, *arguments: Any) -> bool:
        self.asked.append("encode")
        return self.codec.encode(*arguments)

    def decode(self, *arguments: Any) -> None:
        self.asked.append("decode")
        self.codec.decode(*arguments)


def test_the_codec_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, everything would be right and slow: tests compare it with torch, and must not compare torch."""
    own, asked, kept = rounding._codec, list[str](), rounding_of("int8")
    monkeypatch.setattr(rounding, "_codec", lambda *which: Watched(own(*which), asked))  # type: ignore[arg-type]
    for value in (torch.randn(1, 4, 64), torch.randn(1, 2, 9, 64)[..., 3:7, :], torch.randn(1, 4, 64).bfloat16()):
        layer = kept.kept({"keys": value})
        kept.restored(layer)
        kept.write_back(layer, {"keys": value})
        chained([kept.packed(layer)["keys"]] * 2, -2)
        assert asked == ["encode"] + 4 * ["decode"]
        (lying,) = kept.unread(LayerTensors.captured([layer]).layers)
        kept.restored(lying)
        chained([kept.packed(lying)["keys"]] * 2, -2)
        assert asked == ["encode"] + 7 * ["decode"]
        asked.clear()


def test_the_default_type_of_floats_changes_nothing() -> None:
    value = torch.randn(1, 4, 64, dtype=torch.float32)
    for table in (rounding._table, rounding._grid, rounding._codec):
        table.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        other = rounding_of("int8").kept({"recurrent.0": value})
    finally:
        torch.set_default_dtype(torch.float32)
    assert rounding._table(torch.device("cpu"), True).dtype == torch.float32
    for table in (rounding._table, rounding._grid, rounding._codec):
        table.cache_clear()
    own = rounding_of("int8").kept({"recurrent.0": value})
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_tables_that_lead_outside_are_refused() -> None:
    table, borders = np.ones(256, np.float32), np.geomspace(1, 2**30, 60, dtype=np.float32)
    Codec(borders, table, table, 4, 0, 252, 1.0)
    wrong: list[tuple[Any, ...]] = [
        (np.geomspace(1, 2**30, 300, dtype=np.float32), table, table, 1, 0, 255),
        (borders, table[:9], table, 4, 0, 252),
        (borders, table, table[:9], 4, 0, 252),
        (borders, table, table, 4, -1, 252),
        (borders, table, table, 4, 0, 256),
        (borders[::-1].copy(), table, table, 4, 0, 252),
        (np.linspace(1, 1.9, 60, dtype=np.float32), table, table, 4, 0, 252),
        (np.array([np.nan], np.float32), table, table, 4, 0, 252),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="borders"):
            Codec(*arguments, 1.0)
