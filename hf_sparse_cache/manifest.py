"""`sparse_cache.json`: what a saved cache belongs to, which files it is made of, and who vouches for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from .checks import MOST_ID, shown
from .config import SparseCacheConfig
from .errors import DamagedFileError
from .models import fingerprint
from .models.binding import Binding
from .planning.cuts import CutRule, Tokens
from .planning.lineage import Lineage
from .store import files
from .store.headers import is_count, parse_json
from .store.seal import VARIABLE, Seal


NAME = "sparse_cache.json"
VERSION = 3  # that of the files: 1 lists none, and up to 2 none is packed
_MAX_BYTES = 2**28
# What a caller chooses for a handle, whatever the model; what version 1 counted as part of the fingerprint; and the
# differences that are named.
_SETTINGS = ("max_memory", "max_checkpoints", "exactness", "grid", "cut_after", "pieces", "storage")
_CUTS, _LISTED = ("grid", "cut ids", "min distance", "exactness"), 3


@dataclass(frozen=True)
class Manifest:
    """What the folder of a saved cache says of itself.

    Attributes:
        fingerprint: what its states depend on (see `models.fingerprint`).
        config: the model's configuration, to name what differs.
        settings: those of the handle that saved it.
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
            _told(binding.config, max_memory),
        )

    @property
    def space(self) -> str:
        """The space that its states are of."""
        return fingerprint.durable_space(self.fingerprint, self.namespace)

    def lineage(self, tokens: Tokens) -> Lineage:
        """Of a state of version 1, which its file does not say: that of every cut of the handle that saved it."""
        cut_ids = tuple(self.fingerprint.get("cut ids", ()))
        longer = np.append(tokens, np.full(2, -1, dtype=np.int32))
        return Lineage(CutRule(self.settings.get("grid") or 1, cut_ids).cuts(longer))

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
        if type(version) is not int or not 1 <= version <= VERSION:
            raise DamagedFileError(f"version is {shown(version)}, and 1 to {VERSION} are read")
        if seal is not None:
            _authenticate(content, seal)
        settings = _settings(content)
        listed = {name: _names(content, name) for name in ("units", "parts")} if version > 1 else {}
        return cls(
            content["fingerprint"],
            content["namespace"],
            content.get("config", {}),
            settings,
            listed.get("units"),
            listed.get("parts", []),
        )

    def refuse_other(self, current: Manifest, folder: Path, *, loading: bool) -> None:
        """Refuses to load it into, or to replace it by the save of, another handle than it belongs to.

        Raises:
            ValueError: names what differs, and what to do.
        """
        saved = {name: value for name, value in self.fingerprint.items() if name not in _CUTS}
        found = fingerprint.differences(saved, current.fingerprint)
        names = fingerprint.different(saved, current.fingerprint)
        if "other config" in found:
            keys = fingerprint.differences(self.config, current.config)
            found[found.index("other config")] = "other config (" + "; ".join(_shortened(keys)) + ")"
        if self.namespace != current.namespace:
            found.append(f"namespace {shown(self.namespace)} instead of {shown(current.namespace)}")
            names.append("namespace")
        if not found:
            return
        if not loading:
            remedy = "This handle cannot save there; choose another folder, or delete this one."
        elif names == ["namespace"]:  # nothing is wrong with the model
            remedy = f"The model fits: leave out namespace=, or pass namespace={shown(self.namespace)}."
        else:
            remedy = "This model cannot continue its states; make a new cache with this model instead."
        listed = "; ".join(_shortened(found))
        raise ValueError(f"The cache saved in {folder} belongs to another setting: {listed}. {remedy}")


_REMEDY = "Save the cache again, to another folder"


def _told(config: SparseCacheConfig, max_memory: int | None) -> dict[str, Any]:
    """The settings of a handle, as far as they are saved; one that is new is left out where it says nothing."""
    told = {**{name: getattr(config, name) for name in _SETTINGS}, "max_memory": max_memory}
    return {name: value for name, value in told.items() if (name, value) != ("storage", "exact")}


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


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    """What a handle would be made with.

    Raises:
        DamagedFileError: it is out of range.
    """
    for name, kind in (("fingerprint", dict), ("namespace", str), ("settings", dict)):
        if not isinstance(content.get(name), kind):
            raise DamagedFileError(f"{name} is {shown(content.get(name, 'missing'))}")
    if not isinstance(content.get("config", {}), dict):
        raise DamagedFileError(f"config is {shown(content['config'])}")
    described, settings = content["fingerprint"], content["settings"]
    if "format" not in described:
        raise DamagedFileError("fingerprint.format is missing")
    if content.get("version", 1) == 1:  # which has the cuts in its fingerprint
        settings = {**{name: described[name] for name in ("grid", "exactness") if name in described}, **settings}
        settings.setdefault("exactness", "bitwise")
        ids = described.get("cut ids", [])
        if not isinstance(ids, list) or not all(is_count(item, MOST_ID) for item in ids):
            raise DamagedFileError(f"fingerprint.cut ids is {shown(ids)}, no list of token ids")
    chosen = {name: settings[name] for name in _SETTINGS if name in settings}
    if settings.get("exactness") == "numerical":
        raise DamagedFileError(
            "exactness is 'numerical', whose states do not say what made them, so that no run from nothing could be "
            "compared with one that resumes from them"
        )
    for name in ("max_memory", "max_checkpoints", "grid", "pieces"):
        value = chosen.get(name)
        if value is not None and not is_count(value) and not (name == "max_memory" and isinstance(value, str)):
            raise DamagedFileError(f"settings.{name} is {shown(value)}, not a whole number that can be")
    try:
        if "max_checkpoints" not in chosen or not isinstance(chosen.get("exactness"), str):
            raise ValueError(f"exactness or max_checkpoints is missing, or of another type: {shown(settings)}")
        if not isinstance(chosen.setdefault("cut_after", []), list):
            raise ValueError(f"cut_after is {shown(chosen['cut_after'])}, not a list of strings")
        chosen["cut_after"] = tuple(chosen["cut_after"])
        SparseCacheConfig(**chosen)
    except (ValueError, TypeError) as error:
        raise DamagedFileError(str(error)) from error
    return chosen


def _names(content: dict[str, Any], field_name: str) -> list[str]:
    names = content.get(field_name)
    if not isinstance(names, list) or not all(isinstance(name, str) and files.is_name(name) for name in names):
        raise DamagedFileError(f"{field_name} is no list of names of files")
    return names


def _shortened(phrases: list[str]) -> list[str]:
    left = len(phrases) - _LISTED
    return [*phrases[:_LISTED], f"and {left} more"] if left > 0 else phrases
