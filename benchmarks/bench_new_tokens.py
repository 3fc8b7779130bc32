"""What does a question cost that follows a long document: its new tokens, and what beside them?

    python -m benchmarks.bench_new_tokens                                 four built-in models of about 30 M parameters
    python -m benchmarks.bench_new_tokens --model jamba-134m --pairs 15
    python -m benchmarks.bench_new_tokens --model 38x64 --document 2000 --cold   38 layers of width 64: host time
    python -m benchmarks.bench_new_tokens --json benchmarks/results/new_tokens.json

questions    one document, one question after the other, in plain text: how many tokens each computes beyond its own,
             by its place (second, third and later); and the last prompt once more
first token  of later questions, in CPU time, against the model's own `generate()` on a live cache that is ready, which
             runs the new tokens in one forward (no cache can beat it), and against `copy.deepcopy` of a pre-filled
             cache where that is right; both calls are timed from their start to their end
cold         prompts that share nothing, in CPU time, against stock `generate()` in one shot

Each pair serves one prompt both ways, in alternating order. Printed are the median of the ratios and the interval that
holds it with 95 % confidence, from order statistics. Random weights and random tokens: neither changes what is timed,
and no two questions agree by chance.
"""

import argparse
import gc
import shlex
import statistics
import sys
import time
from math import comb

import numpy as np
import torch
from transformers import Zamba2Config, Zamba2ForCausalLM
from transformers.utils import logging

from benchmarks.outputs import results_file, write_results
from hf_sparse_cache.bench.contenders import Cached, Contender, DeepCopy, Limit
from hf_sparse_cache.bench.upstream import why_wrong
from hf_sparse_cache.bench.workloads import WorkloadRequest
from hf_sparse_cache.exactness import greedy
from hf_sparse_cache.stats import table
from hf_sparse_cache.tools.builtin import SIZES, build_model
from hf_sparse_cache.tools.machine import describe_machine


VOCABULARY, DEEP = 8192, "38x64"


def drawn(draw, tokens):
    return draw.randint(3, VOCABULARY, tokens).astype(np.int32)


def built(name):
    """A built-in model, or one of 38 layers of width 64, whose forwards are short beside what the host does."""
    if name != DEEP:
        return build_model(name, vocab_size=VOCABULARY)
    config = Zamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=38,
        layers_block_type=["hybrid" if index % 6 == 5 else "linear_attention" for index in range(38)],
        intermediate_size=128,
        num_attention_heads=4,
        n_mamba_heads=4,
        mamba_d_state=16,
        chunk_size=64,
        num_mem_blocks=2,
        adapter_rank=8,
        use_mem_rope=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Zamba2ForCausalLM(config)
    model.generation_config.eos_token_id = None
    return model.eval()


def questions(document, count, tokens, draw):
    """Prompts of one document whose questions part at their first token."""
    heads = 3 + draw.permutation(VOCABULARY - 3)[:count]
    tails = [np.concatenate([[head], drawn(draw, tokens - 1)]) for head in heads]
    return [WorkloadRequest("document", np.concatenate([document, tail]).astype(np.int32)) for tail in tails]


def paired(one, other, prompts, beside=None):
    """Ratios of CPU time, one a prompt; each contender leads every second pair. Differences in ms go to `beside`."""
    ratios = []
    for index, asked in enumerate(prompts):
        order = (one, other) if index % 2 else (other, one)
        # What stands ready must do so before either serves: the first to serve captures.
        for contender in order:
            contender.prepare(asked)
        spent = {}
        for contender in order:
            gc.collect()
            started = time.process_time()
            contender.serve(asked, 1, False)
            spent[contender] = time.process_time() - started
        ratios.append(spent[one] / spent[other])
        if beside is not None:
            beside.append(1e3 * (spent[one] - spent[other]))
    return ratios


class Ready(Limit):
    """What a user writes who has the live cache at hand: the class's own `generate()`, nothing of ours around it."""

    def prepare(self, asked):
        super().prepare(asked)
        self._server.ready.length = self._server.resumed_tokens

    def serve(self, asked, max_new_tokens, logits):
        live, ids = self._server.ready, self.ids(asked)
        if live.recurrent_only:  # nothing in it says how many tokens it has read, so only the new ones are given
            ids = ids[:, live.length :]
        return type(self.model).generate(
            self.model, ids, **greedy(ids, max_new_tokens), **{self._server.binding.cache_name: live}
        )


def check_limit(own, limit, asked):
    """Both must answer alike, or they do not do the same work."""
    limit.prepare(asked)
    found = limit.serve(asked, 1, True).logits[0][0]
    served = own.serve(asked, 1, True).logits
    difference = float((found - served).abs().max())
    assert difference <= 1e-4, f"the limit's logits differ by {difference}"


def bounds(values, confidence=0.95):
    """An interval that holds the median of what the values were drawn from, by their order alone."""
    ranked, count = sorted(values), len(values)
    outside, below = 0.0, 0
    while below < count // 2 and 2 * (outside + comb(count, below) / 2**count) <= 1 - confidence:
        outside += comb(count, below) / 2**count
        below += 1
    return (ranked[below - 1], ranked[count - below]) if below else (ranked[0], ranked[-1])


def summary(ratios):
    low, high = bounds(ratios)
    return {"median": statistics.median(ratios), "low": low, "high": high, "pairs": len(ratios)}


def measure(arguments, name, exactness):
    model, draw = built(name), np.random.RandomState(arguments.seed)
    document = drawn(draw, arguments.document)
    prompts = questions(document, 2 + 3 * arguments.pairs + 2, arguments.question, draw)
    own = Cached(model, None, exactness, "learned", max_memory="8GiB", exactness=exactness)
    found = {"model": name, "exactness": exactness, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        computed = [own.serve(asked, 1, False).computed_tokens for asked in prompts[:4]]
        again = own.serve(prompts[3], 1, False).computed_tokens
        limit, beside = Ready(own), []
        check_limit(own, limit, prompts[2])
        found["first token / limit"] = summary(paired(own, limit, prompts[4 : 4 + arguments.pairs], beside))
        found["beside the limit, ms"] = summary(beside)
        limit.close()
        recipe = DeepCopy(model, {"document": arguments.document})
        wrong = why_wrong(model, lambda: DeepCopy(model, {}), own.handle.grid or 256)
        if wrong:
            found["deepcopy"] = wrong
        else:
            recipe.serve(prompts[0], 1, False)
            found["first token / deepcopy"] = summary(
                paired(own, recipe, prompts[4 + arguments.pairs : -arguments.pairs])
            )
        later = [own.serve(asked, 1, False).computed_tokens for asked in prompts[-arguments.pairs :]]
        found["computed"] = {
            "question": arguments.question,
            "second": computed[1],
            "third and later, median": statistics.median([*computed[2:], *later]),
            "third and later, most": max(*computed[2:], *later),
            "the same prompt again": again,
        }
    finally:
        own.close()
    for tokens in arguments.cold:
        own = Cached(model, None, exactness, "learned", max_memory="2GiB", exactness=exactness)
        try:
            ratios = paired(
                own, Contender(model), [WorkloadRequest("", drawn(draw, tokens)) for _ in range(arguments.pairs + 1)]
            )
            found[f"cold / stock, {tokens:,} tokens"] = summary(ratios[1:])  # the first pair warms up
        finally:
            own.close()
    return found


def rows(found):
    for result in found:
        computed = result["computed"]
        name = f"{result['model']}, {result['exactness']}"
        for label in ("second", "third and later, median", "third and later, most", "the same prompt again"):
            yield name, f"computed, {label} (question: {computed['question']})", f"{computed[label]:g}", ""
        for label, value in result.items():
            if isinstance(value, dict) and "median" in value:
                yield name, label, f"{value['median']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}"
        if "deepcopy" in result:
            yield name, "deepcopy", "left out", result["deepcopy"]


def main():
    parser = argparse.ArgumentParser(description="What a question costs that follows a long document")
    parser.add_argument("--model", action="append", choices=[*sorted(SIZES), DEEP])
    parser.add_argument("--exactness", nargs="+", default=["replayable", "bitwise"])
    parser.add_argument("--document", type=int, default=5500)
    parser.add_argument("--question", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--cold", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=results_file)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    names = arguments.model or ["mamba-21m", "jamba-30m", "zamba2-30m", "qwen3.5-29m"]
    found = []
    for name in names:
        for exactness in arguments.exactness:
            found.append(measure(arguments, name, exactness))
            print(table(("model", "what", "median", "95 %"), list(rows(found[-1:]))), flush=True)
            if arguments.json:
                about = {"command": shlex.join(["python", "-m", "benchmarks.bench_new_tokens", *sys.argv[1:]])}
                about |= {"machine": describe_machine(), "seed": arguments.seed}
                write_results(arguments.json, {**about, "results": found})


if __name__ == "__main__":
    main()
