# SPDX-License-Identifier: Apache-2.0
"""Which matrices of a block engines join into one, by their last names: those of a set must share one grid.

As vLLM and SGLang declare them (`packed_modules_mapping`): attention, gated products, Mixtral's experts, the latent
attention of DeepSeek, the linear attention of Qwen3.5. The experts of a layer run in one kernel, and share one as well.
"""

from __future__ import annotations

import re

# Name of the joined module in the engines, and its parts.
JOINED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")), ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")), ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)  # fmt: skip
FUSED = tuple(members for _, members in JOINED)
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.")


def experts_of(name: str) -> str | None:
    """Name of the module that holds the experts of a layer, of a matrix of one of them; None of other matrices."""
    found = _EXPERT.match(name)
    return None if found is None else found[1]
