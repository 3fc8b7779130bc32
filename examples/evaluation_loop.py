"""An evaluation in batches behind one few-shot text, computed once: python examples/evaluation_loop.py [MODEL_ID]"""

import sys

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "jamba-3m"  # built in, with random weights; or any Hub id or folder
BATCH = 8

sums = [(one, other) for one in range(2, 12) for other in range(3, 9)]
shots = "\n\n".join(f"Question: What is {one} plus {other}?\nAnswer: {one + other}" for one, other in sums[:36])
tasks = [(f"{shots}\n\nQuestion: What is {one} plus {other}?\nAnswer:", str(one + other)) for one, other in sums[36:]]
model, tokenizer = load(MODEL_ID, [shots])
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

right = 0
with SparsePrefixCache(model, tokenizer) as cache:
    for start in range(0, len(tasks), BATCH):
        prompts, wanted = zip(*tasks[start : start + BATCH], strict=True)
        inputs = tokenizer(list(prompts), padding=True, return_tensors="pt").to(model.device)
        with cache.record() as rows:
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        right += sum(answer.strip() == number for answer, number in zip(answers, wanted, strict=True))
        computed, together = sum(row.computed_tokens for row in rows), sum(row.batched for row in rows)
        print(f"{len(rows)} prompts, {computed:,} tokens computed, {together} rows in one forward with others")
    print(f"{right} of {len(tasks)} right, as random weights have it. {cache.stats()}")
