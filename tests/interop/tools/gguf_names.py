# SPDX-License-Identifier: Apache-2.0
"""Tensor names of Llama models in GGUF and in transformers, and the row order of q and k that llama.cpp wants."""

from __future__ import annotations

import re

import numpy as np

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def to_transformers(name: str) -> str | None:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj`; None for a name that is not known."""
    base = name.removesuffix(".weight")
    if base in OUTSIDE:
        return OUTSIDE[base]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", base)
    return f"model.layers.{found[1]}.{NAMES[found[2]]}" if found and found[2] in NAMES else None


def to_gguf(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`."""
    base = name.removesuffix(".weight")
    for short, long in OUTSIDE.items():
        if base == long:
            return f"{short}.weight"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", base)
    assert found is not None, name
    return f"blk.{found[1]}.{ {long: short for short, long in NAMES.items()}[found[2]] }.weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves (transformers' rotary order) to pairs (llama.cpp's)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def deinterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
