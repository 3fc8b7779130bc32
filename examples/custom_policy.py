"""A placement policy of your own is one class with one verb: python examples/custom_policy.py [MODEL_ID]"""

import sys
from pathlib import Path

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.planning.policies import Policy, Prompt
from hf_sparse_cache.tools.builtin import load


MODEL_ID = sys.argv[1] if len(sys.argv) > 1 else "jamba-3m"  # built in, with random weights; or any Hub id or folder


class LastFew(Policy):
    """The last few cuts of every prompt, and the place where it left the known path."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.count = count

    def place(self, prompt: Prompt) -> list[int]:
        """Cuts behind the resumed position; `snap` finds the cut at or before any position."""
        return [*prompt.snap([prompt.overlap]), *prompt.open_cuts[-self.count :].tolist()]


document = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
model, tokenizer = load(MODEL_ID, [document])
for policy in ("balanced", "last", LastFew()):
    with SparsePrefixCache(model, tokenizer, policy=policy) as cache:
        for question in ("\n\nWhat is a cut?", "\n\nWhat is a checkpoint?", "\n\nWhat is the grid?"):
            inputs = tokenizer(document + question, return_tensors="pt").to(model.device)
            model.generate(**inputs, past_key_values=cache, max_new_tokens=1)
        print(f"{policy if isinstance(policy, str) else type(policy).__name__:10} {cache.stats()}")
