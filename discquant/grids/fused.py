# SPDX-License-Identifier: Apache-2.0
"""Which matrices of a block engines join into one, by their last names: those of a set must share one grid.

As vLLM and SGLang declare them (`packed_modules_mapping`): attention, gated products, Mixtral's experts, the latent
attention of DeepSeek, the linear attention of Qwen3.5.
"""

from __future__ import annotations

FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"),
)  # fmt: skip
