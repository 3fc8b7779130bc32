"""The exactness badge: a table of prompts that ran stock, cold and resumed, and a verdict."""

from dataclasses import replace
from typing import Any

import torch

from ..cache import SparsePrefixCache
from ..exactness import ExactnessReport, ExactnessRow, check_exactness
from ..tools.machine import describe_machine
from .screen import Screen
from .sources import QUESTIONS, NamedModel, check_length


def run(
    loaded: NamedModel, text: str, screen: Screen, *, tokens: int | None, prompts: int, **options: Any
) -> tuple[ExactnessReport, dict[str, Any]]:
    """Check one model and write the badge.

    Args:
        loaded: the model.
        text: what the prompts begin with.
        tokens: about how many tokens a prompt has; None for three grid steps.
        prompts: how many prompts, each with its own ending.
        options: for `SparsePrefixCache`.

    Returns:
        The report, and the same as plain values.

    Raises:
        ValueError: The text is too short to resume anything.
    """
    screen.say(loaded.line, style="bold")
    name, model, tokenizer = loaded.name, loaded.model, loaded.tokenizer
    with SparsePrefixCache(model, tokenizer, **options) as cache:
        wanted = 3 * cache.grid + 32 if tokens is None else tokens
        common = tokenizer(text, add_special_tokens=False)["input_ids"][:wanted]
        check_length(len(common), cache.grid)
        endings = [tokenizer(question, add_special_tokens=False)["input_ids"] for question in QUESTIONS[:prompts]]
        ids = [torch.tensor(common + ending) for ending in endings]
        with screen.progress(len(ids), name) as steps:
            rows: list[ExactnessRow] = []
            for index, prompt in enumerate(ids):
                steps.now(f"{name}: prompt {index + 1} of {len(ids)}")
                report = check_exactness(model, [prompt], cache=cache)
                rows += report.rows
                steps.done(1)
        report = replace(report, rows=tuple(rows))
    _show(report, model, screen)
    return report, {
        "passed": report.passed,
        "exactness": report.mode,
        "bitwise": report.bitwise,
        "max_abs_logit_diff": report.max_abs_logit_diff,
        "tokens_equal": report.tokens_equal,
        "resumed_tokens": report.resumed_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "prompts": [vars(row) for row in report.rows],
    }


def _show(report: ExactnessReport, model: Any, screen: Screen) -> None:
    """Write the table, the verdict, and what it holds for."""
    columns = ("prompt", "resumed", "logits = cold", "states = cold", "max |Δ logit| to stock", "same tokens")
    yes = {True: "yes", False: "NO"}
    cells = [
        (
            f"{row.prompt_tokens:,}",
            f"{row.resumed_tokens:,}",
            yes[row.logits_bitwise],
            yes[row.states_bitwise],
            f"{row.max_abs_logit_diff:.1e}",
            yes[row.tokens_equal],
        )
        for row in report.rows
    ]
    screen.table(columns, cells)
    # ExactnessReport says the verdict in its last line.
    screen.say(str(report).rsplit("\n", 1)[-1], style="green" if report.passed else "bold red")
    where = describe_machine()
    screen.say(
        f"{report.mode} mode; {model.dtype} on {model.device}; {where['cpu']}, {where['threads']} threads; "
        f"torch {where['torch']}, transformers {where['transformers']}"
    )
