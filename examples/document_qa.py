"""Questions about one long document, timed with the cache and without it: python examples/document_qa.py [MODEL_ID]"""

import sys
import time
from pathlib import Path

from hf_sparse_cache import SparsePrefixCache, check_exactness
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "mamba-3m"  # built in, with random weights; or any Hub id or folder

document = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
questions = [
    "Why does nothing hit?",
    "When is a model refused?",
    "What does clear() do?",
    "Which error names the padding?",
]
model, tokenizer = load(MODEL_ID, [document])


def first_token_seconds(prompt: str, **options: object) -> float:
    """Wall time of the prefill and one token."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    clock = time.perf_counter()
    model.generate(**inputs, max_new_tokens=1, do_sample=False, **options)
    return time.perf_counter() - clock


with SparsePrefixCache(model, tokenizer) as cache:
    for question in questions:
        prompt = f"{document}\n\nQuestion: {question}\nAnswer:"
        cached = first_token_seconds(prompt, past_key_values=cache)
        stock = first_token_seconds(prompt)
        computed = cache.last_request.computed_tokens
        print(f"{question:32} computed {computed:5,} tokens · {cached:.3f} s cached · {stock:.3f} s uncached")
    print(check_exactness(model, [prompt], cache=cache))
