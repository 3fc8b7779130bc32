"""Keep what was read for the next process: python examples/save_and_reload.py [MODEL_ID]

The folder reveals the prompts. It is readable by its owner alone, and is refused by another model or other weights.
"""

import sys
import tempfile
from pathlib import Path

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "jamba-3m"  # built in, with random weights; or any Hub id or folder

document = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text(encoding="utf-8")
model, tokenizer = load(MODEL_ID, [document])


def ask(cache: SparsePrefixCache, question: str) -> None:
    """Read the document and one question."""
    inputs = tokenizer(document + question, return_tensors="pt").to(model.device)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=4)
    info = cache.last_request
    print(f"{info.resumed_tokens:,} of {info.prompt_tokens:,} tokens resumed ({info.reason})")


with tempfile.TemporaryDirectory() as folder:
    with SparsePrefixCache(model, tokenizer) as cache:
        ask(cache, "\n\nWhat is promised?")
        print(cache.save_pretrained(folder), "checkpoints saved")

    with SparsePrefixCache.from_pretrained(folder, model, tokenizer) as cache:  # in another process, or on another day
        ask(cache, "\n\nWhat breaks it?")
