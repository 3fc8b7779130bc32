"""The model families whose states can be captured and resumed exactly, and what each needs.

A new family is one row here, once `states` has a rule for its cache layer classes, and one row in the tests.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedModelError


# Names that transformers has, or had before 5.24, for the cache that a model is given.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


ACCELERATOR_GRID = 1024  # until it is measured: about as many tokens as the launches of one forward take
STEP = 64
# Of models with 30 M parameters on two cores of a CPU.
CUT_TOKENS, CHUNKED_CUT_TOKENS = 8.0, 48.0
ROUTED_FORWARD_TOKENS = 32.0  # Jamba, from 3 M to 134 M parameters: 19 to 33
MEASURED_WEIGHTS = 30e6
# What configurations call the number of experts that tokens are routed to.
_ROUTED = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Family:
    """What a prefill in segments must know about one family of models.

    Attributes:
        name: the family's name in documentation.
        kernel_chunk: tokens to which the kernels pad a segment, or the config attribute that holds that number. Grid
            steps are multiples of it.
        default_grid: tokens between cuts that cost next to nothing on this family (rounded up to the kernel chunk).
        scans: whether a torch loop over the tokens runs on a CPU, which is faster in pieces of the default grid: what
            it works on stays in the processor's cache.
        repeated: of a config, the indices of the layers that the first forward adds to its cache once more, in order.
    """

    name: str
    kernel_chunk: int | str = 1
    default_grid: int = 256
    scans: bool = False
    repeated: Callable[[Any], Sequence[int]] = lambda config: ()

    def chunk(self, config: Any) -> int:
        return self.kernel_chunk if isinstance(self.kernel_chunk, int) else int(getattr(config, self.kernel_chunk))

    def grid(self, config: Any, device: str = "cpu") -> int:
        """Tokens between the cuts of bitwise mode, whole kernel chunks. An accelerator pays for each with launches."""
        chunk = self.chunk(config)
        wanted = self.default_grid if device == "cpu" else max(self.default_grid, ACCELERATOR_GRID)
        return -(-wanted // chunk) * chunk

    def step(self, config: Any) -> int:
        """Distance in tokens of the positions at which checkpoints may be planned in replayable mode."""
        chunk = self.chunk(config)
        return -(-STEP // chunk) * chunk

    def cut_tokens(self, config: Any, device: str = "cpu") -> float:
        """What one more forward costs, in tokens of prefill, until `tune` has measured it."""
        if device != "cpu":
            return float(ACCELERATOR_GRID)
        return CHUNKED_CUT_TOKENS if self.chunk(config) > 1 else CUT_TOKENS

    def forward_tokens(self, config: Any, device: str, weights: int) -> float:
        """What a forward costs besides its tokens, in tokens.

        On a CPU that hardly depends on the model, and what a token costs does. Routed experts have few tokens each to
        work on, and more of them when prompts run together.
        """
        cut = self.cut_tokens(config, device)
        least = ROUTED_FORWARD_TOKENS if any((getattr(config, name, 0) or 0) > 1 for name in _ROUTED) else 4.0
        return cut if device != "cpu" else min(max(cut * MEASURED_WEIGHTS / weights, least), 256.0)


def _mamba2(name: str) -> Family:
    return Family(name, kernel_chunk="mamba_chunk_size")


def _delta_rule(name: str) -> Family:
    # The chunk of the gated delta rule is a constant of the kernels; short segments cost it more than the others.
    return Family(name, kernel_chunk=64, default_grid=512)


def _loops(config: Any) -> list[int]:
    # Layers that run several times keep keys, values and conv states of each pass.
    looped = range(config.loop_layer_index_start, config.loop_layer_index_end)
    return [*looped] * (config.loop_num_passes - 1)


# Keyed by `model_type` of the text config.
FAMILIES: dict[str, Family] = {
    "mamba": Family("Mamba", scans=True),
    "falcon_mamba": Family("FalconMamba", scans=True),
    "mamba2": Family("Mamba2", kernel_chunk="chunk_size"),
    "jamba": Family("Jamba", scans=True),
    "zamba": Family("Zamba", scans=True),
    "zamba2": Family("Zamba2", kernel_chunk="chunk_size"),
    "bamba": _mamba2("Bamba"),
    "granitemoehybrid": _mamba2("GraniteMoeHybrid"),
    "nemotron_h": Family("NemotronH", kernel_chunk="chunk_size"),
    "falcon_h1": _mamba2("FalconH1"),
    "qwen3_next": _delta_rule("Qwen3-Next"),
    "qwen3_5_text": _delta_rule("Qwen3.5"),
    "qwen3_5_moe_text": _delta_rule("Qwen3.5-MoE"),
    "olmo_hybrid": _delta_rule("OlmoHybrid"),
    "kimi_linear": _delta_rule("KimiLinear"),
    "bailing_hybrid": _delta_rule("BailingHybrid"),
    "qwen4_exp_text": _delta_rule("Qwen4Exp"),
    "glm5_next_text": _delta_rule("GLM5Next"),
    "lfm2": Family("LFM2"),
    "lfm2_moe": Family("LFM2-MoE"),
    "lfm3": Family("LFM3"),
    "zaya": Family("Zaya"),
    "inkling_text": Family("Inkling"),
    "inkling2_text": Family("Inkling2"),
    "inkling2_loop_text": Family("Inkling2-Loop", repeated=_loops),
    "lara_mini": _delta_rule("LaraMini"),
    "llama": Family("Llama"),
    "qwen3": Family("Qwen3"),
    "gemma3_text": Family("Gemma3"),
}

# Known families that cannot be served, and what upstream would have to change.
REFUSED: dict[str, str] = {
    "minimax": "it accepts only a cache class of its own, and is itself wrong when layer 0 is linear; it would have "
    "to keep its states in a DynamicCache",
    "xlstm": "its forward ignores past_key_values and keeps state in an object of its own; it would have to keep it "
    "in a DynamicCache",
    "rwkv": "its forward ignores past_key_values and keeps state in a list of its own; it would have to keep it in a "
    "DynamicCache",
    "recurrent_gemma": "it keeps its state on its modules, shared by all calls; it would have to keep it in the cache",
}


def unwrapped(model: Any) -> Any:
    """The transformers model inside the wrappers of PEFT and `torch.compile`, whose `generate()` they both call."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def learned_prompt(model: Any) -> str:
    """Which kind of learned prompt a wrapper of PEFT puts before the tokens, such as "PROMPT_TUNING"; "" for none.

    The model inside knows nothing of it: who calls that model gets the answer to another prompt.
    """
    model = getattr(model, "_orig_mod", model)
    configs, active = getattr(model, "peft_config", None), getattr(model, "active_adapter", None)
    config = configs.get(active) if isinstance(configs, dict) and isinstance(active, str) else None
    learned = hasattr(model, "get_base_model") and getattr(config, "is_prompt_learning", False)
    return str(getattr(config.peft_type, "value", config.peft_type)) if learned and config is not None else ""


def family_of(model: Any) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: Names the class and lists what is supported.
    """
    kind = type(model).__name__
    names = ", ".join(sorted(known.name for known in FAMILIES.values()))
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"model is a {kind}, not a transformers model with generate(); supported are the causal language models "
            f"of {names}."
        )
    model_type = model.config.get_text_config(decoder=True).model_type
    why = REFUSED.get(model_type, "no exact resume is known for it")
    if model_type in FAMILIES and not getattr(model.config, "is_encoder_decoder", False) and model.can_generate():
        return FAMILIES[model_type]
    raise UnsupportedModelError(
        f"{kind} (model_type {model_type!r}) is not supported: {why}. Supported are the causal language models of "
        f"{names}. Use this model without SparsePrefixCache."
    )


def cache_name_of(model: Any) -> str:
    """The keyword under which a model's forward takes its cache in the installed transformers.

    Raises:
        UnsupportedModelError: It takes none.
    """
    parameters = inspect.signature(type(model).forward).parameters
    name = next((name for name in CACHE_NAMES if name in parameters), None)
    if name is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes no cache: it has no parameter {' or '.join(CACHE_NAMES)}."
        )
    return name


def kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """Names of the modules that `from_pretrained(dtype=...)` leaves in float32."""
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept
