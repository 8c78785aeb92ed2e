# SPDX-License-Identifier: Apache-2.0
"""Random models of the families that GGUF is written for beside Llama, with the bundled model's tokenizer.

What they are for is how a file is laid out and what it tells: names, rows, norms, experts, windows, scales. So few
matrices are rounded (o_proj; of mixtures the experts of the last block, behind the last choice of a router), the others
lie in float32, and a mistake is far larger than what int8 activations of these make.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

WINDOW = 16  # of layers that slide: the windows of text are longer
_SLIDING = {"head_dim": 96, "query_pre_attn_scalar": 96, "sliding_window": WINDOW}
_DENSE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_FUSED = ("qkv_proj", "gate_up_proj", "down_proj")
_EXPERTS = ("q_proj", "k_proj", "v_proj", "o_proj", *(f"model.layers.{block}" for block in range(6)))
_LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1 + i / 100 for i in range(24)], "long_factor": [1 + i / 20 for i in range(24)],
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Class of the configuration without "Config", what differs from `_settings`, and the matrices that stay in float32.
# llama.cpp wants certain tokens of a model that is called phi3, hence another name.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}, _DENSE),
    "llama_linear": ("Llama", {"rope_parameters": _LINEAR["full_attention"]}, _DENSE),
    "llama_yarn": ("Llama", {"rope_parameters": _YARN}, _DENSE),
    "llama_yarn_grown": ("Llama", {"rope_parameters": {**_YARN, "attention_factor": 1.5}}, _DENSE),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True}, _DENSE),
    "gemma3_untied": ("Gemma3Text", {**_SLIDING, "tie_word_embeddings": False}, _DENSE),
    "qwen2": ("Qwen2", {"vocab_size": 1056}, _DENSE),  # transformers gives its tokenizer one token more
    "qwen3": ("Qwen3", {"head_dim": 96}, _DENSE),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, _EXPERTS),
    "qwen3moe": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
        _EXPERTS,
    ),
    "gemma": ("Gemma", {"head_dim": 96}, _DENSE),
    "gemma2": ("Gemma2", _SLIDING, _DENSE),
    "gemma3": ("Gemma3Text", _SLIDING, _DENSE),
    "gemma3_linear": ("Gemma3Text", {**_SLIDING, "rope_parameters": _LINEAR}, _DENSE),
    "fused": ("Phi3", {}, _FUSED),
    "fused_long": (
        "Phi3",
        {
            "rope_parameters": _LONG, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        _FUSED,
    ),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
        _DENSE,
    ),
    "cohere": ("Cohere", {"logit_scale": 0.5}, _DENSE),
    "cohere_normed": (
        "Cohere",
        {
            "logit_scale": 0.5, "use_qk_norm": True, "num_hidden_layers": 64, "hidden_size": 64,
            "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
        },
        _DENSE,
    ),
}  # fmt: skip


def make(name: str, tokenizer: Path, out: Path) -> None:
    """Save a model of a family, float32, with the tokenizer that lies in a folder."""
    import torch
    import transformers

    family, extra, _ = FAMILIES[name]
    tokens = transformers.AutoTokenizer.from_pretrained(tokenizer)
    known = transformers.AutoConfig.from_pretrained(tokenizer)
    settings: dict[str, Any] = {
        "vocab_size": known.vocab_size, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 7,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
        "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id,
    }  # fmt: skip
    if family in ("Qwen2", "Phi3", "Granite", "Cohere"):
        del settings["head_dim"]
    config = getattr(transformers, f"{family}Config")(**{**settings, **extra})
    model_class = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    torch.manual_seed(5)
    model = getattr(transformers, model_class)(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in key:
                parameter.mul_(4.0)
    model.save_pretrained(out)
    for file in tokenizer.glob("*token*.json"):
        shutil.copy(file, out / file.name)
