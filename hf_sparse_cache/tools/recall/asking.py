"""Ask a model a question of a manual; and lose what a cache has stored, to see whether the answers notice."""

from typing import Any

import torch

from ...models import ambient
from ...store.store import CheckpointStore
from .manual import CODE_DIGITS, Manual


def manual_ids(tokenizer: Any, manual: Manual, question: str = "") -> torch.Tensor:
    """Token ids `(1, length)` of a manual, with a question behind it."""
    ids: torch.Tensor = tokenizer(manual.text + question, return_tensors="pt")["input_ids"]
    return ids


def answer(model: Any, tokenizer: Any, prompt: torch.Tensor, **options: Any) -> str:
    """What a model says next, as long as a code is: greedy, through `generate()`.

    Args:
        prompt: token ids `(1, length)`.
        options: for `generate()`, such as `past_key_values`.
    """
    prompt = prompt.to(model.device)
    mask = torch.ones_like(prompt)
    with ambient.off():
        written = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=CODE_DIGITS, **options)
    text: str = tokenizer.decode(written[0, prompt.shape[1] :])
    return text.strip()


def lose_states(store: CheckpointStore) -> int:
    """Zero every recurrent and conv state that a store holds in memory; keys and values stay.

    That is what a cache resumes from that forgets the states of recurrent layers, as transformers' own does for
    Mamba-1. Only for showing what would happen: nothing that a handle says from this store afterwards is right.

    Returns:
        How many checkpoints lost their state.
    """
    lost = store.stored()
    for checkpoint in lost:
        state: Any = checkpoint.state  # of the fastest tier, whose payloads are tensors
        for layer in state.layers:
            for value in layer.values():
                if torch.is_tensor(value):
                    value.zero_()
    return len(lost)
