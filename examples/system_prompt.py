"""Many users, one system prompt, and the place where they part: python examples/system_prompt.py [MODEL_ID]"""

import sys
from pathlib import Path

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "zamba2-3m"  # built in, with random weights; or any Hub id or folder

rules = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text(encoding="utf-8")
users = [
    "Is bfloat16 exact?",
    "What does wiped mean?",
    "Hello!",
    "May I train the model in between?",
    "Which threads?",
]
model, tokenizer = load(MODEL_ID, [rules])

# The separator is a special token: as the tokenizer is known, the prompt is cut there, whatever its length.
separator = tokenizer.eos_token or "\n\n"
with SparsePrefixCache(model, tokenizer) as cache:
    for user in users:
        inputs = tokenizer(f"{rules}{separator}{user}", return_tensors="pt").to(model.device)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=4)
        info = cache.last_request
        print(f"{user:36} overlap {info.overlap_tokens:5,} · resumed {info.resumed_tokens:5,} · {info.reason}")
    print(cache.stats())
