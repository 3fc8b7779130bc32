"""What `bench --task` does: a few-shot task with and without the cache, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .screen import Screen


def run(task: Path, shots: int | None, settings: Any, screen: Screen) -> bool:
    """Score a task on every model of the settings; whether all of it was exact.

    Raises:
        ValueError: there is no such task, or a row of it is none.
        ImportError: a package of the extra [bench] is missing.
    """
    from ..cache import SparsePrefixCache
    from ..evaluation.tasks import compare, load_task
    from ..exactness import TOLERANCE, check_exactness
    from ..tools.builtin import load

    asked = load_task(task, shots, settings.requests)
    contexts = list(dict.fromkeys(context for context, _ in asked.pairs))
    told, rows, exact = [], [], True
    for name in settings.models:
        model, tokenizer = load(name, contexts, settings.dtype, settings.device, settings.seed)
        options = {"max_memory": settings.max_memory, "grid": settings.grid, "policy": settings.policies[0]}
        with SparsePrefixCache(model, tokenizer, **options) as cache:
            found = compare(cache, asked, say=screen.say)
            report = check_exactness(model, contexts[-settings.checked :], cache=cache) if settings.checked else None
        close = found.max_abs_difference <= TOLERANCE or model.dtype.itemsize < 4
        exact = exact and close and (report is None or report.bitwise)
        said = "not checked" if report is None else "bitwise" if report.bitwise else "NOT EXACT"
        told.append({"model": name, **asdict(found), "exactness": said})
        rows.append(
            (
                name,
                f"{found.plain_accuracy:.1%}",
                f"{found.accuracy:.1%}",
                f"{found.plain_seconds:.1f} s",
                f"{found.seconds:.1f} s",
                f"{found.plain_seconds / found.seconds:.1f}×",
                f"{found.resumed_tokens / found.prompt_tokens:.1%}",
                f"{found.max_abs_difference:.1e}",
                said,
            )
        )
    title = (
        "model",
        "accuracy, plain",
        "cached",
        "time, plain",
        "cached",
        "faster",
        "skipped",
        "largest Δ",
        "warm = cold",
    )
    screen.say()
    screen.table(title, rows)
    screen.emit({"task": str(task), "shots": len(asked.shots), "measured": told})
    return exact
