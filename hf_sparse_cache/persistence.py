"""Saving what a handle has stored, and loading it in another process: safetensors and JSON, no pickle.

A saved cache is a folder: `sparse_cache.json` says what it belongs to, and each state and KV segment is a file of its
own (see `files`). The states reveal the prompts they were made from: files are readable by their owner alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .models import fingerprint
from .models.server import Server
from .models.tensors import LayerTensors
from .store import files
from .store.disk import DiskTier


logger = logging.get_logger(__name__)
MANIFEST = "sparse_cache.json"
# What a caller chooses for a handle, whatever the model; and the differences that are named.
_SETTINGS, _LISTED = ("grid", "exactness", "namespace"), 3


class SavedFolder(DiskTier):
    """The units of one space in one flat folder."""

    def folder_of(self, space: str) -> Path:
        return self.folder


def save(server: Server, save_directory: str | Path) -> int:
    """Writes what a handle may read to a folder; see `SparsePrefixCache.save_pretrained`."""
    folder = Path(save_directory)
    config = server.binding.config
    manifest = {
        **_described(server),
        "settings": {"max_memory": server.store.max_memory, "max_checkpoints": config.max_checkpoints},
    }
    if (folder / MANIFEST).exists():
        _refuse_other(folder, _manifest(folder), manifest, loading=False)
    files.private_folder(folder)
    files.write(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())
    target = SavedFolder(folder, None)
    stale = {id(checkpoint): checkpoint for checkpoint in target.load(folder)}
    space = fingerprint.durable_space(manifest["fingerprint"], config.namespace)
    saved = 0
    own, _ = server.space.now()
    for tier in reversed(server.store.tiers):  # the slowest first: what is used most is written last
        for _, unit in tier.units(own):
            found = tier.fetch(unit, list(unit.spans))
            if found is not None:
                saved += target.write(replace(found, space=space))
            kept = target.match(unit.tokens, space).checkpoints(unit.position)
            stale = {key: item for key, item in stale.items() if not any(item is other for other in kept[-1:])}
    for checkpoint in stale.values():
        target.evict(checkpoint)
    target.sweep()
    return len(target)


def settings(save_directory: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Keywords for a handle on a saved cache: the saved ones where `options` gives no others."""
    manifest = _manifest(Path(save_directory))
    saved = manifest["fingerprint"]
    defaults = {
        "grid": saved.get("grid"),
        "exactness": saved.get("exactness", "bitwise"),
        "namespace": manifest["namespace"],
        "max_checkpoints": manifest["settings"]["max_checkpoints"],
    }
    if options.get("store") is None:
        defaults["max_memory"] = manifest["settings"]["max_memory"]
    return {**defaults, **options}


def load(server: Server, save_directory: str | Path) -> None:
    """Reads what `save` wrote into a handle's store; see `SparsePrefixCache.from_pretrained`."""
    folder = Path(save_directory)
    _refuse_other(folder, _manifest(folder), _described(server), loading=True)
    source = SavedFolder(folder, None, read_only=True)
    source.reader = LayerTensors.from_bytes
    space, _ = server.space.now()
    found = source.load(folder)
    loaded = sum(server.store.bring_up(source, item, space=space) for item in found)
    logger.info(f"Loaded {loaded} of {len(found)} checkpoints from {folder}.")


def _described(server: Server) -> dict[str, Any]:
    """What a saved cache belongs to."""
    return {
        "fingerprint": fingerprint.describe(server.binding),
        "namespace": server.binding.config.namespace,
        "config": fingerprint.config_values(server.binding.model.config),
    }


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no saved SparsePrefixCache: it has no {MANIFEST}; see save_pretrained"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        _ = manifest["fingerprint"]["format"], manifest["namespace"], manifest["settings"]["max_checkpoints"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); delete the folder and save the cache again") from error
    return manifest


def _refuse_other(folder: Path, saved: dict[str, Any], current: dict[str, Any], *, loading: bool) -> None:
    found = fingerprint.differences(saved["fingerprint"], current["fingerprint"])
    names = fingerprint.different(saved["fingerprint"], current["fingerprint"])
    if "other config" in found:
        keys = fingerprint.differences(saved.get("config", {}), current["config"])
        found[found.index("other config")] = "other config (" + "; ".join(_shortened(keys)) + ")"
    if saved["namespace"] != current["namespace"]:
        found.append(f"namespace {saved['namespace']!r} instead of {current['namespace']!r}")
        names.append("namespace")
    if not found:
        return
    values = {**saved["fingerprint"], "namespace": saved["namespace"]}
    if not loading:
        remedy = "This handle cannot save there; choose another folder, or delete this one."
    elif set(names) <= {*_SETTINGS, "cut ids"}:  # nothing is wrong with the model
        advice = [f"leave out {name}=, or pass {name}={values[name]!r}" for name in names if name in _SETTINGS]
        advice += ["pass the tokenizer that it was saved with"] if "cut ids" in names else []
        remedy = f"The model fits, the settings do not: {'; '.join(advice)}."
    else:
        remedy = "This model cannot continue its states; make a new cache with this model instead."
    listed = "; ".join(_shortened(found))
    raise ValueError(f"The cache saved in {folder} belongs to another setting: {listed}. {remedy}")


def _shortened(phrases: list[str]) -> list[str]:
    left = len(phrases) - _LISTED
    return [*phrases[:_LISTED], f"and {left} more"] if left > 0 else phrases
