"""What the demo found, as values and on the screen: questions, answers, times, and the verdicts."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from ..exactness import ExactnessReport
from ..stats import CacheStats, counted, format_bytes
from .screen import Screen


# Of the time on the wall while the first token is awaited; below it the figures say more about other processes.
_LEAST_SHARE = 0.8


@dataclass(frozen=True)
class Answered:
    """One question, served.

    Attributes:
        expected: the right answer, "" where nobody knows it; `answer` and `uncached_answer` are what the model said.
        prompt_tokens, overlap_tokens, resumed_tokens, computed_tokens: see `RequestInfo`.
        cached_seconds: time to first token with the cache, by the wall clock.
        uncached_seconds: the same without it, or None where it was not measured, as for `uncached_answer`.
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
    expected: str = ""
    answer: str = ""
    uncached_answer: str | None = None

    @property
    def ratio(self) -> float | None:
        """How many times sooner the first token came, where both were measured."""
        return None if self.uncached_seconds is None else self.uncached_seconds / self.cached_seconds


@dataclass(frozen=True)
class Wiped:
    """The same questions, asked of a cache whose states were zeroed.

    Attributes:
        answered: question, right answer, and what was said.
        report: of the check of exactness; it must not pass.
        chance: share of right answers that is left to chance.
    """

    answered: tuple[tuple[str, str, str], ...]
    report: ExactnessReport
    chance: float

    @property
    def right(self) -> int:
        """How many of the answers are right."""
        return sum(expected == said for _, expected, said in self.answered)

    @property
    def rejected(self) -> bool:
        """Whether the check noticed."""
        return self.report.resumed_tokens > 0 and not self.report.passed

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        rows = [{"question": asked, "expected": code, "answer": said} for asked, code, said in self.answered]
        figures = {"max_abs_logit_diff": self.report.max_abs_logit_diff, "chance": self.chance}
        return {"questions": rows, "right": self.right, "rejected": self.rejected, **figures}


@dataclass(frozen=True)
class Result:
    """One model's demo; `cpu_share` is that of the processor's time that it got while it was timed."""

    model: str
    grid: int
    answered: tuple[Answered, ...]
    exactness: ExactnessReport
    stats: CacheStats
    wiped: Wiped | None = None
    cpu_share: float = 1.0

    @property
    def ratios(self) -> list[float]:
        """Side by side ratios of the questions whose document had been read before."""
        return [row.ratio for row in self.answered if row.ratio is not None and row.resumed_tokens]

    @property
    def passed(self) -> bool:
        """Exact, and a cache without states was not."""
        return self.exactness.passed and (self.wiped is None or self.wiped.rejected)

    @property
    def busy(self) -> bool:
        """Whether other processes took so much of the machine that the times mean little."""
        return self.cpu_share < _LEAST_SHARE

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
            "wiped": None if self.wiped is None else self.wiped.to_dict(),
            "cpu_share": self.cpu_share,
            "busy": self.busy,
            "stats": self.stats.to_dict(),
        }


def _judged(expected: str, said: str | None) -> str:
    return "" if said is None else f"{said} {'right' if said == expected else 'WRONG'}"


def show(result: Result, screen: Screen) -> None:
    """The table of one model, and the verdicts below it."""
    _show_rows(result, screen)
    if result.ratios:
        # Rounded first: one ratio, or several that look alike, are one figure.
        ratios = dict.fromkeys(f"{ratio:.1f}×" for ratio in (min(result.ratios), max(result.ratios)))
        screen.say(
            f"Side by side with stock generate(), the first token came {' to '.join(ratios)} sooner once the document "
            "was known."
        )
    if result.busy:
        screen.say(
            f"THE MACHINE WAS BUSY: while timed, this process ran {result.cpu_share:.0%} of the time and waited for "
            "others in the rest. The times are too long and the ratios uneven; run it again on a quiet machine.",
            style="bold yellow",
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
    if result.wiped is not None:
        _show_wiped(result.wiped, screen)
    screen.say()


def _show_rows(result: Result, screen: Screen) -> None:
    known = any(row.expected for row in result.answered)
    columns = ["question", *(("answer", "without cache") if known else ()), "prompt", "overlap", "resumed", "computed"]
    columns += ["cached", "uncached", "ratio", "stored"]
    rows = [
        [
            row.question if len(row.question) <= 44 else row.question[:43] + "…",
            *((_judged(row.expected, row.answer), _judged(row.expected, row.uncached_answer)) if known else ()),
            f"{row.prompt_tokens:,}",
            f"{row.overlap_tokens:,}",
            f"{row.resumed_tokens:,}",
            f"{row.computed_tokens:,}",
            f"{row.cached_seconds:.3f} s",
            "" if row.uncached_seconds is None else f"{row.uncached_seconds:.3f} s",
            "" if row.ratio is None else f"{row.ratio:.1f}×",
            f"{row.checkpoints} · {format_bytes(row.stored_bytes)}",
        ]
        for row in result.answered
    ]
    if result.wiped is not None and result.wiped.answered:
        question, expected, said = result.wiped.answered[0]
        verdict = "rejected" if result.wiped.rejected else "NOT NOTICED"
        rows.append([f"states wiped: {question}", _judged(expected, said), *[""] * (len(columns) - 3), verdict])
    screen.table(columns, rows)
    screen.say("In tokens; cached and uncached: time to first token; stored: checkpoints · bytes.")
    if known:
        stock = [row for row in result.answered if row.uncached_answer is not None]
        screen.say(
            f"Answers: {sum(row.answer == row.expected for row in result.answered)} of {len(result.answered)} right "
            f"with the cache, {sum(row.uncached_answer == row.expected for row in stock)} of {len(stock)} without it."
        )


def _show_wiped(wiped: Wiped, screen: Screen) -> None:
    verdict = "the check rejects it" if wiped.rejected else "AND THE CHECK DID NOT NOTICE"
    screen.say(
        f"A cache that lost its states, wiped on purpose: {wiped.right} of {len(wiped.answered)} answers right "
        f"(by chance {wiped.chance:.1%}); {verdict}, with logits {wiped.report.max_abs_logit_diff:.1e} "
        "from stock.",
        style="green" if wiped.rejected else "bold red",
    )
