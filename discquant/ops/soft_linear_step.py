# SPDX-License-Identifier: Apache-2.0
"""Operator `soft_linear_step_`: the projected step in the epilogue of dY^T x, so that no gradient reaches memory."""

from __future__ import annotations

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops._soft_linear import step_op
from discquant.ops._steps import check_separate, check_state, check_table, flatten_options, table_scale
from discquant.ops.reference import projected_step as step_reference
from discquant.ops.reference.projected_step import StepCounts, StepOptions
from discquant.ops.reference.soft_linear import tokens, weight_gradient
from discquant.ops.soft_linear import check_pair
from discquant.ops.soft_linear_table import rule

_OP = "soft_linear_step_"


def step_is_fused(x: Tensor, out_features: int, in_features: int) -> bool:
    """Say whether the table found the epilogue step faster than matmul and step for x of [num_tokens, in_features]."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return rule(x.device, "step", x.shape[0], out_features * in_features)[0] == "fused"


@torch.no_grad()
def _run(
    grad_output: Tensor, x: Tensor, frac: Tensor, frac_ref: Tensor, scale: Tensor, group_size: int,
    options: StepOptions, momentum: Tensor | None, second_moment: Tensor | None, q_down: Tensor | None,
    table: Tensor | None, impl: str,
) -> Tensor:  # fmt: skip
    check_state(_OP, frac, frac_ref, scale, momentum, second_moment, group_size, options)
    check_pair(_OP, grad_output, x, *frac.shape)
    registry.require_device(_OP, frac, x=x, grad_output=grad_output)
    check_table(_OP, frac, q_down, table)
    check_separate(
        _OP, frac, momentum, second_moment, options,
        frac_ref=frac_ref, scale=scale, grad_output=grad_output, x=x, q_down=q_down, table=table,
    )  # fmt: skip
    tensors = (grad_output, x, frac, frac_ref, scale, momentum, second_moment, table)
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    chosen = registry.choose(
        _OP, impl, frac.device, triton="float64, which only the reference computes in" if double else None
    )
    flat_y, flat_x = tokens(grad_output), tokens(x)
    if chosen == "reference":
        slope, size = table_scale(scale, group_size, frac, q_down, table)
        return step_reference.projected_step_(
            frac, frac_ref, weight_gradient(flat_y, flat_x), slope, group_size=size,
            options=options, momentum=momentum, second_moment=second_moment,
        )  # fmt: skip
    # An optimizer without a moment must not mark one as changed.
    first = None if options.optimizer == "sgd" else momentum
    second = second_moment if options.optimizer == "adamw" else None
    state = (frac, frac_ref, scale, first, second, q_down if table is not None else None, table)
    counts: Tensor = step_op(flat_y, flat_x, *state, group_size, *flatten_options(options))
    return counts


def soft_linear_step_(
    grad_output: Tensor,
    x: Tensor,
    frac: Tensor,
    frac_ref: Tensor,
    scale: Tensor,
    *,
    group_size: int,
    options: StepOptions,
    momentum: Tensor | None = None,
    second_moment: Tensor | None = None,
    q_down: Tensor | None = None,
    table: Tensor | None = None,
    impl: str = "auto",
) -> StepCounts:
    """Projected step on the weight gradient dY^T x, which never reaches memory.

    Equal to `projected_step_(frac, frac_ref, dY^T x, scale, ...)` up to the order of the sum over tokens. All
    tokens of the step must be in x: the clamp acts on the whole gradient.

    Args:
        grad_output: Gradient of the layer's output, floating, [..., out_features].
        x: The layer's input, same dtype, [..., in_features].
        frac: Changed in place; see `projected_step_`, as all that follow.
        frac_ref: Place that reproduces the original weight.
        scale: Grid step, [out_features, num_groups].
        group_size: Columns per group, -1 for the row.
        options: Scalars of the step.
        momentum: First moment; changed in place.
        second_moment: Second moment; changed in place.
        q_down: Lower codes, with a table only.
        table: Levels of a look-up grid.
        impl: "auto" | "reference" | "triton".

    Returns:
        StepCounts over this tensor.

    Raises:
        TypeError: An argument is not a Tensor, options no StepOptions, or a scalar of it no number (no integer).
        ValueError: Shapes, dtypes or devices disagree, a moment is missing, a scalar is out of range, or elements of
            what is to be changed share an address, of one tensor or of two, or with what is only read.
        NotImplementedError: float64 with impl="triton", or impl="cpp".
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic. Records no graph. Opt-in: it saves memory (no gradient buffer), and time only where measured
        so. A NaN is known only from the counts, after the other coordinates have moved. Waits for the device to return
        the counts; see `soft_linear_step_deferred_`.
    """
    counts = _run(
        grad_output, x, frac, frac_ref, scale, group_size, options, momentum, second_moment, q_down, table, impl
    )  # fmt: skip
    return StepCounts(*counts.tolist())


def soft_linear_step_deferred_(
    grad_output: Tensor,
    x: Tensor,
    frac: Tensor,
    frac_ref: Tensor,
    scale: Tensor,
    *,
    group_size: int,
    options: StepOptions,
    momentum: Tensor | None = None,
    second_moment: Tensor | None = None,
    q_down: Tensor | None = None,
    table: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`soft_linear_step_` without waiting for the device: the same step, arguments and errors.

    Returns:
        int64, [5], on the device of `frac`: live, fractional, moved, saturated, nan.
    """
    return _run(
        grad_output, x, frac, frac_ref, scale, group_size, options, momentum, second_moment, q_down, table, impl
    )  # fmt: skip
