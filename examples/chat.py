"""A chat of several turns: each turn reads only what is new in it. python examples/chat.py [MODEL_ID]"""

import sys
from pathlib import Path

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "jamba-3m"  # built in, with random weights; or any Hub id or folder

manual = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
model, tokenizer = load(MODEL_ID, [manual])
if tokenizer.chat_template is None:
    tokenizer.chat_template = "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"

messages = [{"role": "system", "content": f"Answer from this manual.\n{manual}"}]
with SparsePrefixCache(model, tokenizer) as cache:
    for turn in ["What is a checkpoint?", "And what is a cut?", "How are they related?"]:
        messages.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=48, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        info = cache.last_request
        print(
            f"{turn:24} {info.prompt_tokens:,} tokens, of which {info.computed_tokens:,} were computed ({info.reason})"
        )
    print(cache.stats())
