"""How far states in 16 and in 8 bits move the logits of each family: `python -m benchmarks.bench_storage`.

On the tiny models of the tests, in float32: prompts of 160 tokens are rounded once, at token 128, and the logits of
their last 9 tokens are compared with those of the same prompt in one piece. Each part of a state is tried in 8 bits by
itself (the others in 16), and all together. `models/deviation.py` follows from the figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.outputs import results_file, write_results
from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models import prefill, states
from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.models.rounding import PARTS, rounding_of
from hf_sparse_cache.tools.machine import describe_machine


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TOKENS, CUT, KEPT, ROWS = 160, 128, 9, 50
RESULTS = Path(__file__).parent / "results" / "storage_deviation.json"
KWARGS = {"use_cache": True, "logits_to_keep": KEPT}
WAYS: dict[str, Any] = {
    "bf16": rounding_of("bf16"),
    "int8": rounding_of("int8"),
    **{f"int8: {part}": rounding_of("int8", (part,)) for part in PARTS},
    **{f"int8: all but {part}": rounding_of("int8", set(PARTS) - {part}) for part in PARTS},
}


@torch.no_grad()
def measure(family: str, prompts: int) -> dict[str, Any]:
    """The largest and the median difference of each way over the prompts of a family."""
    from matrix import build_shared
    from tiny_models import random_ids

    found: dict[str, list[float]] = {way: [] for way in WAYS}
    scale = 0.0
    with SparsePrefixCache(build_shared(family)) as cache:
        binding = cache.server.binding
        for seed in range(-(-prompts // ROWS)):
            row = Row(random_ids(TOKENS, seed=1000 + seed, batch=min(ROWS, prompts)), KWARGS)
            stock = prefill.segment(binding, binding.live_cache(), row, TOKENS).logits[:, -KEPT:]
            scale = max(scale, float(stock.abs().max()))
            first = binding.live_cache()
            prefill.segment(binding, first, row, CUT)
            for way, rounding in WAYS.items():
                state = states.capture_state(first, rounding)
                kv = [states.capture_kv(first, 0, CUT, rounding)] if first.full_attention_layers else []
                live = binding.live_cache()
                states.restore(live, state, kv, rounding)
                live.length = CUT
                logits = prefill.segment(binding, live, row, TOKENS).logits[:, -KEPT:]
                found[way] += (logits - stock).abs().flatten(1).amax(1).tolist()
    ways = {way: {"largest": max(each), "median": sorted(each)[len(each) // 2]} for way, each in found.items()}
    return {"logits_up_to": scale, "ways": ways}


def main() -> None:
    """Measures the families that are named, or all."""
    from matrix import supported_families

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--prompts", type=int, default=200, help="of each family")
    parser.add_argument("--out", type=results_file, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"prompts": asked.prompts, "machine": describe_machine(), "families": {}}
    for family in asked.families or supported_families():
        measured = found["families"][family] = measure(family, asked.prompts)
        row = ", ".join(f"{way} {each['largest']:.1e}" for way, each in measured["ways"].items())
        print(f"{family}: logits up to {measured['logits_up_to']:.1f}; largest difference {row}", flush=True)
    write_results(asked.out, found)


if __name__ == "__main__":
    main()
