# SPDX-License-Identifier: Apache-2.0
"""weight = scale * (q_down + frac - zero_point), or between levels of a table or of scale * q + minimum; its gradient.

One program per [BLOCK_M, BLOCK_K] tile; every input is read once, the result written once. Computed in ACC
(float32, or float64 for float64 input) without contraction to fused multiply-adds, so that float32 results equal
the reference bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import adjacent, cast, decode_position, load_codes, load_codes_minus, load_masked
from .grid_tile import group_mode, interpolate, load_grouped, load_slope, weight_arguments


@triton.jit
def _soft_weight_fwd_kernel(
    out_ptr, q_ptr, frac_ptr, scale_ptr, zero_ptr, table_ptr, index_ptr,
    out_features, in_features,
    stride_om, stride_ok, stride_qm, stride_qk, stride_fm, stride_fk, stride_sm, stride_sg, stride_zm, stride_zg,
    ZERO: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_MIN: tl.constexpr, HAS_TABLE: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr, EVEN: tl.constexpr, ROW_AXIS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    k0 = tl.program_id(1 - ROW_AXIS).to(tl.int64) * BLOCK_K
    offs_m = tl.program_id(ROW_AXIS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    if EVEN:  # no tile reaches past an edge
        mask_m = None
        mask = None
    else:
        mask_m = offs_m < out_features
        mask = mask_m[:, None] & (offs_k < in_features)[None, :]
    code = load_masked(frac_ptr + offs_m[:, None] * stride_fm + offs_k[None, :] * stride_fk, mask)
    step = load_grouped(
        scale_ptr, stride_sm, stride_sg, offs_m, mask_m, k0, in_features, ACC, BLOCK_M, BLOCK_K, MODE, GROUP, index_ptr
    )  # fmt: skip
    zero = ZERO
    if HAS_ZERO:  # with HAS_MIN the minimum
        zero = load_grouped(
            zero_ptr, stride_zm, stride_zg, offs_m, mask_m, k0, in_features, ACC, BLOCK_M, BLOCK_K, MODE, GROUP,
            index_ptr,
        )  # fmt: skip
    MIN_TYPE: tl.constexpr = zero_ptr.dtype.element_ty if HAS_MIN else None
    position = decode_position(code, KIND, ACC)
    if HAS_TABLE or ACC != tl.float32:
        q = load_codes(q_ptr, stride_qm, stride_qk, offs_m, mask_m, k0, in_features, BLOCK_K, PACKED)
        weight = interpolate(q, position, step, zero, table_ptr, HAS_TABLE, LEVELS, ACC, MIN_TYPE)
    else:
        FIRST: tl.constexpr = 0.0 if HAS_ZERO else ZERO
        q = load_codes_minus(
            q_ptr, stride_qm, stride_qk, offs_m, mask_m, k0, in_features, FIRST, BLOCK_K, PACKED
        )
        if HAS_MIN:
            weight = interpolate(q, position, step, zero, table_ptr, False, LEVELS, ACC, MIN_TYPE)
        else:
            if HAS_ZERO:
                q -= zero
            weight = step * (q + position)
    out = out_ptr + offs_m[:, None] * stride_om + offs_k[None, :] * stride_ok
    tl.store(out, cast(weight, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _soft_weight_bwd_kernel(
    out_ptr, grad_ptr, q_ptr, scale_ptr, table_ptr, index_ptr,
    out_features, in_features,
    stride_om, stride_ok, stride_gm, stride_gk, stride_qm, stride_qk, stride_sm, stride_sg,
    LEVELS: tl.constexpr, PACKED: tl.constexpr, HAS_TABLE: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
    ROW_AXIS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    k0 = tl.program_id(1 - ROW_AXIS).to(tl.int64) * BLOCK_K
    offs_m = tl.program_id(ROW_AXIS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_m = offs_m < out_features
    mask = mask_m[:, None] & (offs_k < in_features)[None, :]
    grad = tl.load(
        grad_ptr + offs_m[:, None] * stride_gm + offs_k[None, :] * stride_gk, mask=mask, other=0
    ).to(ACC)
    slope = load_slope(
        scale_ptr, stride_sm, stride_sg, q_ptr, stride_qm, stride_qk, table_ptr, offs_m, mask_m, k0, in_features,
        ACC, BLOCK_M, BLOCK_K, MODE, GROUP, HAS_TABLE, LEVELS, PACKED, index_ptr,
    )  # fmt: skip
    out = out_ptr + offs_m[:, None] * stride_om + offs_k[None, :] * stride_ok
    tl.store(out, cast(grad * slope, out_ptr.dtype.element_ty), mask=mask)


def tile(cols: int, transpose: bool = False, block: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of a tile, or the caller's choice: long in the direction that memory is written."""
    if block is not None:
        return block
    if transpose:
        return 64, 64
    return (8, 256) if cols >= 256 else (16, max(16, triton.next_power_of_2(cols)))


def _grid(rows: int, cols: int, block_m: int, block_k: int) -> tuple[int, tuple[int, int]]:
    """Dimension of the grid that counts row tiles, and the grid.

    Programs in the order of memory, unless the rows are too many for any dimension but the first: 65535 blocks.
    """
    tiles = triton.cdiv(rows, block_m), triton.cdiv(cols, block_k)
    return (1, tiles[::-1]) if tiles[0] <= 65535 else (0, tiles)


def soft_weight_fwd(
    q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, is_reference: bool, transpose: bool,
    minimum: Tensor | None = None, g_idx: Tensor | None = None, block: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Launch the forward kernel; arguments as `discquant.ops.soft_weight`, already checked."""
    rows, cols = frac.shape
    out = frac.new_empty((cols, rows) if transpose else (rows, cols), dtype=dtype)
    if out.numel() == 0:
        return out
    block_m, block_k = tile(cols, transpose, block)
    mode, group = group_mode(group_size, cols, block_k, scale, g_idx)
    wide = any(t is not None and t.dtype == torch.float64 for t in (frac, scale, zero_point, table, minimum))
    zero, strides, constants = weight_arguments(
        q_down, frac, scale, zero_point, table, num_bits, is_reference, minimum
    )
    stride_ok, stride_om = out.stride() if transpose else out.stride()[::-1]
    row_axis, grid = _grid(rows, cols, block_m, block_k)
    _soft_weight_fwd_kernel[grid](
        out, q_down, frac, scale, zero, adjacent(table, scale), adjacent(g_idx),
        rows, cols, stride_om, stride_ok, *strides, **constants,
        MODE=mode, GROUP=group, ACC=tl.float64 if wide else tl.float32,
        EVEN=rows % block_m == 0 and cols % block_k == 0, ROW_AXIS=row_axis, BLOCK_M=block_m, BLOCK_K=block_k,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def soft_weight_bwd(
    grad_weight: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, g_idx: Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Launch the backward kernel: gradient of `frac`, [out_features, in_features], in `dtype`."""
    rows, cols = grad_weight.shape
    out = grad_weight.new_empty((rows, cols), dtype=dtype)
    if out.numel() == 0:
        return out
    block_m, block_k = tile(cols, block=block)
    mode, group = group_mode(group_size, cols, block_k, scale, g_idx)
    wide = dtype == torch.float64 or any(
        t is not None and t.dtype == torch.float64 for t in (grad_weight, scale, table)
    )
    row_axis, grid = _grid(rows, cols, block_m, block_k)
    _soft_weight_bwd_kernel[grid](
        out, grad_weight, q_down, scale, adjacent(table, scale), adjacent(g_idx),
        rows, cols,
        *out.stride(), *grad_weight.stride(), *q_down.stride(), *scale.stride(),
        LEVELS=2**num_bits, PACKED=q_down.shape[1] != cols, HAS_TABLE=table is not None,
        MODE=mode, GROUP=group, ACC=tl.float64 if wide else tl.float32,
        ROW_AXIS=row_axis, BLOCK_M=block_m, BLOCK_K=block_k,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out
