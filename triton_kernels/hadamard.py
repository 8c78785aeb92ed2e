# SPDX-License-Identifier: Apache-2.0
"""Randomized Hadamard rotation along the last dimension of n = K * 2^m: butterflies in registers, then a K x K mix.

The first kernel holds whole runs of 2^m values and applies m butterfly stages (and the signs); the second, launched
only for K > 1, multiplies by the K x K matrix across runs. Everything in ACC, one rounding at each store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import DTYPES, adjacent, cast


@triton.jit
def _hadamard_run_kernel(
    out_ptr, x_ptr, signs_ptr, num_runs, runs_per_row, factor,
    HAS_SIGNS: tl.constexpr, SIGNS_FIRST: tl.constexpr, ACC: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    runs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = tl.arange(0, RUN)
    mask = (runs < num_runs)[:, None] & (offs < RUN)[None, :]
    place = runs[:, None] * RUN + offs[None, :]
    values = tl.load(x_ptr + place, mask=mask, other=0).to(ACC)
    if HAS_SIGNS:
        signs = tl.load(
            signs_ptr + (runs % runs_per_row)[:, None] * RUN + offs[None, :], mask=mask, other=0
        ).to(ACC)
        if SIGNS_FIRST:
            values = values * signs
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(values, (BLOCK_R, RUN >> (stage + 1), 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        joined = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
        values = tl.reshape(joined, (BLOCK_R, RUN))
    values = values * tl.load(factor)
    if HAS_SIGNS and not SIGNS_FIRST:
        values = values * signs
    tl.store(out_ptr + place, cast(values, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hadamard_mix_kernel(
    out_ptr, x_ptr, matrix_ptr, run, factor, stride_row, stride_col,
    ORDER: tl.constexpr, PADDED: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # The first dimension of the grid: the second ends at 65535, and there may be more rows.
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, PADDED)
    mask_c = offs_c < run
    acc = tl.zeros((PADDED, BLOCK_C), ACC)
    for k in range(ORDER):
        value = tl.load(x_ptr + (row * ORDER + k) * run + offs_c, mask=mask_c, other=0).to(ACC)
        column = tl.load(matrix_ptr + offs_k * stride_row + k * stride_col, mask=offs_k < ORDER, other=0).to(
            ACC
        )
        acc += column[:, None] * value[None, :]
    out = out_ptr + (row * ORDER + offs_k[:, None]) * run + offs_c[None, :]
    mask = (offs_k < ORDER)[:, None] & mask_c[None, :]
    tl.store(out, cast(acc * tl.load(factor), out_ptr.dtype.element_ty), mask=mask)


def hadamard_fwd(x: Tensor, signs: Tensor | None, matrix: Tensor, inverse: bool) -> Tensor:
    """Launch on x of [num_rows, n], contiguous; `matrix` is int8 [K, K] on the same device.

    A run, n / K values, changes hands through shared memory; the caller's matrix is so large that 64 KiB hold it.
    """
    rows, size = x.shape
    order = matrix.shape[0]
    run = size // order
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = x.new_full((), size**-0.5, dtype=acc)
    one = torch.ones_like(scale)
    block_r = max(1, min(8, 2048 // run))
    block_c = max(16, min(128, triton.next_power_of_2(run), 8192 // triton.next_power_of_2(order)))
    flips = adjacent(signs, x)
    middle = torch.empty_like(x, dtype=acc) if order > 1 else out

    def turn_runs(target: Tensor, source: Tensor, factor: Tensor) -> None:
        _hadamard_run_kernel[(triton.cdiv(rows * order, block_r),)](
            target, source, flips, rows * order, order, factor,
            HAS_SIGNS=signs is not None, SIGNS_FIRST=not inverse, ACC=DTYPES[acc],
            RUN=run, STAGES=run.bit_length() - 1, BLOCK_R=block_r, num_warps=4 if run <= 4096 else 16,
        )  # fmt: skip

    def mix(target: Tensor, source: Tensor, factor: Tensor) -> None:
        turned = matrix.t() if inverse else matrix
        _hadamard_mix_kernel[(rows, triton.cdiv(run, block_c))](
            target, source, turned, run, factor, *turned.stride(),
            ORDER=order, PADDED=triton.next_power_of_2(order), ACC=DTYPES[acc], BLOCK_C=block_c, num_warps=8,
        )  # fmt: skip

    if order == 1:
        turn_runs(out, x, scale)
    elif inverse:
        mix(middle, x, one)
        turn_runs(out, middle, scale)
    else:
        turn_runs(middle, x, one)
        mix(out, middle, scale)
    return out
