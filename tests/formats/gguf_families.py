# SPDX-License-Identifier: Apache-2.0
"""Random models of every family that GGUF is written for, small ones of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8}
# Class of the configuration without "Config", and what differs from COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "head_dim": 64,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("Gemma", {"head_dim": 64}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3Text", {**_GEMMA, "num_hidden_layers": 6}),
    "phi3": ("Phi3", {}),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "command-r": ("Cohere", {}),
}


def make_family(name: str, folder: Path, **config: Any) -> Path:
    """Save a random bfloat16 model without a tokenizer; return its folder."""
    import transformers

    family, extra = FAMILIES[name]
    settings = getattr(transformers, f"{family}Config")(**{**COMMON, **extra, **config})
    model_class = getattr(
        transformers, "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    )
    torch.manual_seed(3)
    model = model_class(settings).to(torch.bfloat16)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder
