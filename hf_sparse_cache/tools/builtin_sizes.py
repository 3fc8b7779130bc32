"""Names of the built-in models and what each is made of; nothing heavy is imported, so that a shell can complete them.

A new size is one row in `SIZES`; `builtin` builds it.
"""

from collections.abc import Callable
from typing import Any


LINEAR, HYBRID = "linear_attention", "hybrid"


def _mamba(hidden_size: int, layers: int) -> dict[str, Any]:
    """Selective scans only."""
    return {"hidden_size": hidden_size, "num_hidden_layers": layers, "state_size": 16}


def _jamba(hidden_size: int, layers: int) -> dict[str, Any]:
    """Mamba-1, attention in one layer of four, four experts in every second layer."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": max(1, hidden_size // 256),
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
    }


def _zamba2(hidden_size: int, layers: int) -> dict[str, Any]:
    """Mamba-2 everywhere; in one layer of three, before it, one of two shared blocks of attention and feed-forward."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "layers_block_type": [HYBRID if index % 3 == 1 else LINEAR for index in range(layers)],
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": hidden_size // 64,
        "num_mem_blocks": 2,
        "adapter_rank": 32,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
        "n_mamba_heads": hidden_size // 32,
        "mamba_d_state": 64,
        "chunk_size": 128,
    }


def _bamba(hidden_size: int, layers: int) -> dict[str, Any]:
    """Mamba-2, attention in one layer of four."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": max(1, hidden_size // 256),
        "attn_layer_indices": list(range(2, layers, 4)),
        "mamba_n_heads": hidden_size // 32,
        "mamba_d_state": 64,
        "mamba_chunk_size": 128,
    }


def _qwen3_5(hidden_size: int, layers: int) -> dict[str, Any]:
    """Gated delta rule, gated attention in every fourth layer."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": hidden_size // 128,
        "num_key_value_heads": max(1, hidden_size // 256),
        "head_dim": 128,
        "linear_num_key_heads": hidden_size // 128,
        "linear_num_value_heads": hidden_size // 64,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    }


# name: class in transformers, maker of its config, hidden size, layers. A name counts parameters at vocab_size=8192.
# Those of 3 M are for examples and tests, those up to 30 M prefill 6,000 tokens in seconds on two CPU cores, and the
# others are for an accelerator, or for patience.
SIZES: dict[str, tuple[str, Callable[[int, int], dict[str, Any]], int, int]] = {
    "mamba-3m": ("MambaForCausalLM", _mamba, 128, 4),
    "jamba-3m": ("JambaForCausalLM", _jamba, 128, 4),
    "zamba2-3m": ("Zamba2ForCausalLM", _zamba2, 128, 4),
    "qwen3.5-3m": ("Qwen3_5ForCausalLM", _qwen3_5, 128, 4),
    "mamba-21m": ("MambaForCausalLM", _mamba, 640, 4),
    "jamba-30m": ("JambaForCausalLM", _jamba, 512, 4),
    "zamba2-30m": ("Zamba2ForCausalLM", _zamba2, 512, 6),
    "bamba-27m": ("BambaForCausalLM", _bamba, 512, 6),
    "qwen3.5-29m": ("Qwen3_5ForCausalLM", _qwen3_5, 512, 8),
    "mamba-130m": ("MambaForCausalLM", _mamba, 1024, 17),
    "jamba-134m": ("JambaForCausalLM", _jamba, 768, 10),
    "zamba2-131m": ("Zamba2ForCausalLM", _zamba2, 768, 14),
    "bamba-137m": ("BambaForCausalLM", _bamba, 1024, 10),
    "qwen3.5-143m": ("Qwen3_5ForCausalLM", _qwen3_5, 1024, 12),
    "mamba-294m": ("MambaForCausalLM", _mamba, 1536, 18),
    "jamba-273m": ("JambaForCausalLM", _jamba, 1024, 12),
    "zamba2-275m": ("Zamba2ForCausalLM", _zamba2, 1024, 18),
    "bamba-300m": ("BambaForCausalLM", _bamba, 1024, 24),
    "qwen3.5-269m": ("Qwen3_5ForCausalLM", _qwen3_5, 1024, 24),
}
