"""How much memory does a process take that stores, over what the cache accounts for? A case of `bench_costs`.

python -m benchmarks.process_memory all --model zamba2-30m      one process; one JSON line on standard output
"""

import argparse
import json
import subprocess
import sys

import numpy as np
from transformers.utils import logging

from benchmarks.bench_planner import peak_bytes
from hf_sparse_cache.bench.contenders import Cached, EveryCut
from hf_sparse_cache.bench.workloads import WorkloadRequest
from hf_sparse_cache.tools.builtin import build_model


VOCABULARY = 8192


def memory(arguments, name):
    """Two processes serve the same prompts in the same segments; one stores every checkpoint, the other none.

    Returns:
        The difference of their peaks over the bytes stored, one value a repeat.
    """
    values = []
    for _ in range(min(3, arguments.repeats)):  # two processes each: slow, and nearly the same every time
        everything, nothing = (_process(arguments, name, mode) for mode in ("all", "none"))
        values.append((everything["peak"] - nothing["peak"]) / everything["stored"])
    return {f"memory taken / {everything['stored'] / 2**20:,.0f} MiB stored": (values, "<= 1.10")}


def _process(arguments, name, mode):
    command = [sys.executable, "-m", "benchmarks.process_memory", mode, "--model", name]
    command += ["--tokens", str(arguments.tokens), "--prompts", str(3 * arguments.prompts)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("all", "none"), help="which checkpoints are kept")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=9)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    model = build_model(arguments.model, vocab_size=VOCABULARY)
    policy = EveryCut() if arguments.mode == "all" else "none"
    contender = Cached(model, None, "memory", policy, max_memory=None, grid=128)
    draw = np.random.RandomState(0)
    for _ in range(arguments.prompts):
        contender.serve(WorkloadRequest("", draw.randint(3, VOCABULARY, arguments.tokens).astype(np.int32)), 1, False)
    peak = peak_bytes()
    print(json.dumps({"peak": peak, "stored": contender.peak_bytes(), "held": contender.held_bytes()}))


if __name__ == "__main__":
    main()
