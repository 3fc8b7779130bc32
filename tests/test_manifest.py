"""`sparse_cache.json`: what it says, whom it is believed, and whose it is."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hf_sparse_cache import DamagedFileError, SparseCacheConfig, manifest
from hf_sparse_cache.manifest import NAME, Manifest
from hf_sparse_cache.models import fingerprint
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store.seal import Seal


PLAIN, KEYED, OTHER = Seal(), Seal("correct horse battery staple"), Seal("another key of sufficient length")
STATE = f"state-{'a' * 12}-{'b' * 32}.safetensors"
PART = f"kv-{'c' * 12}-{'d' * 32}.safetensors"
CONTENT: dict[str, Any] = {
    "version": 3,
    "fingerprint": {"format": 1, "model": "Tiny", "devices": ["cpu"]},
    "namespace": "anna",
    "config": {"layers": 3, "least": math.inf},
    "settings": {
        "max_memory": 1000,
        "max_checkpoints": None,
        "exactness": "bitwise",
        "grid": 64,
        "cut_after": ["x"],
        "pieces": None,
    },
    "units": [STATE],
    "parts": [PART],
}


def changed(*path: str, value: Any = None, gone: bool = False) -> dict[str, Any]:
    """The content with another value at a path, or without what is there."""
    found: Any = copy.deepcopy(CONTENT)
    place = found
    for name in path[:-1]:
        place = place[name]
    if gone:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return found  # type: ignore[no-any-return]


def read(folder: Path, content: Any, seal: Seal | None = PLAIN) -> Manifest:
    (folder / NAME).write_text(json.dumps(content))
    return Manifest.read(folder, seal)


def refused(folder: Path, content: Any, seal: Seal | None = PLAIN) -> str:
    with pytest.raises(DamagedFileError) as raised:
        read(folder, content, seal)
    assert raised.value.path == folder / NAME
    start, said = str(raised.value).split(" is damaged or not a saved cache's: ")
    assert start == str(folder / NAME) and said.endswith(". Save the cache again, to another folder")
    return said.removesuffix(". Save the cache again, to another folder")


# -- what it says -----------------------------------------------------------------------------------------------------


def test_all_of_it_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, CONTENT)
    assert found.fingerprint == CONTENT["fingerprint"] and found.config == CONTENT["config"]
    assert (found.namespace, found.units, found.parts) == ("anna", [STATE], [PART])
    assert found.settings == {**CONTENT["settings"], "cut_after": ("x",)} and found.listed == {STATE, PART}
    assert found.space == fingerprint.durable_space(CONTENT["fingerprint"], "anna")
    assert found.space.endswith("\x1fanna")


@pytest.mark.parametrize("seal", [PLAIN, KEYED])
def test_what_is_written_is_read(tmp_path: Path, seal: Seal) -> None:
    found = read(tmp_path, CONTENT)
    (tmp_path / NAME).write_bytes(found.text(seal))
    assert Manifest.read(tmp_path, seal) == Manifest.read(tmp_path, None) == found
    content = json.loads(found.text(seal))
    signed = {"keyed", "signature"} if seal is KEYED else set()
    assert {name: value for name, value in content.items() if name not in signed} == CONTENT
    assert set(content) == {*CONTENT, *signed}
    assert found.text(seal).decode() == json.dumps(content, indent=2, sort_keys=True)
    nothing = json.loads(replace(found, units=None).text(seal))
    assert nothing["units"] == [] and nothing["version"] == 3
    assert Manifest({}, "", {}, {}).parts == [] and Manifest({}, "", {}, {}).listed == set()


def test_a_manifest_of_a_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "describe", lambda binding: {"format": 1, "model": binding.model.name})
    monkeypatch.setattr(fingerprint, "config_values", lambda config: {"size": config.size})
    model = SimpleNamespace(name="Tiny", config=SimpleNamespace(size=7))
    config = SparseCacheConfig(max_memory="1GiB", max_checkpoints=2, grid=32, namespace="b", cut_after=("x",))
    found = Manifest.of(SimpleNamespace(model=model, config=config), 99)  # type: ignore[arg-type]
    assert (found.fingerprint, found.namespace, found.config) == ({"format": 1, "model": "Tiny"}, "b", {"size": 7})
    assert (found.units, found.parts) == (None, [])
    assert found.settings == {
        "max_memory": 99,  # of the store
        "max_checkpoints": 2,
        "exactness": "replayable",
        "grid": 32,
        "cut_after": ("x",),
        "pieces": None,
    }
    rounded = Manifest.of(SimpleNamespace(model=model, config=replace(config, storage="int8")), None)  # type: ignore[arg-type]
    assert rounded.settings == {**found.settings, "max_memory": None, "storage": "int8"}


def test_what_made_a_state_of_the_first_version() -> None:
    """Every cut of the handle that saved it, special tokens and all; it had no strings to cut after."""
    tokens = np.asarray([5] * 20, np.int32)
    tokens[8] = 7
    for ids, grid in (([7], 8), ([], 8), ([7], None), ([5], 8)):
        settings = {} if grid is None else {"grid": grid}
        made = Manifest({"cut ids": ids} if ids else {}, "", {}, settings)
        longer = np.append(tokens, np.asarray([0, 0], np.int32))
        expected = CutRule(grid or 1, tuple(ids)).cuts(longer).tolist()
        assert made.lineage(tokens) == Lineage(expected) and max(expected) <= 20
    assert Manifest({}, "", {}, {"grid": 10}).lineage(tokens) == Lineage([10, 20])  # also where the text ends
    assert Manifest({}, "", {}, {"grid": None}).lineage(tokens[:3]) == Lineage([1, 2, 3])
    assert Manifest({"cut ids": [-1]}, "", {}, {"grid": 10}).lineage(tokens) == Lineage([10, 20])


# -- what is read -----------------------------------------------------------------------------------------------------


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"holds no saved SparsePrefixCache: it has no {NAME}"):
        Manifest.read(tmp_path, PLAIN)
    (tmp_path / NAME).mkdir()
    with pytest.raises(DamagedFileError, match="is a folder, not a file that was written here"):
        Manifest.read(tmp_path, PLAIN)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_each_version_is_read(tmp_path: Path, version: int) -> None:
    found = read(tmp_path, {**CONTENT, "version": version})
    assert found.units == (None if version == 1 else [STATE]) and found.parts == ([] if version == 1 else [PART])


def test_without_a_version_it_is_the_first(tmp_path: Path) -> None:
    found = read(tmp_path, changed("version", gone=True))
    assert (found.units, found.parts, found.listed) == (None, [], set())


@pytest.mark.parametrize("version", [0, 4, -1, True, 2.0, "3", None, [1]])
def test_no_other_version_is(tmp_path: Path, version: Any) -> None:
    assert refused(tmp_path, {**CONTENT, "version": version}) == f"version is {version!r}, and 1 to 3 are read"


@pytest.mark.parametrize("content", [[], "text", 3, None])
def test_what_is_no_object_is_none(tmp_path: Path, content: Any) -> None:
    assert refused(tmp_path, content) == "it is no JSON object"


@pytest.mark.parametrize("field_name", ["units", "parts"])
@pytest.mark.parametrize("names", [None, "all", {}, [3], ["a"], ["../" + STATE], [STATE, STATE + "x"]])
def test_files_are_listed_by_names_that_units_have(tmp_path: Path, field_name: str, names: Any) -> None:
    for version in (2, 3):
        content = {**changed(field_name, value=names), "version": version}
        assert refused(tmp_path, content) == f"{field_name} is no list of names of files"
        content.pop(field_name)
        assert refused(tmp_path, content) == f"{field_name} is no list of names of files"
    assert read(tmp_path, {**changed(field_name, value=names), "version": 1}).units is None
    assert read(tmp_path, changed(field_name, value=[])).listed == {STATE, PART} - {*CONTENT[field_name]}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("fingerprint",), [], "fingerprint is []"),
        (("fingerprint",), None, "fingerprint is None"),
        (("namespace",), 3, "namespace is 3"),
        (("settings",), "x", "settings is 'x'"),
        (("config",), [], "config is []"),
        (("fingerprint",), {"model": "Tiny"}, "fingerprint.format is missing"),
        (("settings", "max_memory"), -1, "settings.max_memory is -1, not a whole number that can be"),
        (("settings", "max_memory"), 1.0, "settings.max_memory is 1.0, not a whole number that can be"),
        (("settings", "max_memory"), "1 stone", "max_memory='1 stone' is not a size"),
        (("settings", "max_checkpoints"), "3", "settings.max_checkpoints is '3', not a whole number that can be"),
        (("settings", "max_checkpoints"), True, "settings.max_checkpoints is True, not a whole"),
        (("settings", "grid"), "64", "settings.grid is '64', not a whole"),
        (("settings", "grid"), 1, "grid must be at least 2 tokens, not 1"),
        (("settings", "pieces"), 2.5, "settings.pieces is 2.5, not a whole"),
        (("settings", "pieces"), 1, "pieces must be None or at least 2 tokens, not 1"),
        (("settings", "exactness"), "numerical", "exactness is 'numerical', whose states do not say what made them"),
        (("settings", "exactness"), ["bitwise"], "exactness or max_checkpoints is missing, or of another type: {"),
        (("settings", "exactness"), "loose", "exactness must be 'replayable' or 'bitwise', not 'loose'"),
        (("settings", "cut_after"), "x", "cut_after is 'x', not a list of strings"),
        (("settings", "cut_after"), None, "cut_after is None, not a list of strings"),
        (("settings", "cut_after"), [3], "cut_after must be strings of at least one character"),
        (("settings", "storage"), "fp4", "storage must be 'exact', 'bf16' or 'int8', not 'fp4'"),
        (("settings", "storage"), {}, "storage must be 'exact', 'bf16' or 'int8', not {}"),
    ],
)
def test_what_no_handle_can_have_is_named(tmp_path: Path, path: tuple[str, ...], value: Any, said: str) -> None:
    assert refused(tmp_path, changed(*path, value=value)).startswith(said)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("fingerprint",), "fingerprint is 'missing'"),
        (("namespace",), "namespace is 'missing'"),
        (("settings",), "settings is 'missing'"),
        (("settings", "exactness"), "exactness or max_checkpoints is missing"),
        (("settings", "max_checkpoints"), "exactness or max_checkpoints is missing"),
    ],
)
def test_what_must_be_there_is_named(tmp_path: Path, path: tuple[str, ...], said: str) -> None:
    assert refused(tmp_path, changed(*path, gone=True)).startswith(said)


@pytest.mark.parametrize("name", ["max_memory", "grid", "pieces"])
def test_other_settings_may_be_missing(tmp_path: Path, name: str) -> None:
    assert name not in read(tmp_path, changed("settings", name, gone=True)).settings


def test_what_may_be_missing_has_a_default(tmp_path: Path) -> None:
    assert read(tmp_path, changed("settings", "cut_after", gone=True)).settings["cut_after"] == ()
    assert read(tmp_path, changed("config", gone=True)).config == {}
    for value in (0, "2GiB", None):
        assert read(tmp_path, changed("settings", "max_memory", value=value)).settings["max_memory"] == value
    for name, value in (("storage", "int8"), ("max_checkpoints", 0), ("grid", 2), ("pieces", 2)):
        assert read(tmp_path, changed("settings", name, value=value)).settings[name] == value
    assert "from the future" not in read(tmp_path, changed("settings", "from the future", value=1)).settings


def test_the_first_version_has_its_cuts_in_its_fingerprint(tmp_path: Path) -> None:
    first: dict[str, Any] = {"fingerprint": {"format": 1, "grid": 16, "exactness": "replayable", "cut ids": [0, 5]}}
    first |= {"namespace": "", "settings": {"max_checkpoints": 1}}
    found = read(tmp_path, first)
    assert found.settings == {"max_checkpoints": 1, "grid": 16, "exactness": "replayable", "cut_after": ()}
    first["settings"] |= {"grid": 32}  # what is told twice
    assert read(tmp_path, first).settings["grid"] == 32
    del first["fingerprint"]["exactness"], first["fingerprint"]["cut ids"]
    assert read(tmp_path, first).settings["exactness"] == "bitwise"
    for wrong in (5, [-1], [2**31], ["a"], [True], {}):
        first["fingerprint"]["cut ids"] = wrong
        assert refused(tmp_path, first) == f"fingerprint.cut ids is {wrong!r}, no list of token ids"
    later = changed("fingerprint", value={"format": 1, "grid": 16, "cut ids": 5})
    assert read(tmp_path, {**later, "version": 2}).settings["grid"] == 64  # there they say nothing


# -- whom it is believed ----------------------------------------------------------------------------------------------


def signed(seal: Seal, **others: Any) -> dict[str, Any]:
    made = Manifest(CONTENT["fingerprint"], "anna", {}, CONTENT["settings"], [STATE], [PART])
    found: dict[str, Any] = {**json.loads(made.text(seal)), **others}
    return {name: value for name, value in found.items() if value is not None}


def test_a_manifest_is_believed_with_its_key_alone(tmp_path: Path) -> None:
    assert read(tmp_path, signed(KEYED), KEYED).namespace == "anna"
    assert read(tmp_path, signed(KEYED), None).namespace == "anna"  # to look at it
    assert refused(tmp_path, signed(KEYED), PLAIN).startswith("signature: it was written with a key; give key=")
    assert refused(tmp_path, signed(KEYED), OTHER).startswith("signature: it was written with another key than key=")
    assert refused(tmp_path, signed(PLAIN), KEYED).startswith("signature: it was written without a key")


@pytest.mark.parametrize(
    "others",
    [
        {"namespace": "b"},
        {"units": []},
        {"settings": {**CONTENT["settings"], "grid": 32}},
        {"signature": "0" * 32},
        {"signature": 7},
        {"signature": None},
        {"more": 1},
    ],
)
def test_no_word_of_it_can_be_changed(tmp_path: Path, others: dict[str, Any]) -> None:
    said = refused(tmp_path, signed(KEYED, **others), KEYED)
    assert said.startswith("signature: it is not that of the key that key= or HF_SPARSE_CACHE_KEY gives")
    assert read(tmp_path, signed(KEYED, **others), None).fingerprint == CONTENT["fingerprint"]


def test_a_signature_that_says_of_no_key_is_that_of_one(tmp_path: Path) -> None:
    for seal, said in ((PLAIN, "it was written with a key"), (KEYED, "it was written with another key")):
        assert refused(tmp_path, signed(KEYED, keyed=None), seal).startswith(f"signature: {said}")
    assert refused(tmp_path, signed(PLAIN, keyed=KEYED.keyed), KEYED).startswith("signature: it is not that of")
    assert refused(tmp_path, signed(PLAIN, signature=""), PLAIN).startswith("signature: it was written with a key")


# -- whose it is ------------------------------------------------------------------------------------------------------


def made(namespace: str = "anna", config: dict[str, Any] | None = None, **described: Any) -> Manifest:
    return Manifest({"format": 1, "model": "Tiny", **described}, namespace, config or {}, {})


def refusal(saved: Manifest, current: Manifest, loading: bool = True) -> str:
    with pytest.raises(ValueError, match=r"^The cache saved in folder belongs to another setting: ") as raised:
        saved.refuse_other(current, Path("folder"), loading=loading)
    return str(raised.value).partition("setting: ")[2]


def test_the_same_model_and_namespace_is_accepted() -> None:
    for loading in (True, False):
        made().refuse_other(made(), Path("folder"), loading=loading)
        made(config={"layers": 1}).refuse_other(made(config={"layers": 2}), Path("folder"), loading=loading)
        cuts = {"grid": 64, "cut ids": [3], "min distance": 16, "exactness": "bitwise"}
        made(**cuts).refuse_other(made(), Path("folder"), loading=loading)  # of the first version


def test_what_differs_is_named_with_the_remedy() -> None:
    end = "This model cannot continue its states; make a new cache with this model instead."
    assert refusal(made(), made(model="Huge")) == f"model Tiny instead of Huge. {end}"
    assert refusal(made(), made(weights="x"), False) == (
        "other weights. This handle cannot save there; choose another folder, or delete this one."
    )
    fits = "The model fits: leave out namespace=, or pass namespace='anna'."
    assert refusal(made(), made("b")) == f"namespace 'anna' instead of 'b'. {fits}"
    assert refusal(made(), made("b"), False) == (
        "namespace 'anna' instead of 'b'. This handle cannot save there; choose another folder, or delete this one."
    )
    assert refusal(made(), made("b", model="Huge")) == (
        f"model Tiny instead of Huge; namespace 'anna' instead of 'b'. {end}"
    )


def test_of_another_configuration_the_first_differences_are_named() -> None:
    end = "This model cannot continue its states; make a new cache with this model instead."
    keys: dict[str, Any] = {f"k{number}": number for number in range(5)}
    for count, more in ((1, ""), (3, ""), (4, "; and 1 more"), (5, "; and 2 more")):
        others = keys | dict.fromkeys(list(keys)[:count], -1)
        saved, current = (
            replace(made(config={**settings, "same": 1}), fingerprint={"format": 1, "config": digest})
            for settings, digest in ((keys, "a"), (others, "b"))
        )
        named = "; ".join(f"k{number} {number} instead of -1" for number in range(min(count, 3)))
        assert refusal(saved, current) == f"other config ({named}{more}). {end}"


def test_of_many_differences_the_first_are_named() -> None:
    for count, more in ((2, ""), (3, ""), (4, "; and 1 more"), (6, "; and 3 more")):
        saved, current = ({f"a{number}": side for number in range(count)} for side in (1, 2))
        named = "; ".join(f"a{number} 1 instead of 2" for number in range(min(count, 3)))
        assert refusal(made(**saved), made(**current)).startswith(f"{named}{more}. This model cannot")


def test_names_of_what_is_saved_are_those_of_settings() -> None:
    assert {*manifest._SETTINGS} <= SparseCacheConfig().to_dict().keys()
