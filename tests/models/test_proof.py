"""A handle proves its binding: honest models pass, whatever breaks upstream is refused or right, never silent."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import DTYPES, Bench, supported_families
from tiny_models import build
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.models.llama import modeling_llama
from transformers.models.mamba2 import modeling_mamba2

from hf_sparse_cache import SparsePrefixCache, UnsupportedModelError
from hf_sparse_cache.models import mamba1, proof, rounding, states
from hf_sparse_cache.models.families import CACHE_NAMES
from hf_sparse_cache.models.weights import identity


Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", supported_families())
def test_honest_models_pass(family: str, dtype: str) -> None:
    with SparsePrefixCache(build(family, DTYPES[dtype]), exactness="bitwise") as cache:
        assert cache.stats().proved


def test_the_sample_has_ordinary_tokens_whatever_the_configuration_names() -> None:
    """Some models stand for an image by a number that is no token at all."""
    model = build("Jamba")
    with SparsePrefixCache(model, exactness="bitwise") as cache:
        vocabulary = model.config.vocab_size
        own = proof.sample_prompt(cache.server.binding, 3)
        model.config.image_token_index, model.config.audio_token_id = -200, vocabulary + 7
        model.config.video_token_id = [-1, -vocabulary, vocabulary - 1]
        try:
            drawn = proof.sample_prompt(cache.server.binding, 3)
            assert int(drawn.max()) < vocabulary - 1 and drawn.shape == own.shape
            model.config.video_token_id = [-1]
            assert torch.equal(proof.sample_prompt(cache.server.binding, 3), own)
        finally:
            del model.config.image_token_index, model.config.audio_token_id, model.config.video_token_id


# -- ten ways and more to break upstream ------------------------------------------------------------------------------


def upstreams(function: Any, own: Any) -> Any:
    """As if a version of transformers had it; what others put in its place is code that is attached."""
    function.__module__ = own.__module__
    return function


def method_gone(patch: Patch) -> None:
    patch.delattr(GenerationMixin, "_prefill")


def method_with_other_parameters(patch: Patch) -> None:
    own = GenerationMixin._validate_model_kwargs
    patch.setattr(GenerationMixin, "_validate_model_kwargs", lambda self, given: own(self, given))


def cache_method_renamed(patch: Patch) -> None:
    patch.delattr(DynamicCache.__mro__[1], "update_recurrent_state")


def forgetful_scan(patch: Patch) -> None:
    """As upstream was for the Mamba-1 families: the state is announced and no scan asks for it."""
    patch.setattr(mamba1, "announce", lambda state: None)


def scan_under_another_name(patch: Patch) -> None:
    """Held where nobody finds it."""
    patch.setattr(mamba1, "_scans_of", lambda kind: [])


def extra_state(patch: Patch) -> None:
    own = LinearAttentionLayer.update_recurrent_state

    def update(self: Any, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.momentum = recurrent_states * 0.5
        return own(self, recurrent_states, *args, **kwargs)

    patch.setattr(LinearAttentionLayer, "update_recurrent_state", update)


def state_elsewhere(patch: Patch) -> None:
    """A part of the state that lives in a module of transformers, shared by all caches."""
    own, kept = LinearAttentionLayer.update_recurrent_state, {"sum": 0.0}

    def update(self: Any, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept["sum"] = 0.5 * kept["sum"] + float(recurrent_states.mean())
        return own(self, recurrent_states + kept["sum"], *args, **kwargs)

    patch.setattr(LinearAttentionLayer, "update_recurrent_state", update)


def recurrent_state_ignored(patch: Patch) -> None:
    own = modeling_mamba2.mamba2_chunk_scan

    def scan(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "initial_states": None})

    patch.setattr(modeling_mamba2, "mamba2_chunk_scan", upstreams(scan, own))


def conv_state_not_continued(patch: Patch) -> None:
    own = LinearAttentionLayer.update_conv_state

    def update(self: Any, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        full = own(self, conv_states, *args, **kwargs)
        fresh = torch.zeros_like(full)
        fresh[..., -conv_states.shape[-1] :] = conv_states
        return fresh

    patch.setattr(LinearAttentionLayer, "update_conv_state", update)


def flag_renamed(patch: Patch) -> None:
    """`has_previous_state` is still there, and means nothing any more."""
    own = LinearAttentionLayer.update_conv_state

    def update(self: Any, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.has_previous_state[0] = getattr(self, "went_before", False)
        self.went_before = True
        return own(self, conv_states, *args, **kwargs)

    patch.setattr(LinearAttentionLayer, "update_conv_state", update)


def counter_beside_the_state(patch: Patch) -> None:
    """A number on the layer that decides something and that no rule restores."""
    own = LinearAttentionLayer.update_recurrent_state

    def update(self: Any, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return own(self, recurrent_states, *args, **kwargs)

    patch.setattr(LinearAttentionLayer, "update_recurrent_state", update)


def captured_in_place(patch: Patch) -> None:
    for room in (rounding, states):
        patch.setattr(room, "own", lambda tensor: tensor.detach())


def default_changed(patch: Patch) -> None:
    """The cache goes into a keyword that the forward no longer looks at."""
    own = modeling_mamba2.Mamba2Model.forward

    def forward(self: Any, *args: Any, use_cache: Any = None, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
        output = own(self, *args, use_cache=False, **kwargs)
        for name, cache in given.items():
            setattr(output, name, cache)
        return output

    patch.setattr(modeling_mamba2.Mamba2Model, "forward", upstreams(forward, own))


def last_layer_forgets(patch: Patch) -> None:
    """The keys and values are all there, in the last layer only nobody looks at those before the segment."""
    own = modeling_llama.LlamaAttention.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx == 3:
            caches = {name: Forgetting(kwargs[name]) for name in CACHE_NAMES if kwargs.get(name) is not None}
            kwargs = {**kwargs, **caches, "attention_mask": None}
        return own(self, hidden_states, *args, **kwargs)

    patch.setattr(modeling_llama.LlamaAttention, "forward", upstreams(forward, own))


class Forgetting:
    """Takes keys and values, and gives back the new ones alone."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._cache.update(keys, values, *args, **kwargs)
        return keys, values


def keys_elsewhere(patch: Patch) -> None:
    """Half of the values live in a tensor of another name."""
    own = DynamicLayer.update

    def update(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.scales = values.abs().amax()
        return own(self, keys, values, *args, **kwargs)

    patch.setattr(DynamicLayer, "update", update)


BREAKS: list[tuple[Callable[[Patch], None], str, str]] = [
    (method_gone, "Mamba2", "has no _prefill"),
    (method_with_other_parameters, "Jamba", "_validate_model_kwargs takes no model_kwargs"),
    (cache_method_renamed, "Mamba2", "update_recurrent_state"),
    (forgetful_scan, "Jamba", "after two pieces"),
    (scan_under_another_name, "Mamba", "its scan did not take it"),
    (extra_state, "Mamba2", "keeps tensors in momentum"),
    (state_elsewhere, "Mamba2", "does not continue as before"),
    (recurrent_state_ignored, "Mamba2", "after two pieces"),
    (conv_state_not_continued, "Mamba2", "after two pieces"),
    (conv_state_not_continued, "LFM2", "after two pieces"),
    (flag_renamed, "Mamba2", "does not continue as before"),
    (counter_beside_the_state, "Jamba", "calls of layer 0"),
    (captured_in_place, "Mamba2", "does not continue as before|changes when the model goes on"),
    (default_changed, "Mamba2", "keeps nothing in the cache"),
    (last_layer_forgets, "Llama", "the logits"),
    (keys_elsewhere, "Llama", "keeps tensors in scales"),
]


@pytest.mark.parametrize(
    ("how", "family", "reason"), BREAKS, ids=[f"{how.__name__}-{name}" for how, name, _ in BREAKS]
)
def test_what_breaks_upstream_is_refused(
    how: Callable[[Patch], None], family: str, reason: str, monkeypatch: Patch
) -> None:
    model = build(family)
    before, random = dict(vars(model)), torch.get_rng_state()
    how(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=reason):
        SparsePrefixCache(model, grid=16, exactness="bitwise")
    assert dict(vars(model)) == before and torch.equal(torch.get_rng_state(), random)
    assert not mamba1._bound
    monkeypatch.undo()
    with SparsePrefixCache(build(family), grid=16, exactness="bitwise") as cache:
        assert cache.stats().proved


def test_every_method_that_is_used_is_there() -> None:
    """The checks look at what upstream has: not one of them is for a name that is gone already."""
    for name in ("_validate_model_kwargs", "_prepare_cache_for_generation", "_prefill"):
        assert "self" in inspect.signature(getattr(PreTrainedModel, name, getattr(GenerationMixin, name))).parameters


# -- what it costs, and who need not pay ------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch: Patch) -> list[int]:
    """The tokens of each forward of a Jamba."""
    from transformers.models.jamba.modeling_jamba import JambaForCausalLM

    own, seen = JambaForCausalLM.forward, list[int]()

    def forward(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(input_ids.shape[1])
        return own(self, input_ids, *args, **kwargs)

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    monkeypatch.setattr(JambaForCausalLM, "forward", upstreams(forward, own))
    return seen


def test_once_for_each_model(forwards: list[int]) -> None:
    model = build("Jamba")
    with SparsePrefixCache(model, exactness="bitwise"):
        assert sum(forwards) <= 512 and len(forwards) <= 6
        forwards.clear()
        with SparsePrefixCache(model, exactness="bitwise") as second:
            assert sum(forwards) <= 2 and second.stats().proved


def test_skipped_when_asked(forwards: list[int]) -> None:
    with SparsePrefixCache(build("Jamba"), prove=False, exactness="bitwise") as cache:
        assert sum(forwards) <= 2 and not cache.stats().proved


def test_training_mode_is_proved_when_it_ends(forwards: list[int]) -> None:
    model = build("Jamba").train()
    bench = Bench("Jamba", model=model)
    with bench.handle() as cache:
        assert sum(forwards) <= 2 and not cache.stats().proved
        model.eval()
        bench.warm(cache)
        bench.generate(bench.prompt(1), cache)
        assert cache.stats().proved and cache.last_request.reason == "resumed"


def test_random_numbers_and_gradients_are_left_alone() -> None:
    model = build("Jamba")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with SparsePrefixCache(model, exactness="bitwise"):
        assert torch.equal(torch.rand(3), expected)
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_give_no_numbers() -> None:
    """A row that no prompt of the proof needs does no harm; NaN everywhere cannot be proved, and says so."""
    model = build("Jamba")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("nan")
    with SparsePrefixCache(model, exactness="bitwise") as cache:
        assert cache.stats().proved
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="not finite"):
        SparsePrefixCache(build_like(model), exactness="bitwise")
    with SparsePrefixCache(model, prove=False, exactness="bitwise") as cache:
        assert not cache.stats().proved


def build_like(model: PreTrainedModel) -> PreTrainedModel:
    """Another object with the same weights, of which nothing is remembered."""
    twin = build("Jamba")
    twin.load_state_dict(model.state_dict())
    return twin


def test_a_model_is_not_kept_alive() -> None:
    import gc
    import weakref

    model = build("Mamba2")
    with SparsePrefixCache(model, exactness="bitwise"):
        gone = weakref.ref(model)
    identity(model)
    del model
    gc.collect()
    assert gone() is None
