# SPDX-License-Identifier: Apache-2.0
"""Tiles of a grid: what groups of columns share, levels, slopes, and the weight between two levels.

Ways to read a value that a group of columns shares: GATHER (any group size), ONE (the tile lies in one group),
SEVERAL (the tile holds whole groups, a power of two of columns each), INDEXED (a vector names each column's group).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import cast, decode_position, frac_kind, load_codes, load_masked

GATHER = tl.constexpr(0)
ONE = tl.constexpr(1)
SEVERAL = tl.constexpr(2)
INDEXED = tl.constexpr(3)


def group_mode(
    group_size: int, in_features: int, block_k: int, scale: Tensor | None = None, g_idx: Tensor | None = None
) -> tuple[int, int]:
    """Return (mode, GROUP): the group size to compile for, 0 for the whole row; where INDEXED the number of groups."""
    if g_idx is not None and scale is not None:
        return INDEXED.value, scale.shape[1]
    if group_size == -1 or group_size >= in_features:
        return ONE.value, 0
    if group_size % block_k == 0:
        return ONE.value, group_size
    if block_k % group_size == 0 and group_size & (group_size - 1) == 0:
        return SEVERAL.value, group_size
    return GATHER.value, group_size


def weight_arguments(
    q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
    num_bits: int, is_reference: bool, minimum: Tensor | None,
) -> tuple[Tensor, list[int], dict[str, object]]:  # fmt: skip
    """What stands for `zero_ptr`, and the strides and constants that every kernel with a weight takes."""
    offset = zero_point if minimum is None else minimum
    zero = scale if offset is None else offset
    strides = [*q_down.stride(), *frac.stride(), *scale.stride(), *zero.stride()]
    constants = {
        "ZERO": 0.0 if table is not None else float(2 ** (num_bits - 1)), "LEVELS": 2**num_bits,
        "KIND": frac_kind(frac.dtype, is_reference), "PACKED": q_down.shape[1] != frac.shape[1],
        "HAS_ZERO": offset is not None, "HAS_MIN": minimum is not None, "HAS_TABLE": table is not None,
    }  # fmt: skip
    return zero, strides, constants


@triton.jit
def load_grouped(
    ptr, stride_m, stride_g, offs_m, mask_m, k0, in_features,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    index_ptr=None,
):  # fmt: skip
    """Load a per-group value for a tile: [BLOCK_M, 1] or [BLOCK_M, BLOCK_K], in ACC."""
    if MODE == ONE:
        group = 0
        if GROUP != 0:
            group = k0 // GROUP
        # A tile may lie past the last column altogether.
        mask = None if mask_m is None else mask_m & (k0 < in_features)
        value = load_masked(ptr + offs_m * stride_m + group * stride_g, mask)
        return value.to(ACC)[:, None]
    elif MODE == SEVERAL:
        groups = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)
        mask = None if mask_m is None else mask_m[:, None] & (groups * GROUP < in_features)[None, :]
        value = load_masked(ptr + offs_m[:, None] * stride_m + groups[None, :] * stride_g, mask).to(ACC)
        wide = tl.broadcast_to(value[:, :, None], (BLOCK_M, BLOCK_K // GROUP, GROUP))
        return tl.reshape(wide, (BLOCK_M, BLOCK_K))
    else:
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask = None if mask_m is None else mask_m[:, None] & (offs_k < in_features)[None, :]
        if MODE == INDEXED:
            index = load_masked(index_ptr + offs_k, None if mask_m is None else offs_k < in_features)
            # An entry that names no group must not read past the row.
            groups = tl.minimum(tl.maximum(index, 0), GROUP - 1).to(offs_k.dtype)
        else:
            groups = offs_k // GROUP
        return load_masked(ptr + offs_m[:, None] * stride_m + groups[None, :] * stride_g, mask).to(ACC)


@triton.jit
def load_levels(table_ptr, codes, LEVELS: tl.constexpr, ACC: tl.constexpr):
    """Levels T[q] and T[q + 1] in ACC; the last one for codes past the table, which must not read past it."""
    index = codes.to(tl.int32)
    lower = tl.load(table_ptr + tl.minimum(index, LEVELS - 1)).to(ACC)
    return lower, tl.load(table_ptr + tl.minimum(index + 1, LEVELS - 1)).to(ACC)


@triton.jit
def load_slope(
    scale_ptr, stride_sm, stride_sg, q_ptr, stride_qm, stride_qk, table_ptr, offs_m, mask_m, k0, in_features,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    HAS_TABLE: tl.constexpr, LEVELS: tl.constexpr, PACKED: tl.constexpr, index_ptr=None,
):  # fmt: skip
    """d weight / d frac of a tile in ACC: scale, times T[q + 1] - T[q] with a table."""
    slope = load_grouped(
        scale_ptr, stride_sm, stride_sg, offs_m, mask_m, k0, in_features, ACC, BLOCK_M, BLOCK_K, MODE, GROUP, index_ptr
    )  # fmt: skip
    if HAS_TABLE:
        codes = load_codes(q_ptr, stride_qm, stride_qk, offs_m, mask_m, k0, in_features, BLOCK_K, PACKED)
        lower, upper = load_levels(table_ptr, codes, LEVELS, ACC)
        slope = slope * (upper - lower)
    return slope


@triton.jit
def affine_level(code, step, minimum, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """step * code + minimum in ACC, product and sum each rounded to DTYPE as the format's engine does."""
    product = cast(step * code, DTYPE).to(ACC)
    return cast(product + minimum, DTYPE).to(ACC)


@triton.jit
def interpolate(
    q, position, step, zero, table_ptr, HAS_TABLE: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr,
    MIN_TYPE: tl.constexpr = None,
):  # fmt: skip
    """Weight at `position` between code q and q + 1; the reference's order of operations.

    With MIN_TYPE `zero` is the weight of code 0, as tensors of that type hold it.
    """
    if HAS_TABLE:
        lower, upper = load_levels(table_ptr, q, LEVELS, ACC)
        weight = step * tl.where(position == 1.0, upper, lower + position * (upper - lower))
    elif MIN_TYPE is not None:
        code = q.to(ACC)
        lower = affine_level(code, step, zero, MIN_TYPE, ACC)
        upper = affine_level(code + 1.0, step, zero, MIN_TYPE, ACC)
        weight = tl.where(position == 1.0, upper, lower + position * (upper - lower))
    else:
        weight = step * ((q.to(ACC) - zero) + position)
    return weight


@triton.jit
def weight_tile(
    q_ptr, frac_ptr, scale_ptr, zero_ptr, table_ptr, index_ptr, offs_n, mask_n, k0, in_features,
    stride_qm, stride_qk, stride_fm, stride_fk, stride_sm, stride_sg, stride_zm, stride_zg,
    ZERO: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_TABLE: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] weights in ACC, rows offs_n, columns from k0.

    zero_ptr holds what each group has beside its scale: zero points, or with HAS_MIN minimums.
    """
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask = mask_n[:, None] & (offs_k < in_features)[None, :]
    q = load_codes(q_ptr, stride_qm, stride_qk, offs_n, mask_n, k0, in_features, BLOCK_K, PACKED)
    code = tl.load(frac_ptr + offs_n[:, None] * stride_fm + offs_k[None, :] * stride_fk, mask=mask, other=0)
    step = load_grouped(
        scale_ptr, stride_sm, stride_sg, offs_n, mask_n, k0, in_features, ACC, BLOCK_N, BLOCK_K, MODE, GROUP, index_ptr
    )  # fmt: skip
    zero = ZERO
    if HAS_ZERO:
        zero = load_grouped(
            zero_ptr, stride_zm, stride_zg, offs_n, mask_n, k0, in_features, ACC, BLOCK_N, BLOCK_K, MODE, GROUP,
            index_ptr,
        )  # fmt: skip
    return interpolate(
        q, decode_position(code, KIND, ACC, True), step, zero, table_ptr, HAS_TABLE, LEVELS, ACC,
        zero_ptr.dtype.element_ty if HAS_MIN else None,
    )  # fmt: skip
