"""Hybrids of known sizes, built from their configurations with random weights: nothing is downloaded."""

import torch
import transformers

from hf_sparse_cache.models.families import kept_in_float32


LINEAR, FULL, HYBRID, MLP = "linear_attention", "full_attention", "hybrid", "mlp"
_NEMOTRON = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_LETTERS = {"M": LINEAR, "-": MLP, "*": FULL}
_ZAMBA2 = {"num_attention_heads": 32, "num_key_value_heads": 32, "chunk_size": 256, "adapter_rank": 128}
_FALCON = {"mamba_d_state": 256, "mamba_n_groups": 1, "mamba_chunk_size": 256, "num_key_value_heads": 2}
_QWEN = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "head_dim": 256}

# Name -> class of transformers and its configuration, as on the Hub; "tiny" is for rehearsals.
HYBRIDS = {
    "tiny": (
        "BambaForCausalLM",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "attn_layer_indices": [1, 3],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "mamba_n_heads": 8,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
    ),
    "Zamba2-1.2B": (
        "Zamba2ForCausalLM",
        {
            **_ZAMBA2,
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 38,
            "layers_block_type": [HYBRID if i in (5, 11, 17, 23, 29, 35) else LINEAR for i in range(38)],
            "mamba_d_state": 128,
            "mamba_ngroups": 1,
            "n_mamba_heads": 64,
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
        },
    ),
    "Zamba2-7B": (
        "Zamba2ForCausalLM",
        {
            **_ZAMBA2,
            "vocab_size": 32000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 81,
            "layers_block_type": [HYBRID if i == 6 or (i > 6 and i % 6 == 5) else LINEAR for i in range(81)],
            "mamba_d_state": 64,
            "mamba_ngroups": 2,
            "n_mamba_heads": 112,
            "num_mem_blocks": 2,
            "use_mem_rope": True,
        },
    ),
    "FalconH1-7B": (
        "FalconH1ForCausalLM",
        {
            **_FALCON,
            "vocab_size": 130048,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 44,
            "num_attention_heads": 12,
            "head_dim": 128,
            "mamba_d_ssm": 3072,
            "mamba_n_heads": 24,
            "mamba_d_head": 128,
        },
    ),
    "NemotronH-8B": (
        "NemotronHForCausalLM",
        {
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 21504,
            "layers_block_type": [_LETTERS[letter] for letter in _NEMOTRON],
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "chunk_size": 128,
        },
    ),
    "Qwen3.5-9B": (
        "Qwen3_5ForCausalLM",
        {
            **_QWEN,
            "vocab_size": 248320,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "linear_num_value_heads": 32,
        },
    ),
}


def configured(name):
    """The class of a hybrid, and its configuration."""
    class_name, options = HYBRIDS[name]
    kind = getattr(transformers, class_name)
    config = kind.config_class(**options, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = 2**17
    return kind, config


def build(name, device, dtype, seed=0):
    """A hybrid on a device: drawn there, in the dtype in which it stays, with no copy in float32 beside it."""
    kind, config = configured(name)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    config.dtype = dtype
    kept = kept_in_float32(model, dtype)
    for parameter_name, parameter in model.named_parameters():
        if any(f".{module}." in f".{parameter_name}." for module in kept):
            parameter.data = parameter.data.float()  # as from_pretrained() leaves it
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # by fan-in, so that a lost state shows in the logits
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model.eval()
