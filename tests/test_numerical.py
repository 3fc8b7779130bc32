"""Numerical mode: checkpoints anywhere, equal to stock to rounding."""

import pytest
import torch
from tiny_models import build, random_ids

from hf_sparse_cache import SparsePrefixCache, check_exactness
from hf_sparse_cache.planning.cuts import with_free_cuts


DOCUMENT = random_ids(171, seed=1)  # not on any grid


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", ["Mamba", "Zamba2", "Qwen3.5", "Gemma3", "Llama"])
def test_resumes_off_the_grid(family: str, dtype: torch.dtype, tolerance: float) -> None:
    if dtype == torch.float64 and family != "Mamba" and family != "Llama":
        tolerance = 1e-4  # these families compute parts of a layer in float32 whatever the dtype
    model = build(family, dtype=dtype)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with SparsePrefixCache(model, grid=64, policy="junction", exactness="numerical") as cache:
        for seed in range(4):
            prompt = torch.cat([DOCUMENT, random_ids(20 + seed, seed=2 + seed)], dim=1)
            expected = torch.stack(model.generate(prompt, **options).logits)
            got = torch.stack(model.generate(prompt, past_key_values=cache, **options).logits)
            assert (got - expected).abs().max() <= tolerance
        assert cache.last_request.resumed_tokens == 171  # the junction itself
        for _, _, checkpoint in cache.store.checkpoints():
            for layer in checkpoint.state.layers:
                for value in layer.values():
                    if torch.is_tensor(value):
                        value.zero_()
        wiped = torch.stack(model.generate(prompt, past_key_values=cache, **options).logits)
        if family != "Llama":  # its checkpoints hold nothing but keys and values
            assert (wiped - expected).abs().max() > 1e-3


@pytest.mark.parametrize("tight", [False, True])
def test_a_conversation_that_grows_and_comes_back(tight: bool) -> None:
    """Two chains of keys and values over one span are two: none takes the other's entry, and all of it is cleared."""
    model = build("Jamba")
    text = random_ids(700, seed=0)
    with SparsePrefixCache(model, exactness="numerical", grid=128) as sizes:
        budget = 3 * sizes.size.state_bytes + 900 * sizes.size.kv_bytes_per_token
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    memory = budget if tight else "2GiB"
    with SparsePrefixCache(model, exactness="numerical", grid=128, max_memory=memory) as cache:
        for number, length in enumerate((200, 330, 470, 600, 270, 410, 540, 200, 480, 330, 610, 700)):
            prompt = text[:, :length]
            got = torch.stack(model.generate(prompt, past_key_values=cache, **options).logits)
            cache.store.verify()
            if number % 4 == 3:
                expected = torch.stack(model.generate(prompt, **options).logits)
                assert (got - expected).abs().max() <= 1e-4
        assert cache.stats().resumed_tokens > 1000 and (cache.stats().evictions > 0) == tight
        cache.clear()
        cache.store.verify()
        assert cache.store.used_bytes == cache.store.remembered_tokens == cache.stats().tree_bytes == 0
        model.generate(prompt, past_key_values=cache, **options)
        assert cache.last_request.resumed_tokens == 0


def test_the_check_asks_for_the_tolerance_alone() -> None:
    model = build("Mamba")
    prompts = [torch.cat([DOCUMENT, random_ids(30, seed=seed)], dim=1) for seed in (2, 3)]
    with SparsePrefixCache(model, grid=64, policy="junction", exactness="numerical") as cache:
        assert check_exactness(model, prompts, cache=cache).passed
        for _, _, checkpoint in cache.store.checkpoints():
            for layer in checkpoint.state.layers:
                layer["recurrent.0"].zero_()
        assert not check_exactness(model, prompts, cache=cache).passed


def test_free_cuts_leave_no_segment_of_one_token() -> None:
    regular = torch.arange(64, 200, 64).numpy()
    assert with_free_cuts(regular, (65, 200), 200).tolist() == [65, 128, 192, 200]
    assert with_free_cuts(regular, (199, 1, 0), 200).tolist() == [64, 128, 192]
    assert with_free_cuts(regular[:0], (2,), 2).tolist() == [2]
