# SPDX-License-Identifier: Apache-2.0
"""Reference of `soft_linear`: a linear layer whose weight lies `frac` of the way between grid neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from discquant.ops.reference.soft_weight import accumulate_dtype, slope, soft_weight


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
    """y = x W(frac)^T + b, with W rounded to the dtype of x; the contract is `discquant.ops.soft_linear`."""
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
        Gradient of the weight, never rounded to a 16-bit dtype.
    """
    compute = accumulate_dtype(grad_output, x)
    if x.is_cuda and x.dtype != compute:
        return torch.mm(grad_output.t(), x, out_dtype=compute)
    return grad_output.to(compute).t() @ x.to(compute)


def frac_gradient(
    weight_grad: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None, group_size: int
) -> Tensor:
    """d frac = d W * d weight / d frac, in the dtype of `weight_grad`, [out_features, in_features]."""
    return weight_grad * slope(q_down, scale, table, group_size, weight_grad.shape[1], weight_grad.dtype)
