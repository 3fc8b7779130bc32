"""One row per model family: its class in transformers and a config of a few hundred thousand parameters.

A new family is one row here. Every row has at least four layers with every layer type of its family, windows and
chunks of 16 tokens so that short prompts cross them, and embeddings that are not tied to the output.
"""

from dataclasses import dataclass, field
from typing import Any

import transformers


VOCABULARY = 128
PAD, BOS, SPECIAL = 0, 1, 2
FIRST_WORD, LAST_WORD = 3, 119  # what prompts are made of; above are the image tokens of multimodal classes
# Names that many configs share; a row overrides them.
IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None, "tie_word_embeddings": False}
SIZE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, **IDS}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
HYBRID, HYBRID_SLIDING, INDEXED = "hybrid", "hybrid_sliding", "indexed_attention"
# Mamba-2 with 8 heads of 16 channels and 16 states, in chunks of 16 tokens.
MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16}
# Gated delta rule with 2 key heads and 4 value heads.
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ROUTED: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# Attention with compressed keys and values.
LATENT: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
PLAIN: dict[str, Any] = {**SIZE, **HEADS}
# Layers of both Inklings: short convolutions on keys, values and both residual branches, relative positions.
INKLING: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 16,
    "rel_extent": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "route_scale": 1.0,
    "layer_types": [HYBRID_SLIDING, HYBRID] * 2,
}


@dataclass(frozen=True)
class Family:
    """One row: the class in transformers, its config, and what it carries from token to token."""

    label: str
    class_name: str
    config: dict[str, Any] = field(repr=False)
    state: str = "recurrent"  # "recurrent" (with or without convolution), "conv" only, or "none"
    embedding_scale: float = 1.0
    float64: bool = True  # whether transformers runs it in float64

    @property
    def available(self) -> bool:
        """Whether the installed transformers has this class."""
        return hasattr(transformers, self.class_name)


ROWS = [
    Family("Mamba", "MambaForCausalLM", {**SIZE, "state_size": 16}),
    Family(
        "Mamba2",
        "Mamba2ForCausalLM",
        {**SIZE, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16},
    ),
    Family("FalconMamba", "FalconMambaForCausalLM", {**SIZE, "state_size": 16}),
    Family(
        "Jamba",
        "JambaForCausalLM",
        {**PLAIN, "mamba_d_state": 16, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    Family(
        "Zamba",
        "ZambaForCausalLM",
        {**PLAIN, "num_key_value_heads": 4, "mamba_d_state": 16, "layers_block_type": [LINEAR, HYBRID] * 2},
    ),
    Family(
        "Zamba2",
        "Zamba2ForCausalLM",
        {
            **PLAIN,
            "num_key_value_heads": 4,
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "chunk_size": 16,
            "adapter_rank": 8,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "layers_block_type": [LINEAR, HYBRID] * 2,
        },
    ),
    Family("Bamba", "BambaForCausalLM", {**PLAIN, **MAMBA2, "attn_layer_indices": [1, 3]}),
    Family(
        "GraniteMoeHybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **PLAIN,
            **MAMBA2,
            "num_local_experts": 4,
            "shared_intermediate_size": 64,
            "attention_multiplier": 0.25,
            "position_embedding_type": "rope",
            "layer_types": [LINEAR, FULL] * 2,
        },
    ),
    Family(
        "NemotronH",
        "NemotronHForCausalLM",
        {
            **IDS,
            **HEADS,
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 48,
            "layers_block_type": [LINEAR, "moe", FULL, LINEAR, "mlp", FULL],
        },
    ),
    Family("FalconH1", "FalconH1ForCausalLM", {**PLAIN, **MAMBA2, "mamba_d_ssm": 128}),
    Family("Qwen3-Next", "Qwen3NextForCausalLM", {**PLAIN, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 48}),
    Family("Qwen3.5", "Qwen3_5ForCausalLM", {**PLAIN, **DELTA}),
    Family(
        "Qwen3.5-MoE", "Qwen3_5MoeForCausalLM", {**PLAIN, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 48}
    ),
    Family("OlmoHybrid", "OlmoHybridForCausalLM", {**PLAIN, "linear_key_head_dim": 16}),
    Family(
        "KimiLinear",
        "KimiLinearForCausalLM",
        {**PLAIN, **LATENT, **ROUTED, "num_hidden_layers": 5, "linear_head_dim": 16, "linear_num_heads": 4},
    ),
    Family(
        "BailingHybrid",
        "BailingHybridForCausalLM",
        {**PLAIN, **LATENT, **ROUTED, "head_dim": 16, "n_group": 2, "topk_group": 1, "layer_group_size": 2},
    ),
    Family(
        "Qwen4Exp",
        "Qwen4ExpForCausalLM",
        {
            **PLAIN,
            **DELTA,
            **EXPERTS,
            "eos_token_id": SPECIAL,
            "shared_expert_intermediate_size": 48,
            "hc_lowrank": 16,
            "ple_layer_ids": [1, 3],
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 100,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 1,
            "indexer_n_heads": 8,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 32,
            "indexer_compress_ratio": 4,
            "layer_types": [LINEAR, INDEXED] * 2,
        },
    ),
    Family(
        "GLM5Next",
        "Glm5NextForConditionalGeneration",
        {
            **IDS,
            "image_token_id": 120,
            "video_token_id": 121,
            "image_start_token_id": 122,
            "image_end_token_id": 123,
            "video_start_token_id": 124,
            "video_end_token_id": 125,
            "text_config": {
                **PLAIN,
                **LATENT,
                "qk_rope_head_dim": 0,
                "q_lora_rank": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 48,
                "index_topk": 32,
                "index_kpool": 4,
                "index_head_dim": 16,
                "index_n_heads": 16,  # with few heads pools tie at score 0, and which one wins depends on the width
                "linear_head_dim": 16,
                "linear_num_heads": 4,
                "hc_mult": 2,
                "layer_types": [LINEAR, INDEXED] * 2,
                "mlp_layer_types": ["dense", "sparse"] * 2,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 64,
                "projection_intermediate_size": 16,
                "image_size": 28,
            },
        },
    ),
    Family("LFM2", "Lfm2ForCausalLM", {**PLAIN, "full_attn_idxs": [1, 3]}, state="conv"),
    Family(
        "LFM2-MoE",
        "Lfm2MoeForCausalLM",
        {**PLAIN, **EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", FULL] * 2},
        state="conv",
    ),
    Family(
        "LFM3",
        "Lfm3ForCausalLM",
        {**PLAIN, "head_dim": 16, "sliding_window": 16, "layer_types": ["conv", SLIDING, "conv", FULL]},
        state="conv",
    ),
    Family(
        "Zaya",
        "ZayaForCausalLM",
        {
            **SIZE,
            **EXPERTS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts_per_tok": 1,
            "router_hidden_size": 16,
            "sliding_window": 16,
            "layer_types": [HYBRID, HYBRID_SLIDING] * 2,
        },
    ),
    Family(
        "Inkling",
        "InklingForCausalLM",
        {**PLAIN, **INKLING, "n_shared_experts": 1, "logits_mup_width_multiplier": 1.0},
        state="conv",
    ),
    Family(
        "Inkling2",
        "Inkling2ForCausalLM",
        {**SIZE, **INKLING, "unpadded_vocab_size": VOCABULARY, "n_layers_per_attn_res_block": 2},
        state="conv",
        float64=False,  # the router multiplies float32 activations by its weights
    ),
    Family(
        "Inkling2-Loop",
        "Inkling2LoopForCausalLM",
        {
            **SIZE,
            **INKLING,
            "num_hidden_layers": 8,
            "layer_types": [HYBRID_SLIDING, HYBRID] * 4,
            "unpadded_vocab_size": VOCABULARY,
            "n_layers_per_attn_res_block": 2,
            "loop_layer_index_start": 2,
            "loop_layer_index_end": 6,
            "loop_gate_rank": 8,
        },
        state="conv",
        float64=False,  # as Inkling2
    ),
    Family(
        "LaraMini",
        "LaraMiniForCausalLM",
        {
            **PLAIN,
            **DELTA,
            **EXPERTS,
            "shared_expert_intermediate_size": 48,
            "num_hidden_layers": 5,
            "sliding_window": 16,
        },
    ),
    Family("Llama", "LlamaForCausalLM", PLAIN, state="none"),
    Family("Qwen3", "Qwen3ForCausalLM", {**PLAIN, "head_dim": 16}, state="none"),
    Family(
        "Gemma3",
        "Gemma3ForCausalLM",
        {
            **PLAIN,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": [SLIDING, FULL] * 2,
        },
        state="none",
        embedding_scale=0.125,
    ),
    Family("MiniMax", "MiniMaxForCausalLM", {**PLAIN, "num_local_experts": 4, "block_size": 16}),
    Family("xLSTM", "xLSTMForCausalLM", {**SIZE, "num_heads": 2, "qk_dim_factor": 1.0, "chunk_size": 16}),
    Family("RWKV", "RwkvForCausalLM", {**SIZE, "rescale_every": 0}),
    Family(
        "RecurrentGemma",
        "RecurrentGemmaForCausalLM",
        {**PLAIN, "num_key_value_heads": 1, "attention_window_size": 16},
        embedding_scale=0.125,
    ),
]
FAMILIES: dict[str, Family] = {row.label: row for row in ROWS}
