"""What a folder of stored states holds: by prefix, by model and by byte. Nothing in the folder is changed."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..persistence import SavedFolder
from ..planning.cuts import Tokens
from ..stats import counted, format_bytes
from ..tools.builtin_sizes import SIZES
from ..tools.outline import added_kv_bytes, outline
from .screen import Screen


# Tokens of a prefix that are shown, at its end, where prefixes that begin alike differ.
_SHOWN_TOKENS = 8


@dataclass(frozen=True)
class Stored:
    """One checkpoint.

    Attributes:
        tokens: of its path, `(position,)`.
        depth: how many stored checkpoints lie on this path before it.
        state_bytes: of its states.
        kv_bytes: of the keys and values that it adds to those of the checkpoint before it.
        used: when it was last used or written, in seconds since the epoch.
        folder: where its file lies.
    """

    space: str
    tokens: Tokens
    depth: int
    state_bytes: int
    kv_bytes: int
    used: float
    folder: Path


def read(folder: Path) -> list[Stored]:
    """Every checkpoint of a saved cache, or of a disk tier with its folder for each model; a path before its branches.

    Raises:
        ValueError: There is none.
    """
    if not folder.is_dir():
        raise ValueError(f"DIR {folder} is not a folder; give one written by save_pretrained, or a disk_dir.")
    source = SavedFolder(folder, None, read_only=True)
    for part in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        source.load(part)
    stored: list[Stored] = []
    with source.lock:
        for space, root in sorted(source.forest.roots.items()):
            for branch in outline(root):
                before, path = branch.before, branch.node.path_tokens()
                for depth, checkpoint in enumerate(branch.checkpoints, branch.above):
                    state: Any = checkpoint.state
                    used = state.path.stat().st_mtime
                    kv_bytes = added_kv_bytes(checkpoint, before)
                    before = checkpoint.position
                    stored.append(
                        Stored(space, path[:before], depth, checkpoint.nbytes, kv_bytes, used, state.path.parent)
                    )
    if not stored:
        raise ValueError(f"DIR {folder} holds no checkpoint; give one written by save_pretrained, or a disk_dir.")
    return stored


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
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:  # several lines about connections, revisions and configs
        raise ValueError(
            f"--tokenizer {name}: neither a folder with a tokenizer, nor in the local cache of Hugging Face, nor to "
            "be fetched from the Hub; check the name and the connection, or leave it out to see token ids."
        ) from error


def run(folder: Path, tokenizer: Any, tree: bool, screen: Screen) -> dict[str, Any]:
    """Write what the folder holds; as a tree, with every checkpoint below the one it continues.

    Returns:
        The same as plain values.
    """
    stored = read(folder)
    models = []
    for space in dict.fromkeys(item.space for item in stored):
        own = [item for item in stored if item.space == space]
        about, namespace = _describe(space)
        folders = sorted({item.folder for item in own})
        if folders != [folder]:
            screen.say(f"In {', '.join(map(str, folders))}:")
        states, kv = sum(item.state_bytes for item in own), sum(item.kv_bytes for item in own)
        screen.say(
            f"{about['model']} ({', '.join(about['dtype'])}, grid {about['grid']}, namespace {namespace!r}): "
            f"{counted(len(own), 'checkpoint')}, {format_bytes(states)} of states, {format_bytes(kv)} of keys and "
            "values",
            style="bold",
        )
        rows = [
            (
                ("  " * item.depth if tree else "") + f"{len(item.tokens):,}",
                format_bytes(item.state_bytes),
                format_bytes(item.kv_bytes),
                f"{datetime.fromtimestamp(item.used):%Y-%m-%d %H:%M}",
                _end(item.tokens, tokenizer),
            )
            for item in (own if tree else sorted(own, key=lambda item: -item.used))
        ]
        screen.table(("position", "state", "KV added", "last used", "its prefix ends with"), rows)
        checkpoints = [
            {
                "position": len(item.tokens),
                "depth": item.depth,
                "state_bytes": item.state_bytes,
                "kv_bytes": item.kv_bytes,
                "last_used": item.used,
            }
            for item in own
        ]
        models.append({**about, "namespace": namespace, "folders": [*map(str, folders)], "checkpoints": checkpoints})
    return {"folder": str(folder), "models": models}


def _describe(space: str) -> tuple[dict[str, Any], str]:
    """What a durable space is about (see `fingerprint`), and its namespace."""
    described, _, namespace = space.partition("\x1f")
    about = json.loads(described)
    return {name: about[name] for name in ("model", "dtype", "grid", "exactness", "torch", "transformers")}, namespace


def _end(tokens: Tokens, tokenizer: Any) -> str:
    last = tokens[-_SHOWN_TOKENS:].tolist()
    shown = " ".join(map(str, last)) if tokenizer is None else repr(tokenizer.decode(last))
    return shown.replace("|", "\\|")
