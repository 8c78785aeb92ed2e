# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp must be told to build a model: metadata from config.json, and the tensors of rotary factors.

llama.cpp holds some numbers of a family in its own code (which layers slide, the scale of attention). Where a
configuration says another, the file would run and answer wrongly: it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats.config_numbers import integer, is_number, number, table
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
# What transformers takes where config.json states none, by its class; of others 10000 and 1e-6.
_THETAS = {"MixtralForCausalLM": 1e6, "Gemma3ForCausalLM": 1e6, "CohereForCausalLM": 5e5}
_EPSILONS = {"MixtralForCausalLM": 1e-5, "Phi3ForCausalLM": 1e-5}
_WHOLE_HEADS = ("qwen2", "phi3", "command-r")
# Bounds of YaRN where nothing is stated, in transformers and llama.cpp.
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
_MOST_LAYERS = 1 << 12
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
    heads = integer(config, "num_attention_heads")
    return Layout(family, heads, integer(config, "num_key_value_heads", heads), _experts(config))


def model_metadata(config: Mapping[str, Any]) -> Metadata:
    """Metadata that llama.cpp needs to build the model; keys without the architecture's prefix.

    Raises:
        UnrepresentableError: The configuration wants something that llama.cpp does not compute in this family.
        CheckpointError: An entry is missing or no number.
    """
    layout = layout_of(config)
    family, hidden, head_dim = layout.family.name, integer(config, "hidden_size"), head_size(config)
    _check_activation(config, family)
    if family in _WHOLE_HEADS and head_dim * layout.query != hidden:
        raise UnrepresentableError(
            f"gguf: {layout.query} heads of {head_dim}; llama.cpp wants those of {family} to make up "
            f"hidden_size {hidden}"
        )
    found: Metadata = {
        "context_length": _context(config, family),
        "embedding_length": hidden,
        "block_count": integer(config, "num_hidden_layers", most=_MOST_LAYERS),
        "feed_forward_length": integer(config, "intermediate_size"),
        "attention.head_count": layout.query,
        "attention.head_count_kv": layout.key,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": _rotated(config, family, head_dim),
        "vocab_size": integer(config, "vocab_size"),
    }
    if family == "command-r":
        found["attention.layer_norm_epsilon"] = number(config, "layer_norm_eps", 1e-5)
    else:
        found["attention.layer_norm_rms_epsilon"] = number(
            config, "rms_norm_eps", _usual(config, _EPSILONS, 1e-6)
        )
    found |= _rope(config, family)
    if layout.experts:
        found |= _mixture(config, family)
    if family in _PERIODS:
        found |= _sliding(config, family)
    if family == "granite":
        found |= {
            "attention.scale": number(config, "attention_multiplier", 1.0),
            "embedding_scale": number(config, "embedding_multiplier", 1.0),
            "residual_scale": number(config, "residual_multiplier", 1.0),
            "logit_scale": number(config, "logits_scaling", 1.0),
        }
    if family == "command-r":
        found["logit_scale"] = number(config, "logit_scale", 0.0625)
        normed = integer(config, "num_hidden_layers") >= _NORMED_FROM
        if bool(config.get("use_qk_norm")) != normed:
            raise UnrepresentableError(
                f"gguf: use_qk_norm is {bool(config.get('use_qk_norm'))}; llama.cpp norms q and k of command-r from "
                f"{_NORMED_FROM} layers on, and only there"
            )
    if family == "phi3":  # required by earlier versions; later ones pass over it
        found["attention.sliding_window"] = integer(config, "sliding_window", 0, least=0)
    return found


def metadata_warnings(config: Mapping[str, Any]) -> list[str]:
    """What llama.cpp will do otherwise than transformers, one sentence each."""
    window, family = config.get("sliding_window"), family_of(config).name
    # Qwen's models slide only where they say so.
    slides = config.get("use_sliding_window", not family.startswith("qwen"))
    if (
        slides
        and isinstance(window, int)
        and window < integer(config, "max_position_embeddings")
        and family in _NO_WINDOW
    ):
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
    rope, family = rope_of(config), family_of(config).name
    if _scaling(rope, family) != "longrope":
        return {}
    found = {}
    for tensor, key in ((ROPE_LONG, "long_factor"), (ROPE_SHORT, "short_factor")):
        values = rope.get(key)
        wanted = _rotated(config, family, head_size(config)) // 2
        if not isinstance(values, list) or len(values) != wanted or not all(map(is_number, values)):
            raise CheckpointError(f"config.json: {key} must be {wanted} numbers")
        found[tensor] = torch.tensor([float(value) for value in values], dtype=torch.float32)
    return found


def _check_activation(config: Mapping[str, Any], family: str) -> None:
    computed = _ACTIVATIONS.get(family, ("silu", "swish"))
    # The first Gemma's `hidden_act: gelu` was a mistake that transformers passes over.
    named = config.get("hidden_activation") or (None if family == "gemma" else config.get("hidden_act"))
    if named is not None and named not in computed:
        raise UnrepresentableError(f"gguf: hidden_act {named!r} is not what llama.cpp computes")


def _usual(config: Mapping[str, Any], by_class: Mapping[str, float], others: float) -> float:
    """What transformers takes where nothing is stated."""
    return by_class.get(str((config.get("architectures") or [None])[0]), others)


def _context(config: Mapping[str, Any], family: str) -> int:
    """Positions that the model was trained for; Command-R's max_position_embeddings is a bound on memory."""
    stated = integer(config, "max_position_embeddings")
    return integer(config, "model_max_length", stated) if family == "command-r" else stated


def _rotated(config: Mapping[str, Any], family: str, head_dim: int) -> int:
    """Entries of a head that are rotated."""
    own = config.get("partial_rotary_factor") is not None
    share = number(config if own else rope_of(config), "partial_rotary_factor", 1.0)
    if share > 1:
        raise CheckpointError(f"config.json: partial_rotary_factor must be at most 1, got {share}")
    if share != 1 and family != "phi3":
        raise UnrepresentableError(
            f"gguf: partial_rotary_factor {share}; llama.cpp rotates whole heads of {family}"
        )
    return int(share * head_dim)


def _scaling(rope: Mapping[str, Any], family: str) -> str:
    """Name of the scaling; Phi-3's `yarn` is longrope by an earlier name, also in transformers."""
    kind = rope_kind(rope)
    return "longrope" if family == "phi3" and kind == "yarn" else kind


def _rope(config: Mapping[str, Any], family: str) -> Metadata:
    rope = rope_of(config, "full_attention")
    kind = _scaling(rope, family)
    found: Metadata = {"rope.freq_base": number(rope, "rope_theta", _usual(config, _THETAS, 10000.0))}
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": number(rope, "factor")}
    elif kind == "yarn":
        found |= _yarn(config, rope)
    elif kind == "longrope" and family == "phi3":
        found |= _long_rope(config, rope)
    elif kind not in ("default", "llama3"):
        raise UnrepresentableError(f"gguf: rotary scaling {kind!r} is not written")
    return found


def _yarn(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Metadata:
    """Factors of YaRN; llama.cpp multiplies attn_factor by the usual growth of attention, 1 + ln(factor) / 10."""
    longest = integer(config, "max_position_embeddings")
    original = integer(rope, "original_max_position_embeddings", longest)
    factor = number(rope, "factor", longest / original)
    betas = {key: number(rope, key, usual) for key, usual in _YARN_BETAS.items()}
    if rope.get("truncate", True) is not True or betas != _YARN_BETAS:
        raise UnrepresentableError(
            f"gguf: YaRN's bounds are {betas}, truncate {rope.get('truncate', True)}; llama.cpp takes {_YARN_BETAS} "
            "whatever the file says, and rounds them"
        )
    found: Metadata = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    usual = _growth(factor)
    growth = usual
    if rope.get("attention_factor") is not None:
        growth = number(rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        growth = _growth(factor, number(rope, "mscale")) / _growth(factor, number(rope, "mscale_all_dim"))
    if growth != usual:
        found["rope.scaling.attn_factor"] = growth / usual
    return found


def _growth(factor: float, scale: float = 1.0) -> float:
    return 1 + 0.1 * scale * math.log(factor) if factor > 1 else 1.0


def _long_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Metadata:
    """Factors by the length of the context; attention grows by sqrt(1 + ln(ratio) / ln(original))."""
    longest = integer(config, "max_position_embeddings")
    own = rope.get("original_max_position_embeddings") is not None
    original = integer(rope if own else config, "original_max_position_embeddings", longest, least=2)
    ratio = number(rope, "factor", longest / original)
    factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": number(rope, "attention_factor", factor),
    }


def _experts(config: Mapping[str, Any]) -> int:
    """Experts of each layer; 0 where the model has none."""
    for key in ("num_local_experts", "num_experts"):
        if config.get(key):
            return integer(config, key)
    return 0


def _mixture(config: Mapping[str, Any], family: str) -> Metadata:
    found: Metadata = {
        "expert_count": _experts(config),
        "expert_used_count": integer(config, "num_experts_per_tok"),
    }
    if family == "qwen3moe":
        found["expert_feed_forward_length"] = integer(config, "moe_intermediate_size")
        if not config.get("norm_topk_prob"):
            raise UnrepresentableError(
                "gguf: norm_topk_prob false; llama.cpp norms the weights of the experts"
            )
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise UnrepresentableError("gguf: layers without experts; llama.cpp wants them in every layer")
    return found


def _sliding(config: Mapping[str, Any], family: str) -> Metadata:
    """What Gemma 2 and 3 say of their windows and caps."""
    layers = integer(config, "num_hidden_layers", most=_MOST_LAYERS)
    window = integer(config, "sliding_window")
    period = _PERIODS[family]
    usual = [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)
    ]
    stated = config.get("layer_types")
    named = [config.get(key, period) for key in ("sliding_window_pattern", "_sliding_window_pattern")]
    if (stated or usual) != usual or (not stated and named != [period, period]):
        raise UnrepresentableError(
            f"gguf: in llama.cpp one layer in {period} of {family}, the last, attends to all"
        )
    largest = layers == _LARGEST[family]
    scale = (
        integer(config, "hidden_size") // integer(config, "num_attention_heads")
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
        if not all(config.get(key, cap) for key, cap in caps.items()):
            raise UnrepresentableError("gguf: llama.cpp caps the logits of gemma2, and this model does not")
        return found | {key: number(config, key, cap) for key, cap in caps.items()}
    own = table(config, "rope_parameters").get("sliding_attention")
    local = own if isinstance(own, Mapping) else {"rope_theta": config.get("rope_local_base_freq")}
    if rope_kind(local) != "default" or number(local, "rope_theta", _LOCAL_ROPE) != _LOCAL_ROPE:
        raise UnrepresentableError(
            f"gguf: in llama.cpp gemma3's sliding layers rotate by {_LOCAL_ROPE}, here by {dict(local)}"
        )
    if any(config.get(key) for key in (*caps, "use_bidirectional_attention")):
        raise UnrepresentableError(
            "gguf: llama.cpp caps no logits of gemma3 and attends to what came before, unlike this model"
        )
    return found
