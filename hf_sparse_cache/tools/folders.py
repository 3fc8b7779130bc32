"""Workload folders: `meta.json`, `requests.jsonl` and, unless they are block hashes, `texts.jsonl`.

`meta.json` names the template: "concat" (a prompt is its texts one after the other), "chatml" (each text is the turn
of a role), or "hash_ids" (a trace of block hashes, whose `block` says how many tokens one stands for).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import jsontext
from ..checks import shown, text, token_ids, whole_number
from ..planning.cuts import Tokens


TEMPLATES = ("concat", "chatml", "hash_ids")
_HASH_FIELDS = ("hash_ids", "input_length")
_HASHES = "a trace of block hashes needs hash_ids and input_length in each row"
_ROW = "texts.jsonl needs id and text in each row, requests.jsonl group_id and segments, which are ids of the texts"
_MOST_BLOCK = 2**16


class Recorded(NamedTuple):
    """One request for texts: its group, and its segments as rows with `text`, and `role` where that is known."""

    group: str
    segments: list[dict[str, Any]]


class Hashed(NamedTuple):
    """A trace of block hashes: one id a block, and the length of each prompt in tokens."""

    block: int
    prompts: list[Tokens]
    lengths: list[int]


def template_of(folder: Path) -> str:
    """What `meta.json` says how prompts are made.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or names no template that is known.
    """
    found = _meta(folder).get("template")
    if found not in TEMPLATES:
        raise ValueError(
            f"template={shown(found)} in {folder / 'meta.json'} is unknown; use {', '.join(TEMPLATES[:2])} or "
            f"{TEMPLATES[2]}"
        )
    return str(found)


def read_hashes(folder: Path) -> Hashed:
    """A folder of block hashes.

    Raises:
        ValueError: a field is missing or is not what it should be; names file and line.
    """
    block = _meta(folder).get("block")
    block = whole_number(f"block in {folder / 'meta.json'}", block, 1, "it is the tokens of one hash", _MOST_BLOCK)
    prompts, lengths = [], []
    for where, row in _rows(folder, "requests.jsonl"):
        ids = token_ids(_field(row, "hash_ids", where), f"{where}: hash_ids")
        length = whole_number(f"{where}: input_length", _field(row, "input_length", where), 1, "it counts tokens")
        if -(-length // block) != len(ids):
            raise ValueError(
                f"{where}: input_length is {length:,}, but {len(ids):,} hash_ids of {block} tokens stand for "
                f"{(len(ids) - 1) * block + 1:,} to {len(ids) * block:,}; mend one of them"
            )
        prompts.append(ids)
        lengths.append(length)
    return Hashed(block, prompts, lengths)


def read_requests(folder: Path) -> Iterator[Recorded]:
    """Every request of a folder of texts, in file order.

    Raises:
        OSError: a file cannot be read.
        ValueError: a row is not what it should be; names file and line.
    """
    texts: dict[str, dict[str, Any]] = {}
    for where, row in _rows(folder, "texts.jsonl"):
        content = text(f"{where}: text", _field(row, "text", where), _ROW)
        texts[_name(row, "id", where)] = {**row, "text": content}
    for where, row in _rows(folder, "requests.jsonl"):
        names = _field(row, "segments", where)
        if not isinstance(names, list) or not names:
            raise ValueError(f"{where}: segments is {shown(names)}, so there is no text to read; {_ROW}")
        unknown = [name for name in names if not isinstance(name, str | int) or str(name) not in texts]
        if unknown:
            raise ValueError(f"{where}: {shown(unknown[0])} is missing in texts.jsonl; {_ROW}")
        yield Recorded(_name(row, "group_id", where), [texts[str(name)] for name in names])


def folder_prompts(folder: Path) -> Iterator[tuple[str, str]]:
    """Group and text of every request of a workload folder, in file order.

    Raises:
        ValueError: its template is not one of texts, or a row is not what it should be.
    """
    template = template_of(folder)
    if template == "hash_ids":
        raise ValueError(f"template='hash_ids' in {folder / 'meta.json'} has no texts; use concat or chatml")
    for asked in read_requests(folder):
        if template == "chatml":
            turns = [f"<|im_start|>{_role(turn)}\n{turn['text']}<|im_end|>\n" for turn in asked.segments]
            yield asked.group, "".join(turns) + "<|im_start|>assistant\n"
        else:
            yield asked.group, "".join(segment["text"] for segment in asked.segments)


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"trace={str(folder)!r} has no meta.json; give a workload folder or a .jsonl file")
    found = jsontext.read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {shown(found)}; give an object with 'template'")
    return found


def _rows(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {name}; give a folder that has both, texts.jsonl and requests.jsonl")
    for where, row in jsontext.lines(path):
        if not isinstance(row, dict):
            raise ValueError(f"{where} holds {shown(row)}; give an object in each line")
        yield where, row


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where}: {name!r} is missing; {_HASHES if name in _HASH_FIELDS else _ROW}")
    return row[name]


def _name(row: dict[str, Any], field: str, where: str) -> str:
    value = _field(row, field, where)
    return str(value) if type(value) is int else text(f"{where}: {field}", value, "give a name")


def _role(turn: dict[str, Any]) -> str:
    hint = "the template chatml needs one in each row of texts.jsonl"
    return text(f"role of the text {shown(turn['id'])}", turn.get("role"), hint)
