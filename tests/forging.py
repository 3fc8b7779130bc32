"""What somebody who can write a folder could put there: saved caches changed at will, all checksums right again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.store import files
from hf_sparse_cache.store.planes import unpacked
from hf_sparse_cache.store.seal import Seal


@dataclass
class Unit:
    """One file, taken apart."""

    tensors: dict[str, torch.Tensor]
    record: Any
    payload: Any
    raw: list[Callable[[bytes], bytes]] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        texts = {"unit": self.record, "payload": self.payload}
        metadata = {name: text if isinstance(text, str) else json.dumps(text) for name, text in texts.items()}
        data: bytes = safetensors.torch.save(self.tensors, metadata={k: v for k, v in metadata.items() if v != "null"})
        for change in self.raw:
            data = change(data)
        return data


def taken_apart(data: bytes) -> Unit:
    with suppress(DamagedFileError):  # else it is no such file
        data = bytes(unpacked(data))
    meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return Unit(safetensors.torch.load(data), json.loads(meta["unit"]), json.loads(meta.get("payload", "null")))


class Saved:
    """A saved cache to change: `units` by name, and `manifest`; with a seal only the units that it proves."""

    def __init__(self, folder: Path, seal: Seal | None = None) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "sparse_cache.json").read_text())
        self.units: dict[str, Unit] = {}
        for path in folder.glob("*.safetensors"):
            if files.is_name(path.name) and files.kind_of(path) == "a file":
                data = path.read_bytes()
                if seal is not None and not seal.fits(data, path.stem.rpartition("-")[2]):
                    continue
                with suppress(SafetensorError, ValueError, KeyError):  # damaged already
                    self.units[path.name] = taken_apart(data)

    def of(self, kind: str) -> list[Unit]:
        return [unit for name, unit in self.units.items() if name.startswith(kind)]

    def write(self, seal: Seal = files.CHECKSUMS) -> None:
        """Writes all anew: names, references and the list of files agree with what the files hold."""
        names: dict[str, str] = {}
        for name in self.units:
            (self.folder / name).unlink(missing_ok=True)
        if seal.keyed and "signature" in self.manifest:  # as far as anybody can see
            self.manifest["keyed"] = seal.keyed
        for kind in ("kv", "state", "marks"):
            for old, unit in self.units.items():
                if not old.startswith(kind):
                    continue
                if kind == "state" and isinstance(unit.record, dict) and isinstance(unit.record.get("kv"), list):
                    unit.record["kv"] = [rename(item, names) for item in unit.record["kv"]]
                data = unit.to_bytes()
                names[old] = files.new_name(kind, data, seal)
                (self.folder / names[old]).write_bytes(data)
        for key in ("units", "parts"):
            if key in self.manifest:
                self.manifest[key] = [names.get(name, name) for name in self.manifest[key]]
        (self.folder / "sparse_cache.json").write_text(json.dumps(self.manifest))


def rename(item: Any, names: dict[str, str]) -> Any:
    return [*item[:2], names.get(item[2], item[2])] if isinstance(item, list) and len(item) == 3 else item


def header(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """A change of the header of a file's bytes, which may make anything of it."""

    def apply(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        value = json.loads(data[8 : 8 + length])
        found = change(value)
        text = found if isinstance(found, bytes) else json.dumps(value if found is None else found).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return apply
