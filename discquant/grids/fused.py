# SPDX-License-Identifier: Apache-2.0
"""Which matrices of a block engines join into one, by their last names: those of a set must share one grid."""

from __future__ import annotations

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
