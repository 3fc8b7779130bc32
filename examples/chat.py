"""A chat of several turns: each turn reads only what is new in it. python examples/chat.py [MODEL_ID]

The ids of every answer are kept, and the next message is put behind them. An answer that is decoded and tokenised
again often has other tokens, and then the next turn reads it from the first one that differs.
"""

import sys
from pathlib import Path

import torch

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "jamba-3m"  # built in, with random weights; or any Hub id or folder

manual = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
model, tokenizer = load(MODEL_ID, [manual])
if tokenizer.chat_template is None:
    tokenizer.chat_template = "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"


def ids_of(*messages: dict[str, str]) -> torch.Tensor:
    """Messages as ids `(1, length)`; a template that must begin with a system message needs one here as well."""
    rendered = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return rendered["input_ids"].to(model.device)


text = ids_of({"role": "system", "content": f"Answer from this manual.\n{manual}"})
with SparsePrefixCache(model, tokenizer) as cache:
    for turn in ["What is a checkpoint?", "And what is a cut?", "How are they related?"]:
        prompt = torch.cat([text, ids_of({"role": "user", "content": turn})], dim=1)
        text = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=48, do_sample=False
        )
        info = cache.last_request
        print(
            f"{turn:24} {info.prompt_tokens:,} tokens, of which {info.computed_tokens:,} were computed ({info.reason})"
        )
    print(cache.stats())
