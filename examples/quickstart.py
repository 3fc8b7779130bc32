"""The five lines that matter, on a small built-in model: python examples/quickstart.py [MODEL_ID]"""

import sys
from pathlib import Path

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "jamba-3m"  # built in, with random weights; or any Hub id or folder

document = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
questions = ["\n\nWhat is a cut?", "\n\nWhat is a checkpoint?", "\n\nWho holds the handle?"]
model, tokenizer = load(MODEL_ID, [document])

cache = SparsePrefixCache(model, tokenizer, max_memory="500MB")
for question in questions:
    inputs = tokenizer(document + question, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=8)
    print(question.strip(), "->", cache.last_request)
print(cache.stats())
