"""What rounded storage costs: perplexity of the trained models, and the time of a capture and of a restore.

    python -m benchmarks.bench_rounding perplexity               the trained models, each way of keeping states
    python -m benchmarks.bench_rounding time --pairs 15          CPU time on built-in models, side by side

perplexity   of the answers behind held-out manuals, over the tokens that the models were trained to know. The manual
             is cut, and in bitwise mode rounded, at every 64 tokens, whether it is read for the first time or resumed.
time         `capture` is the rounding of the live cache and the copy of all that a cut keeps, as in bitwise mode, as a
             share of the prefill up to it with captures at every `--every` tokens; `restore` is that of the same
             checkpoint beside storage="exact", in alternating order. Medians, with the interval that holds them with
             95 % confidence.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_new_tokens import summary
from benchmarks.outputs import results_file, write_results
from hf_sparse_cache import SparsePrefixCache, UnsupportedModelError
from hf_sparse_cache.models import prefill, states
from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.models.lazy_kv import settle
from hf_sparse_cache.tools import recall
from hf_sparse_cache.tools.builtin import build_model, load
from hf_sparse_cache.tools.machine import describe_machine
from hf_sparse_cache.tools.recall.asking import manual_ids


STORAGES = ("exact", "bf16", "int8")
MODELS = ("mamba-21m", "jamba-30m", "zamba2-30m", "qwen3.5-29m")
RESULTS = Path(__file__).parent / "results" / "rounding.json"
GRID = 64


def answers(tokenizer: Any, name: str, manuals: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Questions behind held-out manuals, each with its answer."""
    found = []
    for index in range(manuals):
        manual = recall.write_manual(seed + index, **recall.MANUALS[name])
        for asked in manual.questions:
            answer = tokenizer(f" {asked.code}.\n", add_special_tokens=False)["input_ids"]
            found.append((manual_ids(tokenizer, manual, asked.text)[0].tolist(), answer))
    return found


def perplexity(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of the answers, for each storage in each mode, and how far from that of storage="exact"."""
    model, tokenizer = load(name, [])
    pairs = answers(tokenizer, name, options.manuals, options.seed)
    tokens = sum(len(answer) for _, answer in pairs)
    rows: dict[str, Any] = {"questions": len(pairs), "answer_tokens": tokens}
    for mode in ("bitwise", "replayable"):
        exact = math.nan
        for storage in STORAGES:
            try:
                cache = SparsePrefixCache(model, grid=GRID, storage=storage, exactness=mode)
            except UnsupportedModelError as error:
                rows[f"{mode} {storage}"] = {"refused": str(error)}
                continue
            with cache:
                scores = cache.loglikelihood(pairs, progress=False)
                resumed = cache.stats().resumed_tokens / cache.stats().prompt_tokens
            found = math.exp(-math.fsum(score for score, _ in scores) / tokens)
            exact = found if storage == "exact" else exact
            rows[f"{mode} {storage}"] = {
                "perplexity": found,
                "from_exact": found / exact - 1,
                "right": sum(greedy for _, greedy in scores) / len(pairs),
                "resumed_share": resumed,
            }
    return rows


class Pass:
    """One prompt through a model, with captures on the way, and the last of them put back."""

    def __init__(self, model: Any, storage: str, ids: torch.Tensor, every: int) -> None:
        self._handle = SparsePrefixCache(model, grid=GRID, storage=storage)  # which keeps the model's scans in order
        self._binding = self._handle.server.binding
        self._rounding = self._binding.rounding
        self._row, self._every = Row(ids, {"use_cache": True, "logits_to_keep": 1}), every
        self._kept: tuple[Any, list[Any]] = (None, [])

    @torch.no_grad()
    def prefill(self) -> tuple[float, float]:
        """CPU seconds of the whole, and of what was cloned and rounded in it."""
        binding, live = self._binding, self._binding.live_cache()
        length, spent, kv = len(self._row), 0.0, []
        started = time.process_time()
        for end in range(self._every, length + 1, self._every):
            prefill.segment(binding, live, self._row, end)
            before = time.process_time()
            if self._rounding.rounds:
                state = states.round_off(live, self._rounding, end - self._every, end)
            else:
                state = states.capture_state(live)
            if live.full_attention_layers:
                kv.append(states.capture_kv(live, end - self._every, end, self._rounding))
            spent += time.process_time() - before
        whole = time.process_time() - started
        self._kept = (state, kv)
        return whole, spent

    @torch.no_grad()
    def restore(self) -> float:
        """CPU seconds until the last checkpoint is in a live cache, keys and values joined."""
        started = time.process_time()
        live = self._binding.live_cache()
        states.restore(live, *self._kept, self._rounding)
        settle(live.layers)
        return time.process_time() - started


def timed(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Capture and restore of each storage."""
    model = build_model(name, vocab_size=8192)
    draw = np.random.RandomState(options.seed)
    ids = torch.from_numpy(draw.randint(3, 8192, (1, options.tokens)).astype(np.int64))
    passes, refused = {}, {}
    for storage in STORAGES:
        try:
            passes[storage] = Pass(model, storage, ids, options.every)
        except UnsupportedModelError as error:
            refused[storage] = str(error)
    kept = tuple(passes)
    captures: dict[str, list[float]] = {storage: [] for storage in kept}
    restores: dict[str, list[float]] = {storage: [] for storage in kept[1:]}
    beside: dict[str, list[float]] = {storage: [] for storage in kept}
    for each in passes.values():
        each.prefill()
        each.restore()
    for index in range(options.pairs):
        for storage in _turned(kept, index):
            gc.collect()
            whole, spent = passes[storage].prefill()
            captures[storage].append(spent / (whole - spent))
            beside[storage].append(
                _often(passes[storage].restore, options.repeats) / options.repeats / (whole - spent)
            )
        for storage in kept[1:]:
            both = {way: _often(passes[way].restore, options.repeats) for way in _turned(("exact", storage), index)}
            restores[storage].append(both[storage] / both["exact"])
    return {
        "capture_over_prefill": {storage: summary(ratios) for storage, ratios in captures.items()},
        "restore_over_prefill": {storage: summary(ratios) for storage, ratios in beside.items()},
        "restore_over_exact": {storage: summary(ratios) for storage, ratios in restores.items()},
        "refused": refused,
    }


def _turned(names: tuple[str, ...], by: int) -> tuple[str, ...]:
    by %= len(names)
    return names[by:] + names[:by]


def _often(call: Callable[[], float], times: int) -> float:
    """The sum over several calls, of which one is too short for the clock."""
    return sum(call() for _ in range(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("perplexity", "time"))
    parser.add_argument(
        "--model", action="append", help="repeat for more; default: all trained, or four built-in ones"
    )
    parser.add_argument("--manuals", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5, help="restores that are timed as one")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--every", type=int, default=512, help="tokens between two captures")
    parser.add_argument("--seed", type=int, default=70_000)
    parser.add_argument("--json", type=results_file, help="file to which the results are added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.model or (list(recall.MANUALS) if options.what == "perplexity" else list(MODELS))
    found = {}
    for name in names:
        found[name] = (perplexity if options.what == "perplexity" else timed)(name, options)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
    if options.json:
        known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        command = " ".join(["python -m benchmarks.bench_rounding", *sys.argv[1:]])
        known[options.what] = {"command": command, "machine": describe_machine(), "models": found}
        write_results(options.json, known)


if __name__ == "__main__":
    main()
