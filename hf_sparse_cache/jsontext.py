"""JSON that others wrote, read strictly: whatever is wrong with it is one `ValueError` that says where."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn


def parse(text: bytes | str, where: str, *, constants: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: in UTF-8 where it is bytes.
        where: the file, or the line of one, for errors.
        constants: whether NaN and infinities are read, as Python writes them: the configuration of a model has some.

    Raises:
        ValueError: it is not JSON in UTF-8, it is nested too deep, it has a key twice, or a number that is none.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_object, parse_constant=float if constants else _no_number)
    except RecursionError:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deep; mend it") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON in UTF-8 ({error}); mend it") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: see `parse`.
    """
    return parse(path.read_bytes(), str(path))


def lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each value of a `.jsonl` file stands, and the value; empty lines are passed over.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not JSON; names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}: line {number}"
                yield where, parse(line, where)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:60]!r} comes twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
