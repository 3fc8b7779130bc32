"""What is the cache worth on an accelerator? A hybrid of 1 to 3 B parameters in bfloat16 under long shared prefixes.

    python -m benchmarks.gpu                       1.6 B parameters on "cuda", prefixes of 4k, 16k and 64k tokens
    python -m benchmarks.gpu --model 2.9b --prefix 16384 --json benchmarks/results/gpu.json
    python -m benchmarks.gpu --model tiny --device cpu --prefix 512 --repeats 1      does it run at all?

Random weights, nothing is downloaded. For each prefix: a first question about it, and further questions, each by stock
generate() and by the cache in turn; time to first token, bytes stored, most bytes allocated on the device with and
without the cache, and whether a resumed run equals a cold one bit for bit. Clocks are read after the device has
finished.

The seconds that the cache notes itself (capture, restore) are those of the host: work queued on the device is not in
them.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BambaConfig, BambaForCausalLM
from transformers.utils import logging

from hf_sparse_cache.bench.contenders import Cached, Contender, Limit, Replayed
from hf_sparse_cache.bench.workloads import WorkloadRequest
from hf_sparse_cache.stats import format_bytes, table
from hf_sparse_cache.tools.machine import describe_machine


# Hidden size and layers of a Bamba: Mamba-2 layers, attention in one layer of four.
MODELS = {"tiny": (128, 4), "1.6b": (2048, 20), "2.9b": (2560, 24)}
VOCABULARY, SUFFIX = 32000, 256


def build(size, device, dtype, seed):
    hidden, layers = MODELS[size]
    config = BambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden if size != "tiny" else 2 * hidden,
        num_hidden_layers=layers,
        attn_layer_indices=list(range(2, layers, 4)),
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        mamba_n_heads=2 * hidden // 64,
        mamba_d_head=64,
        mamba_d_state=64 if size == "tiny" else 128,
        mamba_chunk_size=256,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # drawn where and as they stay: no copy in float32 beside it
    try:
        with torch.device(device):
            model = BambaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:  # by fan-in, so that a lost state shows in the logits
                weight.normal_(0.0, weight.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model.eval()


def questions(prefix, count, seed):
    draw = np.random.RandomState(seed)
    head = draw.randint(3, VOCABULARY, prefix)
    tails = [draw.randint(3, VOCABULARY, SUFFIX) for _ in range(count)]
    return [WorkloadRequest("prefix", np.concatenate([head, tail]).astype(np.int32)) for tail in tails]


def measure(model, prefix, arguments):
    first, second, *again = questions(prefix, 2 + arguments.repeats, arguments.seed)
    stock = Contender(model)
    own = Cached(model, None, "cache", "learned", max_memory=arguments.max_memory, grid=arguments.grid)
    limit = Limit(own)
    warm_up = WorkloadRequest("other", questions(2 * own.handle.grid, 1, arguments.seed + 1)[0].ids)
    for contender in (stock, own):
        contender.serve(warm_up, 2, False)
    cold = {"stock": stock.serve(first, 1, False), "cache": own.serve(first, 1, False)}
    own.serve(second, 1, False)  # a short prompt of which nothing was known is cut where the second one leaves it
    rows = []
    for index, asked in enumerate(again):
        limit.prepare(asked)
        order = [stock, limit, own] if index % 2 == 0 else [own, limit, stock]
        served = {contender.name: contender.serve(asked, arguments.new_tokens, True) for contender in order}
        rows.append({name: result for name, result in served.items() if result is not None})
    twin, last = Replayed(own), rows[-1]["cache"]
    fresh = twin.replay(again[-1], last, arguments.new_tokens)
    stats = own.handle.stats()
    result = {
        "prefix_tokens": prefix,
        "resumed_tokens": last.resumed_tokens,
        "cold_over_stock": cold["cache"].first_token_seconds / cold["stock"].first_token_seconds,
        "stock_seconds": [row["stock"].first_token_seconds for row in rows],
        "cache_seconds": [row["cache"].first_token_seconds for row in rows],
        "sooner": [row["stock"].first_token_seconds / row["cache"].first_token_seconds for row in rows],
        "over_limit": [
            row["cache"].first_token_seconds / row["limit"].first_token_seconds for row in rows if "limit" in row
        ],
        "decode_over_stock": [_per_token(row["cache"]) / _per_token(row["stock"]) for row in rows],
        "stored_bytes": stats.checkpoint_bytes + stats.kv_bytes,
        "held_bytes": own.held_bytes(),
        "stock_peak_bytes": max(row["stock"].device_peak_bytes for row in rows),
        "cache_peak_bytes": max(row["cache"].device_peak_bytes for row in rows),
        "bitwise": bool(torch.equal(last.logits, fresh.logits) and torch.equal(last.tokens, fresh.tokens)),
        "max_abs_logit_diff_to_stock": float((last.logits - rows[-1]["stock"].logits).abs().max()),
    }
    for contender in (twin, limit, own):
        contender.close()
    return result


def _per_token(served):
    return (served.total_seconds - served.first_token_seconds) / max(1, served.new_tokens - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="1.6b")
    parser.add_argument("--prefix", type=int, action="append", help="shared tokens; repeat for more")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-memory", default="16GiB")
    parser.add_argument("--grid", type=int, help="default: what suits the model")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="questions about a known prefix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no accelerator was found; --model tiny --device cpu --prefix 512 tries the program without one")
    model = build(arguments.model, arguments.device, getattr(torch, arguments.dtype), arguments.seed)
    print(f"Bamba, {model.num_parameters() / 1e9:.2f} B parameters, {model.dtype}, random weights, {model.device}")
    results = [measure(model, prefix, arguments) for prefix in arguments.prefix or [4096, 16384, 65536]]
    columns = ("prefix", "resumed", "stock", "cache", "sooner", "over limit", "decode", "cold", "stored", "bitwise")
    print(table(columns, [_cells(result) for result in results]))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
        content = {"command": command, "machine": describe_machine(), "parameters": model.num_parameters()}
        text = json.dumps({**content, "seed": arguments.seed, "results": results}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")


def _cells(result):
    median = statistics.median
    return (
        f"{result['prefix_tokens']:,}",
        f"{result['resumed_tokens']:,}",
        f"{median(result['stock_seconds']):.3f} s",
        f"{median(result['cache_seconds']):.3f} s",
        f"{median(result['sooner']):.1f}× ({min(result['sooner']):.1f} to {max(result['sooner']):.1f})",
        f"{median(result['over_limit']):.2f}×" if result["over_limit"] else "",
        f"{median(result['decode_over_stock']):.3f}×",
        f"{result['cold_over_stock']:.2f}×",
        format_bytes(result["stored_bytes"]),
        "yes" if result["bitwise"] else "NO",
    )


if __name__ == "__main__":
    main()
