"""What a folder of stored states holds: by prefix, by model and by byte. Nothing in the folder is changed."""

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..checks import printable
from ..errors import DamagedFileError
from ..planning.cuts import Tokens
from ..planning.lineage import Lineage
from ..stats import counted, format_bytes
from ..store.contents import units_of
from ..store.files import kind_of
from ..store.headers import parse_json
from ..store.seal import Seal
from ..store.storage import open_storage
from ..store.store import CheckpointStore
from ..store.unit_files import UnitFiles, find
from ..tools import recall
from ..tools.builtin_sizes import SIZES
from ..tools.outline import added_kv_bytes, outline
from .screen import Screen


# Tokens of a prefix that are shown, at its end, where prefixes that begin alike differ.
_SHOWN_TOKENS = 8
_DESCRIBED = ("model", "dtype", "torch", "transformers", "storage")


@dataclass(frozen=True)
class Stored:
    """One checkpoint.

    Attributes:
        tokens: of its path, `(position,)`.
        lineage: the segments that made it.
        depth: how many stored checkpoints lie on this path before it.
        state_bytes: of its states.
        kv_bytes: of the keys and values that it adds to those of the checkpoint before it.
        used: when it was last used or written, in seconds since the epoch.
        folder: where its file lies.
    """

    space: str
    tokens: Tokens
    lineage: Lineage
    depth: int
    state_bytes: int
    kv_bytes: int
    used: float
    folder: Path


def stored_in(folder: Path | str) -> list[Stored]:
    """Every checkpoint of a saved cache, of a disk tier with its folder for each model, or of a shared store by its
    folder or URL; a path before its branches.

    Raises:
        ValueError: There is none.
    """
    seal, source = Seal.of(None), CheckpointStore(None, "lru")
    units, refused = _shared(folder, seal) if "://" in str(folder) else _local(Path(folder), seal)
    used: dict[Path, float] = {}
    for unit in units:
        known = unit.lineage or Lineage([len(unit.tokens)])  # format 1 does not say it without keys and values
        source.put(replace(unit, lineage=known).unit(), urgent=True)
        used[unit.state.path] = unit.used / 1e9
    stored: list[Stored] = []
    with source.lock:
        for space, root in sorted(source.forest.roots.items()):
            for branch in outline(root):
                before, path = branch.before, branch.node.path_tokens()
                for depth, checkpoint in enumerate(branch.checkpoints, branch.above):
                    state: Any = checkpoint.state
                    kv_bytes = added_kv_bytes(checkpoint, before)
                    before = checkpoint.position
                    stored.append(
                        Stored(
                            space,
                            path[:before],
                            checkpoint.lineage,
                            depth,
                            checkpoint.nbytes,
                            kv_bytes,
                            used[state.path],
                            state.path.parent,
                        )
                    )
    if not stored:
        raise ValueError(
            f"DIR {folder} holds no checkpoint{printable(refused)}; "
            "give one written by save_pretrained, or a disk_dir, or a shared store."
        )
    return stored


def _local(folder: Path, seal: Seal) -> tuple[list[UnitFiles], str]:
    """The units in a folder, and why one of them is left out.

    Raises:
        ValueError: it is none.
    """
    if not folder.is_dir():
        raise ValueError(f"DIR {folder} is not a folder; give one written by save_pretrained, or a disk_dir.")
    units: list[UnitFiles] = []
    refused = ""
    for part in (folder, *sorted(path for path in folder.iterdir() if kind_of(path) == "a folder")):
        found = find(part, seal)
        units += found.units
        refused = refused or "".join(f" ({path.name}: {reason})" for path, reason in [*found.lost.items()][:1])
    if units:
        return units, refused
    shared, why = _shared(folder, seal)
    return shared, refused or why


def _shared(where: Path | str, seal: Seal) -> tuple[list[UnitFiles], str]:
    """The units of a shared store, and why one of them is left out."""
    storage = open_storage(where)
    units, lost = units_of(storage, seal)
    return units, "".join(f" ({name.rpartition('/')[2]}: {reason})" for name, reason in [*lost.items()][:1])


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or of the Hub.

    Raises:
        ValueError: There is none.
    """
    from transformers import AutoTokenizer

    if name in SIZES:
        raise ValueError(
            f"--tokenizer {name}: a built-in model learns its tokenizer from the texts of each run, so it cannot be "
            "loaded again; give a folder written by tokenizer.save_pretrained, a Hub id, or leave it out."
        )
    try:
        return AutoTokenizer.from_pretrained(recall.folder(name) if name in recall.MANUALS else name)
    except (OSError, ValueError) as error:  # several lines about connections, revisions and configs
        raise ValueError(
            f"--tokenizer {name}: neither a folder with a tokenizer, nor in the local cache of Hugging Face, nor to "
            "be fetched from the Hub; check the name and the connection, or leave it out to see token ids."
        ) from error


def run(folder: Path | str, tokenizer: Any, tree: bool, screen: Screen) -> dict[str, Any]:
    """Write what the folder holds; as a tree, with every checkpoint below the one it continues.

    Returns:
        The same as plain values.
    """
    stored = stored_in(folder)
    models = []
    for space in dict.fromkeys(item.space for item in stored):
        own = [item for item in stored if item.space == space]
        about, namespace = _describe(space)
        folders = sorted({item.folder for item in own})
        if folders != [Path(folder)]:
            screen.say(f"In {', '.join(map(str, folders))}:")
        states, kv = sum(item.state_bytes for item in own), sum(item.kv_bytes for item in own)
        screen.say(
            f"{about['model']} ({_listed(about['dtype'])}, {_kept(about['storage'])}namespace '{namespace}'): "
            f"{counted(len(own), 'checkpoint')}, {format_bytes(states)} of states, {format_bytes(kv)} of keys and "
            "values",
            style="bold",
        )
        rows = [
            (
                ("  " * item.depth if tree else "") + f"{len(item.tokens):,}",
                format_bytes(item.state_bytes),
                format_bytes(item.kv_bytes),
                _shortened(item.lineage),
                _time(item.used),
                _end(item.tokens, tokenizer),
            )
            for item in (own if tree else sorted(own, key=lambda item: -item.used))
        ]
        screen.table(("position", "state", "KV added", "segments", "last used", "its prefix ends with"), rows)
        checkpoints = [
            {
                "position": len(item.tokens),
                "depth": item.depth,
                "state_bytes": item.state_bytes,
                "kv_bytes": item.kv_bytes,
                "segments": item.lineage.to_json(),
                "last_used": item.used,
            }
            for item in own
        ]
        models.append({**about, "namespace": namespace, "folders": [*map(str, folders)], "checkpoints": checkpoints})
    return {"folder": str(folder), "models": models}


def _describe(space: str) -> tuple[dict[str, Any], str]:
    """What a durable space is about (see `fingerprint`), as far as it says so, and its namespace."""
    described, _, namespace = space.partition("\x1f")
    try:
        about = parse_json(described)
    except DamagedFileError:
        about = None
    known = {"storage": "exact", **about} if isinstance(about, dict) else {}
    return {name: _safe(known.get(name, "unknown")) for name in _DESCRIBED}, printable(namespace)


def _shortened(lineage: Lineage) -> str:
    """Of a lineage the number of segments, and where the last ones end."""
    ends = str(lineage).split(", ")
    return f"{len(ends)}: {'… ' if len(ends) > 3 else ''}{', '.join(ends[-3:])}"


def _kept(storage: Any) -> str:
    """How states are kept, where that is not as they are."""
    return "" if storage in ("exact", "unknown") else f"kept in {storage}, "


def _listed(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _safe(value: Any) -> Any:
    """A value from a file without anything that a terminal would obey."""
    if isinstance(value, list):
        return [printable(str(item)) for item in value]
    return value if isinstance(value, int) else printable(str(value))


def _time(used: float) -> str:
    try:
        return f"{datetime.fromtimestamp(used):%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):
        return "unknown"


def _end(tokens: Tokens, tokenizer: Any) -> str:
    last = tokens[-_SHOWN_TOKENS:].tolist()
    shown = " ".join(map(str, last)) if tokenizer is None else _decoded(last, tokenizer)
    return shown.replace("|", "\\|")


def _decoded(last: list[int], tokenizer: Any) -> str:
    try:
        return repr(tokenizer.decode(last))
    except (OverflowError, ValueError, TypeError, IndexError):  # ids that the tokenizer does not have
        return " ".join(map(str, last))
