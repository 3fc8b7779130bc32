"""Files of results: those of others are refused before the work, and what one held stays until all is written."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from hf_sparse_cache.checks import shown
from hf_sparse_cache.hub import replace_whole
from hf_sparse_cache.jsontext import read_json


def results_file(name: str) -> Path:
    """The type of an option that names a JSON file of results.

    Raises:
        argparse.ArgumentTypeError: something lies there that no benchmark wrote.
    """
    path = Path(name)
    if os.path.lexists(path) and not (path.is_file() and _has_results(path)):
        raise argparse.ArgumentTypeError(
            f"{shown(name)} was not written by a benchmark; give another name, or move it away"
        )
    return path


def write_results(path: Path, content: Any) -> None:
    """Puts results in the place of those before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(path, json.dumps(content, indent=1) + "\n")


def _has_results(path: Path) -> bool:
    """Whether a file says on which machine what it holds was measured, at the top or for each part."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return False
    parts = [content, *content.values()] if isinstance(content, dict) else []
    machines = [part.get("machine") for part in parts if isinstance(part, dict)]
    return any(isinstance(machine, dict) and {"python", "torch", "cpu"} <= machine.keys() for machine in machines)
