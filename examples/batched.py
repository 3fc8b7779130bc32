"""Several questions in one left-padded batch; every row resumes by itself: python examples/batched.py [MODEL_ID]"""

import sys
from pathlib import Path

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "zamba2-3m"  # built in, with random weights; or any Hub id or folder

document = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text(encoding="utf-8")
questions = ["What is promised?", "How is it checked, and by whom?", "What breaks it?", "What is promised?"]
model, tokenizer = load(MODEL_ID, [document])
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

with SparsePrefixCache(model, tokenizer) as cache:
    prompts = [f"{document}\n\nQuestion: {question}\nAnswer:" for question in questions]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    print(f"{len(output)} answers; equal questions are computed once, so {cache.stats().requests} prompts were read")
    print(cache.stats())
