# SPDX-License-Identifier: Apache-2.0
"""Operations: public functions with one contract and several implementations (reference, Triton, C++)."""

from __future__ import annotations

# Modules of the names of their functions: importing them registers their operators.
from discquant.ops import pack, packed_linear
from discquant.ops.anchor_codes import anchor_codes
from discquant.ops.hadamard import hadamard
from discquant.ops.linear_kl import linear_kl
from discquant.ops.place_outliers import place_outliers_
from discquant.ops.projected_step import projected_step_, projected_step_deferred_
from discquant.ops.reference.linear_kl import LinearKLResult
from discquant.ops.reference.projected_step import (
    StepCounts,
    StepOptions,
    decode_frac_ref,
    encode_frac_ref,
)
from discquant.ops.reference.soft_linear import weight_gradient
from discquant.ops.reference.soft_weight import decode_frac, expand_groups, unpack_nibbles
from discquant.ops.soft_linear import soft_linear, soft_linear_dfrac, soft_linear_dx, soft_linear_strategy
from discquant.ops.soft_linear_step import soft_linear_step_, soft_linear_step_deferred_, step_is_fused
from discquant.ops.soft_weight import soft_weight

__all__ = [
    "LinearKLResult",
    "StepCounts",
    "StepOptions",
    "anchor_codes",
    "decode_frac",
    "decode_frac_ref",
    "encode_frac_ref",
    "expand_groups",
    "hadamard",
    "linear_kl",
    "pack",
    "packed_linear",
    "place_outliers_",
    "projected_step_",
    "projected_step_deferred_",
    "soft_linear",
    "soft_linear_dfrac",
    "soft_linear_dx",
    "soft_linear_step_",
    "soft_linear_step_deferred_",
    "soft_linear_strategy",
    "soft_weight",
    "step_is_fused",
    "unpack_nibbles",
    "weight_gradient",
]
