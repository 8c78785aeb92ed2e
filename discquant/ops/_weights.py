# SPDX-License-Identifier: Apache-2.0
"""What the ops on interpolated weights share: the checks of their arguments and the reference with its additions."""

from __future__ import annotations

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops.reference import soft_weight as reference
from discquant.ops.reference.projected_step import decode_frac_ref

FRAC_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.uint16)
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(
    op: str, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype | None, is_reference: bool,
    minimum: Tensor | None, g_idx: Tensor | None,
) -> torch.dtype:  # fmt: skip
    """Validate what `soft_weight` and `soft_linear` share; return the weight's dtype."""
    registry.require_given(op, q_down=q_down, frac=frac, scale=scale)
    registry.require_tensors(op, zero_point=zero_point, table=table, minimum=minimum, g_idx=g_idx)
    registry.require(frac.dim() == 2, op, "frac", "have shape", "[out_features, in_features]", frac.shape)
    registry.require_dtype(op, "frac", frac, FRAC_DTYPES)
    if is_reference:
        registry.require(
            frac.dtype != torch.uint16, op, "frac", "as frac_ref not have dtype", torch.uint16, frac.dtype
        )
    registry.require_grid(
        op, q_down, scale, zero_point, table, frac.shape, num_bits, group_size, minimum, g_idx
    )
    registry.require_device(op, q_down, frac=frac)
    weight_dtype = scale.dtype if dtype is None else dtype
    registry.require(
        weight_dtype in WEIGHT_DTYPES, op, "dtype", "be one of", list(WEIGHT_DTYPES), weight_dtype
    )
    registry.require_constant(op, scale=scale, zero_point=zero_point, table=table, minimum=minimum)
    return weight_dtype


def reference_weight(
    q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, is_reference: bool, transpose: bool,
    minimum: Tensor | None = None, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The reference with this op's two additions: `frac_ref` codes and a transposed result."""
    compute = reference.accumulate_dtype(frac, scale, zero_point, table, minimum)
    position = decode_frac_ref(frac, compute) if is_reference else frac
    weight = reference.soft_weight(
        q_down,
        position,
        scale,
        zero_point,
        num_bits=num_bits,
        group_size=group_size,
        table=table,
        dtype=dtype,
        minimum=minimum,
        g_idx=g_idx,
    )
    return weight.t().contiguous() if transpose else weight
