"""Every key that a ``config.json`` of this family may have: a setting of the drafter, refused by
name, or of no effect. ``vllm_dflash.formats.unread`` judges a file by them.

A key that changes what a drafter computes and is passed over shows as nothing but low acceptance.
So each key is in one of four places: ``READ``, ``REFUSED`` (unless it says what is so anyway),
``NO_EFFECT`` (reviewed), or unknown, which is told to the user. Keys that transformers or vLLM
reads for something else are refused too. Pure Python.

    pytest tests/unit/test_config_keys.py
"""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_dflash import fields

READ = frozenset(
    {
        "architectures",
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "head_dim",
        "rms_norm_eps",
        "attention_bias",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "hidden_act",
        "layer_types",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "is_causal",
        "target_hidden_size",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "draft_vocab_size",
        "num_target_layers",
        "block_size",
        "dflash_config",
        "speculators_model_type",
        "transformer_layer_config",
        "mask_token_id",
        "sample_from_anchor",
        "aux_hidden_state_layer_ids",
        "sliding_window_non_causal",
        "markov_head_type",
    }
)
"""Settings of a drafter: ``formats`` and ``DrafterConfig.check`` judge them."""

REFUSED: dict[str, tuple[Any, ...]] = {
    # Rotary positions
    "is_neox_style": (True,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rotary_dim": (),
    "rotary_emb_base": (),
    "rotary_emb_fraction": (1,),
    "xdrope_section": (),
    "mrope_section": (),
    "use_mrope": (False,),
    "no_rope_layers": (),
    "no_rope_layer_interval": (0,),
    "use_rope": (True,),
    "rope_local_base_freq": (),
    "rope_ratio": (1,),
    "dual_chunk_attention_config": (),
    "alibi": (False,),
    "use_alibi": (False,),
    # Attention
    "add_swa_attention_sink_bias": (False,),
    "add_full_attention_sink_bias": (False,),
    "attention_sink_bias": (False,),
    "attention_value_scale": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "attn_logit_softcap": (),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (False,),
    "attn_scale": (),
    "clip_qkv": (),
    "qk_norm": (True,),
    "use_qk_norm": (True,),
    "qkv_bias": (False,),
    "attention_out_bias": (False,),
    "attn_output_gate": (False,),
    "q_lora_rank": (),
    "kv_lora_rank": (),
    "v_head_dim": (),
    "global_head_dim": (),
    "num_global_key_value_heads": (),
    # Layers
    "mlp_bias": (False,),
    "use_bias": (False,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "embedding_scale": (1,),
    "input_embedding_scale": (),
    "parallel_residual": (False,),
    "use_parallel_residual": (False,),
    "hidden_activation": ("silu",),
    "norm_before_residual": (True,),
    "norm_before_fc": (False,),
    "fc_norm": (False,),
    "norm_output": (False,),
    "sandwich_norm": (False,),
    "layernorm_type": ("rmsnorm",),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "moe_num_experts": (0,),
    "num_experts_per_tok": (0,),
    "num_experts_per_token": (0,),
    "top_k_experts": (0,),
    "moe_topk": (0,),
    "moe_top_k": (0,),
    "num_kv_shared_layers": (0,),
    "hidden_size_per_layer_input": (0,),
    "first_k_dense_replace": (0,),
    # Another method's drafter under one of our names
    "shift_label": (False,),
    "use_aux_hidden_state": (True,),
    "conv_kernel_size": (0,),
    "conv_group_size": (),
    "thresh_head_direct_len": (),
    "confidence_head": (False,),
    "target_num_hidden_layers": (),
    "fusion_type": ("concat_fc",),
    "hidden_correction_type": (),
}
"""Keys that change what is computed, in ways that are not implemented; with the values that say
what is so without them. The settings of a head that the drafter does not have are refused by the
heads' own records (``kinds.setting_names``)."""


OF_TRANSFORMERS = frozenset(
    {
        "_auto_class",
        "_check_received_keys",
        "_decode_special_floats",
        "_dict_from_json_file",
        "_encode_special_floats",
        "_experts_implementation",
        "_get_config_dict",
        "_get_files_timestamps",
        "_get_generation_parameters",
        "_getattr_without_heterogeneous_validation",
        "_hasattr_without_heterogeneous_validation",
        "_iter_config_keys_with_heterogeneous_adjustment",
        "_remove_keys_not_serialized",
        "_update_heterogeneous_to_dict_output",
        "_upload_modified_files",
        "_validate_axial_rope_parameters",
        "_validate_default_rope_parameters",
        "_validate_dynamic_rope_parameters",
        "_validate_linear_rope_parameters",
        "_validate_llama3_rope_parameters",
        "_validate_longrope_rope_parameters",
        "_validate_proportional_rope_parameters",
        "_validate_yarn_rope_parameters",
        "allow_global_per_layer_attribute_access",
        "attribute_map",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "convert_rope_params_to_dict",
        "default_rope_type",
        "default_theta",
        "dict_dtype_to_str",
        "from_dict",
        "from_json_file",
        "from_pretrained",
        "get_config_dict",
        "get_mtp_config",
        "get_text_config",
        "ignore_keys_at_rope_validation",
        "is_custom_code",
        "is_heterogeneous",
        "is_remote_code",
        "keys_to_ignore_at_inference",
        "nested_rope_parameter_keys",
        "per_layer_attributes",
        "per_layer_config",
        "push_to_hub",
        "register_for_auto_class",
        "save_pretrained",
        "serialize_explicit_per_layer_config",
        "standardize_rope_params",
        "sub_configs",
        "to_dict",
        "to_diff_dict",
        "to_json_file",
        "to_json_string",
        "update",
        "update_from_string",
        "use_return_dict",
        "validate",
        "validate_architecture",
        "validate_layer_type",
        "validate_output_attentions",
        "validate_rope",
        "validate_token_ids",
    }
)
"""Attributes and methods of transformers' config classes: a key of the same name takes their place,
and they fail, or mean something else. ``tests/unit/test_config_keys.py`` compares."""

READ_ELSEWHERE = frozenset(
    {
        # By transformers' get_text_config, and what vLLM renames to one of them
        "decoder",
        "generator",
        "text_config",
        "text_encoder",
        "llm_config",
        "thinker_config",
        "vision_config",
        "encoder_config",
        "block_configs",
        "mtp_layer_types",
        # By vLLM, instead of settings that the drafter is read from
        "compression_config",
        "hidden_size_per_head",
        "multi_query_group_num",
        "num_attention_groups",
        "compress_ratios",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        # By vLLM, of a draft config: K, and what would be another model's layers, positions or head
        "n_predict",
        "hc_mult",
        "head_dtype",
        "rswa_window",
        "is_mm_prefix_lm",
        "canvas_length",
        "position_encoding_type",
        "attn_config",
        "layers_block_type",
        "attn_type_list",
        "index_share_for_mtp_iteration",
    }
)
"""Keys that transformers or vLLM reads a setting by that is the drafter's under another name, or
none of its settings."""
OF_VLLM = frozenset({"model", "n_head_kv", "num_kv_heads"})
"""An attribute of the config class that vLLM puts around a draft config, and what it takes instead
of ``num_key_value_heads``, null included: as ``OF_TRANSFORMERS``."""
LENGTHS = frozenset(
    {
        "n_positions",
        "max_seq_len",
        "seq_length",
        "model_max_length",
        "max_target_positions",
        "max_sequence_length",
        "max_seq_length",
        "seq_len",
    }
)
"""What vLLM takes for a draft model's length beside ``max_position_embeddings``, the shortest of
all: where a request is longer than that, it is not drafted for."""
READ_REMEDIES = {
    "compression_config": "call it quantization_config if the weights are packed so, else remove it"
}

OF_THE_KIND = frozenset({"projector_type", "model_arch"})
"""Keys that name the drafter's kind."""


def _anything(value: Any) -> bool:
    return True


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return fields.is_int(value)


def _is_finite_number(value: Any) -> bool:
    return fields.is_number(value) and abs(value) <= 1e30


def _is_positive(value: Any) -> bool:
    return _is_finite_number(value) and value >= 1e-30


def _is_ids(value: Any) -> bool:
    return fields.is_int(value) or (fields.is_list(value) and all(map(fields.is_int, value)))


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


_Kind = tuple[Callable[[Any], bool], str, bool]
_FLAG: _Kind = (_is_flag, "true or false", False)
_NUMBER: _Kind = (_is_finite_number, "a number", False)
_COUNT: _Kind = (_is_count, "a whole number", False)
_TOKEN: _Kind = (_is_count, "a token id or null", True)
_TEXT: _Kind = (_is_text, "a text", True)
_OBJECT: _Kind = (_is_object, "an object", True)
_MONOTONIC: _Kind = (_is_positive, "a positive number or null", True)
_ANYTHING: _Kind = (_anything, "", True)

EMBEDDING_SCALE = "input_embedding_scale"
CAP = "final_logit_softcapping"
FACTORS = {
    "logit_scale": 1,
    "logits_scaling": -1,
    "output_multiplier": 1,
    "output_multiplier_scale": 1,
}
"""Of logits, each with the power that it multiplies them in."""
SCALES = (*FACTORS, CAP)
"""Read for probabilities, of no effect where the best is taken, and refused where something is
added to logits."""

NO_EFFECT: dict[str, _Kind] = {
    # Training and generation
    "attention_dropout": _NUMBER,
    "initializer_range": (
        lambda v: isinstance(v, float) and abs(v) < 1e30,
        "a number with a point",
        False,
    ),
    "hidden_dropout": _NUMBER,
    "resid_pdrop": _NUMBER,
    "embd_pdrop": _NUMBER,
    "use_cache": _FLAG,
    "pretraining_tp": _COUNT,
    "bos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
    "eos_token_id": (_is_ids, "a token id, a list of them or null", True),
    "max_anchors": _ANYTHING,
    "num_anchors": _ANYTHING,
    "loss_decay_gamma": _ANYTHING,
    "gamma": _ANYTHING,
    "mask_token": _ANYTHING,
    "training_config": _ANYTHING,
    # Embedding and lm_head are the target's, or tensors of the checkpoint.
    "tie_word_embeddings": _FLAG,
    # Monotonic: the best token stays the best; ``layers.read_scales`` reads them.
    **dict.fromkeys(SCALES, _MONOTONIC),
    # What transformers writes into every file
    "transformers_version": _TEXT,
    "speculators_version": _TEXT,
    "_name_or_path": _TEXT,
    "name_or_path": _TEXT,
    "output_hidden_states": _FLAG,
    "output_attentions": _FLAG,
    "return_dict": _FLAG,
    "is_encoder_decoder": _FLAG,
    "chunk_size_feed_forward": _COUNT,
    "problem_type": _TEXT,
    "num_labels": (
        lambda v: fields.is_int(v) and 0 <= v <= 1024,
        "a whole number up to 1024",
        False,
    ),
    "torchscript": _FLAG,
    "auto_map": (_is_object, "an object", False),
    "speculators_config": _OBJECT,
    "id2label": (
        lambda v: _is_object(v) and all(key.isdecimal() for key in map(str, v)),
        "an object with numbers for keys",
        True,
    ),
    "label2id": _OBJECT,
    "_attn_implementation": _TEXT,
    "_attn_implementation_autoset": _ANYTHING,
    "attn_implementation": _TEXT,
    "has_no_defaults_at_init": _ANYTHING,
    "base_config_key": _ANYTHING,
    "_commit_hash": _TEXT,
    # Written into a draft config by vLLM
    "num_lookahead_tokens": _ANYTHING,
    "truncated_vocab_size": _ANYTHING,
    "method": _ANYTHING,
}
"""Keys that cannot change what is computed, reviewed; with their type, for transformers refuses
another one at vLLM's start."""

DFLASH_CONFIG = frozenset(
    {
        "mask_token_id",
        "target_layer_ids",
        "block_size",
        "causal",
        "use_swa",
        "swa_window_size",
        "sample_from_anchor",
        EMBEDDING_SCALE,
    }
)
"""What is read of ``dflash_config``."""
MODEL_TYPES = ("qwen3", "qwen2", "llama", "mistral")
"""Whose config class vLLM may read the file by: the layers are Qwen3's in all of them."""
