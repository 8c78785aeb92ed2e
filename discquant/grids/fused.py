# SPDX-License-Identifier: Apache-2.0
"""Which matrices of a block engines join into one, by their last names: those of a set must share one grid.

As vLLM and SGLang declare them (`packed_modules_mapping`): attention, gated products, Mixtral's experts, the latent
attention of DeepSeek, the linear attention of Qwen3.5.
"""

from __future__ import annotations

# Name of the joined module in the engines, and its parts.
JOINED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")), ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")), ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)  # fmt: skip
FUSED = tuple(members for _, members in JOINED)
