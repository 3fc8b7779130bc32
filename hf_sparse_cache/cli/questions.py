"""The demo: questions about one long document, timed with the cache and without it, and proved to be exact.

Where the right answers are known they are shown, and the same questions are asked once more of a cache that lost its
states on purpose: its answers are wrong, and the check of exactness must reject it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..cache import SparsePrefixCache
from ..exactness import check_exactness
from ..tools import recall
from ..tools.recall.asking import lose_states
from .screen import Screen, Steps
from .sources import DocumentQuestion, NamedModel, check_length
from .timing import Asker, Reply
from .verdicts import Answered, Result, Wiped, show


@dataclass(frozen=True)
class _Question:
    """One task as this model reads it.

    Attributes:
        ids: the prompt `(1, length)`.
        uncached: whether it is also timed without the cache.
    """

    task: DocumentQuestion
    ids: torch.Tensor
    uncached: bool


def run(
    loaded: NamedModel,
    tasks: list[DocumentQuestion],
    screen: Screen,
    *,
    uncached: int = 3,
    checked: int = 2,
    **options: Any,
) -> Result:
    """Ask every question of one model and write what happened.

    Args:
        loaded: the model.
        tasks: the questions in the order in which they are asked.
        uncached: how many of them are also timed without the cache, on a document that was read before where possible.
        checked: how many of them are checked for exactness.
        options: for `SparsePrefixCache`.
    """
    name, model, tokenizer = loaded.name, loaded.model, loaded.tokenizer
    prompts = [tokenizer(task.prompt, return_tensors="pt")["input_ids"].to(model.device) for task in tasks]
    repeated = [index for index in range(1, len(tasks)) if tasks[index].document == tasks[index - 1].document]
    timed = _spread(repeated or list(range(len(tasks))), uncached)
    proved = _spread(repeated or list(range(len(tasks))), checked)
    work = sum(
        prompt.shape[1] for prompt in (prompts[0], *(prompts[i] for i in timed), *(prompts[i] for i in proved * 2))
    )
    screen.say(loaded.line, style="bold")
    asker = Asker(model, tokenizer)
    answered = []
    with SparsePrefixCache(model, tokenizer, **options) as cache, screen.progress(work, name) as steps:
        check_length(max(prompt.shape[1] for prompt in prompts), cache.grid)
        asker.warm_up(prompts[0])
        for index, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
            answered.append(_ask(asker, cache, _Question(task, prompt, index in timed), steps))
        steps.now(f"{name}: exactness")
        report = check_exactness(model, [prompts[index] for index in proved], cache=cache)
        steps.done(work)
        grid, stats = cache.grid, cache.stats()
    wiped = _wiped(name, asker, tasks, prompts, options) if all(task.answer for task in tasks) else None
    result = Result(name, grid, tuple(answered), report, stats, wiped, asker.cpu_share)
    show(result, screen)
    return result


def _ask(asker: Asker, cache: SparsePrefixCache, question: _Question, steps: Steps) -> Answered:
    task, prompt = question.task, question.ids
    steps.now(task.question)
    cached = asker.reply(prompt, len(task.answer), past_key_values=cache)
    info, stats = cache.last_request, cache.stats()
    assert info is not None
    steps.done(info.computed_tokens)
    stock: Reply | None = None
    if question.uncached:
        steps.now(f"without the cache: {task.question}")
        stock = asker.reply(prompt, len(task.answer))
        steps.done(prompt.shape[1])
    return Answered(
        document=task.document,
        question=task.question,
        prompt_tokens=info.prompt_tokens,
        overlap_tokens=info.overlap_tokens,
        resumed_tokens=info.resumed_tokens,
        computed_tokens=info.computed_tokens,
        cached_seconds=cached.seconds,
        uncached_seconds=None if stock is None else stock.seconds,
        checkpoints=stats.checkpoints,
        stored_bytes=stats.checkpoint_bytes + stats.kv_bytes,
        reason=info.reason,
        expected=task.answer,
        answer=cached.text,
        uncached_answer=None if stock is None else stock.text,
    )


def _wiped(
    name: str, asker: Asker, tasks: list[DocumentQuestion], prompts: list[torch.Tensor], options: dict[str, Any]
) -> Wiped | None:
    """Ask about the first document of a cache that lost its states; None where it had stored none."""
    about = [index for index, task in enumerate(tasks) if task.document == tasks[0].document]
    with SparsePrefixCache(asker.model, asker.tokenizer, **options) as cache:
        asker.reply(prompts[0], 1, past_key_values=cache)
        if not lose_states(cache.store):
            return None
        said = [
            (tasks[i].question, tasks[i].answer, asker.reply(prompts[i], len(tasks[i].answer), past_key_values=cache))
            for i in about[1:]
        ]
        report = check_exactness(asker.model, [prompts[about[-1]]], cache=cache)
    answered = tuple((question, expected, reply.text) for question, expected, reply in said)
    return Wiped(answered, report, recall.chance(name))


def _spread(indices: list[int], count: int) -> list[int]:
    """`count` of the indices, evenly spread from the first to the last."""
    count = min(count, len(indices))
    return [indices[step * (len(indices) - 1) // max(1, count - 1)] for step in range(count)]
