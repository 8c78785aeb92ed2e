# SPDX-License-Identifier: Apache-2.0
"""Reference of `soft_linear`: a linear layer whose weight lies `frac` of the way between grid neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from discquant.ops.reference.soft_weight import accumulate_dtype, expand_groups, soft_weight, unpack_nibbles


def soft_linear(
    x: Tensor,
    q_down: Tensor,
    frac: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int,
    table: Tensor | None = None,
) -> Tensor:
    """y = x W(frac)^T + b, with W rounded to the dtype of x.

    Args:
        x: Activation, floating, [..., in_features].
        q_down: Lower grid code, see `soft_weight`.
        frac: Place between the neighbours, [out_features, in_features].
        scale: Grid step, [out_features, num_groups].
        zero_point: Code of weight zero, [out_features, num_groups].
        bias: Floating, [out_features].
        num_bits: Code width.
        group_size: Columns that share a scale, -1 for the row.
        table: Levels of a look-up grid.

    Returns:
        Activation in x.dtype, [..., out_features].
    """
    weight = soft_weight(
        q_down, frac, scale, zero_point, num_bits=num_bits, group_size=group_size, table=table, dtype=x.dtype
    )
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T x over all tokens, in float32 (float64); [out_features, in_features].

    Args:
        grad_output: Floating, [num_tokens, out_features].
        x: Same dtype, [num_tokens, in_features].

    Returns:
        Gradient of the weight.
    """
    compute = accumulate_dtype(grad_output, x)
    return grad_output.to(compute).t() @ x.to(compute)


def frac_gradient(
    weight_grad: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None, group_size: int
) -> Tensor:
    """d frac = d W * slope, slope = scale, times T[q_down + 1] - T[q_down] with a table.

    Args:
        weight_grad: Gradient of the weight, float32 or float64, [out_features, in_features].
        q_down: Lower grid code, see `soft_weight`.
        scale: Grid step, [out_features, num_groups].
        table: Levels of a look-up grid.
        group_size: Columns that share a scale, -1 for the row.

    Returns:
        Gradient of `frac` in the dtype of `weight_grad`.
    """
    in_features = weight_grad.shape[1]
    slope = expand_groups(scale.to(weight_grad.dtype), group_size, in_features)
    if table is not None:
        q = q_down if q_down.shape[1] == in_features else unpack_nibbles(q_down, in_features)
        levels = table.to(weight_grad.dtype)
        index = q.long()
        slope = slope * (levels[(index + 1).clamp(max=levels.numel() - 1)] - levels[index])
    return weight_grad * slope
