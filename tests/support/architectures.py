"""Tiny models of six layers, of 42 architectures of transformers, and what becomes of a student of some of their layers.

Between them they tell layers apart in every way that is known to us: by lists, by lists of numbers, by rules, by the
number itself, by parts that layers share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DEPTH = 6
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 64}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MAMBA: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}


@dataclass(frozen=True)
class Architecture:
    """A configuration's kind, its own values, and why keep_layers refuses it (a regular expression), if it does."""

    kind: str
    own: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    common: tuple[str, ...] = tuple(COMMON)  # which of COMMON it knows under these names
    keep: tuple[int, ...] = (0, 3, 5)
    told: str = ""  # apart from others of its kind

    @property
    def name(self) -> str:
        return f"{self.kind} {self.told}".strip()


SIZES = ("hidden_size", "num_hidden_layers")
NO_GROUPS = tuple(name for name in COMMON if name not in ("num_key_value_heads", "head_dim"))
SCALED = "scales its logits"
ARCHITECTURES = [
    Architecture("llama"),
    Architecture("mistral"),
    Architecture("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    Architecture("qwen2_moe", {**EXPERTS, "decoder_sparse_step": 2}),
    Architecture("qwen3_moe", {**EXPERTS, "mlp_only_layers": [1, 3]}),
    Architecture("deepseek_v2", {**LATENT, **EXPERTS, "first_k_dense_replace": 2}),
    Architecture("deepseek_v3", {**LATENT, **EXPERTS, "first_k_dense_replace": 2}),
    Architecture("smollm3", {"no_rope_layer_interval": 4}),
    Architecture("gemma2", {"sliding_window": 4}),
    Architecture("gemma3_text", {"sliding_window": 4}, keep=(2, 3)),
    Architecture("gpt2", GPT2, common=()),
    Architecture(
        "gpt2",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx",
        common=(),
        told="scaled",
    ),
    Architecture(
        "gpt_neo",
        {
            "num_layers": DEPTH,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 3]],
            "window_size": 4,
        },
        common=("hidden_size", "max_position_embeddings"),
    ),
    Architecture("gpt_neox", common=NO_GROUPS),
    Architecture(
        "gpt_neox_japanese", {"intermediate_multiple_size": 2}, "dense_bias", common=NO_GROUPS, keep=(2, 3)
    ),
    Architecture("gptj", {**GPT2, "rotary_dim": 4}, common=()),
    Architecture("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, common=NO_GROUPS),
    Architecture("bloom", {"n_layer": DEPTH, "n_head": 4}, common=("hidden_size",)),
    Architecture("mamba", {"state_size": 8, "time_step_rank": 4}, common=SIZES),
    Architecture(
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        common=SIZES,
    ),
    Architecture(
        "jamba",
        {**MAMBA, "num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1},
        "expert_layer_period and expert_layer_offset",
    ),
    Architecture("bamba", {**MAMBA, "attn_layer_indices": [0, 3]}),
    Architecture(
        "zamba2",
        {
            **MAMBA,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"] * 3,
            "attention_head_dim": 16,
            "adapter_rank": 4,
        },
        "cannot be run on eight tokens|another model",
    ),
    Architecture(
        "nemotron_h",
        {
            **EXPERTS,
            "layers_block_type": ["mamba", "attention", "moe"] * 2,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    Architecture("phi3"),
    Architecture("granite"),
    Architecture("cohere", refused=SCALED),
    Architecture("olmo2"),
    Architecture(
        "llama4_text",
        {
            **EXPERTS,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8,
        },
    ),
    Architecture("lfm2", {"full_attn_idxs": [2, 4], "block_multiple_of": 8}),
    Architecture("nemotron"),
    Architecture("starcoder2"),
    Architecture("stablelm"),
    Architecture("mixtral", {"num_local_experts": 4}),
    Architecture("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    # its slopes by layer number are saved with the weights
    Architecture("minimax", {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8}),
    Architecture("exaone4", {"sliding_window": 4, "sliding_window_pattern": 4}),
    Architecture("glm4"),
    Architecture(
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 2,
        },
    ),
    Architecture("diffllama", refused="lambda_init"),
    Architecture("afmoe", {**EXPERTS, "num_dense_layers": 2}),
    Architecture("xlm", {"emb_dim": 32, "n_layers": DEPTH, "n_heads": 4, "causal": True}, common=()),
]


def make_teacher(architecture: Architecture, folder: Path, *, vocab_size: int) -> Path:
    """Save such a model, of weights drawn wide enough that its layers matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {name: COMMON[name] for name in architecture.common}
    ids = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture.kind, **{**sizes, **ids, **architecture.own})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder
