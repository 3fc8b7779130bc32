"""`bench --task`: a few-shot task by plain forwards and through the cache, side by side."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.evaluation.tasks import compare, load_task
from hf_sparse_cache.models import states
from hf_sparse_cache.tools.builtin import load


WORDS = ("red", "green", "blue", "amber", "violet", "north", "south", "east", "west", "river")


def row(draw: random.Random) -> dict[str, Any]:
    choices = [" ".join(draw.choices(WORDS, k=1 + index)) for index in range(4)]
    return {"question": " ".join(draw.choices(WORDS, k=12)), "choices": choices, "answer": draw.randrange(4)}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = random.Random(0)
    write(tmp_path / "shots.jsonl", [row(draw) for _ in range(6)])
    write(tmp_path / "questions.jsonl", [row(draw) for _ in range(5)])
    return tmp_path


def test_a_folder_is_shots_and_questions(folder: Path) -> None:
    task = load_task(folder)
    assert (len(task.shots), len(task.questions)) == (6, 5)
    context, continuation = task.pairs[0]
    assert context.count("Question: ") == 7 and context.endswith("\nAnswer:") and continuation.startswith(" ")
    assert context.count(f"Answer: {task.shots[0].choices[task.shots[0].answer]}\n") >= 1
    assert len(load_task(folder, 2).shots) == 2 and len(load_task(folder, limit=3).questions) == 3
    single = load_task(folder / "questions.jsonl", 2)
    assert (len(single.shots), len(single.questions)) == (2, 3)


@pytest.mark.parametrize("wiped", [False, True])
def test_both_agree_unless_a_state_is_lost(folder: Path, wiped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(folder)
    model, tokenizer = load("jamba-3m", [context for context, _ in task.pairs])
    own = states.restore

    def restore(cache: Any, *args: Any) -> None:
        own(cache, *args)
        for layer in cache.layers if wiped else ():
            for tensor in getattr(layer, "recurrent_states", {}).values():
                torch.zero_(tensor)

    monkeypatch.setattr(states, "restore", restore)
    with SparsePrefixCache(model, tokenizer, prove=False) as cache:
        found = compare(cache, task)
    assert found.resumed_tokens > 0.8 * found.prompt_tokens
    assert (found.max_abs_difference < 1e-4) is not wiped
    if not wiped:
        assert found.choices_equal and found.accuracy == found.plain_accuracy


def test_the_command_reports_both(folder: Path, run: Run) -> None:
    code, out, err = run("bench", "--task", str(folder), "--model", "jamba-3m", "--checked", "1", "--json")
    assert code == 0, err
    (found,) = json.loads(out)["measured"]
    assert found["exactness"] == "bitwise" and found["questions"] == 5 and found["shots"] == 6
    assert 0 <= found["accuracy"] == found["plain_accuracy"] <= 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "cannot be read|no questions"),
        ([{"question": "a", "choices": ["b", "c"]}], "row 1.*answer"),
        ([{"question": "a", "choices": ["b"], "answer": 0}], "row 1.*at least two"),
        ([{"question": 3, "choices": ["b", "c"], "answer": 0}], "row 1"),
        ([{"question": "a", "choices": ["b", "c"], "answer": 2}], "row 1.*no index"),
        ([{"text": "a"}], "row 1"),
        (["a"], "cannot be read|row 1"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_task(write(tmp_path / "task.jsonl", rows))


def test_what_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        load_task(folder / "none.jsonl")
    with pytest.raises(ValueError, match="--shots 7 is more than the 6"):
        load_task(folder, 7)
    (folder / "task.txt").write_text("a")
    with pytest.raises(ValueError, match="no file of rows"):
        load_task(folder / "task.txt")
