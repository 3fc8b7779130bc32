"""A model whose weights lie on disk, layer by layer, through accelerate: python examples/offload.py [MODEL_ID]

Reading the weights dominates here, and a skipped piece of the prompt is a pass over all layers that is not made.
"""

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import disk_offload

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "jamba-3m"  # built in, with random weights; or any Hub id or folder

document = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text(encoding="utf-8")
model, tokenizer = load(MODEL_ID, [document])

with tempfile.TemporaryDirectory() as folder:
    disk_offload(model, folder, execution_device=torch.device("cpu"))
    with SparsePrefixCache(model, tokenizer) as cache:
        for question in ("\n\nWhat is promised?", "\n\nHow is it checked?", "\n\nWhat breaks it?"):
            inputs = tokenizer(document + question, return_tensors="pt")
            model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
            print(cache.last_request)
