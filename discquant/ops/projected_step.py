# SPDX-License-Identifier: Apache-2.0
"""Operator `projected_step_`: one optimizer step on `frac`, projected onto [0, 1], in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops._steps import (
    GRADIENT_DTYPES,
    KEYS,
    OPTIMIZERS,
    SCALAR_SCHEMA,
    SCALARS,
    check_separate,
    check_state,
    check_table,
    flatten_options,
    launch_arguments,
    table_scale,
)
from discquant.ops.reference import projected_step as reference
from discquant.ops.reference.projected_step import StepCounts, StepOptions

_OP = "projected_step_"
_SCHEMA = (
    "(Tensor(a!) frac, Tensor frac_ref, Tensor weight_grad, Tensor scale, Tensor(b!)? momentum, "
    f"Tensor(c!)? second_moment, Tensor? q_down, Tensor? table, int group_size, {SCALAR_SCHEMA}) -> Tensor"
)


def _fake(frac: Tensor, *args: Any) -> Tensor:
    return frac.new_empty(5, dtype=torch.int64)


def _launch(
    frac: Tensor, frac_ref: Tensor, weight_grad: Tensor, scale: Tensor, momentum: Tensor | None,
    second_moment: Tensor | None, q_down: Tensor | None, table: Tensor | None, group_size: int, *options: Any,
) -> Tensor:  # fmt: skip
    counts: Tensor = registry.triton_module("projected_step").projected_step_fwd(
        frac, frac_ref, weight_grad, scale, momentum, second_moment, q_down, table, group_size,
        *launch_arguments(*options),
    )  # fmt: skip
    return counts


_triton_op = registry.define(f"projected_step_{_SCHEMA}", _fake, _launch)
# The same contract in C++ for contiguous CPU tensors; csrc/solver registers the implementation. The number changes with
# the scalars: nothing else keeps a binary of earlier sources from answering.
_cpp_op = registry.define(
    "projected_step_cpp2_(Tensor(a!) frac, Tensor frac_ref, Tensor weight_grad, Tensor scale, Tensor(b!)? momentum, "
    "Tensor(c!)? second_moment, Tensor(d!) counts, int group_size, int optimizer, "
    f"{', '.join(f'float {name}' for name in SCALARS)}, {', '.join(f'int {name}' for name in KEYS)}) -> ()",
    lambda *_: None,
    None,
)


def _cpp_launch(
    frac: Tensor, frac_ref: Tensor, weight_grad: Tensor, scale: Tensor, momentum: Tensor | None,
    second_moment: Tensor | None, group_size: int, *options: Any,
) -> Tensor:  # fmt: skip
    optimizer, scalars, keys = launch_arguments(*options)
    counts = torch.zeros(5, dtype=torch.int64, device=frac.device)
    _cpp_op(
        frac, frac_ref, weight_grad, scale, momentum, second_moment, counts, group_size, OPTIMIZERS.index(optimizer),
        *(scalars[name] for name in SCALARS), *(keys[name] for name in KEYS),
    )  # fmt: skip
    return counts


@torch.no_grad()
def _run(
    frac: Tensor, frac_ref: Tensor, weight_grad: Tensor, scale: Tensor | None, group_size: int, options: StepOptions,
    momentum: Tensor | None, second_moment: Tensor | None, q_down: Tensor | None, table: Tensor | None, impl: str,
) -> Tensor:  # fmt: skip
    registry.require_given(_OP, frac=frac, weight_grad=weight_grad)
    registry.require_tensors(_OP, scale=scale, table=table)
    if scale is None:
        registry.require(table is None, _OP, "table", "without scale be", None, "a Tensor")
        # The gradient is by frac already: the factor 1 for every row.
        scale, group_size = frac.new_ones((frac.shape[0], 1), dtype=torch.float32), -1
    check_state(_OP, frac, frac_ref, scale, momentum, second_moment, group_size, options)
    registry.require_dtype(_OP, "weight_grad", weight_grad, GRADIENT_DTYPES)
    shape = weight_grad.shape
    registry.require(shape == frac.shape, _OP, "weight_grad", "have the shape of frac", frac.shape, shape)
    registry.require_device(_OP, frac, weight_grad=weight_grad)
    check_table(_OP, frac, q_down, table)
    check_separate(
        _OP, frac, momentum, second_moment, options,
        frac_ref=frac_ref, scale=scale, weight_grad=weight_grad, q_down=q_down, table=table,
    )  # fmt: skip
    tensors = (frac, frac_ref, weight_grad, scale, momentum, second_moment)
    double = any(t is not None and t.dtype == torch.float64 for t in (*tensors, table))
    unsupported = "float64, which only the reference computes in" if double else None
    cpp = unsupported or _cpp_problem(tensors)
    chosen = registry.choose(
        _OP, impl, frac.device, triton=unsupported, cpp=cpp, cpp_operator="projected_step_cpp2_"
    )
    if chosen != "triton":
        scale, group_size = table_scale(scale, group_size, frac, q_down, table)
    if chosen == "reference":
        return reference.projected_step_(
            frac, frac_ref, weight_grad, scale, group_size=group_size, options=options,
            momentum=momentum, second_moment=second_moment,
        )  # fmt: skip
    # An optimizer without a moment must not mark one as changed.
    first = None if options.optimizer == "sgd" else momentum
    second = second_moment if options.optimizer == "adamw" else None
    state = (frac, frac_ref, weight_grad, scale, first, second)
    scalars = flatten_options(options)
    if chosen == "cpp":
        return _cpp_launch(*state, group_size, *scalars)
    counts: Tensor = _triton_op(*state, None if table is None else q_down, table, group_size, *scalars)
    return counts


def _cpp_problem(tensors: tuple[Tensor | None, ...]) -> str | None:
    for name, tensor in zip(
        ("frac", "frac_ref", "weight_grad", "scale", "momentum", "second_moment"), tensors, strict=True
    ):
        if tensor is not None and tensor.dtype == torch.float16:
            return f"{name} in float16"
        if tensor is not None and not tensor.is_contiguous():
            return f"a non-contiguous {name}"
    return None


def projected_step_(
    frac: Tensor,
    frac_ref: Tensor,
    weight_grad: Tensor,
    scale: Tensor | None,
    *,
    group_size: int,
    options: StepOptions,
    momentum: Tensor | None = None,
    second_moment: Tensor | None = None,
    q_down: Tensor | None = None,
    table: Tensor | None = None,
    impl: str = "auto",
) -> StepCounts:
    """Take one projected step in place.

    kl = clamp(kl_weight * weight_grad * Delta, -grad_clamp, grad_clamp)
    Delta = d weight / d frac = scale, times T[q_down + 1] - T[q_down] on a look-up grid
    g = kl + linear_weight * (1 - 2 clamp(frac_ref, 0, 1)) + hardening * (1 - 2 frac)
    adamw:    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; frac *= 1 - lr * weight_decay;
              d = (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps), with lr and eps corrected instead of m and v
    momentum: m = b1 m + (1 - b1) g; d = m          sgd: d = g
    lion:     d = sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g
    frac = clamp(frac - lr d, 0, 1), rounded stochastically where it is stored in fixed point.
    Coordinates with frac_ref exactly 0 or 1 lie on the grid: they are frozen, their moments stay as they are.
    A coordinate whose KL gradient is not finite (NaN, infinite, or 2^127 above the clamp) keeps frac and moments, and
    is counted in `nan`.

    Args:
        frac: Place between the neighbours, float64/32/bfloat16 or uint8/uint16 fixed point,
            [out_features, in_features]; changed in place.
        frac_ref: Place that reproduces the original weight, floating or uint8 code (u - 63) / 126, same shape.
        weight_grad: Gradient of the loss by the weight, floating, same shape; by `frac` where scale is None.
        scale: Grid step in weight units, floating, [out_features, num_groups]; None where the gradient is by `frac`
            already (`soft_linear_dfrac`), so that Delta = 1.
        group_size: Columns per group, -1 for the row.
        options: Scalars; `moment_bound` is the fixed scale of 8-bit moments. Element (row, column) takes the noise of
            index first_index + row * in_features + column, with the in_features of this call: with `first_index` =
            first row * in_features a block of whole rows steps as within the whole tensor. A block of columns does
            not: its noise is another, as good.
        momentum: First moment, floating or int8, same shape (adamw, momentum, lion); changed in place.
        second_moment: Second moment, floating, or uint8 holding its root (adamw); changed in place.
        q_down: Lower grid code, uint8, one or two per byte; needed with a table, else not read.
        table: Levels of a look-up grid in ascending order, floating, [2 ** num_bits]; None is uniform.
        impl: "auto" | "reference" | "triton" | "cpp".

    Returns:
        StepCounts over this tensor.

    Raises:
        TypeError: An argument is not a Tensor, options no StepOptions, or a scalar of it no number (no integer).
        ValueError: Shapes, dtypes or devices disagree, a moment is missing, a scalar is out of range, or elements of
            what is to be changed share an address, of one tensor or of two, or with what is only read.
        NotImplementedError: An explicit impl does not cover these dtypes or strides.
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic; independent of tiling. Records no graph: `frac` may be a leaf that requires grad. Waits for the
        device to return the counts; see `projected_step_deferred_`. float64 is computed by the reference on every
        device.

    Source:
        DiscQuant, arXiv 2501.06417, update rule; 8-bit layout and hardening are this project's.
    """
    counts = _run(
        frac, frac_ref, weight_grad, scale, group_size, options, momentum, second_moment, q_down, table, impl
    )
    return StepCounts(*counts.tolist())


def projected_step_deferred_(
    frac: Tensor,
    frac_ref: Tensor,
    weight_grad: Tensor,
    scale: Tensor | None,
    *,
    group_size: int,
    options: StepOptions,
    momentum: Tensor | None = None,
    second_moment: Tensor | None = None,
    q_down: Tensor | None = None,
    table: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`projected_step_` without waiting for the device: the same step, arguments and errors.

    Returns:
        int64, [5], on the device of `frac`: live, fractional, moved, saturated, nan.
    """
    return _run(
        frac, frac_ref, weight_grad, scale, group_size, options, momentum, second_moment, q_down, table, impl
    )
