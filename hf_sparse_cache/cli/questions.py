"""The demo: questions about one long document, timed with the cache and without it, and proved to be exact."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..cache import SparsePrefixCache
from ..exactness import ExactnessReport, check_exactness
from ..stats import CacheStats, counted, format_bytes
from .screen import Screen, Steps
from .sources import Task, check_length, model_line


@dataclass(frozen=True)
class Answered:
    """One question, served.

    Attributes:
        prompt_tokens, overlap_tokens, resumed_tokens, computed_tokens: see `RequestInfo`.
        cached_seconds: time to first token with the cache: `generate(max_new_tokens=1)` by the wall clock.
        uncached_seconds: the same without it, or None where it was not measured.
        checkpoints, stored_bytes: what the store held afterwards.
    """

    document: str
    question: str
    prompt_tokens: int
    overlap_tokens: int
    resumed_tokens: int
    computed_tokens: int
    cached_seconds: float
    uncached_seconds: float | None
    checkpoints: int
    stored_bytes: int
    reason: str

    @property
    def ratio(self) -> float | None:
        """How many times sooner the first token came, where both were measured."""
        return None if self.uncached_seconds is None else self.uncached_seconds / self.cached_seconds


@dataclass(frozen=True)
class Result:
    """One model's demo."""

    model: str
    grid: int
    answered: tuple[Answered, ...]
    exactness: ExactnessReport
    stats: CacheStats

    @property
    def ratios(self) -> list[float]:
        """Side by side ratios of the questions whose document had been read before."""
        return [row.ratio for row in self.answered if row.ratio is not None and row.resumed_tokens]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        rows = [{**asdict(row), "ratio": row.ratio} for row in self.answered]
        report = self.exactness
        return {
            "model": self.model,
            "grid": self.grid,
            "questions": rows,
            "ratio_lowest": min(self.ratios, default=None),
            "ratio_median": statistics.median(self.ratios) if self.ratios else None,
            "exactness": {
                "passed": report.passed,
                "bitwise": report.bitwise,
                "max_abs_logit_diff": report.max_abs_logit_diff,
                "tokens_equal": report.tokens_equal,
                "resumed_tokens": report.resumed_tokens,
            },
            "stats": self.stats.to_dict(),
        }


def run(
    name: str,
    model: Any,
    tokenizer: Any,
    tasks: list[Task],
    screen: Screen,
    *,
    uncached: int = 3,
    checked: int = 2,
    **options: Any,
) -> Result:
    """Ask every question of one model and write what happened.

    Args:
        name: what the model was called on the command line.
        tasks: the questions in the order in which they are asked.
        uncached: how many of them are also timed without the cache, on a document that was read before where possible.
        checked: how many of them are checked for exactness.
        options: for `SparsePrefixCache`.
    """
    prompts = [tokenizer(task.prompt, return_tensors="pt")["input_ids"].to(model.device) for task in tasks]
    repeated = [index for index in range(1, len(tasks)) if tasks[index].document == tasks[index - 1].document]
    timed = _spread(repeated or list(range(len(tasks))), uncached)
    proved = _spread(repeated or list(range(len(tasks))), checked)
    work = sum(
        prompt.shape[1] for prompt in (prompts[0], *(prompts[i] for i in timed), *(prompts[i] for i in proved * 2))
    )
    screen.say(model_line(name, model), style="bold")
    answered = []
    with SparsePrefixCache(model, tokenizer, **options) as cache, screen.progress(work, name) as steps:
        check_length(max(prompt.shape[1] for prompt in prompts), cache.grid)
        _first_token(model, prompts[0][:, :16])  # what only the first call pays, such as starting threads
        for index, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
            answered.append(_ask(model, cache, task, prompt, index in timed, steps, f"question {index + 1}"))
        steps.now(f"{name}: exactness")
        report = check_exactness(model, [prompts[index] for index in proved], cache=cache)
        steps.done(work)
        result = Result(name, cache.grid, tuple(answered), report, cache.stats())
    _show(result, screen)
    return result


def _ask(
    model: Any, cache: SparsePrefixCache, task: Task, prompt: torch.Tensor, uncached: bool, steps: Steps, what: str
) -> Answered:
    steps.now(what)
    cached_seconds = _first_token(model, prompt, past_key_values=cache)
    info, stats = cache.last_request, cache.stats()
    assert info is not None
    steps.done(info.computed_tokens)
    uncached_seconds = None
    if uncached:
        steps.now(f"{what} without the cache")
        uncached_seconds = _first_token(model, prompt)
        steps.done(prompt.shape[1])
    return Answered(
        document=task.document,
        question=task.question,
        prompt_tokens=info.prompt_tokens,
        overlap_tokens=info.overlap_tokens,
        resumed_tokens=info.resumed_tokens,
        computed_tokens=info.computed_tokens,
        cached_seconds=cached_seconds,
        uncached_seconds=uncached_seconds,
        checkpoints=stats.checkpoints,
        stored_bytes=stats.checkpoint_bytes + stats.kv_bytes,
        reason=info.reason,
    )


def _first_token(model: Any, prompt: torch.Tensor, **options: Any) -> float:
    finish: Callable[[], None] = torch.cuda.synchronize if prompt.is_cuda else lambda: None
    finish()
    clock = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=1, **options)
    finish()
    return time.perf_counter() - clock


def _spread(indices: list[int], count: int) -> list[int]:
    """`count` of the indices, evenly spread from the first to the last."""
    count = min(count, len(indices))
    return [indices[step * (len(indices) - 1) // max(1, count - 1)] for step in range(count)]


def _show(result: Result, screen: Screen) -> None:
    columns = ("question", "prompt", "overlap", "resumed", "computed", "cached", "uncached", "ratio", "stored")
    rows = [
        (
            row.question if len(row.question) <= 44 else row.question[:43] + "…",
            f"{row.prompt_tokens:,}",
            f"{row.overlap_tokens:,}",
            f"{row.resumed_tokens:,}",
            f"{row.computed_tokens:,}",
            f"{row.cached_seconds:.3f} s",
            "" if row.uncached_seconds is None else f"{row.uncached_seconds:.3f} s",
            "" if row.ratio is None else f"{row.ratio:.1f}×",
            f"{row.checkpoints} · {format_bytes(row.stored_bytes)}",
        )
        for row in result.answered
    ]
    screen.table(columns, rows)
    screen.say("In tokens; cached and uncached: time to first token; stored: checkpoints · bytes.")
    if result.ratios:
        # Rounded first: one ratio, or several that look alike, are one figure.
        ratios = dict.fromkeys(f"{ratio:.1f}×" for ratio in (min(result.ratios), max(result.ratios)))
        screen.say(
            f"Side by side with stock generate(), the first token came {' to '.join(ratios)} sooner once the document "
            "was known."
        )
    report = result.exactness
    sentence = (
        "EXACT" if report.passed else "NOT EXACT" if report.resumed_tokens else "NOT PROVED, nothing was resumed"
    )
    screen.say(
        f"{sentence}: {counted(len(report.rows), 'prompt')} run stock, cold and warm; "
        f"{report.resumed_tokens:,} tokens resumed; "
        f"warm equals cold bit for bit: {'yes' if report.bitwise else 'NO'}; "
        f"largest logit difference to stock: {report.max_abs_logit_diff:.1e}.",
        style="green" if report.passed else "bold red",
    )
    screen.say()
