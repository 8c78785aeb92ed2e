# SPDX-License-Identifier: Apache-2.0
"""Reference of `soft_linear`: a linear layer whose weight lies `frac` of the way between grid neighbours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from discquant.ops.reference.settled import settled
from discquant.ops.reference.soft_weight import accumulate_dtype, slope, soft_weight


def tokens(x: Tensor) -> Tensor:
    """[..., features] as [num_tokens, features]; -1 would not tell their number where there are no features."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class _LinearFunction(torch.autograd.Function):
    """x W^T + b with W and b rounded to the dtype of x, whose derivatives of every order know no autocast.

    W and b come unrounded: torch would round the gradients of 16-bit ones to 16 bits.
    """

    @staticmethod
    @settled
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @settled
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Products by this Function, so that they can be differentiated again."""
        x, weight = ctx.saved_tensors
        (grad,) = grads
        compute = accumulate_dtype(x)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _linear(grad, weight.t())
        if ctx.needs_input_grad[1]:
            dweight = _linear(tokens(grad).to(compute).t(), tokens(x).to(compute).t()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = tokens(grad).sum(0, dtype=compute).to(ctx.bias_dtype)
        return dx, dweight, dbias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    function: Any = _LinearFunction  # torch leaves apply untyped
    y: Tensor = function.apply(x, weight, bias)
    return y


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
    minimum: Tensor | None = None,
    g_idx: Tensor | None = None,
) -> Tensor:
    """y = x W(frac)^T + b, with W rounded to the dtype of x; the contract is `discquant.ops.soft_linear`."""
    weight = soft_weight(
        q_down, frac, scale, zero_point, num_bits=num_bits, group_size=group_size, table=table,
        dtype=accumulate_dtype(frac, scale, zero_point, table, minimum), minimum=minimum, g_idx=g_idx,
    )  # fmt: skip
    return _linear(x, weight, bias)


@settled
def input_gradient(grad_output: Tensor, weight: Tensor) -> Tensor:
    """dX = dY W, in the dtype of both."""
    return grad_output @ weight


@settled
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
    weight_grad: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None, group_size: int,
    g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """d frac = d W * d weight / d frac, in the dtype of `weight_grad`, [out_features, in_features]."""
    in_features, dtype = weight_grad.shape[1], weight_grad.dtype
    return weight_grad * slope(q_down, scale, table, group_size, in_features, dtype, g_idx)
