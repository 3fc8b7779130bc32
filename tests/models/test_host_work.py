"""What a warm request makes the host do beside the model, counted in calls and in torch operations.

On an accelerator the host's time is what a short question waits for. Seconds depend on the machine; counts do not.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tiny_models import random_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Zamba2Config, Zamba2ForCausalLM

import hf_sparse_cache
from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models import rounding
from hf_sparse_cache.models.rounding import own


PACKAGE = str(Path(hf_sparse_cache.__file__).parent)
LAYERS = (8, 38)
MOST_CALLS, MOST_OPERATIONS = 150.0, 4.0  # a layer


def deep(layers: int) -> Any:
    """A Zamba2 of so many narrow layers, every sixth with attention."""
    config = Zamba2Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=layers,
        layers_block_type=["hybrid" if index % 6 == 5 else "linear_attention" for index in range(layers)],
        intermediate_size=32,
        num_attention_heads=2,
        n_mamba_heads=2,
        mamba_d_state=8,
        chunk_size=16,
        num_mem_blocks=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return Zamba2ForCausalLM(config).eval()


class Operations(TorchDispatchMode):
    """Counts what torch is told to do, but for views: they launch nothing, and are of host memory alone."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def ask(model: Any, ids: torch.Tensor, cache: SparsePrefixCache) -> None:
    model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)


def counted(layers: int) -> tuple[int, int]:
    """Calls of functions of the package, and operations beyond those of the forward, of a third question."""
    model = deep(layers)
    document = random_ids(200, seed=1)
    prompts = [torch.cat([document, random_ids(20, seed=seed)], dim=1) for seed in (2, 3, 4, 5)]
    calls: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[frame.f_code.co_qualname] += 1

    with SparsePrefixCache(model, grid=16) as cache:
        cache.mark(document)
        for prompt in prompts[:2]:
            ask(model, prompt, cache)
        sys.setprofile(watch)
        try:
            ask(model, prompts[2], cache)
        finally:
            sys.setprofile(None)
        with Operations() as whole:
            ask(model, prompts[3], cache)
        info = cache.last_request
        assert info is not None and info.resumed_tokens >= 192
        live = cache.server.binding.live_cache()
        with Operations() as forward, torch.no_grad():
            names = {cache.server.binding.cache_name: live}
            model(prompts[3][:, : info.computed_tokens], use_cache=True, logits_to_keep=1, **names)
    return sum(calls.values()), whole.count - forward.count


def by_layer() -> tuple[float, float]:
    """Calls and operations that one more layer costs."""
    few, many = counted(LAYERS[0]), counted(LAYERS[1])
    calls, operations = ((more - less) / (LAYERS[1] - LAYERS[0]) for less, more in zip(few, many, strict=True))
    return calls, operations


def test_a_layer_costs_few_calls_and_a_copy_for_each_of_its_states() -> None:
    calls, operations = by_layer()
    assert calls <= MOST_CALLS
    assert operations <= MOST_OPERATIONS


def test_the_twin_that_copies_once_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "own", lambda tensor: own(own(tensor)))
    assert by_layer()[1] > MOST_OPERATIONS
