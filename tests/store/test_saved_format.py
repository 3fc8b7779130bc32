"""The format of saved caches, pinned by folders that were saved with it: what is saved now has the same form, and both
the present format and those before are read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import Saved
from persisting import GRID, cold_logits, handle, logits, question
from transformers import PreTrainedModel

from hf_sparse_cache import SparsePrefixCache, fingerprint
from hf_sparse_cache.store import files, planes
from hf_sparse_cache.store.unit_files import FORMAT, READ_FORMATS


GOLDEN = Path(__file__).parents[1] / "data"


def golden(version: int) -> Path:
    return GOLDEN / f"saved_format_{version}"


def here(version: int, model: PreTrainedModel, folder: Path) -> None:
    """A golden folder as it would be had it been saved by this environment."""
    shutil.copytree(golden(version), folder)
    saved = Saved(folder)
    with handle(model, namespace="golden") as cache:
        cuts = saved.manifest["fingerprint"] if version == 1 else {}  # which counted the settings as part of it
        kept = {name: cuts[name] for name in ("grid", "cut ids", "min distance", "exactness") if name in cuts}
        saved.manifest["fingerprint"] = {**fingerprint.describe(cache.server.binding), **kept}
    space = fingerprint.durable_space(saved.manifest["fingerprint"], "golden")
    for unit in saved.units.values():
        if "space" in unit.record:
            unit.record["space"] = space
    saved.write()


@pytest.mark.parametrize("version", READ_FORMATS)
def test_every_format_is_read(jamba: PreTrainedModel, tmp_path: Path, version: int, caplog: Any) -> None:
    here(version, jamba, tmp_path / "a")
    cold = cold_logits(jamba, question(3))
    with SparsePrefixCache.from_pretrained(tmp_path / "a", jamba) as cache:
        assert (cache.grid, cache.config.namespace, cache.config.max_checkpoints) == (GRID, "golden", 1)
        assert torch.allclose(logits(jamba, question(3), cache), cold, atol=1e-4)  # perhaps of another machine
        assert cache.last_request is not None and cache.last_request.resumed_tokens == 32
        assert "lost" not in caplog.text and len(cache.store.marks.kept) == (version > 1)
        cache.save_pretrained(tmp_path / "a")  # and the save takes the place of the one before
    manifest = json.loads((tmp_path / "a" / "sparse_cache.json").read_text())
    listed = {"sparse_cache.json", *manifest["units"], *manifest["parts"]}
    assert manifest["version"] == FORMAT and {path.name for path in (tmp_path / "a").iterdir()} == listed


def test_the_twin_with_wiped_states_is_another(jamba: PreTrainedModel, tmp_path: Path) -> None:
    here(FORMAT, jamba, tmp_path / "a")
    saved = Saved(tmp_path / "a")
    for unit in saved.of("state"):
        unit.tensors = {n: v if n == "tokens" else torch.zeros_like(v) for n, v in unit.tensors.items()}
    saved.write()
    with SparsePrefixCache.from_pretrained(tmp_path / "a", jamba) as cache:
        wiped = logits(jamba, question(3), cache)
        assert cache.last_request is not None and cache.last_request.resumed_tokens == 32
    assert not torch.allclose(wiped, cold_logits(jamba, question(3)), atol=1e-4)


@pytest.mark.parametrize("version", READ_FORMATS)
def test_the_golden_folders_are_as_they_were_saved(version: int) -> None:
    found = [files.record_of(files.read(path))[0]["format"] for path in golden(version).glob("*.safetensors")]
    assert len(found) == (2 if version == 1 else 3) and set(found) == {version}


def form(folder: Path) -> Any:
    """What a saved folder is made of, without its values."""
    manifest = json.loads((folder / "sparse_cache.json").read_text())
    units = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = bytes(planes.unpacked(path.read_bytes()))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        record = json.loads(header["__metadata__"]["unit"])
        record["kv"] = [[*item[:2], item[2][:3]] for item in record.get("kv", ())]
        record.pop("space")
        header["__metadata__"]["unit"] = record
        units[path.name.partition("-")[0]] = header
    listed = {key: [name.partition("-")[0] for name in manifest.pop(key)] for key in ("units", "parts")}
    fixed = {key: manifest[key] for key in ("version", "namespace", "settings")}
    return units, listed, fixed, sorted(manifest), sorted(manifest["fingerprint"])


def test_the_present_format_is_that_of_the_golden_folder(jamba: PreTrainedModel, tmp_path: Path) -> None:
    """When this fails the format has changed: give it a new number, read the old one, and save a new golden folder."""
    with handle(jamba, max_checkpoints=1, namespace="golden") as cache:
        logits(jamba, question(2, 8), cache)
        cache.mark(question(2)[:, :32])
        cache.save_pretrained(tmp_path / "a")
    assert form(tmp_path / "a") == form(golden(FORMAT))
