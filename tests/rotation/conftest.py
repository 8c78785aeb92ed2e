# SPDX-License-Identifier: Apache-2.0
"""Random models of every family that can be rotated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

SMALL = {
    "vocab_size": 40, "hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
           "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "qwen3": {"tie_word_embeddings": True},
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "olmoe": EXPERTS,
}  # fmt: skip


def _save(folder: Path, family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A random model of a family, every vector of it away from its neutral value."""
    options = {"tie_word_embeddings": False, **SMALL, **MORE.get(family, {}), **more}
    config = transformers.AutoConfig.for_model(family, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.2 + (tensor.dim() == 1 and "norm" in name) * 0.8)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def save() -> Callable[..., Path]:
    """Write a random model: save(folder, family, dtype=float32, **configuration)."""
    return _save
