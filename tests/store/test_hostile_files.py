"""Hostile files with right checksums: nothing of them is resumed, no other error comes out, other units are served."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from forging import Saved, Unit, header
from persisting import cold_logits, handle, logits, question, small_store
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, DamagedFileError, SparsePrefixCache
from hf_sparse_cache.store.headers import _spans


Change = Callable[[Unit], Any]


def tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes every tensor but the tokens."""

    def apply(unit: Unit) -> None:
        unit.tensors.update({n: change(v).contiguous() for n, v in unit.tensors.items() if n != "tokens"})

    return apply


def record(**values: Any) -> Change:
    return lambda unit: unit.record.update(values)


def payload(**values: Any) -> Change:
    return lambda unit: unit.payload.update(values)


def raw(change: Callable[[bytes], bytes]) -> Change:
    return lambda unit: unit.raw.append(change)


def one(unit: Unit) -> str:
    return next(name for name in unit.tensors if name != "tokens")


def far(entry: dict[str, Any]) -> None:
    entry["shape"], entry["data_offsets"] = [2**60], [0, 2**62]


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
# What is made of every state and of every span of keys and values.
CHANGES: dict[str, Change] = {
    "not a number": tensors(lambda value: value * float("nan")),
    "infinite": tensors(lambda value: value.float().fill_(float("inf")).to(value.dtype)),
    "other type": tensors(lambda value: value.double()),
    "half": tensors(lambda value: value.half()),
    "whole numbers": tensors(lambda value: value.int()),
    "one more dimension": tensors(lambda value: value[None]),
    "broadcasts": tensors(lambda value: value[..., :1]),
    "twice as long": tensors(lambda value: torch.cat([value, value], dim=-1)),
    "longer by the tokens": tensors(lambda value: torch.cat([value, value], dim=-2)),
    "flat": tensors(lambda value: value.flatten()),
    "empty": tensors(lambda value: value[..., :0]),
    "batch of two": tensors(lambda value: torch.cat([value, value])),
    "a tensor less": lambda unit: unit.tensors.pop(one(unit)),
    "a tensor more": lambda unit: unit.tensors.update({one(unit) + "x": torch.zeros(1)}),
    "a tensor of no layer": lambda unit: unit.tensors.update({"99.keys": torch.zeros(1)}),
    "a layer below 0": lambda unit: unit.tensors.update({"-1.keys": torch.zeros(1)}),
    "a layer that is no number": lambda unit: unit.tensors.update({"keys": torch.zeros(1)}),
    "a layer of other digits": lambda unit: unit.tensors.update({"٣.keys": torch.zeros(1)}),
    "a layer of 5,000 digits": lambda unit: unit.tensors.update({"9" * 5000 + ".keys": torch.zeros(1)}),
    "the next layer's": lambda unit: unit.tensors.update({"9" + one(unit): unit.tensors.pop(one(unit))}),
    "layers beyond memory": payload(layers=10**12),
    "layers beyond all": payload(layers=10**400),
    "layers below 0": payload(layers=-1),
    "a layer less": lambda unit: unit.payload.update(
        layers=unit.payload["layers"] - 1, devices=unit.payload["devices"][1:]
    ),
    "a layer more": lambda unit: unit.payload.update(
        layers=unit.payload["layers"] + 1, devices=[*unit.payload["devices"], "cpu"]
    ),
    "layers as text": payload(layers="4"),
    "layers true": payload(layers=True),
    "no layers": lambda unit: unit.payload.pop("layers"),
    "no devices": lambda unit: unit.payload.pop("devices"),
    "other devices": lambda unit: unit.payload.update(devices=["cuda:7"] * len(unit.payload["devices"])),
    "devices that are none": lambda unit: unit.payload.update(devices=[42] * len(unit.payload["devices"])),
    "a meta device": lambda unit: unit.payload.update(devices=["meta"] * len(unit.payload["devices"])),
    "no plain values": lambda unit: unit.payload.pop("plain"),
    "a plain value more": payload(plain={"0.seen": 7}),
    "a plain value for a tensor": lambda unit: unit.payload["plain"].update({one(unit): 0}),
    "plain values in a list": payload(plain=[1]),
    "no payload": lambda unit: setattr(unit, "payload", None),
    "a payload that is no JSON": lambda unit: setattr(unit, "payload", "{"),
    "a payload that is a list": lambda unit: setattr(unit, "payload", []),
    "a payload nested deep": lambda unit: setattr(unit, "payload", DEEP.decode()),
    "a format to come": record(format=4),
    "format 0": record(format=0),
    "format as text": record(format="2"),
    "format true": record(format=True),
    "no record": lambda unit: setattr(unit, "record", None),
    "a record that is no object": lambda unit: setattr(unit, "record", [1]),
    "a record nested deep": lambda unit: setattr(unit, "record", DEEP.decode()),
    "a record with a key twice": lambda unit: setattr(unit, "record", json.dumps(unit.record)[:-1] + ',"format":2}'),
    "not a number in the record": record(position=float("nan")),
    "another space": record(space="{}\x1fb"),
    "a space that is none": record(space=7),
    "half a character": record(space="\ud800"),
    "keyed": record(keyed=True),
    "encrypted": record(encrypted=True),
    "both": record(keyed=True, encrypted=True),
    "other tokens' type": lambda unit: unit.tensors.update(tokens=unit.tensors["tokens"].long()),
    "tokens in two dimensions": lambda unit: unit.tensors.update(tokens=unit.tensors["tokens"][None]),
    "no tokens": lambda unit: unit.tensors.pop("tokens"),
    "a header that is nested deep": raw(header(lambda value: DEEP)),
    "a header that is no JSON": raw(header(lambda value: b"{no")),
    "a header that is a list": raw(header(lambda value: [value])),
    "a header of 10**18 bytes": raw(lambda data: (10**18).to_bytes(8, "little") + data[8:]),
    "a header of nothing": raw(lambda data: bytes(8) + data[8:]),
    "no bytes": raw(lambda data: b""),
    "four bytes": raw(lambda data: data[:4]),
    "cut short": raw(lambda data: data[:-1]),
    "longer": raw(lambda data: data + b"\0"),
    "metadata that are numbers": raw(header(lambda value: value["__metadata__"].update(unit=1))),
    "no metadata": raw(header(lambda value: value.pop("__metadata__") and None)),
    "a tensor beyond the file": raw(header(lambda value: far(value["tokens"]))),
    "offsets below 0": raw(header(lambda value: value["tokens"].update(data_offsets=[-8, 0]))),
    "offsets that overlap": raw(header(lambda value: value["tokens"].update(data_offsets=[0, 8], shape=[2]))),
    "offsets backwards": raw(header(lambda value: value["tokens"].update(data_offsets=[8, 0]))),
    "offsets as text": raw(header(lambda value: value["tokens"].update(data_offsets=["0", "8"]))),
    "a type that is none": raw(header(lambda value: value[list(value)[-1]].update(dtype="X9"))),
    "a shape below 0": raw(header(lambda value: value[list(value)[-1]].update(shape=[-1]))),
    "a shape beyond all": raw(header(lambda value: value[list(value)[-1]].update(shape=[2**40, 2**40, 0]))),
}
# Of states alone: where they lie, and what they build on.
OF_STATES: dict[str, Change] = {
    "one position more": lambda unit: unit.record.update(position=unit.record["position"] + 1),
    "position below 0": record(position=-1),
    "position as text": record(position="32"),
    "position beyond memory": record(position=2**62),
    "no position": lambda unit: unit.record.pop("position"),
    "segments of many words": record(lineage=["x" * 10**6]),
    "no keys and values": record(kv=[]),
    "keys and values that are no list": record(kv={"a": 1}),
    "keys and values of numbers": record(kv=[1, 2, 3]),
    "a span without its start": lambda unit: unit.record["kv"][0].pop(0),
    "a span that overlaps": lambda unit: unit.record["kv"].append(unit.record["kv"][-1]),
    "spans backwards": lambda unit: unit.record["kv"].insert(0, [96, 0, unit.record["kv"][0][2]]),
    "spans beyond it": lambda unit: unit.record["kv"][-1].__setitem__(1, 10**9),
    "a file elsewhere": lambda unit: unit.record["kv"][0].__setitem__(2, "../../../etc/passwd"),
    "a file of another kind": lambda unit: unit.record["kv"][0].__setitem__(2, "sparse_cache.json"),
    "a token less": lambda unit: unit.tensors.update(tokens=unit.tensors["tokens"][:-1].clone()),
    "a token more": lambda unit: unit.tensors.update(tokens=torch.cat([unit.tensors["tokens"]] * 2)),
}
OF_KV: dict[str, Change] = {
    "another span": record(span=[0, 7]),
    "no span": lambda unit: unit.record.pop("span"),
    "a span of text": record(span="0-32"),
}
CASES = [
    *((kind, name) for name in CHANGES for kind in ("state", "kv")),
    *(("state", name) for name in OF_STATES),
    *(("kv", name) for name in OF_KV),
]
VERSIONED = [*((*case, 2) for case in CASES), *((*case, 1) for case in CASES[::5])]
ALL = {**CHANGES, **OF_STATES, **OF_KV}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path, torch.Tensor]:
    model = tiny_models.build("Jamba")
    folder = tmp_path_factory.mktemp("honest") / "a"
    with handle(model) as cache:
        logits(model, question(2), cache)
        cache.save_pretrained(folder)
    return model, folder, cold_logits(model, question(3))


@pytest.fixture
def copied(honest: Any, tmp_path: Path) -> Iterator[tuple[PreTrainedModel, Path, torch.Tensor]]:
    model, folder, cold = honest
    shutil.copytree(folder, tmp_path / "a")
    yield model, tmp_path / "a", cold


def loses(folder: Path, model: PreTrainedModel, cold: torch.Tensor, caplog: pytest.LogCaptureFixture) -> int:
    """Loads a folder, serves a prompt, and compares it with the cold run; returns the tokens it resumed."""
    caplog.clear()
    with SparsePrefixCache.from_pretrained(folder, model, policy="none") as cache:
        assert torch.equal(logits(model, question(3), cache), cold)
        assert cache.last_request is not None
        told = [entry for entry in caplog.records if entry.levelno == logging.WARNING]
        assert len(told) <= 1 and (not told or str(folder) in told[0].getMessage())
        assert not told or len(told[0].getMessage()) < 1000
        assert told or cache.last_request.resumed_tokens == 96
        return cache.last_request.resumed_tokens


@pytest.mark.parametrize(("kind", "name", "version"), VERSIONED)
def test_nothing_of_a_hostile_save_is_resumed(
    copied: Any, caplog: pytest.LogCaptureFixture, kind: str, name: str, version: int
) -> None:
    model, folder, cold = copied
    saved = Saved(folder)
    as_version(saved, version)
    for unit in saved.of(kind):
        ALL[name](unit)
    saved.write()
    assert loses(folder, model, cold, caplog) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_twin_that_is_only_written_anew_is_resumed(copied: Any, caplog: Any, version: int) -> None:
    model, folder, cold = copied
    saved = Saved(folder)
    as_version(saved, version)
    saved.write()
    assert loses(folder, model, cold, caplog) == 96 and not caplog.records


def as_version(saved: Saved, version: int) -> None:
    if version == 1:
        for key in ("version", "units", "parts"):
            del saved.manifest[key]
        for unit in saved.units.values():
            unit.record["format"] = 1
        for unit in saved.of("kv"):
            del unit.record["space"]


@pytest.mark.parametrize("name", ["not a number", "a layer less", "another space", "one position more", "cut short"])
def test_other_units_of_a_hostile_save_are_served(copied: Any, caplog: pytest.LogCaptureFixture, name: str) -> None:
    model, folder, cold = copied
    saved = Saved(folder)
    deepest = max(saved.of("state"), key=lambda unit: unit.record["position"])
    ALL[name](deepest)
    saved.write()
    assert 0 < loses(folder, model, cold, caplog) < 96
    assert "cannot be used" in caplog.text


@pytest.mark.parametrize("name", ["not a number", "half", "layers beyond memory", "another space", "keyed"])
@pytest.mark.parametrize("kind", ["state", "kv"])
def test_a_hostile_disk_folder(
    honest: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, stores: list[CheckpointStore], kind: str, name: str
) -> None:
    model, _, cold = honest
    stores.append(small_store(model, tmp_path / "d"))
    with handle(model, store=stores[-1]) as cache:
        logits(model, question(2), cache)
    stores[-1].close()
    (folder,) = [path for path in (tmp_path / "d").iterdir() if path.is_dir()]
    (folder / "sparse_cache.json").write_text("{}")  # of no use to a tier, and of none to harm it
    saved = Saved(folder)
    for unit in saved.of(kind):
        ALL[name](unit)
    saved.write()
    stores.append(small_store(model, tmp_path / "d"))
    with handle(model, store=stores[-1], policy="none") as cache:
        assert torch.equal(logits(model, question(3), cache), cold)
        assert cache.last_request is not None and cache.last_request.resumed_tokens == 0
    assert 1 <= len(caplog.records) <= 2 and (folder / "sparse_cache.json").exists()


@pytest.mark.parametrize("size", [2**33, 2**40])
def test_marks_that_promise_more_than_any_can_be_are_not_read(copied: Any, caplog: Any, size: int) -> None:
    """A file that is mostly a hole costs nobody anything to make, and memory to read."""
    model, folder, _ = copied
    with handle(model, policy="none") as cache:
        cache.mark(question(2)[:, :40])
        cold = logits(model, question(3), cache)
    with SparsePrefixCache.from_pretrained(folder, model) as cache:
        cache.mark(question(2)[:, :40])
        cache.save_pretrained(folder)
    (marks,) = folder.glob("marks-*")
    os.truncate(marks, size)
    with SparsePrefixCache.from_pretrained(folder, model, policy="none") as cache:
        assert len(caplog.messages) == 1 and f"has {size} bytes" in caplog.messages[0] and marks.name in caplog.text
        assert not cache.store.marks.kept
        cache.mark(question(2)[:, :40])
        assert torch.equal(logits(model, question(3), cache), cold)
        assert cache.last_request is not None and cache.last_request.resumed_tokens


def test_two_honest_saves_in_one_folder(honest: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of another tenant and of other weights: each is refused by its space, with and without a list of files."""
    model, folder, cold = honest
    with torch.no_grad():
        other = tiny_models.build("Jamba", seed=5)
    for name, source, options in (("tenant", model, {"namespace": "b"}), ("weights", other, {})):
        with handle(source, **options) as cache:
            logits(source, question(2), cache)
            cache.save_pretrained(tmp_path / name)
        for version in (1, 2):
            mixed = tmp_path / f"{name}{version}"
            shutil.copytree(tmp_path / name, mixed)
            saved = Saved(folder)
            as_version(saved, version)
            saved.folder = mixed
            saved.units |= Saved(tmp_path / name).units
            saved.write()
            assert loses(mixed, model, cold, caplog) == 96 and len(caplog.records) == 1
            for path in [*mixed.glob("*.safetensors")]:
                if path.name in {*saved.manifest.get("units", ()), *saved.manifest.get("parts", ())}:
                    path.unlink()
            if version == 2:
                assert loses(mixed, model, cold, caplog) == 0


def test_the_window_of_a_hostile_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.build("Gemma3")
    with handle(model) as cache:
        logits(model, question(2), cache)
        cache.save_pretrained(tmp_path / "honest")
    cold = cold_logits(model, question(3))
    changes: dict[str, Change] = {
        "nothing": lambda unit: None,
        "counts": lambda unit: unit.payload["plain"].update(dict.fromkeys(unit.payload["plain"], 5)),
        "counts in text": lambda unit: unit.payload["plain"].update(dict.fromkeys(unit.payload["plain"], "96")),
        "counts nothing": lambda unit: unit.payload["plain"].clear(),
        "a shorter window": tensors(lambda value: value[..., 1:, :]),
        "a longer window": tensors(lambda value: torch.cat([value, value], dim=-2)),
    }
    for name, change in changes.items():
        shutil.copytree(tmp_path / "honest", tmp_path / name)
        saved = Saved(tmp_path / name)
        assert any(unit.payload["plain"] for unit in saved.of("state"))
        for unit in saved.of("state"):
            change(unit)
        saved.write()
        assert (loses(tmp_path / name, model, cold, caplog) == 96) == (name == "nothing"), name


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an infinite budget": (lambda m: m["settings"].update(max_memory=float("inf")), "settings.max_memory is inf"),
    "a budget that is none": (lambda m: m["settings"].update(max_memory=float("nan")), "settings.max_memory is nan"),
    "a budget below 0": (lambda m: m["settings"].update(max_memory=-1), "settings.max_memory is -1"),
    "half a byte": (lambda m: m["settings"].update(max_memory=0.5), "settings.max_memory is 0.5"),
    "a budget of words": (lambda m: m["settings"].update(max_memory="lots"), "max_memory='lots'"),
    "a true budget": (lambda m: m["settings"].update(max_memory=True), "settings.max_memory is True"),
    "a budget in a list": (lambda m: m["settings"].update(max_memory=[1]), r"settings.max_memory is \[1\]"),
    "a budget beyond all": (lambda m: m["settings"].update(max_memory=10**4000), "settings.max_memory is 1000"),
    "checkpoints of text": (lambda m: m["settings"].update(max_checkpoints="3"), "settings.max_checkpoints is '3'"),
    "no checkpoints": (lambda m: m["settings"].pop("max_checkpoints"), "max_checkpoints is missing"),
    "a grid of text": (lambda m: m["settings"].update(grid="32"), "settings.grid is '32'"),
    "a grid of 1": (lambda m: m["settings"].update(grid=1), "grid must be at least 2"),
    "a grid that is true": (lambda m: m["settings"].update(grid=True), "settings.grid is True"),
    "an unknown mode": (lambda m: m["settings"].update(exactness="vague"), "exactness must be"),
    "a mode of before": (lambda m: m["settings"].update(exactness="numerical"), "exactness is 'numerical'"),
    "strings that are none": (lambda m: m["settings"].update(cut_after=[3]), "cut_after must be strings"),
    "strings in one": (lambda m: m["settings"].update(cut_after="x" * 9999), "cut_after is 'xxx"),
    "strings that are numbers": (lambda m: m["settings"].update(cut_after=7), "cut_after is 7"),
    "cut ids of version 1 that are none": (
        lambda m: (m.update(version=1), m["fingerprint"].update({"cut ids": 5})),
        "fingerprint.cut ids is 5",
    ),
    "cut ids of version 1 beyond all": (
        lambda m: (m.update(version=1), m["fingerprint"].update({"cut ids": [2**70]})),
        r"fingerprint.cut ids is \[1180",
    ),
    "pieces of text": (lambda m: m["settings"].update(pieces="9"), "settings.pieces is '9'"),
    "a mode that is a list": (lambda m: m["settings"].update(exactness=[]), "exactness"),
    "a namespace that is a number": (lambda m: m.update(namespace=3), "namespace is 3"),
    "half a character": (lambda m: m.update(namespace="\ud800"), "surrogates"),
    "a fingerprint that is none": (lambda m: m.update(fingerprint=[]), r"fingerprint is \[\]"),
    "no fingerprint": (lambda m: m.pop("fingerprint"), "fingerprint is 'missing'"),
    "settings that are none": (lambda m: m.update(settings=None), "settings is None"),
    "a config that is none": (lambda m: m.update(config="x"), "config is 'x'"),
    "a version to come": (lambda m: m.update(version=4), "version is 4, and 1 to 3 are read"),
    "a true version": (lambda m: m.update(version=True), "version is True"),
    "a version with a point": (lambda m: m.update(version=3.0), "version is 3.0"),
    "a version of text": (lambda m: m.update(version="2"), "version is '2'"),
    "a version that is a list": (lambda m: m.update(version=[2]), r"version is \[2\]"),
    "files that are no list": (lambda m: m.update(units="all"), "units is no list of names"),
    "a file elsewhere": (lambda m: m["parts"].append("../../../etc/passwd"), "parts is no list of names"),
    "a signature without a key": (lambda m: m.update(signature="x"), "signature: it was written with a key"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused_by_field(copied: Any, name: str) -> None:
    model, folder, _ = copied
    change, said = MANIFESTS[name]
    manifest = json.loads((folder / "sparse_cache.json").read_text())
    change(manifest)
    (folder / "sparse_cache.json").write_text(json.dumps(manifest))
    refused(folder, model, said)


TEXTS = {
    "nested deep": (DEEP.decode(), "nested too deep"),
    "a key twice": ('{"settings": {}, "settings": {}}', "the key 'settings' comes twice"),
    "a long key twice": (f'{{"{"k" * 10**6}": 1, "{"k" * 10**6}": 1}}', "the key 'kkk"),
    "many keys, one twice": (
        "{" + ",".join(f'"{key}": 1' for key in [*range(10**5), 99_999]) + "}",
        "the key '99999' comes twice",
    ),
    "no JSON": ("{", "not JSON"),
    "a list": ("[]", "no JSON object"),
    "nothing": ("", "not JSON"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_manifest_that_is_no_manifest(copied: Any, name: str) -> None:
    model, folder, _ = copied
    (folder / "sparse_cache.json").write_text(TEXTS[name][0])
    refused(folder, model, TEXTS[name][1])


def refused(folder: Path, model: PreTrainedModel, said: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DamagedFileError, match=said) as told:
        SparsePrefixCache.from_pretrained(folder, model)
    assert str(folder / "sparse_cache.json") in str(told.value) and "to another folder" in str(told.value)
    assert str(told.value).isprintable() and len(str(told.value)) < 700
    assert "_prefill" not in model.__dict__
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("threads", "1", 'threads "1" instead of 1'),
        ("threads", 1.0, "threads 1.0 instead of 1"),
        ("threads", True, "threads True instead of 1"),
        ("torch", "\x1b[31mred", r"torch \\x1b\[31mred instead of"),
        ("torch", "x" * 10_000, "torch x{200} instead of"),
        ("more", {"a": [1]}, r"more \{'a': \[1\]\} instead of absent"),
    ],
)
def test_what_differs_is_told_by_value_and_type(copied: Any, name: str, value: Any, said: str) -> None:
    model, folder, _ = copied
    manifest = json.loads((folder / "sparse_cache.json").read_text())
    manifest["fingerprint"][name] = value
    (folder / "sparse_cache.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=said) as told:
        SparsePrefixCache.from_pretrained(folder, model)
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    "kv",
    [
        [[1, 4, "a"]],  # not from the beginning
        [[0, 4, "a"], [5, 6, "b"]],
        [[0, 4, "a"], [3, 6, "b"]],
        [[0, "a"]],
        [[0, 0, "a"]],
        [[0, 4, 4, "a"]],  # a rounding at its very end is in none of them
        [[0, 4, 4, 4, 6, "a"]],
        [[0, 4, 3, "a"]],
        [[0, True, "a"]],
        [[False, 4, "a"]],
        [[0, 4, 7]],
        [[0, 4.0, "a"]],
        [[0, 2**31, "a"]],
        ["0, 4, a"],
    ],
)
def test_keys_and_values_with_gaps_are_refused(kv: list[Any]) -> None:
    with pytest.raises(DamagedFileError, match="its keys and values are not gapless at"):
        _spans(kv)


def test_keys_and_values_without_gaps_are_read() -> None:
    """The twin."""
    spans, names = _spans([[0, 4, "a"], [4, -6, 6, 8, "b"]])
    assert ([(span.start, span.end) for span in spans], names) == ([(0, 4), (4, 8)], ["a", "b"])
