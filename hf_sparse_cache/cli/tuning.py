"""What a prefill in pieces, a cut and the cache itself cost on this machine, and the settings that follow."""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..bench.clock import timed
from ..cache import SparsePrefixCache
from ..checks import shown
from ..config import CONFIG_NAME, SparseCacheConfig
from ..hub import check_own
from ..models import prefill
from ..models.binding import Binding
from ..models.inputs import Row, input_device
from ..planning.lineage import Lineage
from ..tools.machine import describe_machine
from .outputs import check_folder
from .screen import Screen
from .sources import NamedModel


SMALLEST = 128  # tokens of a piece that are tried; each further size is twice the one before
WORTH = 0.97  # of the time of one shot, above which pieces are not worth their cuts
NEAR = 1.03  # of the fastest grid, up to which a finer one is preferred: it resumes more
CUTS = 4  # whose cost is measured together
CPU_TOKENS, ACCELERATOR_TOKENS = 2048, 8192
OUT = Path("tuned")


@dataclass(frozen=True)
class Cost:
    """How much longer one way of running a prompt takes than another: ratios of pairs run side by side.

    Attributes:
        median, low, high: of the pairs; the last two hold the middle half of them.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Cost":
        quarters = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
        return cls(statistics.median(ratios), quarters[0], quarters[2])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def output_folder(model: str, out: Path | None) -> Path:
    """Where the settings go; refused before the work where they could not be written.

    Raises:
        ValueError: it can be no folder, or holds a file of this name that somebody else wrote.
    """
    folder = out or OUT / re.sub(r"[^\w.-]+", "-", model).strip("-.")
    check_folder(folder, "--out")
    check_own(folder / CONFIG_NAME)
    return folder


@dataclass(frozen=True)
class Trials:
    """How it is measured.

    Attributes:
        exactness: the mode that the settings are for.
        tokens: of the prompts; None for what suits the device.
        pairs: how often each way is run beside its rival.
    """

    exactness: str
    tokens: int | None
    pairs: int

    def length(self, device: torch.device) -> int:
        """Tokens of a prompt on a device."""
        return self.tokens or (CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS)


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        tokens: of the prompts.
        pieces: time of a prompt in pieces over that in one shot, by the tokens of a piece.
        config: the settings that follow; its `cut_tokens` are measured.
        cold: time of a cold prompt with these settings over that of stock `generate()`.
    """

    tokens: int
    pieces: dict[int, Cost]
    config: SparseCacheConfig
    cold: Cost

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "tokens": self.tokens,
            "pieces": {str(size): vars(cost) for size, cost in self.pieces.items()},
            "cut_tokens": self.config.cut_tokens,
            "cold_over_stock": vars(self.cold),
            "config": self.config.to_dict(),
        }


def run(loaded: NamedModel, trials: Trials, out: Path, screen: Screen) -> dict[str, Any]:
    """Measure, write what was found, and save the settings that follow from it.

    Args:
        loaded: the model.
        trials: how it is measured.
        out: the folder of the settings.

    Raises:
        ValueError: The prompts are too short for two pieces, or too long for the model.
    """
    device = input_device(loaded.model)
    length = trials.length(device)
    screen.say(loaded.line, style="bold")
    plain = SparseCacheConfig(exactness=trials.exactness, policy="none")
    with SparsePrefixCache(loaded.model, loaded.tokenizer, config=plain) as handle:
        binding = handle.server.binding
        sizes = _sizes(binding, length)
        rounds = trials.pairs * (len(sizes) + 4)
        with screen.progress(rounds, loaded.name) as steps:
            timer = _Timer(binding, length, lambda: steps.done(1))
            pieces = _against_one_shot(timer, sizes, trials.pairs)
            best = min(pieces, key=lambda size: pieces[size].median)
            cut_tokens = _cut_tokens(timer, best if pieces[best].median < WORTH else length, trials.pairs)
            config = _settings(binding, trials.exactness, length, pieces, cut_tokens)
            handle.detach()  # a handle of its own is timed, and stock is
            cold = _cold(loaded, config, length, trials.pairs, lambda: steps.done(1))
    config.save_pretrained(out)
    findings = Findings(length, pieces, config, cold)
    _show(loaded.model, findings, out, screen)
    return {
        "model": loaded.name,
        "exactness": trials.exactness,
        "device": str(device),
        **findings.to_dict(),
        "out": str(out),
        "machine": describe_machine(),
    }


def _sizes(binding: Binding, length: int) -> list[int]:
    """Pieces that are tried: doubled from the smallest, in whole kernel chunks, at least two of them to a prompt.

    Raises:
        ValueError: There is none.
    """
    limit = getattr(binding.text_config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"--tokens {length} is more than this model's {limit} positions; give at most that.")
    sizes, size = [], -(-SMALLEST // binding.chunk) * binding.chunk
    while 2 * size <= length:
        sizes.append(size)
        size *= 2
    if not sizes:
        raise ValueError(f"--tokens {length} is less than two pieces of {size} tokens; give at least {2 * size}.")
    return sizes


class _Timer:
    """Runs a prompt of random tokens in given segments, and says how many seconds that took."""

    def __init__(self, binding: Binding, length: int, done: Callable[[], None]) -> None:
        self._binding, self._done, self.length = binding, done, length
        self._ids = _random_ids(binding.model, length, seed=0)
        self.seconds([min(length, 64)])  # what only the first call costs
        self.seconds([length])

    def seconds(self, ends: Sequence[int]) -> float:
        """Of a prefill whose segments end there."""
        live = self._binding.live_cache()
        row = Row(self._ids[: ends[-1]], {"use_cache": True, "logits_to_keep": 1})
        _finish(row.ids)
        started = time.perf_counter()
        with torch.no_grad():
            prefill.replay(self._binding, live, row, Lineage(ends))
        _finish(row.ids)
        return time.perf_counter() - started

    def pairs(self, one: Sequence[int], other: Sequence[int], count: int) -> list[tuple[float, float]]:
        """Seconds of two ways of running the prompt, side by side; each leads every second time."""
        found = []
        for index in range(count):
            first, second = (one, other) if index % 2 else (other, one)
            seconds = self.seconds(first), self.seconds(second)
            found.append(seconds if index % 2 else seconds[::-1])
            self._done()
        return found

    def ends(self, size: int) -> list[int]:
        """Of pieces of one size."""
        return [*range(size, self.length - 1, size), self.length]


def _against_one_shot(timer: _Timer, sizes: Sequence[int], pairs: int) -> dict[int, Cost]:
    """Time of the prompt in pieces over that in one shot, by size."""
    return {
        size: Cost.of([one / shot for one, shot in timer.pairs(timer.ends(size), [timer.length], pairs)])
        for size in sizes
    }


def _cut_tokens(timer: _Timer, size: int, pairs: int) -> float:
    """What one more cut costs, in tokens of prefill: some more in a prompt that runs in the pieces that suit it."""
    plain = timer.ends(size)
    places = [timer.length * (2 * index + 1) // (2 * CUTS) + 1 for index in range(CUTS)]
    more = sorted({*plain, *places})
    found = [(cut - whole) / whole for cut, whole in timer.pairs(more, plain, 2 * pairs)]
    return round(max(0.0, statistics.median(found)) * timer.length / (len(more) - len(plain)), 1)


def _settings(
    binding: Binding, exactness: str, length: int, pieces: dict[int, Cost], cut_tokens: float
) -> SparseCacheConfig:
    """What follows from the figures."""
    fastest = min(pieces, key=lambda size: pieces[size].median)
    if exactness == "bitwise":
        least = min(1.0, pieces[fastest].median)
        near = [size for size, cost in pieces.items() if cost.median <= NEAR * least]
        return SparseCacheConfig(exactness=exactness, grid=min(near, default=max(pieces)), cut_tokens=cut_tokens)
    worth = pieces[fastest].median < WORTH
    if binding.family.scans and input_device(binding.model).type == "cpu":  # in pieces of its own accord
        whole = -(-length // binding.chunk) * binding.chunk
        return SparseCacheConfig(exactness=exactness, grid=fastest if worth else whole, cut_tokens=cut_tokens)
    return SparseCacheConfig(exactness=exactness, pieces=fastest if worth else None, cut_tokens=cut_tokens)


def _cold(loaded: NamedModel, config: SparseCacheConfig, length: int, pairs: int, done: Callable[[], None]) -> Cost:
    """Time of `generate()` for one token of prompts that share nothing, with a cache over without."""
    model, ratios = loaded.model, []
    with SparsePrefixCache(model, loaded.tokenizer, config=replace(config, max_memory=None)) as cache:
        timed(model, _random_ids(model, length, seed=1)[None], 1, past_key_values=cache)  # which reads all weights
        for index in range(2 * pairs):
            ids = _random_ids(model, length, seed=2 + index)[None]
            ways: list[dict[str, Any]] = [{"past_key_values": cache}, {}]
            seconds = [timed(model, ids, 1, **way).first_token_seconds for way in ways[:: 1 if index % 2 else -1]]
            ratios.append(seconds[0] / seconds[1] if index % 2 else seconds[1] / seconds[0])
            done()
    return Cost.of(ratios)


def _random_ids(model: Any, length: int, seed: int) -> torch.Tensor:
    """`(length,)`, none of the lowest ids, which are special in most vocabularies."""
    draw = torch.Generator().manual_seed(seed)
    most = model.get_input_embeddings().num_embeddings
    return torch.randint(min(16, most - 1), most, (length,), generator=draw).to(input_device(model))


def _finish(ids: torch.Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)


def _show(model: Any, findings: Findings, out: Path, screen: Screen) -> None:
    """Write the figures, what follows from them, and how to use it."""
    where, config = describe_machine(), findings.config
    measured = [(f"{size:,}", str(cost)) for size, cost in findings.pieces.items()]
    screen.say(
        f"{model.dtype} on {input_device(model)}; {where['cpu']}, {where['threads']} threads; torch {where['torch']}, "
        f"transformers {where['transformers']}. Prompts of {findings.tokens:,} tokens; ratios are medians of pairs "
        "run side by side, with their middle half.\n"
    )
    screen.table(("tokens a piece", "time over one shot"), measured)
    screen.say(f"One more cut costs as much as {config.cut_tokens:,.1f} tokens of prefill.")
    screen.say(
        f"A cold prompt takes {findings.cold} of stock generate(), in {config.exactness} mode with these settings:\n"
    )
    shown_names = ("exactness", "grid", "pieces", "cut_tokens")
    screen.table(("setting", "value"), [(name, shown(getattr(config, name))) for name in shown_names])
    screen.say(
        f"Saved in {out}; use it with\n"
        f"SparsePrefixCache(model, tokenizer, config=SparseCacheConfig.from_pretrained({str(out)!r}))"
    )
