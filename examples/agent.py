"""An agent whose context grows with every tool call, and which tries two ways on from the same step.

python examples/agent.py [MODEL_ID]
"""

import sys
from pathlib import Path

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "qwen3.5-3m"  # built in, with random weights; or any Hub id or folder

docs = Path(__file__).parents[1] / "docs"
pages = {path.stem: path.read_text(encoding="utf-8") for path in sorted(docs.glob("*.md"))}
model, tokenizer = load(MODEL_ID, pages.values())
end = tokenizer.eos_token or "\n\n"


def think(context: str) -> None:
    """One step of the agent: read the context, decide what to do next."""
    inputs = tokenizer(context, return_tensors="pt").to(model.device)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
    info = cache.last_request
    print(f"{info.prompt_tokens:6,} tokens · resumed {info.resumed_tokens:6,} · computed {info.computed_tokens:5,}")


with SparsePrefixCache(model, tokenizer) as cache:
    context = f"You may call open(page). Pages: {', '.join(pages)}.{end}"
    for page in ("exactness", "troubleshooting"):
        context += f"open({page}){end}{pages[page][:3000]}{end}"
        think(context)
    print("two ways on from here:")
    for page in ("concepts", "comparison"):
        think(f"{context}open({page}){end}{pages[page][:1500]}{end}")
    print(cache.stats())
