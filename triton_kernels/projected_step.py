# SPDX-License-Identifier: Apache-2.0
"""One optimizer step on `frac`, projected onto [0, 1], in place and in one pass over the state.

One program per few [BLOCK_M, BLOCK_K] tiles along a row: gradient and state are read once, frac and moments written
once; the counts come out of the same pass through integer atomics. Noise depends on the element's index only, never
on the tiling.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import adjacent, frac_kind, load_masked
from .grid_tile import group_mode, load_slope
from .step_tile import (
    COUNT_SLOTS,
    COUNTS,
    KEYS,
    OPTIMIZERS,
    SLOT_WIDTH,
    add_counts,
    in_bytes,
    launch_scalars,
    normal_moments,
    step_terms,
    update_tile,
)


@triton.jit(do_not_specialize=KEYS)
def _projected_step_kernel(
    frac_ptr, ref_ptr, grad_ptr, scale_ptr, first_ptr, second_ptr, q_ptr, table_ptr, counts_ptr,
    out_features, in_features,
    stride_fm, stride_fk, stride_rm, stride_rk, stride_gm, stride_gk, stride_sm, stride_sg,
    stride_mm, stride_mk, stride_vm, stride_vk, stride_qm, stride_qk,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp,
    linear_weight, hardening, first_beta1, first_beta2, first_inverse, second_beta2, second_inverse,
    noise_key, first_index,
    OPTIMIZER: tl.constexpr, FRAC_KIND: tl.constexpr, REF_KIND: tl.constexpr,
    FIRST_INT: tl.constexpr, SECOND_INT: tl.constexpr, NORMAL: tl.constexpr, BYTES: tl.constexpr,
    LINEAR: tl.constexpr, HARDEN: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    HAS_TABLE: tl.constexpr, LEVELS: tl.constexpr, PACKED: tl.constexpr,
    EVEN: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Rows are the first dimension of the grid: the second ends at 65535, and vocabularies have more.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = None if EVEN else offs_m < out_features
    pair = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    other, nan = pair, pair
    for tile in range(TILES):
        k0 = (tl.program_id(1).to(tl.int64) * TILES + tile) * BLOCK_K
        offs_k = k0 + tl.arange(0, BLOCK_K)
        grad_place = grad_ptr + offs_m[:, None] * stride_gm + offs_k[None, :] * stride_gk
        mask = None if EVEN else mask_m[:, None] & (offs_k < in_features)[None, :]
        grad = load_masked(grad_place, mask)
        slope = load_slope(
            scale_ptr, stride_sm, stride_sg, q_ptr, stride_qm, stride_qk, table_ptr, offs_m, mask_m, k0, in_features,
            tl.float32, BLOCK_M, BLOCK_K, MODE, GROUP, HAS_TABLE, LEVELS, PACKED,
        )  # fmt: skip
        pair, other, nan = update_tile(
            grad.to(tl.float32), slope, mask,
            (offs_m * in_features + first_index).to(tl.uint32)[:, None] + offs_k.to(tl.uint32)[None, :],
            offs_m[:, None] * stride_fm + offs_k[None, :] * stride_fk,
            offs_m[:, None] * stride_rm + offs_k[None, :] * stride_rk,
            offs_m[:, None] * stride_mm + offs_k[None, :] * stride_mk,
            offs_m[:, None] * stride_vm + offs_k[None, :] * stride_vk,
            frac_ptr, ref_ptr, first_ptr, second_ptr,
            lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp,
            linear_weight, hardening, first_beta1, first_beta2, first_inverse, second_beta2, second_inverse,
            noise_key, pair, other, nan,
            OPTIMIZER, FRAC_KIND, REF_KIND, FIRST_INT, SECOND_INT, NORMAL, BYTES, LINEAR, HARDEN, DECAY,
        )  # fmt: skip
    slot = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) % SLOTS
    add_counts(counts_ptr, slot, pair, other, nan, BYTES)


def _tiling(rows: int, cols: int, bytewise: bool) -> tuple[tuple[int, int, int], int]:
    """Rows and columns of a tile, tiles of one program; warps. What a program does once should weigh little.

    On bytes one warp walks along a row, so that no warp waits for another where the counts are added up. `count_bytes`
    holds the flags of 31 tiles of eight elements per thread; small matrices take fewer, to have enough programs. A
    thread must have four elements at least: the assembly takes four at once, and would count what fills up fewer.
    """
    if not bytewise or cols < 1024:
        block = (1, 1024) if cols >= 1024 else (8, max(16, min(128, triton.next_power_of_2(cols))))
        warps, most = (max(1, block[0] * block[1] // 256) if bytewise else 4), 8
    else:
        block, warps, most = (1, 256), 1, max(1, min(31, rows * cols // (256 * 4096)))
    tiles = triton.cdiv(cols, block[1])
    count = max(count for count in range(1, most + 1) if tiles % count == 0)
    if bytewise and 2 * count < min(tiles, most):
        # Masks for an overhang cost less than many short programs.
        count = triton.cdiv(tiles, triton.cdiv(tiles, most))
    return (*block, count), warps


def projected_step_fwd(
    frac: Tensor, frac_ref: Tensor, weight_grad: Tensor, scale: Tensor, momentum: Tensor | None,
    second_moment: Tensor | None, q_down: Tensor | None, table: Tensor | None, group_size: int, optimizer: str,
    scalars: Mapping[str, float], keys: Mapping[str, int], block: tuple[int, int, int] | None = None,
    num_warps: int | None = None,
) -> Tensor:  # fmt: skip
    """Launch one step in place; return int64 counts [5]: live, fractional, moved, saturated, nan.

    With a table (and then `q_down`) the chain-rule factor is scale * (table[q + 1] - table[q]), else scale.
    """
    rows, cols = frac.shape
    if frac.numel() == 0:
        return frac.new_zeros(COUNTS, dtype=torch.int64)
    counts = frac.new_zeros((COUNT_SLOTS, SLOT_WIDTH.value), dtype=torch.int64)
    first = frac if momentum is None else momentum
    second = frac if second_moment is None else second_moment
    codes = frac if q_down is None else q_down
    bytewise = in_bytes(frac, frac_ref, first, second, optimizer, scalars)
    usual, warps = _tiling(rows, cols, bytewise)
    block_m, block_k, tiles = block or usual
    warps = num_warps or (4 if block else warps)
    bytewise = bytewise and block_m * block_k >= 128 * warps
    linear, harden, decays = step_terms(scalars, bytewise)
    mode, group = group_mode(group_size, cols, block_k)
    _projected_step_kernel[(triton.cdiv(rows, block_m), triton.cdiv(cols, block_k * tiles))](
        frac, frac_ref, weight_grad, scale, first, second, codes, adjacent(table, scale), counts,
        rows, cols,
        *frac.stride(), *frac_ref.stride(), *weight_grad.stride(), *scale.stride(), *first.stride(), *second.stride(),
        *codes.stride(),
        *launch_scalars(scalars, keys),
        OPTIMIZER=OPTIMIZERS[optimizer], FRAC_KIND=frac_kind(frac.dtype, False),
        REF_KIND=frac_kind(frac_ref.dtype, True),
        FIRST_INT=first.dtype == torch.int8, SECOND_INT=second.dtype == torch.uint8, NORMAL=normal_moments(scalars),
        BYTES=bytewise, LINEAR=linear, HARDEN=harden, DECAY=decays, MODE=mode, GROUP=group,
        HAS_TABLE=table is not None, LEVELS=1 if table is None else table.shape[0], PACKED=codes.shape[1] != cols,
        EVEN=rows % block_m == 0 and cols % (block_k * tiles) == 0,
        SLOTS=COUNT_SLOTS, BLOCK_M=block_m, BLOCK_K=block_k, TILES=tiles,
        num_warps=warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return counts[:, :COUNTS].sum(dim=0)
