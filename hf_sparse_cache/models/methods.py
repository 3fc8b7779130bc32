"""What is called of a model and of its cache, or replaced, and must be there with the parameters that are given."""

import inspect
from typing import Any

from transformers import DynamicCache

from ..errors import UnsupportedModelError


_MODEL_METHODS: dict[str, tuple[str, ...]] = {
    "_validate_model_kwargs": ("model_kwargs",),
    "_prepare_cache_for_generation": ("generation_config", "model_kwargs", "generation_mode"),
    "_prefill": ("input_ids", "generation_config", "model_kwargs"),
    "prepare_inputs_for_generation": ("input_ids", "next_sequence_length", "is_first_iteration", "attention_mask"),
}
_CACHE_METHODS: dict[str, tuple[str, ...]] = {
    "update_conv_state": ("conv_states", "layer_idx"),
    "update_recurrent_state": ("recurrent_states", "layer_idx"),
    "get_seq_length": ("layer_idx",),
    "get_mask_sizes": ("query_length", "layer_idx"),
}


def require_methods(model: Any) -> None:
    """Refuse a release of transformers that lacks a method, or a parameter of one, that is used.

    Raises:
        UnsupportedModelError: Names the method and what it lacks.
    """
    for owner, methods in ((type(model), _MODEL_METHODS), (DynamicCache, _CACHE_METHODS)):
        for name, wanted in methods.items():
            method = getattr(owner, name, None)
            if method is None:
                raise UnsupportedModelError(f"{owner.__name__} has no {name}, which SparsePrefixCache relies on.")
            has = inspect.signature(method).parameters
            takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in has.values())
            missing = [parameter for parameter in wanted if parameter not in has]
            if missing and not (takes_all and name == "prepare_inputs_for_generation"):
                raise UnsupportedModelError(
                    f"{owner.__name__}.{name} takes no {missing[0]}, which SparsePrefixCache gives it."
                )
