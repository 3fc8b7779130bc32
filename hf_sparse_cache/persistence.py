"""Saving what a handle has stored, and loading it in another process: safetensors and JSON, no pickle.

A saved cache is a folder: `sparse_cache.json` says what it belongs to and lists its files, one for each state and KV
segment (see `unit_files`). The states reveal the prompts they were made from: files are readable by their owner alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .checks import path_of, printable
from .errors import DamagedFileError
from .manifest import NAME as MANIFEST
from .manifest import Manifest
from .models.server import Server
from .models.tensors import LayerTensors
from .planning.cuts import Tokens
from .planning.segments import Segmenting
from .store import files
from .store.seal import Seal
from .store.store import CheckpointStore
from .store.tier import Tier
from .store.unit import Unit
from .store.unit_files import Packing, UnitFiles, UnitReader, find, read_marks, state_record


logger = logging.get_logger(__name__)


# -- saving -----------------------------------------------------------------------------------------------------------


def save(server: Server, save_directory: str | Path, seal: Seal) -> int:
    """Writes what a handle may read to a folder; see `SparsePrefixCache.save_pretrained`."""
    folder = path_of("save_directory", save_directory)
    manifest = Manifest.of(server.binding, server.store.max_memory)
    before = Manifest.read(folder, None) if files.kind_of(folder / MANIFEST) is not None else None
    if before is not None:
        before.refuse_other(manifest, folder, loading=False)
    files.private_folder(folder)
    target = _Target(folder, Packing(seal, files.same_name), manifest.space)
    own, _ = server.space.now()
    text = b""
    try:
        for tier in reversed(server.store.tiers):  # the slowest first: what is used most comes last
            for unit in tier.units(own):
                target.put(tier, unit)
        target.put_marks(server.store.marks.prefixes(own))
        text = replace(manifest, units=target.units, parts=target.parts).text(seal)
        files.write(folder / MANIFEST, text, replace=True)
    except BaseException:
        if not _holds(folder / MANIFEST, text):  # else the new one is in its place, and needs them
            target.undo()
        raise
    target.tidy(before)
    return len(target.units)


class _Target:
    """The folder of a save. What an earlier one left stays as it is until the new manifest is in its place."""

    def __init__(self, folder: Path, packing: Packing, space: str) -> None:
        self._folder, self._packing, self._space = folder, packing, space
        self._states: dict[bytes, str] = {}
        self._kv: dict[bytes, str] = {}
        self._marks: list[str] = []
        self._written: list[Path] = []

    @property
    def units(self) -> list[str]:
        """Names of the states, in the order in which they came last."""
        return list(self._states.values())

    @property
    def parts(self) -> list[str]:
        """Names of all other files."""
        return [*dict.fromkeys(self._kv.values()), *self._marks]

    def put(self, tier: Tier, unit: Unit) -> None:
        """Writes a unit of a tier, unless the very same files are there; leaves it out where the tier has lost it."""
        keys = {span: _path(unit, span.end) for span in unit.spans}
        found = tier.fetch(unit, [span for span in unit.spans if keys[span] not in self._kv])
        if found is None:
            return
        for span, payload in found.kv.items():
            self._kv.setdefault(keys[span], self._file(*self._packing.kv(payload, span, self._space)))
        names = [self._kv[keys[span]] for span in unit.spans]
        name = self._file(*self._packing.state(replace(found, space=self._space), names))
        self._states.pop(_path(unit, unit.position), None)
        self._states[_path(unit, unit.position)] = name

    def put_marks(self, prefixes: list[Tokens]) -> None:
        """Writes the announced prefixes, if there are any."""
        if prefixes:
            self._marks.append(self._file(*self._packing.marks(prefixes, self._space)))

    def undo(self) -> None:
        """Takes back what was written."""
        for path in self._written:
            with suppress(OSError, DamagedFileError):
                files.remove(path)

    def tidy(self, before: Manifest | None) -> None:
        """Deletes what only earlier saves of the same cache need, and what one that was killed left unfinished."""
        listing = files.units_in(self._folder)
        kept = {*self.units, *self.parts}
        spaces = {self._space} if before is None else {self._space, before.space}
        stale = set() if before is None else before.listed
        for name in listing.units:
            with suppress(OSError, DamagedFileError):
                record, tokens = files.peek(self._folder / name, self._packing.seal, any_key=True)
                if not any(record.get("space") == space for space in spaces):
                    continue
                stale.add(name)
                if files.is_name(name, "state"):  # format 1 says the space in these files alone
                    stale |= {part for _, part in state_record(record, tokens).kv}
        doomed = [self._folder / name for name in listing.units if name in stale - kept]
        for path in [*doomed, *listing.unfinished]:
            try:
                files.remove(path)
            except (OSError, DamagedFileError) as error:
                logger.warning(f"A file of an earlier save stays in the folder: {printable(str(error))}")

    def _file(self, name: str, data: bytes) -> str:
        path = self._folder / name
        if files.kind_of(path) is not None and not _holds(path, data):  # damaged, or none of ours
            name = files.new_name(name.partition("-")[0], data, self._packing.seal)
            path = self._folder / name
        if files.kind_of(path) is None:
            files.write(path, data)
            self._written.append(path)
        return name


def _path(unit: Unit, end: int) -> bytes:
    """What tells the state, or the keys and values, at `end` of a unit from any other: its tokens and segments."""
    segments = repr(unit.lineage.span(0, end)).encode()
    return hashlib.blake2b(segments + unit.tokens[:end].tobytes(), digest_size=16).digest()


def _holds(path: Path, data: bytes) -> bool:
    try:
        with files.open_regular(path) as file:
            return file.read(len(data) + 1) == data
    except (OSError, DamagedFileError):
        return False


# -- loading ----------------------------------------------------------------------------------------------------------


def settings(save_directory: str | Path, options: dict[str, Any], seal: Seal) -> dict[str, Any]:
    """Keywords for a handle on a saved cache: the saved ones where `options` gives no others."""
    manifest = Manifest.read(path_of("save_directory", save_directory), seal)
    saved = {**manifest.settings, "namespace": manifest.namespace}
    if options.get("store") is not None:
        saved.pop("max_memory", None)
    return {**saved, **options}


def load_saved(server: Server, save_directory: str | Path, seal: Seal, mark: Callable[[Tokens], None]) -> None:
    """Reads what `save` wrote into a handle's store; see `SparsePrefixCache.from_pretrained`.

    Args:
        mark: announces a prefix to the handle.
    """
    folder = path_of("save_directory", save_directory)
    manifest = Manifest.read(folder, seal)
    manifest.refuse_other(Manifest.of(server.binding, None), folder, loading=True)
    source = _Source(folder, manifest, seal)
    space, _ = server.space.now()
    source.reader = UnitReader(LayerTensors.from_bytes, seal, server.space.layout)
    prefixes = source.marks(server.store.ledger.max_remembered)
    units = source.units()
    source.warn_of_other_cuts(units, server.binding.segmenting)
    marked = [unit for unit in units if any(_begins(prefix, unit.tokens) for prefix in prefixes)]
    loaded = sum(source.restore(unit, server.store, space) for unit in marked)
    for prefix in prefixes:  # before the others come, which may need the room
        source.announce(prefix, mark)
    loaded += sum(source.restore(unit, server.store, space) for unit in units if unit not in marked)
    source.warn()
    logger.info(f"Loaded {loaded} of {len(units)} checkpoints from {folder}.")


class _Source:
    """The folder of a saved cache, with a note of every file in it that cannot be used."""

    reader: UnitReader

    def __init__(self, folder: Path, manifest: Manifest, seal: Seal) -> None:
        self._folder, self._manifest, self._seal = folder, manifest, seal
        self._lost: dict[Path, str] = {}

    def units(self) -> list[UnitFiles]:
        """The units that belong to this cache, the least recently used first."""
        found = find(self._folder, self._seal)
        for path, reason in found.lost.items():
            self._lose(path, reason)
        order = {name: index for index, name in enumerate(self._manifest.units or ())}
        for name in order.keys() - found.stored.keys():
            self._lose(self._folder / name, DamagedFileError(f"it is gone, and {MANIFEST} lists it"))
        own = []
        for unit in found.units:
            names = {unit.state.path.name, *(file.path.name for file in unit.kv.values())}
            if self._manifest.units is not None and not names <= self._manifest.listed:
                self._lose(unit.state.path, DamagedFileError(f"{MANIFEST} does not list it with all that it needs"))
            elif unit.space != self._manifest.space:
                self._lose(unit.state.path, DamagedFileError(f"it is of another model or namespace than {MANIFEST}"))
            else:
                own.append(unit)
        own = [replace(unit, lineage=unit.lineage or self._manifest.lineage(unit.tokens)) for unit in own]
        return sorted(own, key=lambda unit: order.get(unit.state.path.name, 0))

    def warn_of_other_cuts(self, units: list[UnitFiles], segmenting: Segmenting) -> None:
        """Says how many of the units no prompt of this handle can resume from."""
        orphans = [unit for unit in units if not _fits(unit, segmenting)]
        if orphans:
            logger.warning(
                f"{len(orphans)} of the {len(units)} checkpoints in {self._folder} were made with other cuts than "
                "this handle's settings give, so they are not resumed from; load with the grid, cut_after, marks and "
                "exactness that they were saved with, or with exactness='replayable', which resumes from any."
            )

    def marks(self, most: int | None) -> list[Tokens]:
        """The announced prefixes, whose tokens may take so many bytes."""
        found: list[Tokens] = []
        for name in (name for name in self._manifest.parts if files.is_name(name, "marks")):
            try:
                found += read_marks(self._folder / name, self._manifest.space, self._seal, most)
            except (OSError, DamagedFileError) as error:
                self._lose(self._folder / name, error)
        return found

    def announce(self, prefix: Tokens, mark: Callable[[Tokens], None]) -> None:
        """Marks a prefix, unless no handle of this kind could have marked it."""
        try:
            mark(prefix)
        except ValueError as error:
            self._lose(self._folder / MANIFEST, error)

    def restore(self, unit: UnitFiles, store: CheckpointStore, space: str) -> bool:
        """Puts one unit into a store; False where it cannot be read, or there is no room."""
        if any(file.path in self._lost for file in (unit.state, *unit.kv.values())):
            return False
        spans = list(unit.kv)
        with store.ledger.footing(unit.tokens, space) as footing:
            missing = store.ledger.missing_spans(footing, spans)
            try:
                read = self.reader.read(unit, missing)
            except DamagedFileError as error:
                self._lose(error.path or unit.state.path, error)
                return False
            return store.put(replace(read, space=space), footing, urgent=True) is not None

    def warn(self) -> None:
        """Names the first file that cannot be used, once."""
        for path, reason in list(self._lost.items())[:1]:
            more = f"; and {len(self._lost) - 1} more files are left out" if len(self._lost) > 1 else ""
            logger.warning(
                f"A stored state is lost, as {printable(str(path))} cannot be used: {printable(str(reason))}{more}."
            )

    def _lose(self, path: Path, error: Exception) -> None:
        self._lost.setdefault(path, str(error))


def _fits(unit: UnitFiles, segmenting: Segmenting) -> bool:
    """Whether a prompt that goes on from a unit could resume from it."""
    longer = np.append(unit.tokens, np.full(2, -1, dtype=np.int32))
    expected = segmenting.expected(segmenting.cuts(longer), len(longer))
    return unit.final or expected is None or (unit.lineage is not None and expected.begins_with(unit.lineage))


def _begins(prompt: Tokens, tokens: Tokens) -> bool:
    return len(tokens) <= len(prompt) and bool((prompt[: len(tokens)] == tokens).all())
