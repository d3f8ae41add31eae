"""Families with mixtures of experts whose layers all attend to earlier tokens."""

from __future__ import annotations

from tests.family_tables.family import (
    LOCAL_EXPERTS,
    NO_HEAD_DIM,
    NUM_EXPERTS,
    OWN_SHAPE,
    SLIDING,
    Family,
    family,
)

ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}

EXPERTS: dict[str, Family] = {
    "Afmoe": family("Afmoe", "Trinity", **NUM_EXPERTS, num_dense_layers=1, **SLIDING),
    "Dbrx": family(
        "Dbrx",
        "DBRX",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        **OWN_SHAPE,
    ),
    "DeepseekV2": family("DeepseekV2", "DeepSeek-V2", **ROUTED_EXPERTS, **LATENT),
    "DeepseekV3": family("DeepseekV3", "DeepSeek-V3, R1", **ROUTED_EXPERTS, **LATENT),
    "Dots1": family("Dots1", "dots.llm1", **ROUTED_EXPERTS),
    "Ernie4_5Moe": family(
        "Ernie4_5_Moe",
        "ERNIE 4.5 21B-A3B",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
    ),
    "FlexOlmo": family("FlexOlmo", "FlexOlmo", num_experts=4, num_experts_per_tok=2),
    "Gemma4 (MoE)": family(
        "Gemma4Text",
        "Gemma 4 26B-A4B",
        **SLIDING,
        hidden_size_per_layer_input=0,
        global_head_dim=16,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
    ),
    "Glm4Moe": family("Glm4Moe", "GLM-4.5, GLM-4.6", **ROUTED_EXPERTS, use_qk_norm=True),
    "Glm4MoeLite": family("Glm4MoeLite", "GLM-4.7-Flash", **ROUTED_EXPERTS, **LATENT),
    "GptOss": family("GptOss", "gpt-oss", **LOCAL_EXPERTS, **SLIDING, rope_parameters={}),
    "GraniteMoe": family("GraniteMoe", "Granite 3 MoE", **LOCAL_EXPERTS, logits_scaling=3.0),
    "GraniteMoeShared": family(
        "GraniteMoeShared", "Granite MoE shared", **LOCAL_EXPERTS, shared_intermediate_size=16
    ),
    "HunYuanMoEV1": family("HunYuanMoEV1", "Hunyuan-A13B", num_experts=4, moe_topk=2),
    "JetMoe": family("JetMoe", "JetMoE", **LOCAL_EXPERTS, kv_channels=8, **NO_HEAD_DIM),
    "Llama4": family(
        "Llama4Text",
        "Llama 4",
        **LOCAL_EXPERTS,
        intermediate_size_mlp=48,
        moe_layers=[1],
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        attention_chunk_size=4,
        floor_scale=4,
    ),
    "LongcatFlash": family(
        "LongcatFlash",
        "LongCat-Flash",
        **LATENT,
        num_layers=1,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
        num_hidden_layers=None,
    ),
    "MiniMaxM2": family("MiniMaxM2", "MiniMax-M2", **LOCAL_EXPERTS, rotary_dim=4),
    "Mixtral": family("Mixtral", "Mixtral", **LOCAL_EXPERTS),
    "Olmoe": family("Olmoe", "OLMoE", num_experts=4, num_experts_per_tok=2),
    "Phimoe": family("Phimoe", "Phi 3.5 MoE", **LOCAL_EXPERTS),
    "Qwen2Moe": family(
        "Qwen2Moe", "Qwen 1.5 and 2 MoE", **NUM_EXPERTS, shared_expert_intermediate_size=16
    ),
    "Qwen3Moe": family("Qwen3Moe", "Qwen3 30B-A3B, 235B-A22B", **NUM_EXPERTS),
}
