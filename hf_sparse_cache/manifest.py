"""`sparse_cache.json`: what a saved cache belongs to, which files it is made of, and who vouches for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .checks import shown
from .config import SparseCacheConfig
from .errors import DamagedFileError
from .models import fingerprint
from .models.binding import Binding
from .store import files
from .store.headers import is_count, parse_json
from .store.seal import VARIABLE, Seal


NAME = "sparse_cache.json"
VERSION = 2  # 1 lists no files
_MAX_BYTES = 2**28
# What a caller chooses for a handle, whatever the model; and the differences that are named.
_SETTINGS, _LISTED = ("grid", "exactness", "namespace"), 3


@dataclass(frozen=True)
class Manifest:
    """What the folder of a saved cache says of itself.

    Attributes:
        fingerprint: what its states depend on (see `models.fingerprint`).
        config: the model's configuration, to name what differs.
        settings: `max_memory` and `max_checkpoints` of the handle that saved it.
        units: names of the files of its states, least recently used first; None where a save of version 1 lists none.
        parts: names of all its other files.
    """

    fingerprint: dict[str, Any]
    namespace: str
    config: dict[str, Any]
    settings: dict[str, Any]
    units: list[str] | None = None
    parts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, binding: Binding, max_memory: int | None) -> Self:
        """What a handle's own cache belongs to."""
        return cls(
            fingerprint.describe(binding),
            binding.config.namespace,
            fingerprint.config_values(binding.model.config),
            {"max_memory": max_memory, "max_checkpoints": binding.config.max_checkpoints},
        )

    @property
    def space(self) -> str:
        """The space that its states are of."""
        return fingerprint.durable_space(self.fingerprint, self.namespace)

    @property
    def listed(self) -> set[str]:
        """Names of all its files."""
        return {*(self.units or ()), *self.parts}

    def text(self, seal: Seal) -> bytes:
        """What to write into the folder, signed where there is a key."""
        content: dict[str, Any] = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "namespace": self.namespace,
            "config": self.config,
            "settings": self.settings,
            "units": self.units or [],
            "parts": self.parts,
        }
        if seal.keyed:
            content["keyed"] = seal.keyed
            content["signature"] = seal.checksum(_plain(content))
        return json.dumps(content, indent=2, sort_keys=True).encode()

    @classmethod
    def read(cls, folder: Path, seal: Seal | None) -> Self:
        """Reads and checks the manifest of a folder.

        Args:
            seal: what must have signed it; None to look at it without believing it.

        Raises:
            FileNotFoundError: there is none.
            DamagedFileError: it is not ours, damaged, or not signed by this key; names the field and the remedy.
            OSError: it cannot be read.
        """
        path = folder / NAME
        if files.kind_of(path) is None:
            raise FileNotFoundError(
                f"{folder} holds no saved SparsePrefixCache: it has no {NAME}; see save_pretrained"
            )
        try:
            with files.open_regular(path) as file:
                content = parse_json(file.read(_MAX_BYTES), constants=True)
            return cls._checked(content, seal)
        except DamagedFileError as error:
            refused = DamagedFileError(f"{path} is damaged or not a saved cache's: {error}. {_REMEDY}")
            refused.path = path
            raise refused from error

    @classmethod
    def _checked(cls, content: Any, seal: Seal | None) -> Self:
        if not isinstance(content, dict):
            raise DamagedFileError("it is no JSON object")
        version = content.get("version", 1)
        if version not in (1, VERSION) or isinstance(version, bool):
            raise DamagedFileError(f"version is {shown(version)}, and 1 and {VERSION} are read")
        if seal is not None:
            _authenticate(content, seal)
        _settings(content)
        listed = {name: _names(content, name) for name in ("units", "parts")} if version > 1 else {}
        return cls(
            content["fingerprint"],
            content["namespace"],
            content.get("config", {}),
            content["settings"],
            listed.get("units"),
            listed.get("parts", []),
        )

    def refuse_other(self, current: Manifest, folder: Path, *, loading: bool) -> None:
        """Refuses to load it into, or to replace it by the save of, another handle than it belongs to.

        Raises:
            ValueError: names what differs, and what to do.
        """
        found = fingerprint.differences(self.fingerprint, current.fingerprint)
        names = fingerprint.different(self.fingerprint, current.fingerprint)
        if "other config" in found:
            keys = fingerprint.differences(self.config, current.config)
            found[found.index("other config")] = "other config (" + "; ".join(_shortened(keys)) + ")"
        if self.namespace != current.namespace:
            found.append(f"namespace {self.namespace!r} instead of {current.namespace!r}")
            names.append("namespace")
        if not found:
            return
        values = {**self.fingerprint, "namespace": self.namespace}
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


_REMEDY = "Save the cache again, to another folder"


def _plain(content: dict[str, Any]) -> bytes:
    """What is signed: everything but the signature."""
    signed = {name: value for name, value in content.items() if name != "signature"}
    return json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()


def _authenticate(content: dict[str, Any], seal: Seal) -> None:
    signature = content.get("signature")
    if reason := seal.refusal({"keyed": content.get("keyed", "" if "signature" in content else None)}):
        raise DamagedFileError(f"signature: {reason}")
    if seal.keyed and not (isinstance(signature, str) and seal.fits(_plain(content), signature)):
        raise DamagedFileError(f"signature: it is not that of the key that key= or {VARIABLE} gives")


def _settings(content: dict[str, Any]) -> None:
    """Raises DamagedFileError where what a handle would be made with is out of range."""
    for name, kind in (("fingerprint", dict), ("namespace", str), ("settings", dict)):
        if not isinstance(content.get(name), kind):
            raise DamagedFileError(f"{name} is {shown(content.get(name, 'missing'))}")
    if not isinstance(content.get("config", {}), dict):
        raise DamagedFileError(f"config is {shown(content['config'])}")
    described, settings = content["fingerprint"], content["settings"]
    if "format" not in described:
        raise DamagedFileError("fingerprint.format is missing")
    values = {f"settings.{name}": settings.get(name) for name in ("max_memory", "max_checkpoints")}
    values["fingerprint.grid"] = described.get("grid")
    for name, value in values.items():
        if value is not None and not is_count(value) and not (name.endswith("memory") and isinstance(value, str)):
            raise DamagedFileError(f"{name} is {shown(value)}, not a whole number that can be")
    exactness = described.get("exactness", "bitwise")
    try:
        if "max_checkpoints" not in settings or not isinstance(exactness, str):
            raise ValueError(f"exactness or max_checkpoints is missing, or of another type: {shown(exactness)}")
        SparseCacheConfig(
            max_memory=settings.get("max_memory"),
            max_checkpoints=settings["max_checkpoints"],
            exactness=exactness,
            grid=described.get("grid"),
        )
    except ValueError as error:
        raise DamagedFileError(str(error)) from error


def _names(content: dict[str, Any], field_name: str) -> list[str]:
    names = content.get(field_name)
    if not isinstance(names, list) or not all(isinstance(name, str) and files.is_name(name) for name in names):
        raise DamagedFileError(f"{field_name} is no list of names of files")
    return names


def _shortened(phrases: list[str]) -> list[str]:
    left = len(phrases) - _LISTED
    return [*phrases[:_LISTED], f"and {left} more"] if left > 0 else phrases
