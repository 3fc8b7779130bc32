"""What does reuse save when a model is evaluated: lm-evaluation-harness's own model beside ours, on the same requests.

    python -m benchmarks.bench_evaluation                                 few-shot and zero-shot, three built-in models
    python -m benchmarks.bench_evaluation --model jamba-30m --plain 5     the harness's model on 5 of the examples
    python -m benchmarks.bench_evaluation --memory                        peak memory with a vocabulary of 150,000
    python -m benchmarks.bench_evaluation --json benchmarks/results/evaluation.json

few-shot     25 examples behind 2,000 tokens of shots, a question of 50 tokens, 4 continuations of 3 to 6 tokens each
zero-shot    25 contexts of 100 tokens that share nothing, 4 continuations each

Both get the same token ids, at the same batch size, in the same process. Times are CPU time. With `--plain n` the
harness's model scores the first n examples and its time is taken n-fold up to all of them, as each costs it the same;
log-likelihoods and choices are compared on what both scored. Random weights and tokens, which change nothing that is
timed. Needs `pip install 'hf_sparse_cache[eval]'`.
"""

import argparse
import gc
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import lm_eval
import numpy as np
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from benchmarks.outputs import results_file, write_results
from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.evaluation.harness import SparseLM
from hf_sparse_cache.stats import table
from hf_sparse_cache.tools.builtin import SIZES, build_model, build_tokenizer
from hf_sparse_cache.tools.machine import describe_machine


VOCABULARY, CHOICES = 8192, 4
LARGE_VOCABULARY, TEXTS, TEXT_TOKENS = 150_000, 8, 2000


def requests(shots, question, examples, seed):
    """Contexts behind shared shots, each with continuations of 3 to 6 tokens, in the harness's own form."""
    draw = np.random.RandomState(seed)

    def drawn(tokens):
        return draw.randint(3, VOCABULARY, tokens).tolist()

    head, found = drawn(shots), []
    for _ in range(examples):
        context = head + drawn(question)
        found += [(None, context, drawn(3 + choice)) for choice in range(CHOICES)]
    return found


def timed(lm, asked):
    gc.collect()
    wall, started = time.perf_counter(), time.process_time()
    found = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    return found, time.process_time() - started, time.perf_counter() - wall


def chosen(answers):
    values = np.asarray([value for value, _ in answers]).reshape(-1, CHOICES)
    return values.argmax(-1).tolist()


def measure(name, model, tokenizer, batch_size, case, arguments):
    shots, question = {"few-shot": (2000, 50), "zero-shot": (0, 100)}[case]
    asked = requests(shots, question, arguments.examples, arguments.seed)
    options = {"tokenizer": tokenizer, "batch_size": batch_size, "max_length": 4096}
    plain = HFLM(model, **options)
    count = min(arguments.examples, arguments.plain if case == "few-shot" else arguments.examples)
    timed(plain, requests(0, 64, 1, 1))  # warms up
    expected, plain_seconds, plain_wall = timed(plain, asked[: count * CHOICES])
    ours = SparseLM(model, **options, exactness=arguments.exactness)
    timed(ours, requests(0, 64, 1, 1))
    before = ours.cache.stats()
    found, seconds, wall = timed(ours, asked)
    stats = ours.cache.stats()
    ours.cache.detach()
    both = found[: len(expected)]
    whole = plain_seconds * arguments.examples / count
    prompt = stats.prompt_tokens - before.prompt_tokens
    return {
        "model": name,
        "case": case,
        "batch size": batch_size,
        "exactness": arguments.exactness,
        "examples": arguments.examples,
        "examples of the harness's model": count,
        "seconds of the harness's model, all": whole,
        "seconds": seconds,
        "wall": {"the harness's model, as many as it scored": plain_wall, "ours": wall},
        "times faster": whole / seconds,
        "largest difference": max(abs(one - other) for (one, _), (other, _) in zip(expected, both, strict=True)),
        "greedy equal": [greedy for _, greedy in expected] == [greedy for _, greedy in both],
        "choices equal": chosen(expected) == chosen(both),
        "tokens skipped": (stats.resumed_tokens - before.resumed_tokens) / prompt,
    }


def peak(what):
    """Bytes by which memory grows at most while a process scores; in a process of its own, on Linux."""
    model = build_model("jamba-3m", vocab_size=LARGE_VOCABULARY)
    draw = np.random.RandomState(0)
    texts = draw.randint(3, LARGE_VOCABULARY, (TEXTS, TEXT_TOKENS)).tolist()
    with SparsePrefixCache(model, max_memory="64MiB") as cache, torch.no_grad():
        cache.loglikelihood([(texts[0][:300], texts[1][:4])])
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status("VmRSS")
        if what == "continuations":
            cache.loglikelihood([(text[:-4], text[-4:]) for text in texts])
        elif what == "whole texts":
            cache.loglikelihood_rolling(texts, prefix=1)
        else:  # one of the eight rows of a run with all logits, which takes eight times as much
            model(torch.tensor(texts[:1])).logits.log_softmax(-1)
    print(status("VmHWM") - before)


def status(name):
    """Bytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def memory():
    found = {}
    for what in ("continuations", "whole texts", "all logits of one row"):
        command = [sys.executable, "-m", "benchmarks.bench_evaluation", "--peak", what]
        found[what] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    full = TEXTS * found["all logits of one row"]
    return {
        **found,
        "all logits, eight rows": full,
        "continuations / all": found["continuations"] / full,
        "whole texts / all": found["whole texts"] / full,
        "tokens": TEXTS * TEXT_TOKENS,
        "vocabulary": LARGE_VOCABULARY,
    }


def rows(results):
    for row in results:
        yield (
            row["model"],
            row["case"],
            str(row["batch size"]),
            f"{row['times faster']:.1f}×",
            f"{row['largest difference']:.1e}",
            "yes" if row["choices equal"] else "NO",
            f"{row['tokens skipped']:.1%}",
        )


def main():
    parser = argparse.ArgumentParser(description="What reuse saves when a model is evaluated")
    parser.add_argument("--model", action="append", choices=sorted(SIZES))
    parser.add_argument("--case", action="append", choices=["few-shot", "zero-shot"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--examples", type=int, default=25)
    parser.add_argument("--plain", type=int, default=25, help="examples of the few-shot case that HFLM scores")
    parser.add_argument("--exactness", default="replayable")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=results_file, help="added to what the file holds")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if arguments.peak:
        peak(arguments.peak)
        return
    known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    told = {**describe_machine(), "lm_eval": lm_eval.__version__}
    command = shlex.join(["python", "-m", "benchmarks.bench_evaluation", *sys.argv[1:]])
    known = {
        "machine": told,
        "commands": [*known.get("commands", []), command],
        "results": known.get("results", []),
    } | {name: value for name, value in known.items() if name == "memory"}
    if arguments.memory:
        known["memory"] = memory()
        print(json.dumps(known["memory"], indent=1))
    for name in () if arguments.memory else arguments.model or ["mamba-21m", "jamba-30m", "zamba2-30m"]:
        model, tokenizer = build_model(name, vocab_size=VOCABULARY), build_tokenizer(["some text for a tokenizer"])
        for case in arguments.case or ["zero-shot", "few-shot"]:
            for batch_size in arguments.batch_size:
                known["results"].append(measure(name, model, tokenizer, batch_size, case, arguments))
                print(
                    table(
                        ("model", "case", "batch", "faster", "difference", "same choices", "skipped"),
                        list(rows(known["results"][-1:])),
                    ),
                    flush=True,
                )
                if arguments.json:
                    write_results(arguments.json, known)
    if arguments.json:
        write_results(arguments.json, known)


if __name__ == "__main__":
    main()
