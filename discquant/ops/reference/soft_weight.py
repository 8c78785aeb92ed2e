# SPDX-License-Identifier: Apache-2.0
"""Reference of `soft_weight`: the weight that lies `frac` of the way between two grid neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Fixed-point `frac`: the integer code u stands for u / FRAC_DENOMINATOR[dtype].
FRAC_DENOMINATOR: dict[torch.dtype, int] = {torch.uint8: 255, torch.uint16: 65535}


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any argument is float64, else float32: the dtype in which every op computes."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def exact_quotient(value: Tensor, divisor: float) -> Tensor:
    """value / divisor, correctly rounded: on CUDA torch multiplies by the reciprocal of a Python number."""
    return value / torch.full((), divisor, dtype=value.dtype, device=value.device)


def decode_frac(frac: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `frac` as a floating tensor in [0, 1]; integer codes are divided by their denominator."""
    denominator = FRAC_DENOMINATOR.get(frac.dtype)
    if denominator is None:
        return frac.to(dtype)
    return exact_quotient(frac.to(dtype), denominator)


def unpack_nibbles(q_packed: Tensor, in_features: int) -> Tensor:
    """Unpack two 4-bit codes per byte (low nibble first) to uint8 codes, [out_features, in_features]."""
    pair = torch.stack((q_packed & 15, q_packed >> 4), dim=-1)
    rows, width = q_packed.shape
    return pair.reshape(rows, 2 * width)[:, :in_features]


def expand_groups(
    per_group: Tensor, group_size: int, in_features: int, g_idx: Tensor | None = None
) -> Tensor:
    """Repeat one value per group along the input axis; the last group may be short.

    Args:
        per_group: Any dtype, [out_features, num_groups].
        group_size: Columns per group, -1 for one group per row; not read with `g_idx`.
        in_features: Number of columns of the result.
        g_idx: Group of each column, int32 or int64, [in_features]; None is column // group_size.

    Returns:
        Same dtype, [out_features, in_features].

    Raises:
        IndexError: An entry of `g_idx` names a group that is not there.
    """
    if g_idx is not None:
        # Counted from the end, a negative entry would name a group.
        return per_group[:, torch.where(g_idx < 0, per_group.shape[1], g_idx.long())]
    if group_size == -1 or per_group.shape[1] == 1:
        return per_group.expand(-1, in_features)
    return per_group.repeat_interleave(group_size, dim=1)[:, :in_features]


def slope(
    q_down: Tensor, scale: Tensor, table: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype,
    g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """d weight / d frac of every coordinate: scale, times T[q_down + 1] - T[q_down] with a table.

    Args:
        q_down: Lower grid code, see `soft_weight`; read with a table only.
        scale: Grid step, [out_features, num_groups].
        table: Levels of a look-up grid or None.
        group_size: Columns that share a scale, -1 for the row.
        in_features: Columns of the weight.
        dtype: Dtype of the result and of the arithmetic.
        g_idx: Group of each column, [in_features], in place of column // group_size.

    Returns:
        Weight units per unit of frac, [out_features, in_features].
    """
    step = expand_groups(scale.to(dtype), group_size, in_features, g_idx)
    if table is None:
        return step
    index = (q_down if q_down.shape[1] == in_features else unpack_nibbles(q_down, in_features)).long()
    levels = table.to(dtype)
    return step * (levels[(index + 1).clamp(max=levels.numel() - 1)] - levels[index])


def _between(position: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """`position` of the way between two levels; exactly the upper one at 1."""
    return torch.where(position == 1, upper, lower + position * (upper - lower))


class _BetweenFunction(torch.autograd.Function):
    """`_between`, whose derivative by the position is `step` everywhere: at 1 too, and where levels are rounded."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, lower: Tensor, upper: Tensor, step: Tensor) -> Tensor:
        """`step` is upper - lower, or what that would be if the levels were not rounded."""
        ctx.save_for_backward(step)
        return _between(position, lower, upper)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Of torch operators, so that it can be differentiated again."""
        (step,) = ctx.saved_tensors
        return grads[0] * step, None, None, None


def _between_steps(position: Tensor, lower: Tensor, upper: Tensor, step: Tensor) -> Tensor:
    function: Any = _BetweenFunction  # torch leaves apply untyped
    between: Tensor = function.apply(position, lower, upper, step)
    return between


def affine_weight(q_down: Tensor, position: Tensor, step: Tensor, minimum: Tensor) -> Tensor:
    """L(q_down) + position * (L(q_down + 1) - L(q_down)), with L(q) = step * q + minimum rounded as an engine does.

    Args:
        q_down: Lower grid code, one per element, [out_features, in_features].
        position: Place between the neighbours, float32 or float64, same shape.
        step: Grid step of each coordinate, in the dtype of `position`, broadcastable.
        minimum: Weight of code 0 of each coordinate, broadcastable; product and sum of a level are each rounded to its
            dtype.

    Returns:
        Weight in the dtype of `position`, whose derivative by it is `step`, [out_features, in_features].
    """
    compute, engine = position.dtype, minimum.dtype

    def level(code: Tensor) -> Tensor:
        product = (step * code).to(engine).to(compute)
        return (product + minimum.to(compute)).to(engine).to(compute)

    code = q_down.to(compute)
    return _between_steps(position, level(code), level(code + 1), step)


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
    minimum: Tensor | None = None,
    g_idx: Tensor | None = None,
) -> Tensor:
    """Interpolate between neighbouring grid points; the contract is `discquant.ops.soft_weight`.

    Note:
        At frac 0 and 1 the result equals the grid's own dequantisation bit for bit. Differentiable in every floating
        argument but a table; with a minimum in `frac` alone.

    Source:
        DiscQuant, arXiv 2501.06417, definition of w^x.
    """
    in_features = frac.shape[1]
    compute = accumulate_dtype(frac, scale, zero_point, table, minimum)
    if q_down.shape[1] != in_features:
        q_down = unpack_nibbles(q_down, in_features)
    position = decode_frac(frac, compute)
    step = expand_groups(scale.to(compute), group_size, in_features, g_idx)
    if minimum is not None:
        weight = affine_weight(q_down, position, step, expand_groups(minimum, group_size, in_features, g_idx))
    elif table is None:
        zero = (
            torch.full((1, 1), 2.0 ** (num_bits - 1), dtype=compute, device=frac.device)
            if zero_point is None
            else expand_groups(zero_point.to(compute), group_size, in_features, g_idx)
        )
        # q - zero is a small integer, so the sum with frac rounds once and the product once.
        weight = step * ((q_down.to(compute) - zero) + position)
    else:
        levels = table.to(compute)
        index = q_down.long()
        lower = levels[index]
        upper = levels[(index + 1).clamp(max=levels.numel() - 1)]
        weight = step * _between_steps(position, lower, upper, upper - lower)
    return weight.to(scale.dtype if dtype is None else dtype)
