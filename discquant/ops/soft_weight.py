# SPDX-License-Identifier: Apache-2.0
"""Operator `soft_weight`: codes and positions to weights in one pass, differentiable in `frac`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops._weights import check, reference_weight

_OP = "soft_weight"
_ARGUMENTS = (
    "Tensor q_down, Tensor frac, Tensor scale, Tensor? zero_point, Tensor? table, "
    "int num_bits, int group_size, ScalarType dtype, bool is_reference, bool transpose, "
    "Tensor? minimum=None, Tensor? g_idx=None"
)


def _fake(
    q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, is_reference: bool, transpose: bool,
    minimum: Tensor | None = None, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    rows, cols = frac.shape
    return frac.new_empty((cols, rows) if transpose else (rows, cols), dtype=dtype)


def _bwd_fake(
    grad_weight: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return grad_weight.new_empty(grad_weight.shape, dtype=dtype)


def _launch(*args: Any) -> Tensor:
    out: Tensor = registry.triton_module("soft_weight").soft_weight_fwd(*args)
    return out


def _bwd_launch(*args: Any) -> Tensor:
    out: Tensor = registry.triton_module("soft_weight").soft_weight_bwd(*args)
    return out


_fwd_op = registry.define(f"soft_weight({_ARGUMENTS}) -> Tensor", _fake, _launch)
# The same contract in C++ for contiguous CPU tensors; csrc/solver registers the implementation. The number changes with
# the arguments: nothing else keeps a binary of earlier sources from answering.
_cpp_op = registry.define(
    "soft_weight_cpp2_(Tensor(a!) out, Tensor q_down, Tensor frac, Tensor scale, Tensor? zero_point, Tensor? table, "
    "int num_bits, int group_size, bool is_reference, bool transpose, Tensor? minimum=None, Tensor? g_idx=None) -> ()",
    lambda *_: None,
    None,
)
_bwd_op = registry.define(
    "soft_weight_bwd(Tensor grad_weight, Tensor q_down, Tensor scale, Tensor? table, "
    "int num_bits, int group_size, ScalarType dtype, Tensor? g_idx=None) -> Tensor",
    _bwd_fake,
    _bwd_launch,
)


class SoftWeightFunction(torch.autograd.Function):
    """soft_weight through a compiled kernel; saves codes and scales, never the weight."""

    @staticmethod
    def forward(
        ctx: Any, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
        num_bits: int, group_size: int, dtype: torch.dtype, is_reference: bool, transpose: bool,
        minimum: Tensor | None, g_idx: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Launch the forward kernel."""
        ctx.save_for_backward(q_down, scale, table, g_idx)
        ctx.constants = (num_bits, group_size, frac.dtype, transpose)
        out: Tensor = _fwd_op(
            q_down, frac, scale, zero_point, table, num_bits, group_size, dtype, is_reference, transpose,
            minimum, g_idx,
        )  # fmt: skip
        return out

    @staticmethod
    @registry.once(_OP)
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Gradient of `frac` only."""
        nothing = (None,) * 10
        if not ctx.needs_input_grad[1]:
            return (None, None, *nothing)
        q_down, scale, table, g_idx = ctx.saved_tensors
        num_bits, group_size, dtype, transpose = ctx.constants
        grad_weight = grads[0].t() if transpose else grads[0]
        grad = _bwd_op(grad_weight, q_down, scale, table, num_bits, group_size, dtype, g_idx)
        return (None, grad, *nothing)


def _cpp_problem(
    q_down: Tensor,
    frac: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    table: Tensor | None,
    dtype: torch.dtype,
    minimum: Tensor | None,
    g_idx: Tensor | None,
) -> str | None:
    """Say what of these arguments the C++ kernel does not cover, or None."""
    if frac.requires_grad and torch.is_grad_enabled():
        return "a gradient of frac"
    covered: dict[str, tuple[torch.dtype, ...]] = {
        "frac": (torch.float32, torch.bfloat16, torch.uint8, torch.uint16),
        "scale": (torch.float32, torch.bfloat16, torch.float16),
        "zero_point": (torch.uint8, torch.float32),
        "table": (torch.float32, torch.bfloat16),
        "minimum": (torch.float32, torch.bfloat16, torch.float16),
    }
    if dtype not in (torch.float32, torch.bfloat16):
        return f"a result in {dtype}"
    named = {
        "q_down": q_down, "frac": frac, "scale": scale, "zero_point": zero_point, "table": table,
        "minimum": minimum, "g_idx": g_idx,
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"a non-contiguous {name}"
        if tensor is not None and tensor.dtype not in covered.get(name, (tensor.dtype,)):
            return f"{name} in {tensor.dtype}"
    return None


def soft_weight(
    q_down: Tensor,
    frac: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int,
    table: Tensor | None = None,
    dtype: torch.dtype | None = None,
    is_reference: bool = False,
    transpose: bool = False,
    minimum: Tensor | None = None,
    g_idx: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Interpolate between neighbouring grid points.

    Uniform grid: weight = scale * (q_down + frac - zero_point).
    Look-up table: weight = scale * (T[q_down] + frac * (T[q_down + 1] - T[q_down])).
    Floating minimum: weight = L(q_down) + frac * (L(q_down + 1) - L(q_down)), and exactly L(q_down + 1) at frac 1, with
    L(q) = scale * q + minimum, where product and sum are each rounded to the dtype of `minimum`.
    Computed in float32 (float64 if an input is float64), rounded once to `dtype`.

    Args:
        q_down: Lower grid code, uint8, [out_features, in_features], or two 4-bit codes per byte
            (low nibble first), [out_features, ceil(in_features / 2)]. Below 2 ** num_bits: with a table the
            reference raises IndexError for others, kernels read the last level.
        frac: Place between the neighbours, unitless in [0, 1]: floating, or uint8 / uint16 fixed point
            (code / 255, code / 65535), [out_features, in_features].
        scale: Grid step in weight units, floating, [out_features, num_groups].
        zero_point: Code of weight zero, uint8, or floating where it is no integer, [out_features, num_groups]; None is
            2 ** (num_bits - 1) on a uniform grid and 0 with a table.
        num_bits: Code width, 2 to 8.
        group_size: Columns that share a scale; -1 is the whole row; the last group may be short. Not read with `g_idx`.
        table: Levels of a look-up grid in ascending order, floating, [2 ** num_bits]; None is uniform.
        dtype: Result dtype; default the dtype of `scale`.
        is_reference: `frac` holds `frac_ref`: floating, or uint8 code u for (u - 63) / 126; gives the
            teacher's weight from the same state.
        transpose: Return the weight as [in_features, out_features], contiguous.
        minimum: Weight of code 0, floating, [out_features, num_groups]; in place of a zero point and of a table.
        g_idx: Group of each column, int32 or int64, [in_features], in place of column // group_size; then there are any
            number of groups. Entries are in 0 .. num_groups - 1: the reference raises IndexError for others, kernels
            take the nearest group.
        impl: "auto" | "reference" | "triton" | "cpp".

    Returns:
        Weight, [out_features, in_features] (transposed if asked).

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shapes, dtypes or devices disagree.
        NotImplementedError: A gradient of scale, zero_point, table or minimum is asked for, or of `frac` through
            impl="cpp", or a second derivative of a kernel's result.
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic. Differentiable in a floating `frac`, once (the reference: any number of times); backward saves
        codes and scales, not the weight. With a minimum the gradient is that of unrounded levels, grad * scale: their
        rounding is passed straight through, as the one to `dtype` is.

    Source:
        DiscQuant, arXiv 2501.06417, definition of w^x.
    """
    weight_dtype = check(
        _OP, q_down, frac, scale, zero_point, table, num_bits, group_size, dtype, is_reference, minimum, g_idx
    )
    cpp = _cpp_problem(q_down, frac, scale, zero_point, table, weight_dtype, minimum, g_idx)
    chosen = registry.choose(_OP, impl, frac.device, cpp=cpp, cpp_operator="soft_weight_cpp2_")
    args = (
        q_down,
        frac,
        scale,
        zero_point,
        table,
        num_bits,
        group_size,
        weight_dtype,
        is_reference,
        transpose,
        minimum,
        g_idx,
    )
    if chosen == "reference":
        return reference_weight(*args)
    out: Tensor
    if chosen == "triton":
        out = registry.differentiable(SoftWeightFunction, *args)
        return out
    out = _fake(*args)
    weight = (q_down, frac, scale, zero_point, table, num_bits, group_size, is_reference, transpose)
    # The nearest group first: int32 would wrap an entry that is far off into another.
    index = None if g_idx is None else g_idx.clamp(0, scale.shape[1] - 1).to(torch.int32)
    _cpp_op(out, *weight, minimum, index)
    return out
