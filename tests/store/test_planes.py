"""Packed files: what comes out is what went in, floats shrink, and nothing hostile takes room or passes."""

from __future__ import annotations

import json
import logging
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import zstandard
from forging import Saved, header
from hypothesis import given, settings
from hypothesis import strategies as st
from persisting import cold_logits, handle, logits, question
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, DamagedFileError, SparsePrefixCache
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.store import files, planes
from hf_sparse_cache.store.headers import canonical


DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int16,
    torch.int8,
    torch.bool,
)
TOKENS = np.arange(7, dtype=np.int32)


def plain(tensors: dict[str, torch.Tensor], tokens: np.ndarray = TOKENS) -> bytes:
    layers = LayerTensors((tensors, {"seen": 3}))
    return canonical(layers.to_bytes(json.dumps({"format": 3}), tokens))


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * 50).to(dtype) if not dtype.is_floating_point else drawn.to(dtype)


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3)), max_size=6),
    st.integers(0, 50),
    st.integers(3, 2000),
)
@settings(deadline=None, max_examples=150)
def test_what_comes_out_is_what_went_in(drawn: list[Any], count: int, numbers: int) -> None:
    tensors = {f"t{index}": noise(tuple(shape), dtype, index) for index, (dtype, shape) in enumerate(drawn)}
    data = plain({**tensors, "large": noise((600,))}, np.arange(count, dtype=np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planes, "_NUMBERS", numbers)  # of many pieces, too
        small = planes.packed(data)
        assert len(small) <= len(data) and planes.packed(data) == small
        back = planes.unpacked(small, len(data) + 4096)
    found = LayerTensors.from_bytes(back)
    assert found.layers[1] == {"seen": 3} and set(found.layers[0]) == {*tensors, "large"}
    for name, value in tensors.items():
        assert found.layers[0][name].dtype == value.dtype and torch.equal(found.layers[0][name], value)
    for own in (files.record_of(small), files.record_of(back)):  # a folder is listed without unpacking anything
        assert own[0] == {"format": 3} and np.array_equal(own[1], np.arange(count))


def test_what_was_unpacked_is_not_copied_again() -> None:
    """Its tensors are views of one memory; a file with something odd is read by the library, which copies."""
    data = plain({"keys": noise((1, 4, 500, 64)), "values": noise((1, 4, 500, 64), torch.bfloat16)})
    back = planes.unpacked(planes.packed(data))
    assert isinstance(back, memoryview)
    begin = np.frombuffer(back, np.uint8).ctypes.data
    lies = [value.data_ptr() - begin for value in LayerTensors.from_bytes(back).tensors()]
    assert all(0 < place < len(back) for place in lies)
    for odd in ({"none": noise((0, 4))}, {"small": noise((4,)).to(torch.float8_e4m3fn)}):
        back = planes.unpacked(planes.packed(plain({"keys": noise((1, 4, 500, 64)), **odd})))
        begin = np.frombuffer(back, np.uint8).ctypes.data
        found = LayerTensors.from_bytes(back)
        assert torch.equal(found.layers[0]["keys"], noise((1, 4, 500, 64)))
        assert not any(0 <= value.data_ptr() - begin < len(back) for value in found.tensors())


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.72), (torch.float32, 0.88)])
def test_floats_shrink_by_their_exponents(dtype: torch.dtype, most: float) -> None:
    data = plain({"keys": noise((1, 4, 500, 64), dtype)})
    assert 0.6 < len(planes.packed(data)) / len(data) <= most


def test_what_does_not_shrink_or_shrinks_too_far_is_stored_as_it_is() -> None:
    drawn = torch.from_numpy(np.random.default_rng(0).integers(-128, 128, 50_000, np.int8))
    for data in (plain({"n": drawn}), plain({"n": torch.zeros(10**6)}), plain({"n": torch.ones(3)})):
        assert planes.packed(data) == data and planes.unpacked(data) == data


SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def squeezed(plane: bytes) -> bytes | None:
    """A plane as it is written where it shrinks."""
    compress, tried = zstandard.ZstdCompressor(level=planes.LEVEL).compress, plane[: planes._TRIED_BYTES]
    if len(compress(tried)) > 0.97 * len(tried) or len(compress(plane)) > 0.97 * len(plane):
        return None
    return compress(plane)


def strips_of(numbers: bytes, size: int) -> Iterator[tuple[int, bytes, int]]:
    """What is written of the numbers of a piece, byte by byte of a number, in as wide strips as may be."""
    small = [squeezed(numbers[byte::size]) for byte in range(size)]
    byte = 0
    while byte < size:
        fits = [w for w in (1, 2, 4, 8) if byte % w == 0 and byte + w <= size and not any(small[byte : byte + w])]
        width = max(fits, default=1)
        raw = b"".join(numbers[at + byte : at + byte + width] for at in range(0, len(numbers), size))
        found = small[byte]
        yield width, raw if found is None else found, int(found is not None)
        byte += width


def packed_slowly(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The layout and the planes of a plain file."""
    start = 8 + int.from_bytes(data[:8], "little")
    named = {name: each for name, each in json.loads(data[8:start]).items() if name not in ("tokens", "__metadata__")}
    order = sorted(named.items(), key=lambda item: item[1]["data_offsets"])
    tensors, pieces, written, at = {}, [], b"", 0
    for size, group in groupby(order, key=lambda item: SIZES[item[1]["dtype"]]):
        run = b""
        for name, each in group:
            first, last = each["data_offsets"]
            run += data[start + first : start + last]
            tensors[name] = [each["dtype"], each["shape"], at, at + last - first]
            at += last - first
        for begin in range(0, len(run), size * planes._NUMBERS):
            piece = run[begin : begin + size * planes._NUMBERS]
            strips = list(strips_of(piece, size))
            pieces.append([size, len(piece) // size, [[width, len(strip), small] for width, strip, small in strips]])
            written += b"".join(strip for _, strip, _ in strips)
    return {"tensors": tensors, "pieces": pieces}, written


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    tensors = safetensors.numpy.load(data)
    return json.loads(zstandard.decompress(tensors["layout"].tobytes())), tensors["planes"].tobytes()


@pytest.mark.parametrize("numbers", [700, 2**20])
def test_planes_are_those_of_a_slow_second_way(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(planes, "_NUMBERS", numbers)
    wide = [torch.from_numpy(np.random.default_rng(0).integers(-(2**62), 2**62, 900)) for _ in range(2)]
    late = torch.cat([noise((2**14 + 9,), torch.int8), torch.zeros(2**14, dtype=torch.int8)])
    far = torch.from_numpy(np.random.default_rng(1).integers(-128, 128, 600_000, np.int8))
    soon = torch.cat([torch.zeros(2**14, dtype=torch.int8), far])
    whole = [wide[0].view(torch.int32), wide[1].view(torch.int16), wide[1].view(torch.int8)]
    floats = [noise((3, 500), dtype) for dtype in DTYPES[:4]]
    for tensors in (
        [*floats, *wide, *whole],
        [late],
        [wide[0], floats[0], whole[2], late],
        [soon, floats[2], torch.zeros(40_000)],
    ):
        data = plain({f"t{index}": value.clone() for index, value in enumerate(tensors)})
        small = planes.packed(data)
        if small != data:
            assert taken_apart(small) == packed_slowly(data)
            back = bytes(planes.unpacked(small))
            start = 8 + int.from_bytes(back[:8], "little")
            assert start % 8 == 0 and back[-TOKENS.nbytes :] == TOKENS.tobytes()
            read, own = safetensors.torch.load(back), safetensors.torch.load(data)
            assert set(read) == set(own) and all(torch.equal(read[name], own[name]) for name in own)
            kept = {
                name: json.loads(each[8 : 8 + int.from_bytes(each[:8], "little")])["__metadata__"]
                for name, each in (("back", back), ("data", data))
            }
            assert kept["back"] == kept["data"]
    assert small != data


def test_a_file_is_packed_from_a_size_on_and_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.from_numpy(np.random.default_rng(0).integers(-128, 128, 100_000, np.int8))
    for zeros, shrinks in ((2_000, False), (8_000, True)):
        data = plain({"n": drawn, "o": torch.zeros(zeros // 2, dtype=torch.int16)})
        assert (planes.packed(data) != data) is shrinks
    data = plain({"n": noise((2000,))})
    small = planes.packed(data)
    for name, fits, not_any_more in (
        ("_LEAST_BYTES", len(data), len(data) + 1),
        ("_MOST_LAYOUT_BYTES", len(json.dumps(taken_apart(small)[0], separators=(",", ":"))), 40),
        ("MOST_TIMES", len(data) / len(small) + 0.001, len(data) / len(small) - 0.001),
    ):
        for value, expected in ((fits, small), (not_any_more, data)):
            with monkeypatch.context() as patch:
                patch.setattr(planes, name, value)
                assert planes.packed(data) == expected, (name, value)
    nothing = plain({})
    monkeypatch.setattr(planes, "_LEAST_BYTES", 0)
    assert planes.packed(nothing) == nothing


def test_nothing_is_read_before_it_has_come() -> None:
    """The header is there; what else is looked at was waited for, and no more than it."""
    whole = planes.packed(plain({"keys": noise((3000,)), "n": noise((900,), torch.int64)}))
    found = files.Header.parse(whole, len(whole))
    arriving = bytearray(whole[: found.start]) + bytearray(len(whole) - found.start)
    asked: list[int] = []

    def there(end: int) -> None:
        asked.append(end)
        arriving[:end] = whole[:end]

    assert bytes(planes.unpacked(memoryview(arriving), None, there)) == bytes(planes.unpacked(whole))
    begin, end = found.place("planes", "U8", 1)
    ends = list(accumulate(length for *_, strips in taken_apart(whole)[0]["pieces"] for _, length, _ in strips))
    assert asked == [found.place("layout", "U8", 1)[1], found.place("tokens", "I32", 4)[1], *(begin + e for e in ends)]
    assert asked[-1] == end
    data, waited = plain({"n": noise((3,))}), []
    assert planes.unpacked(data, None, waited.append) is data and waited == [len(data)]


def test_what_a_file_may_unpack_to_is_bounded_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    small = planes.packed(plain({"keys": noise((3000,))}))
    need = 12_000 + TOKENS.nbytes
    assert len(planes.unpacked(small, need)) > need
    for most in (need - 1, 0):
        with pytest.raises(DamagedFileError, match=f"would unpack to {need} bytes, and may to {most} at most"):
            planes.unpacked(small, most)
    for most in (None, 10**9):
        with monkeypatch.context() as patch:
            patch.setattr(planes, "MOST_TIMES", 1)
            with pytest.raises(DamagedFileError, match=f"may to {len(small)} at most"):
                planes.unpacked(small, most)


# -- hostile ----------------------------------------------------------------------------------------------------------


def changed(change: Callable[[Any, bytes], tuple[Any, bytes] | None], numbers: int = 20_000) -> bytes:
    """A packed file whose layout and planes are others, and everything else is right."""
    tensors = safetensors.torch.load(whole := planes.packed(plain({"keys": noise((numbers,))})))
    text = zstandard.decompress(tensors["layout"].numpy().tobytes())
    layout, strips = json.loads(text), tensors["planes"].numpy().tobytes()
    layout, strips = change(layout, strips) or (layout, strips)
    packed = layout if isinstance(layout, bytes) else zstandard.compress(json.dumps(layout).encode())
    tensors |= {"layout": torch.tensor(list(packed), dtype=torch.uint8)}
    tensors |= {"planes": torch.frombuffer(bytearray(strips or b"\0"), dtype=torch.uint8)[: len(strips)]}
    metadata = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    return bytes(safetensors.torch.save(tensors, metadata=metadata))


def told(size: int) -> bytes:
    """A frame that says it holds so many bytes, and holds a few."""
    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(2**33 % 70_000 + 70_000)))
    frame[4] = (frame[4] & 0b00111111) | 0b11000000  # a size of 8 bytes follows
    return bytes(frame[:5]) + (b"" if frame[4] & 0x20 else bytes(frame[5:6])) + size.to_bytes(8, "little")


def last_strip(layout: Any, strips: bytes, frame: bytes) -> tuple[Any, bytes]:
    strip = layout["pieces"][0][2][-1]
    strips = strips[: len(strips) - strip[1]] + frame
    strip[1] = len(frame)
    return layout, strips


def raw_strip(layout: Any, strips: bytes, length: int) -> tuple[Any, bytes]:
    found, data = last_strip(layout, strips, bytes(length))
    found["pieces"][0][2][-1][2] = 0
    return found, data


def pieces(change: Callable[[Any], Any]) -> Callable[[Any, bytes], None]:
    return lambda layout, strips: (layout, strips, change(layout["pieces"]))[:2]


def bomb(layout: Any, strips: bytes) -> tuple[Any, bytes]:
    """Zeros without end, each of whose numbers is right."""
    count = 2000
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(2**20))
    layout["tensors"] = {"0.keys": ["U8", [count * 2**20], 0, count * 2**20]}
    layout["pieces"] = [[1, 2**20, [[1, len(frame), 1]]]] * count
    return layout, frame * count


def unsized() -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(20_000))


HOSTILE: dict[str, tuple[Callable[[Any, bytes], Any], str]] = {
    "a bomb": (bomb, "would unpack to 2097152028 bytes, and may to"),
    "a layout that unpacks to all": (lambda x, y: (told(2**50), y), "says 1125899906842624 bytes"),
    "a layout without a size": (lambda x, y: (unsized(), y), "says nothing of its size"),
    "a layout that is no frame": (lambda x, y: (b"\0" * 50, y), "a packed part"),
    "a layout of nothing": (lambda x, y: (b"", y), "a packed part"),
    "a layout that is a list": (lambda x, y: ([], y), "no object"),
    "a layout of text": (lambda x, y: (zstandard.compress(b"{no"), y), "no JSON|not JSON|JSON"),
    "no pieces": (lambda x, y: (x.pop("pieces") and x, y), "no tensors and pieces"),
    "no tensors": (lambda x, y: (x.pop("tensors") and x, y), "no tensors and pieces"),
    "a strip that unpacks to all": (lambda x, y: last_strip(x, y, told(2**60)), "says 1152921504606846976 bytes"),
    "a strip without a size": (lambda x, y: last_strip(x, y, unsized()), "says nothing of its size"),
    "a strip of another size": (lambda x, y: last_strip(x, y, zstandard.compress(bytes(19_999))), "must have 20000"),
    "a strip cut short": (lambda x, y: last_strip(x, y, zstandard.compress(bytes(20_000))[:-3]), "a packed part"),
    "a strip with more behind": (lambda x, y: last_strip(x, y, zstandard.compress(bytes(20_000)) + b"x"), "a packed"),
    "a strip that says it holds nothing": (lambda x, y: last_strip(x, y, zstandard.compress(b"")), "says 0 bytes"),
    "a strip of nothing": (lambda x, y: last_strip(x, y, b""), "a packed part"),
    "planes cut short": (lambda x, y: (x, y[:-1]), "more bytes than it has"),
    "planes with more behind": (lambda x, y: (x, y + b"x"), "its layout says"),
    "a strip as it is and too short": (lambda x, y: raw_strip(x, y, 19_999), "a strip has 19999 bytes, and must have"),
    "a strip as it is and too long": (lambda x, y: raw_strip(x, y, 20_001), "a strip has 20001 bytes, and must have"),
    "pieces in an object": (lambda x, y: x.update(pieces={}), "no tensors and pieces"),
    "tensors in a list": (lambda x, y: x.update(tensors=[]), "no tensors and pieces"),
    "a piece of two": (pieces(lambda p: p[0].pop()), "a piece that is none"),
    "a piece of four": (pieces(lambda p: p[0].append(0)), "a piece that is none"),
    "a piece whose strips are none": (pieces(lambda p: p[0].__setitem__(2, {})), "strips that are none"),
    "a number more than any piece has": (pieces(lambda p: p[0].__setitem__(1, 2**20 + 1)), "strips that are none"),
    "a strip of 0 bytes a number": (pieces(lambda p: p[0][2].append([0, 0, 0])), "strips that are none"),
    "a strip of two": (pieces(lambda p: p[0][2][0].pop()), "strips that are none"),
    "a strip of four": (pieces(lambda p: p[0][2][0].append(0)), "strips that are none"),
    "a strip that is no list": (pieces(lambda p: p[0][2].append(1)), "strips that are none"),
    "a tensor below 0": (lambda x, y: x["tensors"].update(more=["F32", [1], -4, 0]), "where its tensors lie"),
    "a tensor of five": (lambda x, y: x["tensors"].update(more=["F32", [0], 80_000, 80_000, 0]), "where its tensors"),
    "no planes": (lambda x, y: (x, b""), "would unpack to 80028 bytes"),
    "a piece less": (pieces(lambda p: p.pop()), "not the bytes of its tensors"),
    "a piece more": (pieces(lambda p: p.append(p[0])), "not the bytes of its tensors"),
    "a piece that is none": (pieces(lambda p: p.append(7)), "a piece that is none"),
    "numbers of 3 bytes": (pieces(lambda p: p[0].__setitem__(0, 3)), "a piece that is none"),
    "numbers of 4.0 bytes": (pieces(lambda p: p[0].__setitem__(0, 4.0)), "a piece that is none"),
    "numbers below 0": (pieces(lambda p: p[0].__setitem__(1, -1)), "a piece that is none"),
    "numbers beyond all": (pieces(lambda p: p[0].__setitem__(1, 2**61)), "strips that are none"),
    "true numbers": (pieces(lambda p: p[0].__setitem__(1, True)), "a piece that is none"),
    "a strip less": (pieces(lambda p: p[0][2].pop()), "do not make numbers"),
    "a strip too wide": (pieces(lambda p: p[0][2][0].__setitem__(0, 8)), "do not make numbers"),
    "strips in another order": (pieces(lambda p: p[0][2].insert(0, p[0][2].pop())), "do not make numbers"),
    "a strip of text": (pieces(lambda p: p[0][2][0].__setitem__(1, "9")), "strips that are none"),
    "tensors that overlap": (
        lambda x, y: x["tensors"].update(more=["F32", [1], 0, 4]),
        "where its tensors lie|not the bytes",
    ),
    "tensors with a gap": (lambda x, y: x["tensors"]["0.keys"].__setitem__(2, 4), "not the bytes of its tensors"),
    "tokens twice": (lambda x, y: x["tensors"].update(tokens=["I32", [0], 0, 0]), "where its tensors lie"),
    "a tensor that is none": (lambda x, y: x["tensors"].update(more=[1]), "where its tensors lie"),
}


def traced(nbytes: int) -> Any:
    """Memory that `tracemalloc` sees, in the place of slots."""
    return np.empty(nbytes, np.uint8)


@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_is_named_before_anything_of_its_size_is_made(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "memory", traced)
    change, named = HOSTILE[what]
    data = changed(lambda layout, strips: change(layout, strips))
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError, match=named):
            planes.unpacked(data)
        assert tracemalloc.get_traced_memory()[1] < 2**21 + 12 * len(data)
    finally:
        tracemalloc.stop()
    honest = changed(lambda layout, strips: None)
    assert len(planes.unpacked(honest)) > 80_000
    with pytest.raises(DamagedFileError, match="may to 50000 at most"):
        planes.unpacked(honest, 50_000)


def test_the_twin_without_the_bound_takes_all_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "MOST_TIMES", 10**9)
    monkeypatch.setattr(planes, "memory", traced)

    def small(layout: Any, strips: bytes) -> tuple[Any, bytes]:
        found, data = bomb(layout, strips)
        found = {"tensors": {"0.keys": ["U8", [2**26], 0, 2**26]}, "pieces": found["pieces"][:64]}
        return found, data[: len(data) // 2000 * 64]

    data = changed(small)
    tracemalloc.start()
    try:
        assert len(planes.unpacked(data)) > 2**26 > 200 * len(data)
        assert tracemalloc.get_traced_memory()[1] > 2**26
    finally:
        tracemalloc.stop()


def test_a_packing_to_come_is_named() -> None:
    data = header(lambda value: value["__metadata__"].update(packed="hay"))(changed(lambda layout, strips: None))
    with pytest.raises(DamagedFileError, match="packed as 'hay'"):
        planes.unpacked(data)


@pytest.mark.parametrize("what", ["a bomb", "a strip that unpacks to all", "planes cut short"])
def test_nothing_hostile_is_resumed(jamba: PreTrainedModel, tmp_path: Path, caplog: Any, what: str) -> None:
    """In a saved cache and in the disk tier, with every checksum right."""
    cold = cold_logits(jamba, question(3))
    with handle(jamba, store=CheckpointStore(None, "lru", disk_memory="1GiB", disk_dir=tmp_path / "disk")) as cache:
        logits(jamba, question(2), cache)
        cache.save_pretrained(tmp_path / "a")
        cache.store.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    saved = Saved(tmp_path / "b")
    for unit in saved.of("state"):
        hostile = changed(HOSTILE[what][0])

        def forged(data: bytes, hostile: bytes = hostile) -> bytes:
            meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            tensors = {**safetensors.torch.load(hostile), "tokens": safetensors.torch.load(data)["tokens"]}
            return bytes(safetensors.torch.save(tensors, metadata={**meta, "packed": "planes of zstd"}))

        unit.raw.append(forged)
    saved.write()
    for folder, resumed in (("a", True), ("b", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING), SparsePrefixCache.from_pretrained(tmp_path / folder, jamba) as cache:
            assert torch.equal(logits(jamba, question(3), cache), cold)
            assert cache.last_request is not None and (cache.last_request.resumed_tokens > 0) == resumed
        assert ("A stored state is lost" in caplog.text) != resumed


@pytest.mark.parametrize("length", range(1, 18))
def test_a_header_ends_where_any_number_can_begin(length: int) -> None:
    data = canonical(safetensors.numpy.save({"a" * length: np.ones(3)}, {"unit": "{}"}))
    assert int.from_bytes(data[:8], "little") % 8 == 0 and safetensors.numpy.load(data)["a" * length].sum() == 3
