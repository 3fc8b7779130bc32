"""What does the cache cost where it cannot help? The cases nobody likes to show, each against its rival in one run.

    python -m benchmarks.bench_costs                                     every case on three built-in models, 5 repeats
    python -m benchmarks.bench_costs --model jamba-30m --only overhead   one case on one model
    python -m benchmarks.bench_costs --json benchmarks/results/costs.json

overhead     prompts that share nothing: stock generate() in one shot, in the same chunks, and with the cache
short        prompts shorter than a grid step, which can never be resumed
tiny-budget  a budget of little more than one checkpoint, under prompts that do share
cold-start   making the handle and serving its first prompt
one-token    one new token after a long known prefix: against stock, and against the limit (only what is left to
             compute, from a live cache that is ready)
decode       a long decode: seconds a token with the cache and without, step beside step
big-store    the same prompts on an empty store and on one that remembers 10,000 others
memory       what a process grows by that keeps every checkpoint, beside one that keeps none, over the bytes
             that the cache accounts for meanwhile

A repeat serves all prompts with every contender in turn; handles are fresh in each. A ratio is one contender's time
over another's in one repeat; printed are the median and the range over the repeats. Built-in models have random
weights and prompts are random tokens: neither changes what is timed.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import time

import numpy as np
from transformers.utils import logging

from benchmarks import decode_steps
from benchmarks.outputs import results_file, write_results
from benchmarks.process_memory import memory
from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.bench.contenders import Cached, Chunked, Contender, Limit
from hf_sparse_cache.bench.upstream import why_wrong
from hf_sparse_cache.bench.workloads import WorkloadRequest
from hf_sparse_cache.request import open_request
from hf_sparse_cache.simulator import Sized
from hf_sparse_cache.stats import table
from hf_sparse_cache.tools.builtin import SIZES, build_model
from hf_sparse_cache.tools.machine import describe_machine


VOCABULARY = 8192


def prompts(count, tokens, shared=0, groups=1, seed=0):
    """Random prompts; those of a group share their first tokens, and follow each other in turn."""
    draw = np.random.RandomState(seed)
    heads = [draw.randint(3, VOCABULARY, shared) for _ in range(groups)]
    rows = [np.concatenate([heads[i % groups], draw.randint(3, VOCABULARY, tokens - shared)]) for i in range(count)]
    return [WorkloadRequest(str(index % groups), row.astype(np.int32)) for index, row in enumerate(rows)]


def cached(arguments, model, name="learned", **options):
    return Cached(model, None, name, "learned", **{"max_memory": "2GiB", "grid": arguments.grid, **options})


def alternate(contenders, asked, new_tokens=1, start=0):
    """Every prompt by every contender in turn: the requests of each."""
    served = {contender.name: [] for contender in contenders}
    for index, one in enumerate(asked):
        for contender in contenders:
            contender.prepare(one)
        shift = (index + start) % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            gc.collect()
            result = contender.serve(one, new_tokens, False)
            if result is not None:
                served[contender.name].append(result)
    return served


def repeated(arguments, make, asked, new_tokens=1):
    """A list of `alternate` results, one a repeat, each with fresh contenders."""
    runs = []
    for repeat in range(arguments.repeats):
        contenders = make()
        try:
            runs.append(alternate(contenders, asked, new_tokens, repeat))
        finally:
            for contender in contenders:
                contender.close()
    return runs


def first_tokens(served):
    return sum(request.first_token_seconds for request in served)


def ratio(runs, one, other, measure=first_tokens):
    return [measure(run[one]) / measure(run[other]) for run in runs]


def share(runs, name, *parts):
    """Seconds of some parts of a contender's prefill over the whole of it, a repeat each."""
    totals = [{part: sum(getattr(r, part) for r in run[name]) for part in (*parts, "prefill_seconds")} for run in runs]
    return [sum(total[part] for part in parts) / total["prefill_seconds"] for total in totals]


def overhead(arguments, model):
    handle = cached(arguments, model).handle
    asked = prompts(arguments.prompts, arguments.tokens)
    # On some models stock refuses prefill_chunk_size, or answers wrongly with it.
    chunks = not why_wrong(model, lambda: Chunked(model, handle.grid), handle.grid)

    def make():
        chunked = [Chunked(model, handle.grid)] if chunks else []
        return [Contender(model), *chunked, cached(arguments, model)]

    runs = repeated(arguments, make, asked)
    copying = share(runs, "learned", "capture_seconds", "restore_seconds")
    same_chunks = {"cache / stock, same chunks": (ratio(runs, "learned", "chunked"), "<= 1.03")} if chunks else {}
    return {
        **same_chunks,
        "cache / stock, one shot": (ratio(runs, "learned", "stock"), "<= 1.10"),
        "capture and restore / prefill": (copying, "<= 0.02"),
        "matching and planning / prefill": (share(runs, "learned", "match_seconds", "plan_seconds"), ""),
    }


def short(arguments, model):
    asked = prompts(4 * arguments.prompts, min(128, arguments.tokens))
    runs = repeated(arguments, lambda: [Contender(model), cached(arguments, model)], asked)
    return {"cache / stock": (ratio(runs, "learned", "stock"), "")}


def tiny_budget(arguments, model):
    handle = cached(arguments, model).handle
    one = handle.size.state_bytes + handle.grid * handle.size.kv_bytes_per_token
    asked = prompts(
        2 * arguments.prompts, arguments.tokens, shared=arguments.tokens * 3 // 4, groups=arguments.prompts
    )
    runs = repeated(
        arguments,
        lambda: [
            Contender(model),
            cached(arguments, model, "tiny", max_memory=one + one // 2),
            cached(arguments, model, "ample"),
        ],
        asked,
    )
    evictions = [sum(request.evictions for request in run["tiny"]) for run in runs]
    return {
        "tiny budget / stock": (ratio(runs, "tiny", "stock"), ""),
        "ample budget / stock": (ratio(runs, "ample", "stock"), ""),
        "evictions a request": ([count / len(asked) for count in evictions], ""),
        "eviction / prefill": (share(runs, "tiny", "eviction_seconds"), ""),
    }


def cold_start(arguments, model):
    (asked,) = prompts(1, arguments.tokens)
    making, first = [], []
    for repeat in range(arguments.repeats):
        started = time.perf_counter()
        SparsePrefixCache(model).detach()
        made = time.perf_counter() - started
        contenders = [Contender(model), cached(arguments, model)]
        served = alternate(contenders, [asked], start=repeat)
        contenders[1].close()
        stock = first_tokens(served["stock"])
        making.append(made / stock)
        first.append(first_tokens(served["learned"]) / stock)
    return {"making the handle / stock": (making, ""), "its first prompt / stock": (first, "")}


def one_token(arguments, model):
    asked = prompts(arguments.prompts + 2, arguments.tokens, shared=arguments.tokens - 32)

    def make():
        own = cached(arguments, model)
        for first in asked[:2]:  # a short prompt of which nothing was known is cut where the second one leaves it
            own.serve(first, 1, False)
        return [Contender(model), Limit(own), own]

    runs = repeated(arguments, make, asked[2:])
    copying = share(runs, "learned", "capture_seconds", "restore_seconds")
    return {
        "stock / cache": (ratio(runs, "stock", "learned"), ""),
        "cache / limit": (ratio(runs, "learned", "limit"), "<= 1.15"),
        "capture and restore / prefill": (copying, "<= 0.02"),
    }


def decode(arguments, model):
    own = cached(arguments, model)
    try:
        asked = prompts(2, min(256, arguments.tokens))
        return decode_steps.decode(arguments, model, own.handle, [one.ids for one in asked])
    finally:
        own.close()


def big_store(arguments, model):
    asked = prompts(arguments.prompts, arguments.tokens, seed=1)
    full = cached(arguments, model, "full")
    fill(full.handle, arguments.store)
    runs = []
    for repeat in range(arguments.repeats):
        empty = cached(arguments, model, "empty")
        new = [WorkloadRequest(one.group, np.roll(one.ids, repeat + 1)) for one in asked]
        runs.append(alternate([empty, full], new, start=repeat))
        empty.close()
    full.close()
    parts = ("match_seconds", "plan_seconds", "eviction_seconds")
    return {
        f"{arguments.store:,} prompts / empty": (ratio(runs, "full", "empty"), ""),
        "matching, planning, eviction / prefill": (share(runs, "full", *parts), ""),
        "the same on an empty store": (share(runs, "empty", *parts), ""),
    }


def fill(handle, count, tokens=512):
    """Prompts of other users: remembered, with checkpoints that only have a size."""
    space = handle.server.space.now()[0]
    size = handle.size
    kv = (lambda start, end: Sized((end - start) * size.kv_bytes_per_token)) if size.kv_bytes_per_token else None
    for one in prompts(count, tokens, shared=tokens // 2, groups=max(1, count // 20), seed=2):
        segmenting = handle.server.binding.segmenting
        with open_request(handle.store, handle.policy, one.ids, segmenting, space=space) as request:
            for position in request.planned:
                request.add(position, Sized(size.state_bytes), kv)


CASES = {
    "overhead": overhead,
    "short": short,
    "tiny-budget": tiny_budget,
    "cold-start": cold_start,
    "one-token": one_token,
    "decode": decode,
    "big-store": big_store,
    "memory": memory,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=SIZES, help="built-in model; repeat for more")
    parser.add_argument("--only", action="append", choices=CASES)
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt")
    parser.add_argument("--prompts", type=int, default=3, help="distinct prompts in each repeat")
    parser.add_argument("--new-tokens", type=int, default=256, help="to decode in the case 'decode'")
    parser.add_argument("--store", type=int, default=10_000, help="prompts remembered in the case 'big-store'")
    parser.add_argument("--grid", type=int, help="default: what suits the model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=results_file, help="file for the results")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    results = []
    for name in arguments.model or ["mamba-21m", "jamba-30m", "zamba2-30m"]:
        model = build_model(name, vocab_size=VOCABULARY)
        warm = prompts(2, 600, shared=550, seed=9)
        own = cached(arguments, model)
        alternate([Contender(model), own], warm, 2)
        gc.freeze()  # collections between requests look at what is new
        own.close()
        for case in arguments.only or CASES:
            started = time.perf_counter()
            found = CASES[case](arguments, name if case == "memory" else model)
            for what, (values, bound) in found.items():
                results.append({"model": name, "case": case, "what": what, "values": values, "bound": bound})
            print(f"{name} {case}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    columns = ("model", "case", "ratio", "median", "range", "bound")
    print(table(columns, [_cells(result) for result in results]))
    if arguments.json:
        commands, kept = [shlex.join(["python", "-m", "benchmarks.bench_costs", *sys.argv[1:]])], []
        if arguments.json.exists():  # what is measured anew takes the place of what the file holds
            before = json.loads(arguments.json.read_text(encoding="utf-8"))
            measured = {(result["model"], result["case"]) for result in results}
            kept = [result for result in before["results"] if (result["model"], result["case"]) not in measured]
            commands = [before["command"], *commands] if kept else commands
        content = {"command": " && ".join(commands), "machine": describe_machine(), "seed": 0}
        content["results"] = [*kept, *results]
        write_results(arguments.json, content)


def _cells(result):
    low, high = min(result["values"]), max(result["values"])
    median = statistics.median(result["values"])
    return (
        result["model"],
        result["case"],
        result["what"],
        f"{median:.3f}",
        f"{low:.3f} to {high:.3f}",
        result["bound"],
    )


if __name__ == "__main__":
    main()
