# SPDX-License-Identifier: Apache-2.0
"""Reference of `soft_weight`: the weight that lies `frac` of the way between two grid neighbours."""

from __future__ import annotations

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
    return pair.reshape(q_packed.shape[0], -1)[:, :in_features]


def expand_groups(per_group: Tensor, group_size: int, in_features: int) -> Tensor:
    """Repeat one value per group along the input axis; the last group may be short.

    Args:
        per_group: Any dtype, [out_features, num_groups].
        group_size: Columns per group, -1 for one group per row.
        in_features: Number of columns of the result.

    Returns:
        Same dtype, [out_features, in_features].
    """
    if group_size == -1 or per_group.shape[1] == 1:
        return per_group.expand(-1, in_features)
    return per_group.repeat_interleave(group_size, dim=1)[:, :in_features]


def slope(
    q_down: Tensor, scale: Tensor, table: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """d weight / d frac of every coordinate: scale, times T[q_down + 1] - T[q_down] with a table.

    Args:
        q_down: Lower grid code, see `soft_weight`; read with a table only.
        scale: Grid step, [out_features, num_groups].
        table: Levels of a look-up grid or None.
        group_size: Columns that share a scale, -1 for the row.
        in_features: Columns of the weight.
        dtype: Dtype of the result and of the arithmetic.

    Returns:
        Weight units per unit of frac, [out_features, in_features].
    """
    step = expand_groups(scale.to(dtype), group_size, in_features)
    if table is None:
        return step
    index = (q_down if q_down.shape[1] == in_features else unpack_nibbles(q_down, in_features)).long()
    levels = table.to(dtype)
    return step * (levels[(index + 1).clamp(max=levels.numel() - 1)] - levels[index])


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
) -> Tensor:
    """Interpolate between neighbouring grid points; the contract is `discquant.ops.soft_weight`.

    Note:
        At frac 0 and 1 the result equals the grid's own dequantisation bit for bit. Differentiable in every floating
        argument.

    Source:
        DiscQuant, arXiv 2501.06417, definition of w^x.
    """
    in_features = frac.shape[1]
    compute = accumulate_dtype(frac, scale)
    if q_down.shape[1] != in_features:
        q_down = unpack_nibbles(q_down, in_features)
    position = decode_frac(frac, compute)
    step = expand_groups(scale.to(compute), group_size, in_features)
    if table is None:
        zero = (
            torch.full((1, 1), 2.0 ** (num_bits - 1), dtype=compute, device=frac.device)
            if zero_point is None
            else expand_groups(zero_point.to(compute), group_size, in_features)
        )
        # q - zero is a small integer, so the sum with frac rounds once and the product once.
        weight = step * ((q_down.to(compute) - zero) + position)
    else:
        levels = table.to(compute)
        index = q_down.long()
        lower = levels[index]
        upper = levels[(index + 1).clamp(max=levels.numel() - 1)]
        weight = step * torch.where(position == 1, upper, lower + position * (upper - lower))
    return weight.to(scale.dtype if dtype is None else dtype)
