"""A text-generation pipeline with batch_size=8 over many prompts: python examples/batched_pipeline.py [MODEL_ID]

The pipeline makes the batches. What rows of one batch share is computed once, at the first batch already, and what
later batches share with it is resumed. A batch is padded on the left, as for every generation.
"""

import sys
from pathlib import Path

from transformers import pipeline

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "jamba-3m"  # built in, with random weights; or any Hub id or folder

document = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text(encoding="utf-8")[:4000]
words = (
    "mode",
    "cut",
    "lineage",
    "segment",
    "tolerance",
    "replay",
    "dtype",
    "device",
    "policy",
    "tier",
    "check",
    "grid",
)
model, tokenizer = load(MODEL_ID, [document])
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
write = pipeline("text-generation", model=model, tokenizer=tokenizer)

with SparsePrefixCache(model, tokenizer, ambient=True) as cache:  # the pipeline need not be told
    prompts = [f"{document}\n\nQuestion: What is said of the word {word}?\nAnswer:" for word in words]
    with cache.record() as requests:
        answers = write(prompts, batch_size=8, max_new_tokens=4, do_sample=False, return_full_text=False)
    for start in range(0, len(requests), 8):
        rows = requests[start : start + 8]
        computed = sum(row.computed_tokens for row in rows)
        print(f"{len(rows)} rows of {sum(row.prompt_tokens for row in rows):,} tokens, {computed:,} of them computed")
    print(len(answers), "answers:", cache.stats())
