"""Tiny causal language models, one per family, with seeded random weights: no download, no accelerator.

`build` makes one; `state_sensitivity` says how much its logits depend on what it carries from token to token, so that
a check of exactness on it can fail.
"""

import inspect
from collections.abc import Iterable, Iterator

import torch
import transformers
from tiny_families import FAMILIES, FIRST_WORD, LAST_WORD
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_sparse_cache.models.families import cache_name_of
from hf_sparse_cache.tools.random_weights import cast_weights, draw_weights


def available_families() -> list[str]:
    """Labels of the families that the installed transformers has."""
    return [label for label, family in FAMILIES.items() if family.available]


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Build the tiny model of one family, in evaluation mode, the same for the same `seed` in every run."""
    if name not in FAMILIES:
        raise ValueError(f"name={name!r} is not a family; choose one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if not family.available:
        raise ValueError(f"{family.class_name} is not in transformers {transformers.__version__}; upgrade to test it")
    model_class = getattr(transformers, family.class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the few values that draw_weights leaves as the family initialises them
        model = model_class(model_class.config_class(**family.config))
    draw_weights(model, seed, family.embedding_scale)
    model.generation_config.eos_token_id = None  # random decoding never stops early
    if dtype == torch.float64 and getattr(model.config, "_experts_implementation", "eager") != "eager":
        model.set_experts_implementation("eager")  # the grouped matrix product has no float64
    return cast_weights(model, dtype).eval()


def random_ids(length: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Token ids of shape (batch, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, LAST_WORD + 1, (batch, length), generator=generator)


def state_sensitivity(model: PreTrainedModel, kind: str, prefix_tokens: int = 64, steps: int = 16) -> float:
    """Largest logit difference over `steps` decoded tokens when all states of one kind are zeroed after the prefix.

    One token at a time, because that is the one path on which every family of transformers reads its state.

    Args:
        model: a model from `build`.
        kind: "recurrent" or "conv".
        prefix_tokens: tokens consumed before the states are zeroed.
        steps: tokens decoded after it.
    """
    ids = random_ids(prefix_tokens + steps)
    kept = _decode(model, ids, prefix_tokens, wiped_kind=None)
    wiped = _decode(model, ids, prefix_tokens, wiped_kind=kind)
    return (kept - wiped).abs().max().item()


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor) -> tuple[str, object]:
    """Consume `ids` with the family's own cache; return the name under which `forward` takes it, and the cache."""
    inputs: dict[str, object] = {"input_ids": ids, "use_cache": True}
    if hasattr(model, "_setup_cache"):  # RecurrentGemma resets its modules only here, and does not return its cache
        model._setup_cache(model.config, ids.shape[0], ids.device, model.dtype)
        inputs[cache_name_of(model)] = DynamicCache(config=model.config)
    output = {**inputs, **model(**inputs)}
    name = next(name for name in ("cache", "past_key_values", "cache_params", "state") if output.get(name) is not None)
    return name, output[name]


@torch.no_grad()
def _decode(model: PreTrainedModel, ids: Tensor, prefix_tokens: int, wiped_kind: str | None) -> Tensor:
    accepts_positions = "position_ids" in inspect.signature(model.forward).parameters
    cache_name, cache = prefill(model, ids[:, :prefix_tokens])
    if wiped_kind is not None:
        for tensor in carried_states(model, cache, wiped_kind):
            tensor.zero_()
    logits = []
    for position in range(prefix_tokens, ids.shape[1]):
        inputs = {"input_ids": ids[:, position : position + 1], cache_name: cache, "use_cache": True}
        if accepts_positions:
            inputs["position_ids"] = torch.full((ids.shape[0], 1), position)
        logits.append(model(**inputs).logits)
    return torch.cat(logits, dim=1)


def carried_states(model: PreTrainedModel, cache: object, kind: str) -> Iterator[Tensor]:
    """The live tensors of one kind ("recurrent" or "conv") that `model` carries in `cache`, or on its own modules."""
    attribute = f"{kind}_states"
    for layer in getattr(cache, "layers", []):
        yield from _tensors(getattr(layer, attribute, {}).values())
    if kind == "recurrent":
        yield from _tensors(getattr(cache, "linear_cache", []))  # MiniMax
        for states in getattr(cache, "rnn_state", {}).values():  # xLSTM
            yield from _tensors(states)
    if isinstance(cache, list):  # RWKV: two shifted inputs, then numerator, denominator and running maximum
        yield from cache[2:4] if kind == "recurrent" else cache[:2]
    for module in model.modules():  # RecurrentGemma
        yield from _tensors([getattr(module, "recurrent_states" if kind == "recurrent" else "conv1d_state", None)])


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor))
