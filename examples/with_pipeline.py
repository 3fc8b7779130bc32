"""The cache in a text-generation pipeline, with sampling: python examples/with_pipeline.py [MODEL_ID]"""

import sys
from pathlib import Path

import torch
from transformers import pipeline

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "jamba-3m"  # built in, with random weights; or any Hub id or folder

document = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text(encoding="utf-8")
model, tokenizer = load(MODEL_ID, [document])
write = pipeline("text-generation", model=model, tokenizer=tokenizer)

with SparsePrefixCache(model, tokenizer) as cache:
    for question in ("\n\nWhat is promised?", "\n\nHow is it checked?", "\n\nWhat breaks it?"):
        torch.manual_seed(0)
        result = write(
            document + question, past_key_values=cache, max_new_tokens=12, do_sample=True, return_full_text=False
        )
        print(repr(result[0]["generated_text"]), "·", cache.last_request.resumed_tokens, "tokens resumed")
