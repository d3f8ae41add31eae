"""Tiny random models of the causal language model families of transformers.

`FAMILIES` maps a name to the config that makes the family's smallest model in which each kind of
its layers occurs. `tiny(name)` is that model. A family that the installed transformers lacks is not
in `names()`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from rosd_fast.model.attention import use_exact_attention
from tests.tiny import SHAPE

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Parameters of recurrent layers: rates, gates and time steps, whose own initial values keep a state
# from exploding.
OWN_INIT = (
    *("A_log", "dt_bias", "dt_proj", "ssm_d", ".D", "time_decay", "time_first", "time_mix"),
    *("recurrent_param", "input_gate", "igate_preact", "fgate_preact", "recurrent_gate"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models.

    config: transformers' config class, without "Config".
    known: the models that people know it by.
    changes: to `SHAPE`, by names of the config; None: the name is left out.
    std: of the random weights, large so that attention is not uniform.
    dtype: the widest dtype in which transformers can run it.
    """

    config: str
    known: str
    changes: dict[str, Any] = field(default_factory=dict)
    std: float = 0.25
    dtype: torch.dtype = torch.float64


def _family(config: str, known: str, /, *, std: float = 0.25, **changes: Any) -> Family:
    return Family(config=config, known=known, changes=changes, std=std)


SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
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
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 3,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
    "num_hidden_layers": 3,
}
NO_HEAD_DIM = {"head_dim": None}
OWN_SHAPE = dict.fromkeys(SHAPE) | {"vocab_size": SHAPE["vocab_size"]}  # under names of its own
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 5.0, 8.0],
    "original_max_position_embeddings": 16,
}

FAMILIES: dict[str, Family] = {
    "Afmoe": _family("Afmoe", "Trinity", **EXPERTS, num_dense_layers=1, **SLIDING),
    "Apertus": _family("Apertus", "Apertus"),
    "Arcee": _family("Arcee", "AFM 4.5B"),
    "Bamba": _family(
        "Bamba", "Bamba", **MAMBA2, attn_layer_indices=[1], rope_parameters=None, **NO_HEAD_DIM
    ),
    "BitNet": _family("BitNet", "BitNet b1.58"),
    "Bloom": _family("Bloom", "BLOOM, BLOOMZ", n_layer=2, n_head=4),
    "CodeGen": _family("CodeGen", "CodeGen", **GPT, n_ctx=128, rotary_dim=4),
    "Cohere": _family("Cohere", "Command R", logit_scale=0.3),
    "Cohere2": _family("Cohere2", "Command R7B, Command A", logit_scale=0.3, **SLIDING),
    "Cwm": _family("Cwm", "Code World Model", **SLIDING, rope_parameters={"rope_theta": 1e4}),
    "Dbrx": _family(
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
    "DeepseekV2": _family("DeepseekV2", "DeepSeek-V2", **ROUTED_EXPERTS, **LATENT),
    "DeepseekV3": _family("DeepseekV3", "DeepSeek-V3, R1", **ROUTED_EXPERTS, **LATENT),
    "DiffLlama": _family("DiffLlama", "DiffLlama"),
    "Doge": _family("Doge", "Doge"),
    "Dots1": _family("Dots1", "dots.llm1", **ROUTED_EXPERTS),
    "Ernie4_5": _family("Ernie4_5", "ERNIE 4.5 0.3B"),
    "Ernie4_5Moe": _family(
        "Ernie4_5_Moe",
        "ERNIE 4.5 21B-A3B",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
    ),
    "Exaone4": _family("Exaone4", "EXAONE 4.0", **SLIDING),
    "Falcon": _family(
        "Falcon", "Falcon 7B, 40B", new_decoder_architecture=True, num_kv_heads=2, **NO_HEAD_DIM
    ),
    "Falcon (ALiBi)": _family("Falcon", "Falcon-RW", alibi=True, multi_query=False, **NO_HEAD_DIM),
    "FalconH1": _family("FalconH1", "Falcon-H1", **MAMBA2, mamba_d_ssm=64),
    "FalconMamba": _family("FalconMamba", "Falcon Mamba", state_size=8, **NO_HEAD_DIM),
    "FlexOlmo": _family("FlexOlmo", "FlexOlmo", num_experts=4, num_experts_per_tok=2),
    "Gemma": _family("Gemma", "Gemma 1"),
    "Gemma2": _family(
        "Gemma2",
        "Gemma 2",
        **SLIDING,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "Gemma3": _family("Gemma3Text", "Gemma 3", **SLIDING, query_pre_attn_scalar=8),
    "Gemma3n": _family(
        "Gemma3nText",
        "Gemma 3n",
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        intermediate_size=[48] * 4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        laurel_rank=4,
        altup_num_inputs=2,
    ),
    "Gemma4": _family(
        "Gemma4Text",
        "Gemma 4",
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        global_head_dim=16,
    ),
    "Gemma4 (MoE)": _family(
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
    "Glm": _family("Glm", "GLM-4 9B"),
    "Glm4": _family("Glm4", "GLM-4-0414, GLM-Z1"),
    "Glm4Moe": _family("Glm4Moe", "GLM-4.5, GLM-4.6", **ROUTED_EXPERTS, use_qk_norm=True),
    "Glm4MoeLite": _family("Glm4MoeLite", "GLM-4.7-Flash", **ROUTED_EXPERTS, **LATENT),
    "GPT2": _family("GPT2", "GPT-2, Cerebras-GPT", **GPT),
    "GPTBigCode": _family("GPTBigCode", "StarCoder 1, SantaCoder", **GPT),
    "GPTJ": _family("GPTJ", "GPT-J", **GPT, rotary_dim=4),
    "GPTNeo": _family(
        "GPTNeo",
        "GPT-Neo",
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "GPTNeoX": _family("GPTNeoX", "Pythia, GPT-NeoX"),
    "GptOss": _family("GptOss", "gpt-oss", **LOCAL_EXPERTS, **SLIDING, rope_parameters={}),
    "Granite": _family("Granite", "Granite 3, 4.1", logits_scaling=3.0),
    "GraniteMoe": _family("GraniteMoe", "Granite 3 MoE", **LOCAL_EXPERTS, logits_scaling=3.0),
    "GraniteMoeHybrid": _family(
        "GraniteMoeHybrid",
        "Granite 4.0 H",
        **LOCAL_EXPERTS,
        **MAMBA2,
        layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=16,
        logits_scaling=3.0,
    ),
    "GraniteMoeShared": _family(
        "GraniteMoeShared", "Granite MoE shared", **LOCAL_EXPERTS, shared_intermediate_size=16
    ),
    "Helium": _family("Helium", "Helium"),
    "HunYuanDenseV1": _family("HunYuanDenseV1", "Hunyuan 0.5B to 7B"),
    "HunYuanMoEV1": _family("HunYuanMoEV1", "Hunyuan-A13B", num_experts=4, moe_topk=2),
    "Jamba": _family(
        "Jamba",
        "Jamba",
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        num_hidden_layers=3,
        use_mamba_kernels=False,
        **NO_HEAD_DIM,
    ),
    "JetMoe": _family("JetMoe", "JetMoE", **LOCAL_EXPERTS, kv_channels=8, **NO_HEAD_DIM),
    "KimiLinear": _family(
        "KimiLinear",
        "Kimi Linear",
        num_local_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=16,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        num_hidden_layers=3,
        linear_head_dim=8,
        linear_num_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "Lfm2": _family(
        "Lfm2",
        "LFM2",
        layer_types=["conv", "full_attention", "conv"],
        num_hidden_layers=3,
        block_multiple_of=16,
    ),
    "Lfm2Moe": _family(
        "Lfm2Moe",
        "LFM2-8B-A1B",
        **EXPERTS,
        num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv"],
        num_hidden_layers=3,
    ),
    "Llama": _family("Llama", "Llama 2 to 3.3, SmolLM2, DeepSeek-R1-Distill"),
    "Llama4": _family(
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
    "LongcatFlash": _family(
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
    "Mamba": _family("Mamba", "Mamba 130M to 2.8B", state_size=8, **NO_HEAD_DIM),
    "Mamba2": _family(
        "Mamba2",
        "Mamba 2, Codestral Mamba",
        state_size=8,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        chunk_size=4,
    ),
    "MiniMax": _family(
        "MiniMax",
        "MiniMax-Text-01, MiniMax-M1",
        **LOCAL_EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        block_size=4,
    ),
    "MiniMaxM2": _family("MiniMaxM2", "MiniMax-M2", **LOCAL_EXPERTS, rotary_dim=4),
    "Ministral": _family("Ministral", "Ministral 8B", **SLIDING),
    "Ministral3": _family("Ministral3", "Ministral 3"),
    "Mistral": _family("Mistral", "Mistral 7B, Mistral Small", sliding_window=4),
    "Mixtral": _family("Mixtral", "Mixtral", **LOCAL_EXPERTS),
    "Mpt": _family("Mpt", "MPT", d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "NanoChat": _family("NanoChat", "nanochat", final_logit_softcapping=3.0),
    "Nemotron": _family("Nemotron", "Nemotron 4, Minitron"),
    "NemotronH": _family(
        "NemotronH",
        "Nemotron-H, Nemotron Nano 2 and 3",
        layers_block_type=["mamba", "attention", "moe", "mamba"],
        num_hidden_layers=None,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        use_mamba_kernels=False,
    ),
    "Olmo": _family("Olmo", "OLMo 1"),
    "Olmo2": _family("Olmo2", "OLMo 2"),
    "Olmo3": _family("Olmo3", "OLMo 3", **SLIDING),
    "OlmoHybrid": _family("OlmoHybrid", "OLMo Hybrid", **LINEAR),
    "Olmoe": _family("Olmoe", "OLMoE", num_experts=4, num_experts_per_tok=2),
    "OPT": _family("OPT", "OPT", ffn_dim=48, word_embed_proj_dim=32),
    "Persimmon": _family("Persimmon", "Persimmon"),
    "Phi": _family("Phi", "Phi 1, 1.5, 2"),
    "Phi3": _family("Phi3", "Phi 3, Phi 4"),
    "Phi3 (LongRoPE)": _family(
        "Phi3",
        "Phi 3 128k, Phi 4 mini",
        rope_parameters=LONGROPE,
        original_max_position_embeddings=16,
    ),
    "Phimoe": _family("Phimoe", "Phi 3.5 MoE", **LOCAL_EXPERTS),
    "Qwen2": _family("Qwen2", "Qwen 2, 2.5, QwQ"),
    "Qwen2Moe": _family(
        "Qwen2Moe", "Qwen 1.5 and 2 MoE", **EXPERTS, shared_expert_intermediate_size=16
    ),
    "Qwen3": _family("Qwen3", "Qwen3 0.6B to 32B"),
    "Qwen3Moe": _family("Qwen3Moe", "Qwen3 30B-A3B, 235B-A22B", **EXPERTS),
    "Qwen3Next": _family(
        "Qwen3Next", "Qwen3-Next", **EXPERTS, **LINEAR, shared_expert_intermediate_size=16
    ),
    "Qwen3_5": _family("Qwen3_5Text", "Qwen3.5", **LINEAR),
    "Qwen3_5Moe": _family(
        "Qwen3_5MoeText", "Qwen3.5 MoE", **EXPERTS, **LINEAR, shared_expert_intermediate_size=16
    ),
    "RecurrentGemma": _family(
        "RecurrentGemma",
        "RecurrentGemma, Griffin",
        num_hidden_layers=3,
        block_types=["recurrent", "recurrent", "attention"],
        attention_window_size=8,
        lru_width=32,
    ),
    "Rwkv": _family("Rwkv", "RWKV-4", attention_hidden_size=32, context_length=128),
    "SeedOss": _family("SeedOss", "Seed-OSS"),
    "SmolLM3": _family("SmolLM3", "SmolLM3", no_rope_layers=[1, 0]),
    "StableLm": _family("StableLm", "StableLM"),
    "Starcoder2": _family("Starcoder2", "StarCoder 2", sliding_window=4),
    "VaultGemma": _family("VaultGemma", "VaultGemma", **SLIDING, query_pre_attn_scalar=8),
    "xLSTM": _family("xLSTM", "xLSTM 7B", num_heads=4, chunk_size=4),
    "Zamba": _family(
        "Zamba",
        "Zamba 1",
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        num_key_value_heads=4,
        **NO_HEAD_DIM,
    ),
    "Zamba2": _family(
        "Zamba2",
        "Zamba 2",
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=4,
        mamba_ngroups=1,
        mamba_d_state=8,
        chunk_size=4,
        use_mamba_kernels=False,
        num_key_value_heads=4,
        **NO_HEAD_DIM,
    ),
}


def names() -> list[str]:
    """The families that the installed transformers has."""
    return [name for name in FAMILIES if hasattr(transformers, f"{FAMILIES[name].config}Config")]


def tiny_config(name: str, **changes: Any) -> Any:
    """The config of the family's tiny model. changes: to it."""
    family = FAMILIES[name]
    options = SHAPE | IDS | copy.deepcopy(family.changes) | changes
    config = getattr(transformers, f"{family.config}Config")
    return config(**{key: value for key, value in options.items() if value is not None})


def tiny(
    name: str, dtype: torch.dtype | None = None, *, seed: int = 0, **changes: Any
) -> transformers.PreTrainedModel:
    """A tiny random model of the family, in eval mode, with the same weights for the same seed.

    dtype: None for the widest in which it runs. changes: to its config.
    """
    family = FAMILIES[name]
    config = tiny_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
        for key, parameter in model.named_parameters():
            if not any(part in key for part in OWN_INIT):
                nn.init.normal_(parameter, std=family.std)
    model.to(dtype or family.dtype)
    if model.dtype == torch.float64:  # grouped products of experts are for narrower dtypes only
        model.set_experts_implementation("eager")
    use_exact_attention(model)
    return model
