# SPDX-License-Identifier: Apache-2.0
"""Matmuls with the interpolated weight made on the fly: y = x W^T, dX = dY W, and d frac = slope * dY^T x.

W (on a uniform grid scale * (q_down + frac - zero_point)) exists one tile at a time, in registers, rounded to x.dtype
before the dot as a materialised weight would be. The third kernel can take the projected step in its epilogue, so that
the gradient never reaches memory. One program per output tile, bands of tiles in turn (L2), fixed order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import DTYPES, adjacent, cast, frac_kind
from .grid_tile import group_mode, load_slope, weight_arguments, weight_tile
from .soft_linear_tiles import Config
from .step_tile import (
    COUNT_SLOTS,
    COUNTS,
    KEYS,
    OPTIMIZERS,
    SLOT_WIDTH,
    WEIGHTED,
    add_counts,
    launch_scalars,
    normal_moments,
    update_tile,
)

BAND = tl.constexpr(8)


@triton.jit
def _tile_of(num_m, num_n):
    """Output tile of this program: bands of BAND row tiles, column by column in a band."""
    pid = tl.program_id(0)
    per_band = BAND * num_n
    first = (pid // per_band) * BAND
    height = tl.minimum(num_m - first, BAND)
    inside = pid % per_band
    return (first + inside % height).to(tl.int64), (inside // height).to(tl.int64)


@triton.jit
def _soft_linear_fwd_kernel(
    y_ptr, x_ptr, q_ptr, frac_ptr, scale_ptr, zero_ptr, table_ptr, index_ptr, bias_ptr,
    num_tokens, out_features, in_features,
    stride_ym, stride_yn, stride_xm, stride_xk,
    stride_qm, stride_qk, stride_fm, stride_fk, stride_sm, stride_sg, stride_zm, stride_zg,
    ZERO: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_BIAS: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile_of(tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N))
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < num_tokens
    mask_n = offs_n < out_features
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k0 in range(0, in_features, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask = mask_m[:, None] & (offs_k < in_features)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask, other=0)
        weight = weight_tile(
            q_ptr, frac_ptr, scale_ptr, zero_ptr, table_ptr, index_ptr, offs_n, mask_n, k0, in_features,
            stride_qm, stride_qk, stride_fm, stride_fk, stride_sm, stride_sg, stride_zm, stride_zg,
            ZERO, LEVELS, KIND, PACKED, HAS_ZERO, HAS_MIN, HAS_TABLE, MODE, GROUP, ACC, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(x, tl.trans(weight.to(x.dtype)), acc, input_precision="ieee", out_dtype=ACC)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0).to(ACC)[None, :]
    out = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(out, cast(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _soft_linear_dx_kernel(
    dx_ptr, dy_ptr, q_ptr, frac_ptr, scale_ptr, zero_ptr, table_ptr, index_ptr,
    num_tokens, out_features, in_features,
    stride_dm, stride_dk, stride_ym, stride_yn,
    stride_qm, stride_qk, stride_fm, stride_fk, stride_sm, stride_sg, stride_zm, stride_zg,
    ZERO: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_TABLE: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # BLOCK_N columns of dX per program; BLOCK_K is the depth along out_features.
    tile_m, tile_k = _tile_of(tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(in_features, BLOCK_N))
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tile_k * BLOCK_N
    mask_m = offs_m < num_tokens
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for n0 in range(0, out_features, BLOCK_K):
        offs_n = n0 + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_n = offs_n < out_features
        mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn, mask=mask, other=0)
        weight = weight_tile(
            q_ptr, frac_ptr, scale_ptr, zero_ptr, table_ptr, index_ptr, offs_n, mask_n, k0, in_features,
            stride_qm, stride_qk, stride_fm, stride_fk, stride_sm, stride_sg, stride_zm, stride_zg,
            ZERO, LEVELS, KIND, PACKED, HAS_ZERO, HAS_MIN, HAS_TABLE, MODE, GROUP, ACC, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        acc = tl.dot(dy, weight.to(dy.dtype), acc, input_precision="ieee", out_dtype=ACC)
    offs_k = k0 + tl.arange(0, BLOCK_N)
    out = dx_ptr + offs_m[:, None] * stride_dm + offs_k[None, :] * stride_dk
    tl.store(out, cast(acc, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_k < in_features)[None, :])


@triton.jit
def _weight_gradient_tile(
    dy_ptr, x_ptr, offs_n, mask_n, k0, num_tokens, in_features, stride_ym, stride_yn, stride_xm, stride_xk,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of dY^T x, all tokens summed in ascending order, BLOCK_K at a time."""
    offs_k = k0 + tl.arange(0, BLOCK_N)
    mask_k = offs_k < in_features
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for t0 in range(0, num_tokens, BLOCK_K):
        offs_t = t0 + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_t = offs_t < num_tokens
        dy = tl.load(
            dy_ptr + offs_t[:, None] * stride_ym + offs_n[None, :] * stride_yn,
            mask=mask_t[:, None] & mask_n[None, :], other=0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + offs_t[:, None] * stride_xm + offs_k[None, :] * stride_xk,
            mask=mask_t[:, None] & mask_k[None, :], other=0,
        )  # fmt: skip
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee", out_dtype=ACC)
    return acc


@triton.jit
def _soft_linear_dfrac_kernel(
    out_ptr, dy_ptr, x_ptr, q_ptr, scale_ptr, table_ptr, index_ptr,
    num_tokens, out_features, in_features,
    stride_om, stride_ok, stride_ym, stride_yn, stride_xm, stride_xk, stride_qm, stride_qk, stride_sm, stride_sg,
    LEVELS: tl.constexpr, PACKED: tl.constexpr, HAS_TABLE: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_n, tile_k = _tile_of(tl.cdiv(out_features, BLOCK_M), tl.cdiv(in_features, BLOCK_N))
    offs_n = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tile_k * BLOCK_N
    mask_n = offs_n < out_features
    acc = _weight_gradient_tile(
        dy_ptr, x_ptr, offs_n, mask_n, k0, num_tokens, in_features, stride_ym, stride_yn, stride_xm, stride_xk,
        ACC, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    slope = load_slope(
        scale_ptr, stride_sm, stride_sg, q_ptr, stride_qm, stride_qk, table_ptr, offs_n, mask_n, k0, in_features,
        ACC, BLOCK_M, BLOCK_N, MODE, GROUP, HAS_TABLE, LEVELS, PACKED, index_ptr,
    )  # fmt: skip
    offs_k = k0 + tl.arange(0, BLOCK_N)
    out = out_ptr + offs_n[:, None] * stride_om + offs_k[None, :] * stride_ok
    tl.store(
        out,
        cast(acc * slope, out_ptr.dtype.element_ty),
        mask=mask_n[:, None] & (offs_k < in_features)[None, :],
    )


@triton.jit(do_not_specialize=KEYS)
def _soft_linear_step_kernel(
    frac_ptr, ref_ptr, dy_ptr, x_ptr, scale_ptr, first_ptr, second_ptr, q_ptr, table_ptr, counts_ptr,
    num_tokens, out_features, in_features,
    stride_ym, stride_yn, stride_xm, stride_xk,
    stride_fm, stride_fk, stride_rm, stride_rk, stride_sm, stride_sg, stride_mm, stride_mk, stride_vm, stride_vk,
    stride_qm, stride_qk,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp,
    linear_weight, hardening, first_beta1, first_beta2, first_inverse, second_beta2, second_inverse,
    noise_key, first_index,
    OPTIMIZER: tl.constexpr, FRAC_KIND: tl.constexpr, REF_KIND: tl.constexpr,
    FIRST_INT: tl.constexpr, SECOND_INT: tl.constexpr, NORMAL: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    HAS_TABLE: tl.constexpr, LEVELS: tl.constexpr, PACKED: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_n, tile_k = _tile_of(tl.cdiv(out_features, BLOCK_M), tl.cdiv(in_features, BLOCK_N))
    offs_n = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tile_k * BLOCK_N
    mask_n = offs_n < out_features
    grad = _weight_gradient_tile(
        dy_ptr, x_ptr, offs_n, mask_n, k0, num_tokens, in_features, stride_ym, stride_yn, stride_xm, stride_xk,
        tl.float32, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # Quarter by quarter: the temporaries of a whole tile would not fit the registers beside the accumulator.
    halves = tl.split(tl.permute(tl.reshape(grad, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        quarters = tl.split(tl.permute(tl.reshape(halves[half], (BLOCK_M, 2, BLOCK_N // 4)), (0, 2, 1)))
        for quarter in tl.static_range(2):
            first_k = k0 + (half * 2 + quarter) * (BLOCK_N // 4)
            offs_k = first_k + tl.arange(0, BLOCK_N // 4)
            slope = load_slope(
                scale_ptr, stride_sm, stride_sg, q_ptr, stride_qm, stride_qk, table_ptr, offs_n, mask_n, first_k,
                in_features, tl.float32, BLOCK_M, BLOCK_N // 4, MODE, GROUP, HAS_TABLE, LEVELS, PACKED,
            )  # fmt: skip
            zeros = tl.zeros((BLOCK_M, BLOCK_N // 4), dtype=tl.int32)
            pair, other, nan = update_tile(
                quarters[quarter], slope, mask_n[:, None] & (offs_k < in_features)[None, :],
                (offs_n * in_features + first_index).to(tl.uint32)[:, None] + offs_k.to(tl.uint32)[None, :],
                offs_n[:, None] * stride_fm + offs_k[None, :] * stride_fk,
                offs_n[:, None] * stride_rm + offs_k[None, :] * stride_rk,
                offs_n[:, None] * stride_mm + offs_k[None, :] * stride_mk,
                offs_n[:, None] * stride_vm + offs_k[None, :] * stride_vk,
                frac_ptr, ref_ptr, first_ptr, second_ptr,
                lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp,
                linear_weight, hardening, first_beta1, first_beta2, first_inverse, second_beta2, second_inverse,
                noise_key, zeros, zeros, zeros,
                OPTIMIZER, FRAC_KIND, REF_KIND, FIRST_INT, SECOND_INT, NORMAL, BYTES=False, LINEAR=WEIGHTED,
                HARDEN=True, DECAY=True,
            )  # fmt: skip
            # At once: counts carried over the quarters would spill.
            add_counts(counts_ptr, tl.program_id(0) % SLOTS, pair, other, nan, False)


def in_32_bits(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where a row reaches further than the 32 bits that the forward kernel counts in."""
    return tensor.contiguous() if tensor.stride(1) * tensor.shape[1] >= 2**31 else tensor


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def soft_linear_fwd(
    x: Tensor, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
    bias: Tensor | None, num_bits: int, group_size: int, is_reference: bool, config: Config,
    minimum: Tensor | None = None, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch y = x W^T + b for x of [num_tokens, in_features]; y in x.dtype."""
    (rows, cols), tokens = frac.shape, x.shape[0]
    y = x.new_empty((tokens, rows))
    if y.numel() == 0:
        return y
    x, q_down, frac, scale = in_32_bits(x), in_32_bits(q_down), in_32_bits(frac), in_32_bits(scale)
    zero_point, minimum = (None if t is None else in_32_bits(t) for t in (zero_point, minimum))
    mode, group = group_mode(group_size, cols, config.block_k, scale, g_idx)
    zero, strides, constants = weight_arguments(
        q_down, frac, scale, zero_point, table, num_bits, is_reference, minimum
    )
    _soft_linear_fwd_kernel[(triton.cdiv(tokens, config.block_m) * triton.cdiv(rows, config.block_n),)](
        y, x, q_down, frac, scale, zero, adjacent(table, scale), adjacent(g_idx), adjacent(bias, x),
        tokens, rows, cols, *y.stride(), *x.stride(), *strides, **constants,
        HAS_BIAS=bias is not None, MODE=mode, GROUP=group, ACC=DTYPES[_accumulator(x)],
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def soft_linear_dx(
    grad_output: Tensor, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None,
    table: Tensor | None, num_bits: int, group_size: int, is_reference: bool, config: Config,
    minimum: Tensor | None = None, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch dX = dY W for dY of [num_tokens, out_features]; dX in dY.dtype."""
    (rows, cols), tokens = frac.shape, grad_output.shape[0]
    dx = grad_output.new_empty((tokens, cols))
    if dx.numel() == 0:
        return dx
    mode, group = group_mode(group_size, cols, config.block_n, scale, g_idx)
    zero, strides, constants = weight_arguments(
        q_down, frac, scale, zero_point, table, num_bits, is_reference, minimum
    )
    _soft_linear_dx_kernel[(triton.cdiv(tokens, config.block_m) * triton.cdiv(cols, config.block_n),)](
        dx, grad_output, q_down, frac, scale, zero, adjacent(table, scale), adjacent(g_idx),
        tokens, rows, cols, *dx.stride(), *grad_output.stride(), *strides, **constants,
        MODE=mode, GROUP=group, ACC=DTYPES[_accumulator(grad_output)],
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return dx


def soft_linear_dfrac(
    grad_output: Tensor, x: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, config: Config, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch d frac = slope * dY^T x, [out_features, in_features], in `dtype`."""
    tokens, rows, cols = x.shape[0], grad_output.shape[1], x.shape[1]
    out = x.new_empty((rows, cols), dtype=dtype)
    if out.numel() == 0:
        return out
    mode, group = group_mode(group_size, cols, config.block_n, scale, g_idx)
    _soft_linear_dfrac_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n),)](
        out, grad_output, x, q_down, scale, adjacent(table, scale), adjacent(g_idx),
        tokens, rows, cols, *out.stride(), *grad_output.stride(), *x.stride(), *q_down.stride(), *scale.stride(),
        LEVELS=2**num_bits, PACKED=q_down.shape[1] != cols, HAS_TABLE=table is not None, MODE=mode, GROUP=group,
        ACC=DTYPES[_accumulator(x)], BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def soft_linear_step(
    grad_output: Tensor, x: Tensor, frac: Tensor, frac_ref: Tensor, scale: Tensor, momentum: Tensor | None,
    second_moment: Tensor | None, q_down: Tensor | None, table: Tensor | None, group_size: int, optimizer: str,
    scalars: Mapping[str, float], keys: Mapping[str, int], config: Config,
) -> Tensor:  # fmt: skip
    """Launch the step on the gradient dY^T x, in place; return int64 counts [5]; see projected_step_fwd."""
    tokens, (rows, cols) = x.shape[0], frac.shape
    if frac.numel() == 0:
        return frac.new_zeros(COUNTS, dtype=torch.int64)
    counts = frac.new_zeros((COUNT_SLOTS, SLOT_WIDTH.value), dtype=torch.int64)
    mode, group = group_mode(group_size, cols, config.block_n // 4)
    first = frac if momentum is None else momentum
    second = frac if second_moment is None else second_moment
    codes = frac if q_down is None else q_down
    _soft_linear_step_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n),)](
        frac, frac_ref, grad_output, x, scale, first, second, codes, adjacent(table, scale), counts,
        tokens, rows, cols, *grad_output.stride(), *x.stride(),
        *frac.stride(), *frac_ref.stride(), *scale.stride(), *first.stride(), *second.stride(), *codes.stride(),
        *launch_scalars(scalars, keys),
        OPTIMIZER=OPTIMIZERS[optimizer], FRAC_KIND=frac_kind(frac.dtype, False),
        REF_KIND=frac_kind(frac_ref.dtype, True),
        FIRST_INT=first.dtype == torch.int8, SECOND_INT=second.dtype == torch.uint8,
        NORMAL=normal_moments(scalars), MODE=mode, GROUP=group,
        HAS_TABLE=table is not None, LEVELS=1 if table is None else table.shape[0], PACKED=codes.shape[1] != cols,
        SLOTS=COUNT_SLOTS, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return counts[:, :COUNTS].sum(dim=0)
