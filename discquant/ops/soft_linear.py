# SPDX-License-Identifier: Apache-2.0
"""Operator `soft_linear`: a linear layer on an interpolated weight, with gradients of x, frac and bias.

Two strategies behind one op: *fused* makes the weight tile by tile inside the matmul; *materialise* writes it once
and calls cuBLAS. `soft_linear_table` chooses, from measurements. The gradients are ops of their own, for engines
that keep no autograd graph of a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops._soft_linear import STRATEGIES, X_DTYPES, chosen, dfrac_op, dx_op, fwd_op
from discquant.ops._weights import check, reference_weight
from discquant.ops.reference import soft_linear as reference
from discquant.ops.reference.projected_step import decode_frac_ref
from discquant.ops.reference.soft_weight import accumulate_dtype

_OP = "soft_linear"
_PASSES = ("forward", "dx", "dfrac")


class SoftLinearFunction(torch.autograd.Function):
    """soft_linear through the kernels; saves x and the state, never a weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None,
        table: Tensor | None, bias: Tensor | None, num_bits: int, group_size: int, is_reference: bool, strategy: str,
        minimum: Tensor | None, g_idx: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Launch the forward pass."""
        kept = x if frac.requires_grad else None
        ctx.save_for_backward(kept, q_down, frac, scale, zero_point, table, minimum, g_idx)
        ctx.constants = (num_bits, group_size, is_reference, strategy, None if bias is None else bias.dtype)
        out: Tensor = fwd_op(
            x, q_down, frac, scale, zero_point, table, bias, num_bits, group_size, is_reference, strategy,
            minimum, g_idx,
        )  # fmt: skip
        return out

    @staticmethod
    @registry.once(_OP)
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, frac and bias, each only if it is needed."""
        x, q_down, frac, scale, zero_point, table, minimum, g_idx = ctx.saved_tensors
        num_bits, group_size, is_reference, strategy, bias_dtype = ctx.constants
        (grad_output,) = grads
        dx = dfrac = dbias = None
        if ctx.needs_input_grad[0]:
            weight = (q_down, frac, scale, zero_point, table)
            dx = dx_op(grad_output, *weight, num_bits, group_size, is_reference, strategy, minimum, g_idx)
        if ctx.needs_input_grad[2]:
            dfrac = dfrac_op(
                grad_output, x, q_down, scale, table, num_bits, group_size, frac.dtype, strategy, g_idx
            )
        if ctx.needs_input_grad[6]:
            dbias = grad_output.sum(dim=0, dtype=accumulate_dtype(grad_output)).to(bias_dtype)
        return (dx, None, dfrac, None, None, None, dbias, None, None, None, None, None, None)


def check_activation(op: str, name: str, x: Tensor, features: int) -> None:
    """Validate an activation or the gradient of one: floating, [..., features]."""
    registry.require_given(op, **{name: x})
    registry.require_dtype(op, name, x, X_DTYPES)
    registry.require(
        x.dim() >= 1 and x.shape[-1] == features, op, name, "have a last dimension of", features, x.shape
    )


def check_pair(op: str, grad_output: Tensor, x: Tensor, out_features: int, in_features: int) -> None:
    """Validate dY and x of one layer: same dtype, same tokens."""
    check_activation(op, "grad_output", grad_output, out_features)
    check_activation(op, "x", x, in_features)
    dtype, tokens = grad_output.dtype, grad_output.shape[:-1]
    registry.require(x.dtype == dtype, op, "x", "have the dtype of grad_output", dtype, x.dtype)
    registry.require(x.shape[:-1] == tokens, op, "x", "have the tokens of grad_output", tokens, x.shape)


def _choose(op: str, impl: str, strategy: str, x: Tensor) -> str:
    registry.require(strategy in STRATEGIES, op, "strategy", "be one of", STRATEGIES, strategy)
    chosen = registry.choose(op, impl, x.device)
    if chosen == "triton" and strategy == "fused" and x.is_cuda and x.dtype == torch.float64:
        raise NotImplementedError(f"{op}: strategy must for float64 on CUDA be = 'materialise', got 'fused'")
    return chosen


def soft_linear_strategy(x: Tensor, stage: str, shape: tuple[int, int]) -> str:
    """Say what strategy="auto" means for these arguments, without running anything.

    Args:
        x: Activation (or its gradient), [..., features].
        stage: "forward", "dx" or "dfrac".
        shape: Of the weight, (out_features, in_features).

    Returns:
        "fused" or "materialise".

    Raises:
        TypeError: x is not a Tensor, or shape holds no integers.
        ValueError: x has no dimension or another dtype, or stage or the length of shape is none of these.
    """
    op = "soft_linear_strategy"
    registry.require_given(op, x=x)
    registry.require_dtype(op, "x", x, X_DTYPES)
    registry.require(x.dim() >= 1, op, "x", "have at least dimensions", 1, x.dim())
    registry.require(stage in _PASSES, op, "stage", "be one of", _PASSES, stage)
    registry.require(len(shape) == 2, op, "shape", "have a length of", 2, len(shape))
    for size in shape:
        registry.require_numbers(op, int, shape=size)
    return chosen(x, stage, shape)[0]


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
    is_reference: bool = False,
    strategy: str = "auto",
    minimum: Tensor | None = None,
    g_idx: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """y = x W(frac)^T + b, with W(frac) as `soft_weight` makes it, rounded to the dtype of x.

    On a uniform grid W = scale * (q_down + frac - zero_point).

    Args:
        x: Activation, floating, [..., in_features].
        q_down: Lower grid code, uint8, [out_features, in_features] or two 4-bit codes per byte.
        frac: Place between the neighbours, unitless in [0, 1]: floating, or uint8 / uint16 fixed point
            (code / 255, code / 65535), [out_features, in_features].
        scale: Grid step in weight units, floating, [out_features, num_groups].
        zero_point: Code of weight zero, uint8, or floating where it is no integer, [out_features, num_groups]; None
            as in `soft_weight`.
        bias: Floating, [out_features].
        num_bits: Code width, 2 to 8.
        group_size: Columns that share a scale; -1 is the whole row; the last group may be short. Not read with `g_idx`.
        table: Levels of a look-up grid in ascending order, floating, [2 ** num_bits]; None is uniform.
        is_reference: `frac` holds `frac_ref` (floating, or uint8 code u for (u - 63) / 126): the teacher's layer.
        strategy: "auto" | "fused" (the weight never reaches memory) | "materialise" (one layer, then cuBLAS).
        minimum: Weight of code 0, floating, [out_features, num_groups], as in `soft_weight`; in place of a zero point
            and of a table.
        g_idx: Group of each column, int32 or int64, [in_features], as in `soft_weight`.
        impl: "auto" | "reference" | "triton".

    Returns:
        Activation in x.dtype, [..., out_features].

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shapes, dtypes or devices disagree.
        NotImplementedError: A gradient of scale, zero_point, table or minimum, or a second derivative of a kernel's
            result, is asked for; impl="cpp", or float64 is to be fused on CUDA (Triton has no such matmul there).
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic. Differentiable in x, a floating `frac` and bias, once (the reference: any number of times).
        Products accumulate in float32 (float64 for float64 x). On CUDA those of float32 x, unless fused, are torch's,
        here and in the gradients: they follow `torch.set_float32_matmul_precision`, a switch of the process, and are
        TF32's below "highest". With a minimum the gradient of `frac` is that of levels before they are rounded, as in
        `soft_weight`. With impl="reference" the strategy has no meaning.

    Source:
        DiscQuant, arXiv 2501.06417, definition of w^x.
    """
    check(
        _OP, q_down, frac, scale, zero_point, table, num_bits, group_size, None, is_reference, minimum, g_idx
    )
    check_activation(_OP, "x", x, frac.shape[1])
    registry.require_tensors(_OP, bias=bias)
    registry.require_device(_OP, q_down, x=x, bias=bias)
    if bias is not None:
        expected = list(frac.shape[:1])
        registry.require(bias.shape == frac.shape[:1], _OP, "bias", "have shape", expected, bias.shape)
        registry.require_dtype(_OP, "bias", bias, X_DTYPES)
    if _choose(_OP, impl, strategy, x) == "reference":
        compute = accumulate_dtype(frac, scale, zero_point, table, minimum)
        position = decode_frac_ref(frac, compute) if is_reference else frac
        grid: dict[str, Any] = {
            "num_bits": num_bits, "group_size": group_size, "table": table, "minimum": minimum, "g_idx": g_idx,
        }  # fmt: skip
        return reference.soft_linear(x, q_down, position, scale, zero_point, bias, **grid)
    args = (q_down, frac, scale, zero_point, table, bias, num_bits, group_size, is_reference, strategy)
    y: Tensor = registry.differentiable(SoftLinearFunction, reference.tokens(x), *args, minimum, g_idx)
    return y.reshape(*x.shape[:-1], frac.shape[0])


@torch.no_grad()
def soft_linear_dx(
    grad_output: Tensor,
    q_down: Tensor,
    frac: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int,
    table: Tensor | None = None,
    is_reference: bool = False,
    strategy: str = "auto",
    minimum: Tensor | None = None,
    g_idx: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """dX = dY W(frac): gradient of the input of `soft_linear`, without a graph.

    Args:
        grad_output: Gradient of the layer's output, floating, [..., out_features].
        q_down: See `soft_linear`, as all that follow.
        frac: Also fixed point, [out_features, in_features].
        scale: [out_features, num_groups].
        zero_point: [out_features, num_groups] or None.
        num_bits: Code width.
        group_size: Columns that share a scale.
        table: Levels of a look-up grid or None.
        is_reference: `frac` holds `frac_ref`.
        strategy: "auto" | "fused" | "materialise".
        minimum: Weight of code 0, [out_features, num_groups], or None.
        g_idx: Group of each column, [in_features], or None.
        impl: "auto" | "reference" | "triton".

    Returns:
        Gradient in grad_output.dtype, [..., in_features].

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shapes, dtypes or devices disagree.
        NotImplementedError: impl="cpp", or float64 is to be fused on CUDA.
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic. Not differentiable.
    """
    op = "soft_linear_dx"
    check(
        op, q_down, frac, scale, zero_point, table, num_bits, group_size, None, is_reference, minimum, g_idx
    )
    check_activation(op, "grad_output", grad_output, frac.shape[0])
    registry.require_device(op, q_down, grad_output=grad_output)
    flat = reference.tokens(grad_output)
    weight = (q_down, frac, scale, zero_point, table, num_bits, group_size)
    if _choose(op, impl, strategy, grad_output) == "reference":
        dense = reference_weight(*weight, flat.dtype, is_reference, False, minimum, g_idx)
        dx = reference.input_gradient(flat, dense)
    else:
        dx = dx_op(flat, *weight, is_reference, strategy, minimum, g_idx)
    return dx.reshape(*grad_output.shape[:-1], frac.shape[1])


@torch.no_grad()
def soft_linear_dfrac(
    grad_output: Tensor,
    x: Tensor,
    q_down: Tensor,
    scale: Tensor,
    *,
    num_bits: int,
    group_size: int,
    table: Tensor | None = None,
    strategy: str = "auto",
    g_idx: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """d frac = Delta * dY^T x: gradient of the positions, also where `frac` is stored in fixed point.

    Delta = scale, also where the grid has a minimum, times T[q_down + 1] - T[q_down] with a table. All tokens of a call
    are summed.

    Args:
        grad_output: Gradient of the layer's output, floating, [..., out_features].
        x: The layer's input, same dtype, [..., in_features].
        q_down: See `soft_linear`; read with a table only.
        scale: [out_features, num_groups].
        num_bits: Code width.
        group_size: Columns that share a scale.
        table: Levels of a look-up grid or None.
        strategy: "auto" | "fused" (Delta in the matmul's epilogue) | "materialise" (cuBLAS, then one pass).
        g_idx: Group of each column, [in_features], or None.
        impl: "auto" | "reference" | "triton".

    Returns:
        Gradient in float32 (float64 for float64 x), [out_features, in_features]; `projected_step_` takes it with
        scale=None.

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shapes, dtypes or devices disagree.
        NotImplementedError: impl="cpp", or float64 is to be fused on CUDA.
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic. Not differentiable.
    """
    op = "soft_linear_dfrac"
    registry.require_given(op, grad_output=grad_output, x=x, q_down=q_down, scale=scale)
    registry.require_tensors(op, table=table, g_idx=g_idx)
    for name, tensor in (("grad_output", grad_output), ("x", x)):
        registry.require(tensor.dim() >= 1, op, name, "have at least dimensions", 1, tensor.dim())
    shape = (grad_output.shape[-1], x.shape[-1])
    registry.require_grid(op, q_down, scale, None, table, shape, num_bits, group_size, g_idx=g_idx)
    check_pair(op, grad_output, x, *shape)
    registry.require_device(op, q_down, grad_output=grad_output, x=x)
    flat_y, flat_x = reference.tokens(grad_output), reference.tokens(x)
    if _choose(op, impl, strategy, x) == "reference":
        whole = reference.weight_gradient(flat_y, flat_x)
        return reference.frac_gradient(whole, q_down, scale, table, group_size, g_idx)
    out: Tensor = dfrac_op(
        flat_y, flat_x, q_down, scale, table, num_bits, group_size, accumulate_dtype(x), strategy, g_idx
    )
    return out
