"""What does deciding cost, next to the prefill that it serves, and is what it remembers bounded?

    python -m benchmarks.bench_deciding WORKLOAD            a workload folder or a .jsonl of token ids
    python -m benchmarks.bench_deciding WORKLOAD --json

Deciding is everything of a request that is neither the model nor a copy of its states: cuts, match, terms and price,
plan, the books of `add` (victims included), observing and settling, and the solve of the survival tables whenever it
falls due. First the store is filled with thousands of other prompts without payloads, cut as the handle cuts, so that
its tables and its tree have their working size and its budget is full. Then requests are served live; the bound is 1 %
of their prefill, counted for cold and resumed requests alone and for all. Seconds are CPU time of the one thread that
serves, so torch is kept to one thread: what else the machine does meanwhile counts for neither side.

The second part serves 20,000 requests without a model and counts the bytes that the overlap model, the survival tables
and the tree hold at four moments; a bound on what is remembered makes the last one a bound too.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.models import prefill, sitting
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.policies import Policy, make_policy
from hf_sparse_cache.planning.segments import Bitwise, Segmenting
from hf_sparse_cache.request import Request, open_request
from hf_sparse_cache.simulator import Sized
from hf_sparse_cache.tools.builtin import build_model
from hf_sparse_cache.tools.machine import describe_machine
from hf_sparse_cache.tools.traces import Trace, load_trace


FIRST, WORDS, APART = 3, 8000, 10_000  # ids of live prompts are none of the special ones; the others' lie above them
PARTS = ("cuts", "match and plan", "add", "close")


class Clock:
    """CPU seconds by part; what a part calls that is not deciding is taken off again."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._copied = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            copied, start = self._copied, time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += time.thread_time() - start - (self._copied - copied)

        return call

    def copies(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self._copied += time.thread_time() - start

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every request of this process is timed meanwhile, and prefills are counted in CPU seconds too."""
        with (
            mock.patch.object(sitting, "time", types.SimpleNamespace(perf_counter=time.thread_time)),
            mock.patch.object(sitting, "open_request", self.timed("match and plan", sitting.open_request)),
            mock.patch.object(Request, "add", self.timed("add", Request.add)),
            mock.patch.object(Request, "close", self.timed("close", Request.close)),
            mock.patch.object(prefill.states, "capture_kv", self.copies(prefill.states.capture_kv)),
        ):
            yield

    def total(self) -> float:
        return sum(self.seconds.values())


def folded(ids: np.ndarray) -> np.ndarray:
    """Token ids of any vocabulary in that of the built-in models; what is shared stays shared."""
    return ids % WORDS + FIRST


def others(trace: Trace, count: int) -> Iterator[np.ndarray]:
    """Prompts shaped like those of the trace, which share nothing with it, nor one round with the next."""
    for index in range(count):
        turn, place = divmod(index, len(trace))
        yield folded(trace[place]) + APART * (turn + 1)


def fill(
    store: CheckpointStore,
    policy: Policy,
    sizes: tuple[int, int],
    prompts: Iterable[np.ndarray],
    cut: tuple[Segmenting, str] = (Bitwise(CutRule(64)), ""),
) -> float:
    """Serve prompts without a model, cut so, in such a space; returns the mean CPU seconds of one."""
    (state_bytes, kv_bytes), (segmenting, space) = sizes, cut
    start, before = time.thread_time(), store.clock
    for ids in prompts:
        with open_request(store, policy, ids, segmenting, space=space) as request:
            for position in request.planned:
                kv = (lambda a, b: Sized((b - a) * kv_bytes)) if kv_bytes else None
                request.add(position, Sized(state_bytes), kv)
    return (time.thread_time() - start) / max(store.clock - before, 1)


def serve(options: argparse.Namespace, trace: Trace) -> dict[str, Any]:
    """Live requests behind a filled store: seconds of deciding and of prefill, cold and resumed."""
    model = build_model(options.model)
    store = CheckpointStore(options.max_memory)
    rows: list[dict[str, Any]] = []
    with SparsePrefixCache(model, store=store, grid=options.grid, exactness=options.exactness) as cache:
        sizes = (cache.size.state_bytes, cache.size.kv_bytes_per_token)
        cut = (cache.server.binding.segmenting, cache.server.space.now()[0])
        alone = fill(store, cache.policy, sizes, others(trace, options.stored), cut)
        prompts = [folded(trace[index]) for index in range(min(options.requests, len(trace)))]
        for ids in (prompts[0][::-1][:600].copy(), *prompts):  # the first one warms the model up
            clock, before = Clock(), cache.stats().prefill_seconds
            with clock.watching():
                prompt = torch.from_numpy(ids).long()[None]
                inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
                model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
            info = cache.last_request
            assert info is not None
            rows.append(
                {
                    "resumed_tokens": info.resumed_tokens,
                    "computed_tokens": info.computed_tokens,
                    "prefill_seconds": cache.stats().prefill_seconds - before,
                    "deciding_seconds": clock.total(),
                    **clock.seconds,
                }
            )
        stored = {"checkpoints": len(store), "remembered_tokens": store.remembered_tokens, "bytes": store.used_bytes}
    rows = rows[1:]
    kinds = {
        "cold": [row for row in rows if not row["resumed_tokens"]],
        "resumed": [row for row in rows if row["resumed_tokens"]],
        "all": rows,
    }
    return {
        "stored": stored,
        "evictions": store.evictions,
        "seconds_a_request_without_a_model": alone,
        **{kind: summary(own) for kind, own in kinds.items() if own},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over requests; the share is that of the sums."""
    shares = [row["deciding_seconds"] / row["prefill_seconds"] for row in rows]
    deciding, served = (sum(row[name] for row in rows) for name in ("deciding_seconds", "prefill_seconds"))
    return {
        "requests": len(rows),
        "computed_tokens": statistics.mean(row["computed_tokens"] for row in rows),
        "prefill_seconds": served / len(rows),
        "deciding_seconds": deciding / len(rows),
        "share": deciding / served,
        "share_median": statistics.median(shares),
        "share_highest": max(shares),
        **{part: sum(row[part] for row in rows) / len(rows) for part in PARTS},
    }


def held_bytes(*roots: Any) -> int:
    """Bytes of the objects that can be reached, payloads and code left out."""
    seen: set[int] = set()
    waiting, total = list(roots), 0
    skipped = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, Sized)
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        waiting += gc.get_referents(item)
    return total


def remember(options: argparse.Namespace, trace: Trace) -> list[dict[str, Any]]:
    """What is held after each quarter of the requests, all of whose tokens are new in every round."""
    policy = make_policy("learned")
    store = CheckpointStore(200 * 1000, max_remembered=options.remembered)
    prompts = others(trace, options.memory_requests)
    rows = []
    for quarter in range(1, 5):
        count = options.memory_requests * quarter // 4 - options.memory_requests * (quarter - 1) // 4
        fill(store, policy, (1000, 0), (next(prompts) for _ in range(count)))
        eviction: Any = store.eviction
        tables = held_bytes(eviction.tables)
        rows.append(
            {
                "requests": store.clock,
                "overlap_model_bytes": held_bytes(policy.model),  # type: ignore[attr-defined]
                "survival_bytes": tables,
                "tree_bytes": held_bytes(store.forest),
                "remembered_tokens": store.remembered_tokens,
                "checkpoints": len(store),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload")
    parser.add_argument("--model", default="jamba-30m")
    parser.add_argument("--exactness", default="replayable", help="or bitwise")
    parser.add_argument("--grid", type=int)
    parser.add_argument("--requests", type=int, default=64, help="served live; one period of the survival tables")
    parser.add_argument("--stored", type=int, default=3000, help="prompts served before, without payloads")
    parser.add_argument("--max-memory", default="512MiB")
    parser.add_argument("--memory-requests", type=int, default=20_000)
    parser.add_argument("--remembered", type=int, default=2**23, help="bytes of remembered prompts in the second part")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trace = load_trace(options.workload)
    name = Path(options.workload).name
    found: dict[str, Any] = {"workload": name, "model": options.model, "exactness": options.exactness}
    found["deciding"] = serve(options, trace)
    found["held"] = remember(options, trace)
    found["machine"] = describe_machine()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    show(found, options)


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    deciding, mib = found["deciding"], 2**20
    stored = deciding["stored"]
    print(
        f"{options.model}, {options.exactness}, behind {options.stored:,} prompts: "
        f"{stored['checkpoints']:,} checkpoints, {stored['bytes'] / mib:,.0f} MiB of {options.max_memory}, "
        f"{stored['remembered_tokens']:,} tokens, "
        f"{deciding['evictions']:,} evictions; "
        f"{1000 * deciding['seconds_a_request_without_a_model']:.2f} ms a request without a model"
    )
    for kind in ("cold", "resumed", "all"):
        if kind in deciding:
            row = deciding[kind]
            print(
                f"  {kind:8} {row['requests']:4} requests of {row['computed_tokens']:6,.0f} computed tokens: deciding "
                f"{1000 * row['deciding_seconds']:.2f} ms of {1000 * row['prefill_seconds']:,.0f} ms, "
                f"{row['share']:.2%} (median {row['share_median']:.2%}, highest {row['share_highest']:.2%}; bound 1 %)"
            )
            print(f"{'':11}ms: {', '.join(f'{part} {1000 * row[part]:.2f}' for part in PARTS)}")
    for row in found["held"]:
        print(
            f"after {row['requests']:6,} requests: overlap model {row['overlap_model_bytes'] / mib:.2f}, survival "
            f"tables {row['survival_bytes'] / mib:.2f}, tree {row['tree_bytes'] / mib:.2f} MiB with "
            f"{row['remembered_tokens']:,} tokens within {options.remembered:,} bytes and "
            f"{row['checkpoints']:,} checkpoints"
        )


if __name__ == "__main__":
    main()
