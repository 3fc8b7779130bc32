"""Several models under one budget of memory, and tenants that never meet: python examples/shared_budget.py"""

import sys
from pathlib import Path

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_IDS = sys.argv[1:] or ["mamba-3m", "jamba-3m"]  # built in, with random weights; or any Hub ids or folders

document = (Path(__file__).parents[1] / "docs" / "comparison.md").read_text(encoding="utf-8")
store = CheckpointStore(max_memory="300MB")

for name in MODEL_IDS:
    model, tokenizer = load(name, [document])
    for tenant in ("anna", "ben"):
        with SparsePrefixCache(model, tokenizer, store=store, namespace=tenant) as cache:
            for question in ("\n\nWhich one is a server?", "\n\nWhich one is wrong on Mamba?"):
                inputs = tokenizer(document + question, return_tensors="pt").to(model.device)
                model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
                info = cache.last_request
                print(
                    f"{name} for {tenant}: {info.resumed_tokens:,} of {info.prompt_tokens:,} resumed ({info.reason})"
                )
    print(f"the store holds {len(store)} checkpoints, {store.used_bytes:,} of {store.max_memory:,} bytes")
