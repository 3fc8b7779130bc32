"""Every unit of a shared store, for people who look at one. It reads the header of each, and changes nothing."""

from __future__ import annotations

from pathlib import Path

from ..errors import DamagedFileError
from . import files
from .addresses import file_of, is_unit
from .headers import Plain
from .seal import Seal
from .storage import Storage
from .unit_files import StoredFile, UnitFiles, state_record


def units_of(storage: Storage, seal: Seal) -> tuple[list[UnitFiles], dict[str, Exception]]:
    """The units of every space, and what cannot be read, with the reason, by name.

    Raises:
        OSError: the storage cannot be listed.
    """
    entries = {entry.name: entry for entry in storage.walk()}
    found: list[UnitFiles] = []
    lost: dict[str, Exception] = {}
    for name in (name for name in entries if "/at/" in name and is_unit(name)):
        entry = entries[name]

        def part(start: int, end: int, name: str = name) -> Plain:
            return storage.read(name, start, end)

        try:
            record = state_record(*files.peek_parts(part, entry.nbytes, seal))
            root = name.partition("/")[0]
            sizes = {file: entries[f"{root}/kv/{file}"].nbytes for _, file in record.kv}
            kv = {span: StoredFile(Path(root, "kv", file), sizes[file]) for span, file in record.kv}
        except KeyError:
            lost[name] = DamagedFileError("keys and values it builds on are gone")
            continue
        except (OSError, DamagedFileError) as error:
            lost[name] = error
            continue
        state = StoredFile(Path(root, "at", file_of(name)), entry.nbytes)
        used = int(entry.modified * 1e9)
        found.append(UnitFiles(record.space, record.tokens, record.lineage, record.final, state, kv, used))
    found.sort(key=lambda unit: (unit.used, unit.state.path.name))
    return found, lost
