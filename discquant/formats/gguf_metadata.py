# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp must be told to build a model: metadata from config.json, and the tensors of rotary factors.

llama.cpp holds some numbers of a family in its own code (which layers slide, the scale of attention). Where a
configuration says another, the file would run and answer wrongly: it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats.gguf_model import Layout, family_of
from discquant.formats.rotary import head_size, rope_factors, rope_kind, rope_of

Metadata = dict[str, int | float | str]

ROPE_FACTORS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# What llama.cpp computes between the two matrices of a block, by family; others compute silu.
_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ACTIVATIONS = {"gemma": _GELU, "gemma2": _GELU, "gemma3": _GELU}
# Every so many-th layer attends to all positions, the others slide.
_PERIODS = {"gemma2": 2, "gemma3": 6}
# Layers of the models of 27 B weights, whose attention is scaled by hidden_size / heads in place of the head's size.
_LARGEST = {"gemma2": 46, "gemma3": 62}
_LOCAL_ROPE = 10000.0
_NORMED_FROM = 64
# transformers slides over a window; llama.cpp lets these families attend to everything.
_NO_WINDOW = ("llama", "qwen2", "qwen3", "qwen3moe", "phi3")


def layout_of(config: Mapping[str, Any]) -> Layout:
    """How GGUF holds a model.

    Raises:
        UnrepresentableError: Its architecture is not written.
        CheckpointError: An entry is missing or no number.
    """
    family = family_of(config)
    heads = _integer(config, "num_attention_heads")
    return Layout(family, heads, _integer(config, "num_key_value_heads", heads), _experts(config))


def model_metadata(config: Mapping[str, Any]) -> Metadata:
    """Metadata that llama.cpp needs to build the model; keys without the architecture's prefix.

    Raises:
        UnrepresentableError: The configuration wants something that llama.cpp does not compute in this family.
        CheckpointError: An entry is missing or no number.
    """
    layout = layout_of(config)
    family, hidden, head_dim = layout.family.name, _integer(config, "hidden_size"), head_size(config)
    _check_activation(config, family)
    found: Metadata = {
        "context_length": _integer(config, "max_position_embeddings"),
        "embedding_length": hidden,
        "block_count": _integer(config, "num_hidden_layers"),
        "feed_forward_length": _integer(config, "intermediate_size"),
        "attention.head_count": layout.query,
        "attention.head_count_kv": layout.key,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": _rotated(config, head_dim),
        "vocab_size": _integer(config, "vocab_size"),
    }
    if family == "command-r":
        found["attention.layer_norm_epsilon"] = float(config.get("layer_norm_eps", 1e-5))
    else:
        found["attention.layer_norm_rms_epsilon"] = float(config.get("rms_norm_eps", 1e-6))
    found |= _rope(config, family)
    if layout.experts:
        found |= _mixture(config, family)
    if family in _PERIODS:
        found |= _sliding(config, family)
    if family == "granite":
        found |= {
            "attention.scale": float(config.get("attention_multiplier", 1.0)),
            "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
            "residual_scale": float(config.get("residual_multiplier", 1.0)),
            "logit_scale": float(config.get("logits_scaling", 1.0)),
        }
    if family == "command-r":
        found["logit_scale"] = float(config.get("logit_scale", 0.0625))
        normed = _integer(config, "num_hidden_layers") >= _NORMED_FROM
        if bool(config.get("use_qk_norm")) != normed:
            raise UnrepresentableError(
                f"gguf: use_qk_norm is {bool(config.get('use_qk_norm'))}; llama.cpp norms q and k of command-r from "
                f"{_NORMED_FROM} layers on, and only there"
            )
    if family == "phi3":  # required by earlier versions; later ones pass over it
        found["attention.sliding_window"] = _integer(config, "sliding_window", 0, least=0)
    return found


def metadata_warnings(config: Mapping[str, Any]) -> list[str]:
    """What llama.cpp will do otherwise than transformers, one sentence each."""
    window = config.get("sliding_window")
    slides = isinstance(window, int) and config.get("use_sliding_window", True)
    if slides and window < config["max_position_embeddings"] and family_of(config).name in _NO_WINDOW:
        return [f"llama.cpp attends to all positions; beyond {window} tokens the original does not"]
    return []


def extra_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Float32 vectors that a file holds beside the original's tensors: divisors of rotary frequencies.

    Raises:
        CheckpointError: Those of a long context are no lists of half a head's rotated entries.
    """
    factors = rope_factors(config)
    if factors is not None:
        return {ROPE_FACTORS: factors}
    rope = rope_of(config)
    if rope_kind(rope) != "longrope":
        return {}
    found = {}
    for tensor, key in ((ROPE_LONG, "long_factor"), (ROPE_SHORT, "short_factor")):
        values = rope.get(key)
        wanted = _rotated(config, head_size(config)) // 2
        if not isinstance(values, Sequence) or len(values) != wanted:
            raise CheckpointError(f"config.json: {key} must be {wanted} numbers")
        found[tensor] = torch.tensor([float(value) for value in values], dtype=torch.float32)
    return found


def _check_activation(config: Mapping[str, Any], family: str) -> None:
    computed = _ACTIVATIONS.get(family, ("silu", "swish"))
    # The first Gemma's `hidden_act: gelu` was a mistake that transformers passes over.
    named = config.get("hidden_activation") or (None if family == "gemma" else config.get("hidden_act"))
    if named is not None and named not in computed:
        raise UnrepresentableError(f"gguf: hidden_act {named!r} is not what llama.cpp computes")


def _rotated(config: Mapping[str, Any], head_dim: int) -> int:
    """Entries of a head that are rotated."""
    share = config.get("partial_rotary_factor") or rope_of(config).get("partial_rotary_factor") or 1.0
    return int(float(share) * head_dim)


def _rope(config: Mapping[str, Any], family: str) -> Metadata:
    rope = rope_of(config, "full_attention")
    kind = rope_kind(rope)
    found: Metadata = {"rope.freq_base": float(rope.get("rope_theta") or 10000.0)}
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(original),
        }
    elif kind == "longrope" and family == "phi3":
        found |= _long_rope(config, rope)
    elif kind not in ("default", "llama3"):
        raise UnrepresentableError(f"gguf: rotary scaling {kind!r} is not written")
    return found


def _long_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Metadata:
    """Factors by the length of the context; attention grows by sqrt(1 + ln(ratio) / ln(original))."""
    longest = _integer(config, "max_position_embeddings")
    stated = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = longest if stated is None else int(stated)
    ratio = float(rope.get("factor") or longest / original)
    factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    named = rope.get("attention_factor")
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": factor if named is None else float(named),
    }


def _experts(config: Mapping[str, Any]) -> int:
    """Experts of each layer; 0 where the model has none."""
    for key in ("num_local_experts", "num_experts"):
        if config.get(key):
            return _integer(config, key)
    return 0


def _mixture(config: Mapping[str, Any], family: str) -> Metadata:
    found: Metadata = {
        "expert_count": _experts(config),
        "expert_used_count": _integer(config, "num_experts_per_tok"),
    }
    if family == "qwen3moe":
        found["expert_feed_forward_length"] = _integer(config, "moe_intermediate_size")
        if not config.get("norm_topk_prob"):
            raise UnrepresentableError(
                "gguf: norm_topk_prob false; llama.cpp norms the weights of the experts"
            )
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise UnrepresentableError("gguf: layers without experts; llama.cpp wants them in every layer")
    return found


def _sliding(config: Mapping[str, Any], family: str) -> Metadata:
    """What Gemma 2 and 3 say of their windows and caps."""
    layers, window = _integer(config, "num_hidden_layers"), _integer(config, "sliding_window")
    period = _PERIODS[family]
    usual = [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)
    ]
    stated = config.get("layer_types")
    if (stated or usual) != usual or config.get("sliding_window_pattern", period) != period:
        raise UnrepresentableError(
            f"gguf: in llama.cpp one layer in {period} of {family}, the last, attends to all"
        )
    largest = layers == _LARGEST[family]
    scale = (
        _integer(config, "hidden_size") // _integer(config, "num_attention_heads")
        if largest
        else head_size(config)
    )
    if config.get("query_pre_attn_scalar", 256) != scale:
        raise UnrepresentableError(
            f"gguf: query_pre_attn_scalar {config.get('query_pre_attn_scalar', 256)}; llama.cpp scales attention by "
            f"{scale} in a model of {family} with {layers} layers"
        )
    found: Metadata = {"attention.sliding_window": window}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if family == "gemma2":
        stated_caps = {key: config.get(key, usual_cap) for key, usual_cap in caps.items()}
        if not all(stated_caps.values()):
            raise UnrepresentableError("gguf: llama.cpp caps the logits of gemma2, and this model does not")
        return found | {key: float(cap) for key, cap in stated_caps.items()}
    own = (config.get("rope_parameters") or {}).get("sliding_attention")
    local = own if isinstance(own, Mapping) else {"rope_theta": config.get("rope_local_base_freq")}
    if rope_kind(local) != "default" or float(local.get("rope_theta") or _LOCAL_ROPE) != _LOCAL_ROPE:
        raise UnrepresentableError(
            f"gguf: in llama.cpp gemma3's sliding layers rotate by {_LOCAL_ROPE}, here by {dict(local)}"
        )
    if any(config.get(key) for key in (*caps, "use_bidirectional_attention")):
        raise UnrepresentableError(
            "gguf: llama.cpp caps no logits of gemma3 and attends to what came before, unlike this model"
        )
    return found


def _integer(config: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < least:
        raise CheckpointError(f"config.json: {key} must be an integer from {least}, got {value!r}")
    return value
