"""Config readers and weight maps of every family: published sizes, transformers' defaults, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from gatework.export.checkpoint import read_config
from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.families import FAMILIES, family_of, grok1, openmoe, params_json
from gatework.export.options import fit_length
from gatework.plugins.errors import GateworkError
from tests.checkpoints import TABLE, hf_config

Raw = dict[str, Any]


def llama(D: int, layers: int, H: int, I: int, **others: Any) -> Raw:
    """config.json of a LLaMA repository on the hub."""
    sizes = {"hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": H, "intermediate_size": I}
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 32000}
    fields |= {"torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5, "use_cache": True}
    return fields | {"tie_word_embeddings": False, "initializer_range": 0.02} | sizes | others


def without(raw: Raw, *names: str) -> Raw:
    return {name: value for name, value in raw.items() if name not in names}


GQA = {"num_key_value_heads": 8}
CODE = {"rope_theta": 1e6, "max_position_embeddings": 16384, "rope_scaling": None, "pretraining_tp": 1}
MISTRAL = llama(4096, 32, 32, 14336, **GQA, torch_dtype="bfloat16", max_position_embeddings=32768) | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 4096,
    "rope_theta": 1e4,
}
MIXTRAL = MISTRAL | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "sliding_window": None,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
}
MIXTRAL_22B = MIXTRAL | {"hidden_size": 6144, "num_hidden_layers": 56, "num_attention_heads": 48}
MIXTRAL_22B |= {"intermediate_size": 16384, "max_position_embeddings": 65536}
# Made up: a Mixtral with the numbers of parameters that rumours give.
GPT_4_RUMOUR = MIXTRAL | {"hidden_size": 10752, "num_hidden_layers": 120, "intermediate_size": 28672}
GPT_4_RUMOUR |= {"num_attention_heads": 84, "num_key_value_heads": 84, "num_local_experts": 16}
GPT_4_RUMOUR |= {"vocab_size": 100_352, "tie_word_embeddings": True}
DBRX = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "auto_map": {"AutoConfig": "configuration_dbrx.DbrxConfig"},
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}
QWEN3 = llama(4096, 36, 32, 12288, **GQA, head_dim=128, torch_dtype="bfloat16", rms_norm_eps=1e-6, rope_theta=1e6) | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
QWEN3_235B = QWEN3_MOE | {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64}
QWEN3_235B |= {"moe_intermediate_size": 1536, "intermediate_size": 12288}
QWEN2 = without(QWEN3, "attention_bias", "head_dim", "rope_scaling") | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "vocab_size": 152064,
}
QWEN2_MOE = QWEN2 | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "shared_expert_intermediate_size": 5632,
    "vocab_size": 151936,
}
QWEN2_57B = QWEN2_MOE | {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_experts": 64}
QWEN2_57B |= {"moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480, "num_experts_per_tok": 8}
QWEN2_57B |= {"num_key_value_heads": 4}
QWEN = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 152064,
}
OLMOE = llama(2048, 16, 16, 1024, num_key_value_heads=16, torch_dtype="bfloat16", vocab_size=50304) | {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}

PHI = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "embd_pdrop": 0.0,
    "eos_token_id": None,
    "hidden_act": "gelu_new",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": None,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}
PHI_2 = PHI | {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "partial_rotary_factor": 0.4}

PHI_SEQUENTIAL = {
    "activation_function": "gelu_new",
    "architecture": {
        "block_cls": "parallel",
        "mixer": {"dropout": 0.1, "mixer_cls": "mha"},
        "mlp": {"mlp_cls": "fused_mlp"},
    },
    "architectures": ["MixFormerSequentialForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_mixformer_sequential.MixFormerSequentialConfig"},
    "embd_layer": "default",
    "embd_pdrop": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mixformer-sequential",
    "n_embd": 2048,
    "n_head": 32,
    "n_inner": None,
    "n_layer": 24,
    "n_positions": 2048,
    "phyagi_version": "0.0.4.dev",
    "resid_pdrop": 0.0,
    "rotary_dim": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}
PHI_MSFT = {
    "activation_function": "gelu_new",
    "architectures": ["PhiForCausalLM"],
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "flash_attn": False,
    "flash_rotary": False,
    "fused_dense": False,
    "img_processor": None,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "phi-msft",
    "n_embd": 2560,
    "n_head": 32,
    "n_head_kv": None,
    "n_inner": None,
    "n_layer": 32,
    "n_positions": 2048,
    "resid_pdrop": 0.1,
    "rotary_dim": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}

MPT = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}

GROK_1 = {
    "architectures": ["Grok1ModelForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_grok1.Grok1Config"},
    "vocab_size": 131072,
    "hidden_size": 6144,
    "intermediate_size": 32768,
    "num_hidden_layers": 64,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "attn_output_multiplier": 0.08838834764831845,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "max_attn_value": 30.0,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "num_experts_per_tok": 2,
    "num_experts": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
}

OPENMOE = {
    "architectures": ["OpenMoeForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_openmoe.OpenMoeForCausalLM"},
    "bos_token_id": 0,
    "dropout_rate": 0.0,
    "enable_kernel": False,
    "enable_load_balance": False,
    "eos_token_id": 1,
    "expert_parallel": None,
    "head_dim": 128,
    "hidden_act": "swiglu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 2048,
    "mlp_gated": True,
    "model_type": "llama",
    "moe_layer_interval": 6,
    "num_attention_heads": 24,
    "num_experts": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 24,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_capacity_factor_eval": 2.0,
    "router_drop_tks": True,
    "router_min_capacity": 4,
    "router_noisy_policy": None,
    "router_topk": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 256384,
}
OPENMOE_BASE = OPENMOE | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "head_dim": 64}
OPENMOE_BASE |= {"num_key_value_heads": 12, "intermediate_size": 2048, "num_experts": 16, "moe_layer_interval": 4}
OPENMOE_34B = OPENMOE | {"hidden_size": 3072, "num_hidden_layers": 32, "intermediate_size": 12288}
OPENMOE_34B |= {"moe_layer_interval": 4}

GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
GPT_OSS_120B = GPT_OSS_20B | {"num_hidden_layers": 36, "num_local_experts": 128, "layer_types": None}
YARN = GPT_OSS_20B["rope_scaling"]
SWITCH = {
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_ff": 3072,
    "d_kv": 64,
    "d_model": 768,
    "decoder_sparse_step": 2,
    "decoder_start_token_id": 0,
    "dense_act_fn": "relu",
    "encoder_sparse_step": 2,
    "eos_token_id": 1,
    "expert_capacity": 64,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "switch_transformers",
    "num_decoder_layers": 12,
    "num_experts": 8,
    "num_heads": 12,
    "num_layers": 12,
    "num_sparse_decoder_layers": 6,
    "num_sparse_encoder_layers": 6,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "router_bias": False,
    "router_dtype": "float32",
    "router_ignore_padding_tokens": False,
    "router_jitter_noise": 0.01,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32128,
}
SWITCH_LARGE = SWITCH | {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_layers": 24, "num_experts": 128}
SWITCH_LARGE |= {"num_decoder_layers": 24, "num_sparse_encoder_layers": 12, "num_sparse_decoder_layers": 12}
SWITCH_XXL = SWITCH_LARGE | {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "dense_act_fn": "gated-gelu"}
SWITCH_C = SWITCH | {"d_model": 2080, "d_ff": 6144, "num_heads": 30, "num_layers": 15, "num_decoder_layers": 15}
SWITCH_C |= {"num_sparse_encoder_layers": 15, "num_sparse_decoder_layers": 15, "num_experts": 2048}
SWITCH_C |= {"tie_word_embeddings": False}

# name -> config, parameters, active parameters, bytes of keys and values per token in fp16
PUBLISHED: dict[str, tuple[Raw, int, int, int]] = {
    "llama-7b": (llama(4096, 32, 32, 11008, rms_norm_eps=1e-6), 6_738_415_616, 6_738_415_616, 524_288),
    "llama-13b": (llama(5120, 40, 40, 13824, rms_norm_eps=1e-6), 13_015_864_320, 13_015_864_320, 819_200),
    "llama-33b": (llama(6656, 60, 52, 17920, rms_norm_eps=1e-6), 32_528_943_616, 32_528_943_616, 1_597_440),
    "llama-65b": (llama(8192, 80, 64, 22016), 65_285_660_672, 65_285_660_672, 2_621_440),
    "llama-2-70b": (llama(8192, 80, 64, 28672, **GQA), 68_976_648_192, 68_976_648_192, 327_680),
    "codellama-7b": (llama(4096, 32, 32, 11008, vocab_size=32016, **CODE), 6_738_546_688, 6_738_546_688, 524_288),
    "codellama-13b": (llama(5120, 40, 40, 13824, vocab_size=32016, **CODE), 13_016_028_160, 13_016_028_160, 819_200),
    "codellama-34b": (llama(8192, 48, 64, 22016, **GQA, **CODE), 33_743_970_304, 33_743_970_304, 196_608),
    "codellama-70b": (llama(8192, 80, 64, 28672, vocab_size=32016, **GQA), 68_976_910_336, 68_976_910_336, 327_680),
    "orca-2-7b": (llama(4096, 32, 32, 11008, vocab_size=32003), 6_738_440_192, 6_738_440_192, 524_288),
    "orca-2-13b": (llama(5120, 40, 40, 13824, vocab_size=32003), 13_015_895_040, 13_015_895_040, 819_200),
    "mistral-7b": (MISTRAL, 7_241_732_096, 7_241_732_096, 131_072),
    "mixtral-8x7b": (MIXTRAL, 46_702_792_704, 12_879_925_248, 131_072),
    "mixtral-8x22b": (MIXTRAL_22B, 140_620_634_112, 39_152_031_744, 229_376),
    "gpt-4-rumour": (GPT_4_RUMOUR, 1_832_293_403_136, 278_555_429_376, 5_160_960),
    "dbrx": (DBRX, 131_596_523_520, 36_469_708_800, 163_840),
    "qwen3-8b": (QWEN3, 8_190_735_360, 8_190_735_360, 147_456),
    "qwen3-30b-a3b": (QWEN3_MOE, 30_532_122_624, 3_353_032_704, 98_304),
    "qwen3-235b-a22b": (QWEN3_235B, 235_093_634_560, 22_190_763_520, 192_512),
    "olmoe-1b-7b": (OLMOE, 6_919_161_856, 1_282_017_280, 131_072),
    "qwen2.5-7b": (QWEN2, 7_615_616_512, 7_615_616_512, 57_344),
    "qwen1.5-moe-a2.7b": (QWEN2_MOE, 14_315_784_192, 2_689_173_504, 196_608),
    "qwen2-57b-a14b": (QWEN2_57B, 57_408_658_944, 14_249_270_784, 57_344),
    "qwen-14b": (QWEN, 14_167_290_880, 14_167_290_880, 819_200),
    "mpt-7b": (MPT, 6_649_286_656, 6_649_286_656, 524_288),
    "phi-1.5": (PHI, 1_418_270_720, 1_418_270_720, 196_608),
    "phi-2": (PHI_2, 2_779_683_840, 2_779_683_840, 327_680),
    "phi-1.5 of 2023": (PHI_SEQUENTIAL, 1_418_270_720, 1_418_270_720, 196_608),
    "phi-2 of 2023": (PHI_MSFT, 2_779_683_840, 2_779_683_840, 327_680),
    "grok-1": (GROK_1, 315_684_820_992, 83_756_587_008, 262_144),
    "openmoe-base": (OPENMOE_BASE, 799_663_104, 535_421_952, 36_864),
    "openmoe-8b": (OPENMOE, 11_855_046_656, 3_801_982_976, 294_912),
    "gpt-oss-20b": (GPT_OSS_20B, 20_914_757_184, 4_187_440_704, 49_152),
    "gpt-oss-120b": (GPT_OSS_120B, 116_829_156_672, 5_711_982_912, 73_728),
    "openmoe-34b": (OPENMOE_34B, 46_270_737_408, 10_031_950_848, 393_216),
    "switch-base-8": (SWITCH, 619_339_008, 222_977_280, 36_864),
    "switch-base-16": (SWITCH | {"num_experts": 16}, 1_072_397_568, 223_051_008, 36_864),
    "switch-base-32": (SWITCH | {"num_experts": 32}, 1_978_514_688, 223_198_464, 36_864),
    "switch-base-64": (SWITCH | {"num_experts": 64}, 3_790_748_928, 223_493_376, 36_864),
    "switch-base-128": (SWITCH | {"num_experts": 128}, 7_415_217_408, 224_083_200, 36_864),
    "switch-base-256": (SWITCH | {"num_experts": 256}, 14_664_154_368, 225_262_848, 36_864),
    "switch-large-128": (SWITCH_LARGE, 26_309_291_008, 740_813_824, 98_304),
    "switch-xxl-128": (SWITCH_XXL, 394_543_476_736, 11_016_318_976, 393_216),
    "switch-c-2048": (SWITCH_C, 1_571_327_875_360, 1_747_228_960, 115_200),
}

# The params.json of Mixtral's first release, as it was passed around, to the letter.
MIXTRAL_PARAMS = (
    '{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,'
    ' "norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8}}'
)


def read(raw: Raw) -> ModelConfig:
    return family_of(raw).read_config(raw)


def with_attention(**options: Any) -> Raw:
    return MPT | {"attn_config": MPT["attn_config"] | options}


def read_attention(options: Raw) -> ModelConfig:
    return read(with_attention(**options))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    raw, total, active, kv_bytes = PUBLISHED[name]
    config = read(raw)
    assert config.num_parameters() == total
    assert config.num_active_parameters() == active
    assert config.kv_bytes_per_token(2) == kv_bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_weight_map_covers_every_weight_and_no_element_twice(name: str) -> None:
    config = read(PUBLISHED[name][0])
    weights = FAMILIES[config.family].weight_map(config)
    assert {ours: weight.shape for ours, weight in weights.items()} == config.tensor_shapes()
    taken: dict[str, list[tuple[int, int]]] = {}
    for weight in weights.values():
        for piece in weight.pieces:
            taken.setdefault(piece.name, []).append(piece.rows or (0, piece.shape[0]))
    sizes = {piece.name: piece.shape[0] for weight in weights.values() for piece in weight.pieces}
    for tensor, ranges in taken.items():
        ends = [0, *(stop for _, stop in sorted(ranges))]
        assert [start for start, _ in sorted(ranges)] == ends[:-1], tensor
        assert ends[-1] == sizes[tensor], tensor


# ---- what config.json says and leaves out

SILENT: dict[str, Raw] = {
    "llama": without(PUBLISHED["llama-7b"][0], "rms_norm_eps", "torch_dtype", "tie_word_embeddings", "architectures"),
    "llama kv null": llama(4096, 32, 32, 11008, num_key_value_heads=None, head_dim=None),
    "llama grouped": llama(4096, 32, 32, 11008, num_key_value_heads=4),
    "mistral": without(MISTRAL, "num_key_value_heads", "rms_norm_eps", "sliding_window", "rope_theta"),
    "mistral unwindowed": MISTRAL | {"sliding_window": None},
    "mistral positions": without(MISTRAL, "max_position_embeddings"),
    "mixtral": without(MIXTRAL, "num_key_value_heads", "rms_norm_eps", "sliding_window", "rope_theta"),
    "mixtral windowed": MIXTRAL | {"sliding_window": 4096},
    "head_dim": MISTRAL | {"head_dim": 96},
    "transformers 5": without(MIXTRAL, "rope_theta", "torch_dtype")
    | {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "tied": MISTRAL | {"tie_word_embeddings": True},
    "qwen3": without(QWEN3, "head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings"),
    "qwen3 window unused": QWEN3 | {"sliding_window": 4096},
    "qwen3_moe": without(QWEN3_MOE, "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings"),
    "qwen3_moe heads": without(QWEN3_MOE, "head_dim", "sliding_window", "use_sliding_window"),
    "qwen2": without(QWEN2, "rms_norm_eps", "rope_theta", "max_position_embeddings"),
    "qwen2_moe": without(QWEN2_MOE, "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings"),
    "phi": without(PHI, "layer_norm_eps", "rope_theta", "max_position_embeddings", "partial_rotary_factor"),
    "gpt-oss": without(GPT_OSS_20B, "head_dim", "num_key_value_heads", "rope_theta", "sliding_window"),
    "olmoe": without(OLMOE, "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings"),
}


@pytest.mark.parametrize("name", SILENT)
def test_silent_fields_mean_what_transformers_takes_them_for(name: str) -> None:
    raw = SILENT[name]
    config = read(raw)
    theirs = transformers.AutoConfig.for_model(**deepcopy(raw))  # which it writes into
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.norm_eps == (theirs.layer_norm_eps if config.norm == "layer" else theirs.rms_norm_eps)
    assert config.rotary_dim == config.head_dim * theirs.rope_parameters.get("partial_rotary_factor", 1)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.sliding_window == (getattr(theirs, "sliding_window", None) or None)
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.tie_embeddings == theirs.tie_word_embeddings


def test_null_kv_heads_are_as_many_as_query_heads() -> None:
    """As before transformers 5, which no longer takes null here from Mistral."""
    assert read(MISTRAL | {"num_key_value_heads": None}).num_kv_heads == 32


@pytest.mark.parametrize("model", TABLE)
def test_reads_what_transformers_writes(model: str, tmp_path: Path) -> None:
    hf_config(model).save_pretrained(tmp_path)
    model_type, sizes = TABLE[model]
    config = read_config(tmp_path)
    assert config.family == model_type
    for name, value in sizes.items():
        owner = config.moe if name in ("num_experts", "top_k", "renormalize", "shared_width") else config
        assert getattr(owner, name) == value, name


@pytest.mark.parametrize(("field", "length"), [("max_position_embeddings", 4096), ("max_sequence_length", 1024)])
def test_context_length_under_either_name(field: str, length: int) -> None:
    assert read(llama(4096, 32, 32, 11008, **{field: length})).max_position_embeddings == length


def test_context_length_of_configs_that_leave_it_out() -> None:
    assert read(llama(4096, 32, 32, 11008)).max_position_embeddings == 2048


@pytest.mark.parametrize(("given", "read_as"), [(2, (2,)), ([2, 32000], (2, 32000)), (None, ()), ([], ())])
def test_end_of_text_ids(given: Any, read_as: tuple[int, ...]) -> None:
    assert read(MISTRAL | {"eos_token_id": given}).eos_token_ids == read_as


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
        ({}, "float32"),
    ],
)
def test_dtype_under_either_name(fields: Raw, dtype: str) -> None:
    assert read(without(MISTRAL, "torch_dtype") | fields).dtype == dtype


def test_generation_config_adds_end_of_text_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DBRX))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [100257, 100279]}))
    assert read_config(tmp_path).eos_token_ids == (100257, 100279)
    assert read_config(tmp_path / "config.json").eos_token_ids == ()


def test_dbrx() -> None:
    config = read(DBRX)
    assert (config.norm, config.norm_eps, config.rope_theta, config.qkv_clip) == ("layer", 1e-5, 5e5, 8.0)
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (8, 128, 32768)
    assert config.moe is not None
    assert config.moe.renormalize


def test_mpt() -> None:
    config = read(MPT)
    assert (config.norm, config.bias, config.tie_embeddings, config.qkv_clip) == ("layer", None, True, None)
    assert (config.activation, config.glu, config.alibi_bias_max, config.rotary_dim) == ("gelu", "none", 8.0, 0)
    assert read(with_attention(clip_qkv=6, alibi_bias_max=16)) == replace(config, qkv_clip=6.0, alibi_bias_max=16.0)
    assert read(MPT | {"expansion_ratio": 2.5}).intermediate_size == 10240
    assert read(with_attention(softmax_scale=128**-0.5)) == config
    assert read(without(MPT, "attn_config", "expansion_ratio", "max_seq_len", "no_bias")) == config


def test_qwen() -> None:
    config = read(QWEN)
    assert (config.intermediate_size, config.head_dim, config.bias, config.norm_eps) == (13696, 128, "qkv", 1e-6)
    assert (config.ntk_length, config.logn_length, config.max_position_embeddings) == (2048, 2048, 8192)
    plain = replace(config, ntk_length=None, logn_length=None)
    assert read(QWEN | {"use_dynamic_ntk": False, "use_logn_attn": False}) == plain == config.within(2048)
    assert config.within(2049) == config
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    older = without(QWEN, *names, "intermediate_size") | {old: QWEN[new] for new, old in names.items()}
    assert read(older | {"ffn_hidden_size": 27392}) == config


def test_qwen2_moe() -> None:
    config = read(without(QWEN2_MOE, "norm_topk_prob"))
    assert config.moe == MoEConfig(num_experts=60, top_k=4, renormalize=False, shared_width=5632)
    assert (config.bias, config.intermediate_size) == ("qkv", 1408)
    assert read(QWEN2_MOE | {"qkv_bias": False}) == replace(config, bias=None)


def test_mpt_goes_past_its_own_context() -> None:
    assert fit_length(read(MPT), None) == 2048
    assert fit_length(read(MPT), 65_536) == 65_536
    with pytest.raises(GateworkError, match="--max-seq is out of range; got 2049"):
        fit_length(read(PHI), 2049)


@pytest.mark.parametrize("raw", [PHI, PHI_2], ids=["phi-1.5", "phi-2"])
def test_phi(raw: Raw) -> None:
    config = read(raw)
    assert (config.rope_dim, config.norm, config.bias, config.parallel) == (32, "layer", "all", True)
    assert (config.activation, config.glu, config.num_kv_heads) == ("gelu_tanh", "none", 32)
    newer = without(raw, "rope_theta", "partial_rotary_factor")
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": raw["partial_rotary_factor"]}
    assert read(newer | {"rope_parameters": rope}) == config


@pytest.mark.parametrize(("raw", "today"), [(PHI_SEQUENTIAL, PHI), (PHI_MSFT, PHI_2)], ids=["phi-1.5", "phi-2"])
def test_phi_of_2023(raw: Raw, today: Raw) -> None:
    """The same model under its older names, and where they are silent."""
    config = read(raw)
    assert replace(config, family="phi") == read(today)
    silent = (
        "architecture",
        "n_inner",
        "n_head_kv",
        "n_positions",
        "rotary_dim",
        "layer_norm_epsilon",
        "tie_word_embeddings",
    )
    assert read(without(raw, *silent)) == config
    assert read(raw | {"vocab_size": 51137}).vocab_size == 51200


@pytest.mark.parametrize("raw", [QWEN2_MOE, QWEN3_MOE], ids=["qwen2_moe", "qwen3_moe"])
def test_layers_without_experts(raw: Raw) -> None:
    config = read(raw | {"decoder_sparse_step": 3, "mlp_only_layers": [5, 0]})
    assert [i for i in range(12) if config.has_experts(i)] == [2, 8, 11]
    assert (config.mlp_width, config.intermediate_size) == (raw["intermediate_size"], raw["moe_intermediate_size"])
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert read(raw).dense_width is None


def test_grok_1() -> None:
    """With and without model_type, and the shape that ckpt-0 stands for when no config is beside it."""
    config = read(GROK_1)
    assert config == read(GROK_1 | {"model_type": "grok-1"})
    assert replace(config, dtype="float32") == grok1.read_config(grok1.PUBLISHED)
    assert (config.attn_softcap, config.attn_scale, config.post_norms) == (30.0, 128**-0.5, True)
    assert (config.embed_multiplier, config.logit_multiplier) == (pytest.approx(6144**0.5), pytest.approx(3**-0.5))
    assert config.moe is not None
    assert not config.moe.renormalize
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_openmoe() -> None:
    """By its class, although its configs call it "llama"."""
    config = read(OPENMOE)
    assert (config.family, config.attn_scale, config.glu, config.extra_mlp) == ("openmoe", 1.0, "three_way", True)
    assert [i for i in range(24) if config.has_experts(i)] == [5, 11, 17, 23]
    assert config.moe is not None
    assert (config.moe.top_k, config.moe.renormalize) == (2, False)
    silent = ("router_topk", "router_capacity_factor_eval", "router_drop_tks", "router_min_capacity")
    assert read(without(OPENMOE, *silent)) == config
    assert (config.expert_capacity, config.min_expert_capacity, config.drop_tokens) == (2.0, 4, False)
    assert read(OPENMOE | {"router_drop_tks": False}) == replace(config, expert_capacity=0.0, min_expert_capacity=0)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    shapes = {ours: weight.shape for ours, weight in openmoe.t5x_weight_map(config).items()}
    assert shapes == config.tensor_shapes()


def test_switch() -> None:
    config = read(SWITCH)
    assert (config.encoder_layers, config.start_token_id, config.eos_token_ids) == (12, 0, (1,))
    assert (config.relative_buckets, config.relative_distance, config.rotary_dim) == (32, 128, 0)
    assert (config.sequence_capacity, config.attn_scale, config.activation, config.glu) == (64, 1.0, "relu", "none")
    assert config.moe == MoEConfig(num_experts=8, top_k=1, renormalize=False)
    assert config.encoder is not None
    assert [i for i in range(12) if config.encoder.has_experts(i)] == [1, 3, 5, 7, 9, 11]
    assert config.logit_multiplier == pytest.approx(768**-0.5)
    silent = ("decoder_start_token_id", "eos_token_id", "expert_capacity", "num_decoder_layers", "dense_act_fn")
    assert read(without(SWITCH, *silent, "relative_attention_num_buckets", "relative_attention_max_distance")) == config
    assert read(SWITCH | {"expert_capacity": 0}) == replace(config, sequence_capacity=0)
    assert read(SWITCH_C).logit_multiplier == 1
    assert (read(SWITCH_XXL).activation, read(SWITCH_XXL).glu) == ("gelu_tanh", "two_way")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_files_of_grok_1_are_sorted_by_name() -> None:
    names = grok1.tensor_names(64)
    assert len(names) == 770
    assert [names.index(f"decoder_layer_{i}/moe/linear/w") for i in (0, 1, 10, 19, 2)] == [2, 14, 26, 134, 146]
    weights = grok1.ckpt_weight_map(read(GROK_1))
    assert {ours: weight.shape for ours, weight in weights.items()} == read(GROK_1).tensor_shapes()
    assert {piece.name for weight in weights.values() for piece in weight.pieces} == set(names)


@pytest.mark.parametrize(("value", "renormalize"), [(1, True), (1.0, True), (None, False)])
def test_dbrx_expert_weight_norm(value: Any, renormalize: bool) -> None:
    config = read(DBRX | {"ffn_config": DBRX["ffn_config"] | {"moe_normalize_expert_weights": value}})
    assert config.moe is not None
    assert config.moe.renormalize == renormalize


def test_dbrx_without_clip() -> None:
    assert read(DBRX | {"attn_config": DBRX["attn_config"] | {"clip_qkv": None}}).qkv_clip is None


@pytest.mark.parametrize("raw", [QWEN3_MOE, OLMOE], ids=["qwen3_moe", "olmoe"])
def test_experts_of_qwen3_and_olmoe(raw: Raw) -> None:
    """Two names for their number, scores as they are where the config is silent, and a clip for OLMoE alone."""
    config = read(without(raw, "norm_topk_prob"))
    assert config == read(without(raw, "num_experts", "norm_topk_prob") | {"num_local_experts": raw["num_experts"]})
    assert config.moe is not None
    assert not config.moe.renormalize
    assert read(OLMOE | {"clip_qkv": 8.0}).qkv_clip == 8.0


# ---- what is refused

UNSUPPORTED: dict[str, tuple[Raw, str]] = {
    "rope_scaling": (MISTRAL | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
    "rope_scaling untyped": (MISTRAL | {"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor"),
    "yarn": (MISTRAL | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.rope_type"),
    "rope per layer": (MISTRAL | {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention"),
    "two thetas": (MISTRAL | {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
    "partial rotary": (MISTRAL | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "attention bias": (llama(64, 2, 4, 96, attention_bias=True), "attention_bias"),
    "mlp bias": (llama(64, 2, 4, 96, mlp_bias=True), "mlp_bias"),
    "activation": (llama(64, 2, 4, 96, hidden_act="gelu"), "hidden_act"),
    "quantised": (MIXTRAL | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "dtype": (MIXTRAL | {"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
    "another class": (llama(64, 2, 4, 96, architectures=["XverseForCausalLM"]), "architectures"),
    "mixed layers": (MISTRAL | {"layer_types": ["full_attention", "sliding_attention"] * 16}, "layer_types"),
    "p-norm": (DBRX | {"ffn_config": DBRX["ffn_config"] | {"moe_normalize_expert_weights": 2}}, "moe_normalize"),
    "dbrx gelu": (DBRX | {"ffn_config": DBRX["ffn_config"] | {"ffn_act_fn": {"name": "gelu"}}}, "ffn_act_fn.name"),
    "dbrx thetas": (
        DBRX | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "attn_config.rope_theta and rope_parameters.rope_theta differ; got 500000.0 and 10000.0; .* fix: write the one",
    ),
    "dbrx thetas, from before transformers 5": (
        DBRX | {"rope_theta": 1e4},
        "attn_config.rope_theta and rope_theta differ",
    ),
    "missing": (without(MISTRAL, "hidden_size"), "hidden_size"),
    "null": (MISTRAL | {"vocab_size": None}, "vocab_size"),
    "mistyped": (MISTRAL | {"vocab_size": "32000"}, "vocab_size"),
    "fraction": (MISTRAL | {"num_hidden_layers": 32.5}, "num_hidden_layers"),
    "bool": (MISTRAL | {"num_hidden_layers": True}, "num_hidden_layers"),
    "no division": (without(MISTRAL, "head_dim") | {"num_attention_heads": 40}, "head_dim"),
    "no heads": (MISTRAL | {"num_attention_heads": 0, "num_key_value_heads": None}, "head"),
    "endless": (MISTRAL | {"num_hidden_layers": 10**12}, "num_layers is too large"),
    "endless experts": (MIXTRAL | {"num_local_experts": 10**9}, "layers of 1000000000 experts"),
    "huge number": (MISTRAL | {"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "token ids": (MISTRAL | {"eos_token_id": "</s>"}, "eos_token_id"),
    "qwen3 window": (QWEN3 | {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
    "qwen3 bias": (QWEN3 | {"attention_bias": True}, "attention_bias"),
    "qwen3 yarn": (QWEN3 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
    "qwen3 layers": (QWEN3 | {"layer_types": ["full_attention", "sliding_attention"] * 18}, "layer_types"),
    "qwen3_moe window": (QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
    "qwen3_moe dense layers": (QWEN3_MOE | {"mlp_only_layers": "0"}, "mlp_only_layers"),
    "qwen3_moe no such layer": (QWEN3_MOE | {"mlp_only_layers": [48]}, "dense_layers"),
    "qwen3_moe dense alone": (QWEN3_MOE | {"mlp_only_layers": list(range(48))}, "dense_layers"),
    "qwen3_moe no step": (QWEN3_MOE | {"decoder_sparse_step": 0}, "moe_interval"),
    "qwen3_moe wide step": (QWEN3_MOE | {"decoder_sparse_step": 49}, "moe_interval"),
    "qwen3_moe width": (without(QWEN3_MOE, "moe_intermediate_size"), "moe_intermediate_size"),
    "qwen3_moe experts": (QWEN3_MOE | {"num_local_experts": 64}, "num_experts"),
    "qwen3_moe no experts": (without(QWEN3_MOE, "num_experts"), "num_experts"),
    "olmoe window": (OLMOE | {"sliding_window": 4096}, "sliding_window"),
    "olmoe heads": (OLMOE | {"head_dim": 64}, "head_dim"),
    "olmoe clip": (OLMOE | {"clip_qkv": 0}, "qkv_clip"),
    "qwen bias": (QWEN | {"no_bias": False}, "no_bias"),
    "qwen rotation": (QWEN | {"rotary_pct": 0.5}, "rotary_pct"),
    "qwen heads": (QWEN | {"kv_channels": 64}, "kv_channels"),
    "qwen width": (QWEN | {"intermediate_size": 27393}, "intermediate_size"),
    "qwen two names": (QWEN | {"n_embd": 4096}, "hidden_size"),
    "qwen length": (QWEN | {"seq_length": 1}, "ntk_length"),
    "qwen2 window": (QWEN2 | {"use_sliding_window": True}, "use_sliding_window"),
    "qwen2 yarn": (QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type"),
    "qwen2_moe dense layers": (without(QWEN2_MOE, "intermediate_size") | {"mlp_only_layers": [0]}, "intermediate_size"),
    "qwen2_moe shared": (without(QWEN2_MOE, "shared_expert_intermediate_size"), "shared_expert_intermediate_size"),
    "qwen2_moe width": (QWEN2_MOE | {"shared_expert_intermediate_size": 0}, "shared_width"),
    "mpt multiquery": (with_attention(attn_type="multiquery_attention"), "attn_config.attn_type"),
    "mpt positions": (with_attention(alibi=False), "attn_config.alibi"),
    "mpt prefix": (with_attention(prefix_lm=True), "attn_config.prefix_lm"),
    "mpt norms": (with_attention(qk_ln=True), "attn_config.qk_ln"),
    "mpt scale": (with_attention(softmax_scale=1.0), "attn_config.softmax_scale"),
    "mpt slopes": (with_attention(alibi_bias_max=0), "alibi_bias_max"),
    "mpt bias": (MPT | {"no_bias": False}, "no_bias"),
    "mpt logits": (MPT | {"logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
    "mpt norm": (MPT | {"norm_type": "rmsnorm"}, "norm_type"),
    "mpt mlp": (MPT | {"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config.ffn_type"),
    "mpt ratio": (MPT | {"expansion_ratio": -4}, "expansion_ratio"),
    "phi activation": (PHI | {"hidden_act": "gelu"}, "hidden_act"),
    "phi norms": (PHI | {"qk_layernorm": True}, "qk_layernorm"),
    "phi rotates nothing": (PHI | {"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
    "phi two parts": (PHI | {"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor"),
    "phi tied": (PHI | {"tie_word_embeddings": True}, "head with a bias"),
    "phi scaled": (PHI | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
    "phi epsilon": (PHI | {"layer_norm_eps": "small"}, "layer_norm_eps"),
    "phi of 2023 sequential": (
        PHI_SEQUENTIAL | {"architecture": {"block_cls": "sequential"}},
        "architecture.block_cls",
    ),
    "phi of 2023 mixer": (PHI_SEQUENTIAL | {"architecture": {"mixer": {"mixer_cls": "conv"}}}, "mixer_cls"),
    "phi of 2023 class": (PHI_SEQUENTIAL | {"architectures": ["PhiForCausalLM"]}, "architectures"),
    "phi of 2023 padding": (PHI_MSFT | {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
    "phi of 2023 activation": (PHI_MSFT | {"activation_function": "relu"}, "activation_function"),
    "phi of 2023 merged": (PHI_MSFT | {"num_local_experts": 4}, "num_local_experts"),
    "openmoe activation": (OPENMOE | {"hidden_act": "silu"}, "hidden_act"),
    "openmoe ungated": (OPENMOE | {"mlp_gated": False}, "mlp_gated"),
    "openmoe interval": (OPENMOE | {"moe_layer_interval": 25}, "moe_interval leaves no layer"),
    "openmoe zero interval": (OPENMOE | {"moe_layer_interval": 0}, "moe_interval"),
    "openmoe capacity": (OPENMOE | {"router_capacity_factor_eval": -1.0}, "expert_capacity"),
    "openmoe experts": (without(OPENMOE, "num_experts"), "num_experts"),
    "openmoe native": (OPENMOE | {"model_type": "openmoe", "architectures": ["HFOpenMoeForCausalLM"]}, "architectures"),
    "grok untied": (GROK_1 | {"tie_word_embeddings": False}, "tie_word_embeddings"),
    "grok quantised": (GROK_1 | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "grok activation": (GROK_1 | {"hidden_act": "silu"}, "hidden_act"),
    "grok cap": (GROK_1 | {"max_attn_value": 0}, "attn_softcap"),
    "grok scale": (GROK_1 | {"attn_output_multiplier": -1}, "attn_scale"),
    "grok class": (GROK_1 | {"model_type": "grok-1", "architectures": ["Grok2"]}, "architectures"),
    "gpt-oss layers": (GPT_OSS_20B | {"layer_types": ["full_attention"]}, "layer_types"),
    "gpt-oss kinds": (GPT_OSS_20B | {"layer_types": ["chunked_attention"] * 24}, "layer_types"),
    "gpt-oss window": (GPT_OSS_20B | {"sliding_window": None}, "sliding_window"),
    "gpt-oss limit": (GPT_OSS_20B | {"swiglu_limit": 0}, "swiglu_limit"),
    "gpt-oss alpha": (GPT_OSS_20B | {"swiglu_alpha": -1.0}, "alpha"),
    "gpt-oss quantised": (GPT_OSS_20B | {"quantization_config": {"quant_method": "gptq"}}, "quant_method"),
    "gpt-oss unquantised": (GPT_OSS_20B | {"quantization_config": {}}, "quantization_config"),
    "gpt-oss experts": (without(GPT_OSS_20B, "num_local_experts"), "num_local_experts"),
    "gpt-oss rope": (GPT_OSS_20B | {"rope_scaling": YARN | {"rope_type": "longrope"}}, "rope_scaling.rope_type"),
    "gpt-oss ropes": (GPT_OSS_20B | {"rope_parameters": YARN}, "rope_scaling"),
    "gpt-oss mscale": (GPT_OSS_20B | {"rope_scaling": YARN | {"mscale": 0.7}}, "rope_scaling.mscale"),
    "gpt-oss factor": (GPT_OSS_20B | {"rope_scaling": YARN | {"factor": None}}, "rope_scaling.factor"),
    "gpt-oss slow": (GPT_OSS_20B | {"rope_scaling": YARN | {"beta_slow": 64}}, "YaRN is out of range"),
    "gpt-oss length": (
        GPT_OSS_20B | {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
        "original_length of YaRN",
    ),
    "gpt-oss base": (GPT_OSS_20B | {"rope_theta": 0}, "rope_theta"),
    "switch router": (SWITCH | {"router_bias": True}, "router_bias"),
    "switch padding": (SWITCH | {"router_ignore_padding_tokens": True}, "router_ignore_padding_tokens"),
    "switch activation": (SWITCH | {"dense_act_fn": "gelu"}, "dense_act_fn"),
    "switch every third": (SWITCH | {"num_sparse_encoder_layers": 4}, "num_sparse_encoder_layers"),
    "switch unequal": (SWITCH | {"num_sparse_decoder_layers": 12}, "num_sparse_decoder_layers"),
    # the file of switch-c-2048 as published: fewer layers in the decoder than there are with experts
    "switch c": (SWITCH_C | {"num_decoder_layers": 12}, "num_sparse_decoder_layers is wrong; got 15; expected 1 to 12"),
    "switch capacity": (SWITCH | {"expert_capacity": -1}, "sequence_capacity"),
    "switch start": (SWITCH | {"decoder_start_token_id": 32128}, "start_token_id"),
    "switch buckets": (SWITCH | {"relative_attention_num_buckets": 2}, "relative_buckets"),
    "switch distance": (SWITCH | {"relative_attention_max_distance": 16}, "relative_distance"),
    "nested": (DBRX | {"attn_config": [1]}, "attn_config"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_refused_by_name(name: str) -> None:
    raw, field = UNSUPPORTED[name]
    with pytest.raises(GateworkError, match=field):
        read(raw)


@pytest.mark.parametrize("model_type", ["gpt2", None, 3, ["llama"]])
def test_unknown_model_type_lists_the_known(model_type: Any) -> None:
    with pytest.raises(GateworkError, match="llama, mistral, mixtral, dbrx, qwen3, qwen3_moe, olmoe"):
        read({"model_type": model_type})


# ---- params.json


def test_mixtral_params(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(MIXTRAL_PARAMS)
    config = read_config(tmp_path / "params.json")
    assert config == read_config(tmp_path)
    assert (config.family, config.rope_theta, config.sliding_window) == ("mixtral", 1e6, None)
    assert (config.num_parameters(), config.num_active_parameters()) == (46_702_792_704, 12_879_925_248)
    assert config == read(MIXTRAL)


MISTRAL_PARAMS = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8}
MISTRAL_PARAMS |= {"norm_eps": 1e-5, "vocab_size": 32000}
LLAMA_PARAMS = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": 32000}
LLAMA_70B = {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8}
LLAMA_70B |= {"n_layers": 80, "norm_eps": 1e-5, "vocab_size": 32000}
STACKED_PARAMS = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
STACKED_PARAMS |= {"intermediate_size": 14336, "vocab_size": 32000, "rms_norm_eps": 1e-5}
STACKED_PARAMS |= {"num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("fields", "theta", "window"),
    [
        ({"sliding_window": 4096}, 1e4, 4096),  # v0.1
        ({}, 1e6, None),  # v0.2
        ({"rope_theta": 1000000.0}, 1e6, None),  # v0.3
        ({"sliding_window": None}, 1e6, None),
        ({"sliding_window": "4096"}, 1e4, 4096),
        ({"sliding_window": [4096] * 32}, 1e4, 4096),
        ({"sliding_window": 4096, "rope_theta": 1e6}, 1e6, 4096),
    ],
)
def test_mistral_params_rope_base_follows_the_window(fields: Raw, theta: float, window: int | None) -> None:
    config = params_json.read_config(MISTRAL_PARAMS | fields)
    assert (config.rope_theta, config.sliding_window, config.family) == (theta, window, "mistral")
    assert config.num_parameters() == 7_241_732_096


@pytest.mark.parametrize(
    ("raw", "total", "theta", "length"),
    [
        (LLAMA_PARAMS, 6_738_415_616, 1e4, 2048),
        (LLAMA_PARAMS | {"norm_eps": 1e-5}, 6_738_415_616, 1e4, 4096),
        (LLAMA_70B, 68_976_648_192, 1e4, 4096),
        (LLAMA_PARAMS | {"norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": 32016}, 6_738_546_688, 1e6, 16384),
    ],
)
def test_meta_params(raw: Raw, total: int, theta: float, length: int) -> None:
    config = params_json.read_config(raw)
    assert (config.family, config.num_parameters()) == ("llama", total)
    assert (config.rope_theta, config.max_position_embeddings) == (theta, length)


def test_stacked_params() -> None:
    config = params_json.read_config(STACKED_PARAMS | {"sliding_window": "4096", "rope_theta": 1e6})
    assert replace(config, sliding_window=None) == read(MIXTRAL)
    assert config.sliding_window == 4096


def test_vocabulary_left_to_the_embedding() -> None:
    raw = LLAMA_PARAMS | {"vocab_size": -1}
    assert params_json.read_config(raw, vocab_rows=32016).vocab_size == 32016
    with pytest.raises(GateworkError, match="vocab_size"):
        params_json.read_config(raw)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (MISTRAL_PARAMS | {"use_biases": True}, "use_biases"),
        (LLAMA_PARAMS | {"use_scaled_rope": True}, "use_scaled_rope"),
        (MISTRAL_PARAMS | {"yarn": {"factor": 4}}, "yarn"),
        (MISTRAL_PARAMS | {"moe": {"num_experts": 8, "num_shared_experts": 1}}, "moe.num_shared_experts"),
        (MISTRAL_PARAMS | {"sliding_window": [4096, None]}, "sliding_window"),
        (MISTRAL_PARAMS | {"sliding_window": "wide"}, "sliding_window"),
        (without(MISTRAL_PARAMS, "n_layers"), "n_layers"),
        (MISTRAL_PARAMS | {"n_heads": "32"}, "n_heads"),
        (without(LLAMA_PARAMS, "multiple_of"), "multiple_of"),
        (LLAMA_PARAMS | {"multiple_of": 0}, "multiple_of"),
        (LLAMA_70B | {"ffn_dim_multiplier": math.nan}, "ffn_dim_multiplier"),
        (LLAMA_70B | {"ffn_dim_multiplier": 10**400}, "ffn_dim_multiplier"),
    ],
)
def test_params_refused_by_name(raw: Raw, field: str) -> None:
    with pytest.raises(GateworkError, match=field):
        params_json.read_config(raw)


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
@pytest.mark.parametrize(
    "raw", [LLAMA_PARAMS, MISTRAL_PARAMS, json.loads(MIXTRAL_PARAMS)], ids=["llama", "mistral", "moe"]
)
def test_params_weight_map_covers_every_weight(raw: Raw, stacked: bool) -> None:
    config = params_json.read_config(raw)
    weights = params_json.weight_map(config, stacked_experts=stacked)
    assert {ours: weight.shape for ours, weight in weights.items()} == config.tensor_shapes()


@pytest.mark.parametrize(
    ("read_one", "raw"),
    [(read, raw) for raw in (MIXTRAL, PHI, MPT, MPT["attn_config"], QWEN, QWEN2_MOE, SWITCH)]
    + [(params_json.read_config, json.loads(MIXTRAL_PARAMS))],
    ids=["mixtral", "phi", "mpt", "mpt attention", "qwen", "qwen2_moe", "switch", "params.json"],
)
def test_no_field_value_breaks_the_reader(read_one: Callable[[Raw], ModelConfig], raw: Raw) -> None:
    """Every field in turn holds something absurd: the reader returns or raises GateworkError, and nothing else."""
    if "alibi" in raw:
        read_one = read_attention
    absurd = [None, True, -1, 0, 10**30, 1e300, math.nan, math.inf, "", "x", [], [[]], {}, {"a": []}]
    refused = 0
    for name in raw:
        for value in absurd:
            try:
                read_one(raw | {name: value})
            except GateworkError:
                refused += 1
    assert refused > len(raw)
