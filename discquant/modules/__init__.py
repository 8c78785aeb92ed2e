# SPDX-License-Identifier: Apache-2.0
"""Modules that hold weights as packed codes."""

from __future__ import annotations

from discquant.modules.packed_experts import PackedExperts, follows_grouped_product
from discquant.modules.packed_linear import PackedLinear
from discquant.modules.packed_model import FusedProjection, PackedReport, is_replaceable, load_packed

__all__ = [
    "FusedProjection",
    "PackedExperts",
    "PackedLinear",
    "PackedReport",
    "follows_grouped_product",
    "is_replaceable",
    "load_packed",
]
