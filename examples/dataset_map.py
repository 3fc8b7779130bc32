"""A column of answers for a dataset, with Dataset.map() in batches: python examples/dataset_map.py [MODEL_ID]

Needs `pip install datasets`. Rows about the same document lie beside each other: a batch computes a document once, and
the next batch resumes where the last one ended.
"""

import sys
from pathlib import Path

from datasets import Dataset, disable_progress_bars

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "zamba2-3m"  # built in, with random weights; or any Hub id or folder

folder = Path(__file__).parents[1] / "docs"
documents = {name: (folder / f"{name}.md").read_text(encoding="utf-8")[:3000] for name in ("exactness", "planning")}
model, tokenizer = load(MODEL_ID, documents.values())
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
questions = ["What is promised?", "What is a cut?", "How is it checked?", "What does it cost?", "When is it refused?"]
rows = [{"document": name, "question": question} for name in documents for question in questions]
disable_progress_bars()

with SparsePrefixCache(model, tokenizer) as cache:

    def answered(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        pairs = zip(batch["document"], batch["question"], strict=True)
        prompts = [f"{documents[name]}\n\nQuestion: {question}\nAnswer:" for name, question in pairs]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
        return {"answer": tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])}

    # A name of its own for the result: otherwise map() would pickle the model to find one.
    table = Dataset.from_list(rows).map(answered, batched=True, batch_size=4, new_fingerprint="answered")
    print(table[0]["question"], "->", repr(table[0]["answer"]), f"and {len(table) - 1} more")
    print(cache.stats())
