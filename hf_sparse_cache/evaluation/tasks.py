"""Few-shot questions with choices, from a file or a folder: scored by plain forwards and through the cache.

A row has `question`, `choices` (a list of strings) and `answer`, the index of the right one. In a folder `shots.jsonl`
holds the examples that every question stands behind, and every other file questions; of a single file the first rows
may be the shots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache import SparsePrefixCache
from ..checks import is_whole, shown, text
from ..models.binding import Binding
from ..models.inputs import input_device
from ..models.pairs import Pair, read_pairs
from ..models.scores import LogitRows


KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SHOTS = "shots.jsonl"
_ROW = "give question (a string), choices (a list of at least two strings) and answer (the index of the right one)"


@dataclass(frozen=True)
class Question:
    """One row of a task."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def context(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def solved(self) -> str:
        return f"{self.context} {self.choices[self.answer]}\n\n"


@dataclass(frozen=True)
class Task:
    """Questions, and what stands before each."""

    name: str
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is scored, choice by choice."""
        head = "".join(shot.solved for shot in self.shots)
        return [(head + asked.context, f" {choice}") for asked in self.questions for choice in asked.choices]

    def chosen(self, scores: Sequence[tuple[float, bool]]) -> list[int]:
        """The likeliest choice of each question."""
        values, found = iter(scores), []
        for asked in self.questions:
            own = [next(values)[0] for _ in asked.choices]
            found.append(max(range(len(own)), key=own.__getitem__))
        return found


def load_task(path: Path, shots: int | None = None, limit: int | None = None) -> Task:
    """Read a task.

    Args:
        path: a file, or a folder of files.
        shots: how many examples stand before each question; default all of the folder's, or none of a file's rows.
        limit: most questions; None for all.

    Raises:
        ValueError: there is no such task, or a row is none; the message names the file and the row.
    """
    if not path.exists():
        raise ValueError(f"--task {path} is not there: give a .jsonl, .json or .parquet file, or a folder of them.")
    files = sorted(item for item in path.iterdir() if item.suffix in KINDS) if path.is_dir() else [path]
    asked = [row for file in files if file.name != SHOTS for row in _rows(file)]
    if path.is_dir() and (path / SHOTS).exists():
        given = list(_rows(path / SHOTS))
        given = given[: len(given) if shots is None else shots]
    else:
        given, asked = asked[: shots or 0], asked[shots or 0 :]
    if shots is not None and len(given) < shots:
        raise ValueError(f"--shots {shots} is more than the {len(given)} examples of {path}: give fewer.")
    if not asked:
        raise ValueError(f"--task {path} has no questions: {_ROW}, a row each.")
    return Task(path.name, tuple(given), tuple(asked[:limit]))


def _rows(file: Path) -> Iterator[Question]:
    import datasets

    if file.suffix not in KINDS:
        raise ValueError(f"--task {file.name} is no file of rows: give one of {', '.join(KINDS)}.")
    try:
        loaded = datasets.load_dataset(KINDS[file.suffix], data_files=str(file), split="train", keep_in_memory=True)
    except Exception as error:
        said = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"--task {file.name} cannot be read: {said}; {_ROW}, a row each.") from error
    for index, row in enumerate(loaded):
        yield _question(row, f"{file.name}, row {index + 1}")


def _question(row: dict[str, Any], where: str) -> Question:
    question, answer, given = row.get("question"), row.get("answer"), row.get("choices")
    choices: list[Any] = given if isinstance(given, list) else []
    if not isinstance(question, str) or len(choices) < 2 or not all(isinstance(item, str) for item in choices):
        raise ValueError(f"{where} is {shown(row)}: {_ROW}.")
    if not is_whole(answer, 0, len(choices) - 1):
        raise ValueError(f"{where} has answer {shown(answer)}, no index of its {len(choices)} choices: {_ROW}.")
    for said in (question, *choices):
        text(f"a string of {where}", said, "give text in UTF-8")
    return Question(question, tuple(choices), int(answer or 0))


@dataclass(frozen=True)
class Compared:
    """One task through both.

    Attributes:
        seconds, plain_seconds: wall time of all questions.
        accuracy, plain_accuracy: share of questions whose right choice is the likeliest.
        prompt_tokens, resumed_tokens: of all pairs, and of them those that were not computed.
        max_abs_difference: largest difference of a log-likelihood.
        choices_equal: whether both choose the same everywhere.
    """

    task: str
    questions: int
    shots: int
    seconds: float
    plain_seconds: float
    accuracy: float
    plain_accuracy: float
    prompt_tokens: int
    resumed_tokens: int
    max_abs_difference: float
    choices_equal: bool


def compare(
    cache: SparsePrefixCache, task: Task, batch_size: int = 8, say: Callable[[str], object] = lambda _: None
) -> Compared:
    """Score a task by plain forwards and through a cache, one after the other.

    Args:
        cache: an empty handle with a tokenizer.
        task: the questions.
        batch_size: rows of a forward in both.
        say: told what is going on.
    """
    from .accuracy import ChoiceAccuracy

    read = read_pairs(cache.server.binding, task.pairs, None)
    say(f"{task.name}: {len(task.questions)} questions by plain forwards")
    started = time.perf_counter()
    expected = plain(cache.server.binding, read, batch_size)
    plain_seconds = time.perf_counter() - started
    say(f"{task.name}: the same through the cache")
    started = time.perf_counter()
    found = cache.loglikelihood([(pair.tokens[: pair.start], pair.tokens[pair.start :]) for pair in read])
    seconds, stats = time.perf_counter() - started, cache.stats()
    chosen = [task.chosen(expected), task.chosen(found)]
    answers = [asked.answer for asked in task.questions]
    right = [
        ChoiceAccuracy(keep_in_memory=True).compute(predictions=one, references=answers)["accuracy"] for one in chosen
    ]
    return Compared(
        task=task.name,
        questions=len(task.questions),
        shots=len(task.shots),
        seconds=seconds,
        plain_seconds=plain_seconds,
        accuracy=right[1],
        plain_accuracy=right[0],
        prompt_tokens=stats.prompt_tokens,
        resumed_tokens=stats.resumed_tokens,
        max_abs_difference=max(abs(one - other) for (one, _), (other, _) in zip(expected, found, strict=True)),
        choices_equal=chosen[0] == chosen[1],
    )


@torch.no_grad()
def plain(binding: Binding, pairs: Sequence[Pair], batch_size: int) -> list[tuple[float, bool]]:
    """What a harness without reuse does: every pair in full, padded on the right, with the logits of every token."""
    found: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].read))
    for begin in range(0, len(order), batch_size):
        chunk = order[begin : begin + batch_size]
        width = len(pairs[chunk[0]].read)
        block = np.stack([np.pad(pairs[index].read, (0, width - len(pairs[index].read))) for index in chunk])
        ids = torch.from_numpy(block).long().to(input_device(binding.model))
        logits = binding.model(input_ids=ids, use_cache=False).logits
        for index, row in zip(chunk, logits, strict=True):
            pair = pairs[index]
            values, likeliest = LogitRows(row[pair.start - 1 : len(pair.read)]).scored(pair.tokens[pair.start :])
            found[index] = float(values.sum()), bool(likeliest.all())
    return [found[index] for index in range(len(pairs))]
