"""What a handle reports, totals over its life and the last request; and how sizes are read and tables written."""

import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from html import escape
from typing import Any, Self

from .checks import shown


class Cause(Enum):
    """Why a prompt resumes where it does: a closed set, whose wording is part of the interface."""

    RESUMED = "resumed"
    NOTHING_STORED = "nothing stored"
    DIVERGES = "diverges at token {token}"
    BEFORE_FIRST = "overlap of {tokens} tokens ends before the first checkpoint at {position}"
    CUT_OTHERWISE = "cut otherwise: the checkpoints on the first {tokens} tokens were made with other settings"
    EVICTED = "evicted"
    TOO_SHORT = "never captured: the prompt is shorter than the first cut"
    NO_ROOM = "never captured: no room was made for a checkpoint on the first {tokens} tokens"
    BATCHED = "never captured: the first {tokens} tokens ran in one forward with other prompts"
    NOT_PLACED = "never captured: the policy placed no checkpoint on the first {tokens} tokens"
    WEIGHTS_CHANGED = "weights changed: what was stored of them was dropped"
    TRAINING = "call not supported: the model is in training mode"
    NOT_SUPPORTED = "call not supported: {why}"


class Reason(str):
    """A cause with its values; as a string, the sentence.

    Attributes:
        cause: the member of the closed set.
        values: by the names in its wording: positions and numbers of tokens, or `why` a call is not supported.
    """

    __slots__ = ("cause", "values")
    cause: Cause
    values: dict[str, int | str]

    def __new__(cls, cause: Cause, **values: int | str) -> Self:
        reason = super().__new__(cls, cause.value.format(**values))
        reason.cause, reason.values = cause, values
        return reason

    def __reduce__(self) -> tuple[Any, ...]:
        return _reason, (self.cause, self.values)

    @property
    def kind(self) -> tuple[Cause, str]:
        """What is the same for prompts that miss alike: the cause without its figures."""
        return self.cause, str(self.values.get("why", ""))


def _reason(cause: Cause, values: dict[str, int | str]) -> Reason:
    return Reason(cause, **values)


@dataclass(frozen=True)
class RequestInfo:
    """One prompt's way through the cache.

    Attributes:
        prompt_tokens: tokens of the prompt, padding left out.
        overlap_tokens: tokens that the prompt shares with earlier prompts, whether or not states are still stored.
        resumed_tokens: tokens skipped thanks to a checkpoint.
        computed_tokens: tokens run through the model.
        captured: positions of the checkpoints this request stored; behind the prompt, of its answer, once that is
            there.
        segments: ends of the segments behind the prefill's result, from 0; of tokens that were decoded one by one,
            `(start, end)`; of tokens that ran batched, in one forward with those of other prompts, `(start, end,
            prompts)`: such a forward depends on its neighbours in its last bits, so it cannot be replayed and nothing
            of it is stored. Where storage is rounded, `(end, end)` says that the state was rounded there. Empty for
            a request that ran uncached.
        reason: why not more was resumed, or "resumed".
    """

    prompt_tokens: int
    overlap_tokens: int = 0
    resumed_tokens: int = 0
    computed_tokens: int = 0
    captured: tuple[int, ...] = ()
    segments: tuple[int | tuple[int, ...], ...] = ()
    reason: Reason = field(kw_only=True)

    @property
    def batched(self) -> bool:
        """Whether part of it ran in one forward with other prompts, so that no run can repeat it bit for bit."""
        return any(isinstance(end, tuple) and len(end) == 3 for end in self.segments)

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that were run though earlier prompts had them too; `explain` says what would have saved them."""
        return max(0, self.overlap_tokens - self.resumed_tokens)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        ends = [f"{end:,}" if isinstance(end, int) else f"{end[0]:,} to {end[1]:,}" for end in self.segments]
        rows = [
            ("tokens of the prompt", f"{self.prompt_tokens:,}"),
            ("shared with earlier prompts", f"{self.overlap_tokens:,}"),
            ("resumed", f"{self.resumed_tokens:,}"),
            ("computed", f"{self.computed_tokens:,}"),
            ("checkpoints captured at", abridged([f"{position:,}" for position in self.captured])),
            ("segments end at", abridged(ends)),
            ("why not more was resumed", str(self.reason)),
        ]
        return html_table((), rows, title="The request")


@dataclass(frozen=True)
class CacheStats:
    """Totals of one handle; what is stored is the store's, shared by every handle on it.

    Attributes:
        requests: prompts served; every row of a batch counts.
        prompt_tokens, overlap_tokens, resumed_tokens, computed_tokens: sums over the requests (see `RequestInfo`).
        checkpoints: checkpoints stored now.
        checkpoint_bytes: bytes of their fixed-size states.
        kv_bytes: bytes of the KV segments they need.
        evictions: checkpoints evicted so far.
        tree_bytes: bytes of what is remembered of prompts besides: their tokens, and the nodes of the tree.
        max_remembered: bytes that the trees of all namespaces may take; None for no bound.
        prefill_seconds: wall time of all prefills, with everything below in it.
        match_seconds: time spent on finding what is stored.
        plan_seconds: time spent on deciding what to capture, and on learning from the prompt.
        capture_seconds, restore_seconds: time spent cloning states and KV out of, and into, live caches; making room
            for what is captured counts as capture.
        proved: whether it was proved on the model, as it is now, that its states can be continued.
        shared: of the store's shared store, what happened there so far, in words, and how often; empty without one.
    """

    requests: int = 0
    prompt_tokens: int = 0
    overlap_tokens: int = 0
    resumed_tokens: int = 0
    computed_tokens: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    kv_bytes: int = 0
    evictions: int = 0
    tree_bytes: int = 0
    max_remembered: int | None = None
    prefill_seconds: float = 0.0
    match_seconds: float = 0.0
    plan_seconds: float = 0.0
    capture_seconds: float = 0.0
    restore_seconds: float = 0.0
    proved: bool = False
    shared: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        skipped = 100 * self.resumed_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        return (
            f"{counted(self.requests, 'request')} · prompts {self.prompt_tokens:,} tokens · resumed "
            f"{self.resumed_tokens:,} ({skipped:.1f} %) · computed {self.computed_tokens:,} · "
            f"{counted(self.checkpoints, 'checkpoint')}, {format_bytes(self.checkpoint_bytes + self.kv_bytes)} · "
            f"{counted(self.evictions, 'eviction')}"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        skipped = self.resumed_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        rows = [
            ("requests", f"{self.requests:,}"),
            ("tokens of their prompts", f"{self.prompt_tokens:,}"),
            ("shared with earlier prompts", f"{self.overlap_tokens:,}"),
            ("resumed", f"{self.resumed_tokens:,} ({skipped:.1%})"),
            ("computed", f"{self.computed_tokens:,}"),
            ("checkpoints stored", f"{self.checkpoints:,}"),
            ("bytes of states", format_bytes(self.checkpoint_bytes)),
            ("bytes of keys and values", format_bytes(self.kv_bytes)),
            ("evictions", f"{self.evictions:,}"),
            ("bytes of remembered prompts", _of(self.tree_bytes, self.max_remembered)),
            ("seconds of prefill", f"{self.prefill_seconds:.3f}"),
            ("of them, matching and planning", f"{self.match_seconds + self.plan_seconds:.3f}"),
            ("of them, capture and restore", f"{self.capture_seconds + self.restore_seconds:.3f}"),
            ("binding proved", "yes" if self.proved else "no"),
            *((f"shared store: {what}", f"{count:,}") for what, count in self.shared.items()),
        ]
        return html_table((), rows, title="The cache so far")


# Calls without a single hit after which something is wrong.
PATIENCE = 20


@dataclass(eq=False)
class _Block:
    """An open `Recorder.block`."""

    recorder: "Recorder"
    found: list[RequestInfo] = field(default_factory=list)
    open: bool = True


# Those around whatever runs now: a thread begins with none, a task with those in which it was made.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("hf_sparse_cache.blocks", default=())


class Recorder:
    """Sums requests up as they finish, from any thread, keeps the latest, and tells the blocks they are made in."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Count from zero, with a lock that nobody holds; open blocks go on."""
        self._recent: deque[RequestInfo] = deque(maxlen=PATIENCE)
        self._lock = threading.Lock()
        self._totals = CacheStats()
        self._calls = 0

    @property
    def last(self) -> RequestInfo | None:
        """The request that finished last; None before the first."""
        recent = self.recent
        return recent[-1] if recent else None

    @property
    def recent(self) -> list[RequestInfo]:
        """The latest requests, oldest first."""
        with self._lock:
            return list(self._recent)

    @contextmanager
    def block(self) -> Iterator[list[RequestInfo]]:
        """A list to which the requests of the calls made inside of the block are added, as `tell` is given them."""
        block = _Block(self)
        _blocks.set((*_blocks.get(), block))
        try:
            yield block.found
        finally:
            block.open = False  # also for tasks that were made inside and go on
            _blocks.set(tuple(other for other in _blocks.get() if other is not block))

    def tell(self, infos: Sequence[RequestInfo]) -> None:
        """Add the rows of one call, in their order, to the lists of all blocks that it is made in."""
        for block in _blocks.get():
            if block.recorder is self and block.open:
                block.found.extend(infos)

    def amend(self, info: RequestInfo, now: RequestInfo) -> None:
        """Put what is known now in the place of a request's entry, wherever it is told."""
        with self._lock:
            lists = [self._recent, *(block.found for block in _blocks.get() if block.recorder is self)]
            for entries in lists:
                for index, entry in enumerate(entries):
                    if entry is info:
                        entries[index] = now

    def totals(self, **stored: Any) -> CacheStats:
        """The sums so far, with what the store holds now filled in."""
        return replace(self._totals, **stored)

    def add(self, info: RequestInfo, **seconds: float) -> None:
        """Count one finished request; `seconds` go by the names of `CacheStats`."""
        with self._lock:
            self._recent.append(info)
            totals = self._totals
            self._totals = replace(
                totals,
                requests=totals.requests + 1,
                prompt_tokens=totals.prompt_tokens + info.prompt_tokens,
                overlap_tokens=totals.overlap_tokens + info.overlap_tokens,
                resumed_tokens=totals.resumed_tokens + info.resumed_tokens,
                computed_tokens=totals.computed_tokens + info.computed_tokens,
                **{name: getattr(totals, name) + spent for name, spent in seconds.items()},
            )

    def called(self) -> list[RequestInfo]:
        """Count one call as over, whose requests were added: the rows of a batch had no earlier one to resume from.

        Returns:
            The latest requests if this was the call number `PATIENCE` and none resumed anything; otherwise nothing.
        """
        with self._lock:
            self._calls += 1
            return list(self._recent) if self._calls == PATIENCE and not self._totals.resumed_tokens else []


def counted(number: int, what: str) -> str:
    """A number and what it counts, as people say it: 1 -> '1 checkpoint'."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def format_bytes(count: float) -> str:
    """Bytes as people read them: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_MOST_DIGITS = 30
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _of(used: int, most: int | None) -> str:
    return format_bytes(used) if most is None else f"{format_bytes(used)} of {format_bytes(most)}"


def parse_bytes(value: int | str | None, name: str = "max_memory") -> int | None:
    """Reads a size such as `2**30`, `"2GiB"` or `"500MB"`; None means no limit.

    Raises:
        ValueError: if the value is negative or cannot be read.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+)(\.[0-9]+)?\s*([a-zA-Z]*)\s*", value)
        unit = _UNITS.get(match[3].lower(), 0) if match is not None and len(match[1]) <= _MOST_DIGITS else 0
        if match is None or not unit or (unit == 1 and float(match[2] or 0)):
            raise ValueError(f"{name}={shown(value)} is not a size; write bytes as a number or e.g. '2GiB'")
        return int(match[1]) * unit + int(float(match[2] or 0) * unit)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if isinstance(value, bool) or number != value or number < 0:
        raise ValueError(
            f"{name}={shown(value)} must be a whole number of bytes, at least 0; or a string such as '2GiB'"
        )
    return number


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: it reads well on a terminal, in a pipe and in an issue."""
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join((line(columns), rule, *(line(row) for row in rows)))


_HTML_CELL = "padding:.15em .6em;border-bottom:1px solid rgba(128,128,128,.35);text-align:"


def html_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    note: str = "",
    words: Sequence[int] = (),
) -> str:
    """A table of a notebook cell: plain HTML in the colours of the page, without scripts or style sheets.

    Args:
        columns: what stands above; none where the first cell of each row says what the others are.
        rows: texts; all that is not in the first column goes to the right.
        title, note: a line above, and a sentence below.
        words: columns that go to the left like the first one.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ("right" if index and index not in words else "left" for index in range(len(cells)))
        made = (
            f"<{tag} style='{_HTML_CELL}{side}'>{escape(cell)}</{tag}>"
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    head = line("th", columns) if columns else ""
    body = "".join(line("td", row) for row in rows)
    above = f"<p><b>{escape(title)}</b></p>" if title else ""
    below = f"<p>{escape(note)}</p>" if note else ""
    return f"<div>{above}<table style='border-collapse:collapse'>{head}{body}</table>{below}</div>"


def abridged(texts: Sequence[str], most: int = 8) -> str:
    """A list in one line; of a long one its beginning and its end."""
    shown = list(texts) if len(texts) <= most else [*texts[: most // 2], "…", *texts[-most // 2 :]]
    return " · ".join(shown) or "none"
