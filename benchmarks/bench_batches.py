"""What do batches and threads cost whose prompts share nothing, or much?

    python -m benchmarks.bench_batches                                      three built-in models
    python -m benchmarks.bench_batches --json benchmarks/results/batches.json

unrelated  a batch of prompts that share nothing, against stock `generate()`, in CPU time
shared     a batch with a long prefix in common, cold, at its first call: tokens computed; CPU time against one prefill
           of the prefix and one forward of what is behind it, both by stock
threads    eight threads with one prefix in common, cold: tokens computed, in prefixes

Each pair runs both ways in alternating order. Printed are the median of the ratios and the interval that holds it with
95 % confidence, from order statistics. Random weights and random tokens: neither changes what is timed.
"""

import argparse
import gc
import shlex
import sys
import threading
import time

import torch
from transformers.utils import logging

from benchmarks.bench_new_tokens import VOCABULARY, summary
from benchmarks.outputs import results_file, write_results
from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import SIZES, build_model
from hf_sparse_cache.tools.machine import describe_machine


ROWS = 8


def drawn(draw, *shape):
    return torch.randint(3, VOCABULARY, shape, generator=draw)


def padded(rows):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0, **options)


def timed(work):
    gc.collect()
    started = time.process_time()
    work()
    return time.process_time() - started


def ratios(ours, other, pairs):
    """Ratios of CPU time; the first pair warms up."""
    found = []
    for index in range(pairs + 1):
        spent = {}
        for name, work in (("ours", ours), ("other", other))[:: 1 if index % 2 else -1]:
            spent[name] = timed(lambda work=work, index=index: work(index))
        found.append(spent["ours"] / spent["other"])
    return summary(found[1:])


def unrelated(model, tokens, pairs, draw):
    batches = [padded(list(drawn(draw, ROWS, tokens))) for _ in range(pairs + 1)]
    with SparsePrefixCache(model) as cache:
        return ratios(
            lambda index: generated(model, batches[index], past_key_values=cache),
            lambda index: generated(model, batches[index]),
            pairs,
        )


def shared(model, prefix, own, pairs, draw):
    batches = []
    for _ in range(pairs + 1):
        common = drawn(draw, prefix)
        batches.append((common, [torch.cat([common, drawn(draw, length)]) for length in own]))
    computed = []

    def ours(index):
        with cache.record() as infos:
            generated(model, padded(batches[index][1]), past_key_values=cache)
        computed.append(sum(info.computed_tokens for info in infos))

    def parts(index):
        """One prefill of the prefix and one forward of the rest, of 24 tokens a row."""
        generated(model, padded([batches[index][0]]))
        generated(model, padded([row[prefix : prefix + 24] for row in batches[index][1]]))

    with SparsePrefixCache(model) as cache:
        found = ratios(ours, parts, pairs)
    return {**found, "computed": max(computed), "own": list(own)}


def threads(model, prefix, own, draw):
    common = drawn(draw, prefix)
    prompts = [padded([torch.cat([common, drawn(draw, own)])]) for _ in range(ROWS)]
    with SparsePrefixCache(model) as cache:
        work = [
            threading.Thread(target=generated, args=(model, prompt), kwargs={"past_key_values": cache})
            for prompt in prompts
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        return {"prefixes": (cache.stats().computed_tokens - ROWS * own) / prefix}


def cases_of(model, pairs, draw):
    """What is measured of one model, by name."""
    ragged = [16, 20, 25, 29, 34, 38, 43, 48]
    return {
        "threads": lambda: threads(model, 2000, 24, draw),
        "unrelated, 100 tokens": lambda: unrelated(model, 100, pairs, draw),
        "unrelated, 700 tokens": lambda: unrelated(model, 700, pairs, draw),
        "shared, 24 own tokens": lambda: shared(model, 2048, [24] * ROWS, pairs, draw),
        "shared, 16 to 48 own tokens": lambda: shared(model, 2048, ragged, pairs, draw),
    }


def main():
    parser = argparse.ArgumentParser(description="What batches and threads cost whose prompts share nothing, or much")
    parser.add_argument("--model", action="append", choices=sorted(SIZES))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["unrelated", "shared", "threads"])
    parser.add_argument("--json", type=results_file)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    results = []
    for name in arguments.model or ["mamba-21m", "jamba-30m", "zamba2-30m"]:
        model, draw = build_model(name, vocab_size=VOCABULARY), torch.Generator().manual_seed(arguments.seed)
        found = {"model": name}
        results.append(found)
        cases = cases_of(model, arguments.pairs, draw)
        for label, case in cases.items():
            if arguments.only in (None, label.split(",")[0]):
                found[label] = case()
                print(name, label, found[label], flush=True)
                if arguments.json:
                    about = {"command": shlex.join(["python", "-m", "benchmarks.bench_batches", *sys.argv[1:]])}
                    about |= {"machine": describe_machine(), "seed": arguments.seed}
                    write_results(arguments.json, {**about, "results": results})


if __name__ == "__main__":
    main()
