"""What is asked: prompts from the Hub, a file or a workload folder, through `datasets`, in order of arrival."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import shown, token_ids
from ..planning.cuts import Tokens
from ..tools.folders import folder_prompts, read_hashes, template_of
from ..tools.traces import interleave


_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
# A prompt that is too long keeps its head, which others share, and this much of its end, which is its own.
TAIL_TOKENS = 128
_ONE_GROUP = "all in order"


@dataclass(frozen=True)
class WorkloadRequest:
    """One request: the group it belongs to (a document, a conversation) and its tokens, int32 of shape `(N,)`."""

    group: str
    ids: Tokens


@dataclass(frozen=True)
class Workload:
    """Requests before they are tokenized.

    Attributes:
        name: for tables.
        source: what was loaded.
        data: a `datasets.Dataset` with a column `group` and a column `text` or `input_ids`, in file order.
    """

    name: str
    source: str
    data: Any

    @property
    def texts(self) -> Sequence[str]:
        """Distinct texts, for the tokenizer of a built-in model to learn from."""
        return list(dict.fromkeys(self.data["text"])) if "text" in self.data.column_names else [self.name]

    def first(self, requests: int | None, per_group: int | None) -> Workload:
        """The first `requests` rows of the file, of each group at most `per_group`; None for all."""
        kept: list[int] = []
        seen: dict[str, int] = {}
        for index, group in enumerate(self.data["group"]):
            if requests is not None and len(kept) == requests:
                break
            seen[group] = seen.get(group, 0) + 1
            if per_group is None or seen[group] <= per_group or group == _ONE_GROUP:
                kept.append(index)
        return replace(self, data=self.data.select(kept))

    def requests(
        self, tokenizer: Any, *, seed: int, max_prompt_tokens: int | None, vocabulary: int
    ) -> list[WorkloadRequest]:
        """Tokenized requests in arrival order.

        Args:
            seed: of the arrivals.
            max_prompt_tokens: longer prompts keep their head and the last `TAIL_TOKENS`.
            vocabulary: ids of a dataset that brings tokens must be below it; block hashes are turned into such ids.
        """
        groups, rows = list(self.data["group"]), self.data
        if "text" in rows.column_names:
            prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows["text"]]
        else:
            prompts = list(rows["input_ids"])
        asked = []
        for index in interleave(groups, seed):
            ids = np.asarray(prompts[index], dtype=np.int64)
            if "text" not in rows.column_names:
                ids = ids % vocabulary
            asked.append(WorkloadRequest(str(groups[index]), _shortened(ids.astype(np.int32), max_prompt_tokens)))
        return asked


def from_texts(name: str, rows: Sequence[tuple[str, str]]) -> Workload:
    """A workload of `(group, text)` in arrival order within each group."""
    import datasets

    return Workload(name, name, datasets.Dataset.from_list([{"group": group, "text": text} for group, text in rows]))


def load_workload(
    source: str, *, columns: Sequence[str] = (), config: str | None = None, split: str = "train"
) -> Workload:
    """Loads prompts through `datasets`.

    Args:
        source: a workload folder, a local `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file, or a Hub id.
        columns: those that make up a prompt, in order; the first one is the group, the text that comes back. One
            column with lists of messages (`role` and `content`) gives one request a turn of the user. A column
            `input_ids` gives tokens as they are. Not needed for a workload folder.
        config: name of the Hub dataset's configuration.
        split: of the dataset.

    Raises:
        FileNotFoundError: `source` looks like a path and does not exist.
        ValueError: `columns` are missing or unknown.
    """
    import datasets

    path = Path(source)
    name = path.name if path.exists() else source
    if path.is_dir() and (path / "meta.json").is_file():
        return Workload(name, source, datasets.Dataset.from_list(list(_folder(path))))
    if path.suffix in _READERS:
        if not path.is_file():
            raise FileNotFoundError(f"dataset={source!r} does not exist; give a file, a workload folder or a Hub id")
        if not path.stat().st_size:
            raise ValueError(f"dataset={source!r} is empty; give a file with at least one row")
    loaded = _loaded(source, path, config, split)
    unknown = [column for column in columns if column not in loaded.column_names]
    if unknown or not (columns or {"messages", "input_ids", "text"} & set(loaded.column_names)):
        raise ValueError(
            f"columns={','.join(columns)!r}: {source} has {', '.join(loaded.column_names)}; name some of them"
        )
    chosen = list(columns) or [c for c in ("messages", "input_ids", "text") if c in loaded.column_names][:1]
    return Workload(name, source, datasets.Dataset.from_list(list(_rows(loaded, chosen))))


def _loaded(source: str, path: Path, config: str | None, split: str) -> Any:
    """The dataset as `datasets` gives it, whose errors have classes of their own and say what is wrong in their cause.

    Raises:
        ValueError: it cannot be loaded.
    """
    import datasets

    try:
        if path.suffix in _READERS:
            return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(source, config, split=split)
    except MemoryError:
        raise
    except Exception as error:
        said = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(
            f"dataset={shown(source)} cannot be loaded ({type(error).__name__}: {said}); check the file, or the name, "
            "config, split and connection of a Hub id"
        ) from error


def _folder(path: Path) -> Iterator[dict[str, Any]]:
    if template_of(path) != "hash_ids":
        for group, text in folder_prompts(path):
            yield {"group": group, "text": text}
        return
    block, prompts, lengths = read_hashes(path)
    for ids, length in zip(prompts, lengths, strict=True):
        blocks = np.repeat(ids.astype(np.int64), block)[:length]
        # A block's hash stands for its tokens, which were not published: any fixed function of both will do. One
        # group, since the trace is in the order of its arrivals already.
        yield {"group": _ONE_GROUP, "input_ids": blocks * 7919 + np.arange(len(blocks)) % block * 104729 + 3}


def _rows(loaded: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(loaded):
        first, where = row[columns[0]], f"row {index} of the dataset"
        if columns == ["input_ids"]:
            yield {"group": str(index), "input_ids": token_ids(first, where)}
        elif isinstance(first, list):
            yield from ({"group": str(index), "text": text} for text in _turns(first, where))
        else:
            parts = [str(row[column]) for column in columns]
            if not any(parts):
                raise ValueError(f"{where} has no text in {', '.join(columns)}; leave it out")
            yield {"group": parts[0], "text": "\n\n".join(parts)}


def _turns(messages: list[Any], where: str) -> Iterator[str]:
    """The prompts of a conversation: everything up to each turn of the user, as ChatML."""
    text = ""
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where} has the message {shown(message)}; give objects with role and content")
        text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
        if message["role"] == "user":
            yield text + "<|im_start|>assistant\n"


def _shortened(ids: Tokens, limit: int | None) -> Tokens:
    if limit is None or len(ids) <= limit:
        return ids
    tail = min(TAIL_TOKENS, limit // 2)
    return np.concatenate([ids[: limit - tail], ids[len(ids) - tail :]])


def common_prefixes(requests: Sequence[WorkloadRequest]) -> dict[str, int]:
    """Tokens that all requests of a group share: what a user who knows them all would keep."""
    shared: dict[str, Tokens] = {}
    for asked in requests:
        known = shared.get(asked.group, asked.ids)
        length = min(len(known), len(asked.ids))
        differ = np.flatnonzero(known[:length] != asked.ids[:length])
        shared[asked.group] = known[: differ[0] if len(differ) else length]
    return {group: len(ids) for group, ids in shared.items()}
