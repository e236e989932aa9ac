"""The transformers suite: small random models of the architectures that Hugging Face users train."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from setpoint_bench.coverage import Build
from setpoint_bench.zoo import small_config, transformers_model

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 120,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_DROPOUT = dict.fromkeys(
    """attention_dropout hidden_dropout attention_probs_dropout_prob hidden_dropout_prob dropout dropout_rate
    activation_dropout attn_pdrop embd_pdrop resid_pdrop summary_first_dropout classifier_dropout layerdrop
    hidden_dropout_rate feat_proj_dropout final_dropout encoder_layerdrop decoder_layerdrop embedding_dropout
    attn_dropout ff_dropout pooler_dropout mlp_dropout drop_path_rate drop_rate""".split(),  # noqa: SIM905
    0.0,
)
_GROUPED = {"num_key_value_heads": 2}
_IMAGE = {"image_size": 32, "patch_size": 8}
_SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_start_token_id": 1,
}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0}
_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT_TOWER = {**_TOWER, "vocab_size": 120, "max_position_embeddings": 16, "eos_token_id": 2, "projection_dim": 32}
_VISION_TOWER = {**_TOWER, **_IMAGE, "projection_dim": 32}

_MODELS: dict[str, dict[str, Any]] = {
    # Encoders of text.
    "bert": {},
    "roberta": {"max_position_embeddings": 70},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    "albert": {"embedding_size": 32},
    "electra": {"embedding_size": 32},
    "deberta": {"pos_att_type": ["c2p", "p2c"], "relative_attention": True, "max_relative_positions": 16},
    "deberta-v2": {"pos_att_type": ["c2p", "p2c"], "relative_attention": True, "position_buckets": 8,
        "share_att_key": True},
    "mpnet": {"max_position_embeddings": 70},
    "xlm-roberta": {"max_position_embeddings": 70},
    "camembert": {"max_position_embeddings": 70},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "fnet": {},
    "squeezebert": {"embedding_size": 64, "q_groups": 2, "k_groups": 2, "v_groups": 2},
    # Decoders.
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 4, "experts_implementation": "batched_mm"},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "qwen2_moe": {**_GROUPED, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "experts_implementation": "batched_mm"},
    "gemma": {**_GROUPED, "head_dim": 16},
    "gemma2": {**_GROUPED, "head_dim": 16},
    "gemma3_text": {**_GROUPED, "head_dim": 16},
    "phi": {},
    "phi3": _GROUPED,
    "stablelm": _GROUPED,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "cohere": _GROUPED,
    "granite": _GROUPED,
    "starcoder2": _GROUPED,
    "smollm3": _GROUPED,
    "mamba": {"state_size": 8, "expand": 2},
    "mamba2": {"state_size": 8, "expand": 2, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    # Encoder and decoder.
    "t5": _T5,
    "mt5": _T5,
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "pegasus": _SEQ2SEQ,
    "marian": _SEQ2SEQ,
    # Images, sound, both.
    "vit": _IMAGE,
    "deit": _IMAGE,
    "beit": _IMAGE,
    "dinov2": {**_IMAGE, "mlp_ratio": 2},
    "swin": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
        "window_size": 4, "num_attention_heads": [2, 4], "num_hidden_layers": 2, "hidden_size": 32},
    "convnext": {"num_hidden_layers": 4, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "segformer": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4],
        "decoder_hidden_size": 32},
    "clip": {"text_config": _TEXT_TOWER, "vision_config": _VISION_TOWER},
    "siglip": {"text_config": _TEXT_TOWER, "vision_config": _VISION_TOWER},
    "whisper": {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    "wav2vec2": {"conv_dim": [32, 32], "conv_kernel": [8, 3], "conv_stride": [4, 2], "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2, "mask_time_prob": 0.0},
    "hubert": {"conv_dim": [32, 32], "conv_kernel": [8, 3], "conv_stride": [4, 2], "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2, "mask_time_prob": 0.0},
}  # fmt: skip


def suite() -> Mapping[str, Build]:
    return {name: partial(_build, name, sizes) for name, sizes in _MODELS.items()}


def _build(name: str, sizes: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """A model with random weights, and the inputs of a training step without a cache."""
    return transformers_model(small_config(name, {**_SIZES, **_NO_DROPOUT}, sizes))
