# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + bias with W = scale * (q - zero_point) read from the "mma" layout: the portable fallback.

Grid: (ceil(N / 64), ceil(M / BLOCK_M)); a program walks one block of 64 rows along k, 128 codes at a time. Every
code is gathered by its place in the tile (docs/packed_layout.md); the weight is rounded once to the dtype of x,
sums are float32. Nothing is recomputed or kept.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS: tl.constexpr = tl.constexpr(64)
COLUMNS: tl.constexpr = tl.constexpr(128)


@triton.jit
def _stored_offset(unit, i):
    """Offset in a 3-bit tile of stored word i (0 to 5) of a lane: one part of four words, one of two."""
    return tl.where(i < 4, unit * 4 + i, 128 + unit * 2 + (i - 4))


@triton.jit
def _packed_linear_kernel(
    x_ptr, words_ptr, scale_ptr, zero_point_ptr, bias_ptr, y_ptr,
    M, N, K, num_groups, group_size, stride_xm,
    NUM_BITS: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, ROWS)
    offs_k = tl.arange(0, COLUMNS)
    k_tiles = tl.cdiv(K, COLUMNS)
    TILE: tl.constexpr = 64 * NUM_BITS

    # Place of code (row, k) of the 64 x 128 block, all [64, 128].
    row = (offs_n % 16)[:, None]
    inner = (offs_k % 16)[None, :]
    lane = (row % 8) * 4 + (inner % 8) // 2
    nibble = row // 8 + 2 * (inner // 8) + 4 * (inner % 2)
    word = (offs_k // 16)[None, :] + tl.zeros_like(lane)
    tile = (offs_n // 16)[:, None] * TILE
    quad = word // 4

    acc = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)
    for k_tile in range(k_tiles):
        base = words_ptr + (block * k_tiles + k_tile) * 4 * TILE + tile
        if NUM_BITS == 4:
            bits = tl.load(base + (word // 4) * 128 + lane * 4 + word % 4)
            q = (bits >> (4 * nibble)) & 15
        else:
            w0 = tl.load(base + _stored_offset(lane, quad * 3))
            w1 = tl.load(base + _stored_offset(lane, quad * 3 + 1))
            w2 = tl.load(base + _stored_offset(lane, quad * 3 + 2))
            w3 = ((w0 >> 3) & 0x11111111) | ((w1 >> 2) & 0x22222222) | ((w2 >> 1) & 0x44444444)
            part = word % 4
            bits = tl.where(part == 0, w0, tl.where(part == 1, w1, tl.where(part == 2, w2, w3)))
            q = (bits >> (4 * nibble)) & 7
        k = k_tile * COLUMNS + offs_k
        at = (block * num_groups + k // group_size)[None, :] * ROWS + offs_n[:, None]
        inside = (k < K)[None, :] & (offs_n < ROWS)[:, None]
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_ZERO:
            centred = q - tl.load(zero_point_ptr + at, mask=inside, other=0).to(tl.int32)
        else:
            centred = q - (1 << (NUM_BITS - 1))
        weight = (scale * centred.to(tl.float32)).to(x_ptr.dtype.element_ty)
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + k[None, :],
            mask=(offs_m < M)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        acc += tl.dot(x, tl.trans(weight), input_precision="ieee")
    n = block * ROWS + offs_n
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + offs_m[:, None] * N + n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m < M)[:, None] & (n < N)[None, :],
    )


def packed_linear_fwd(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    out_features: int, in_features: int, num_bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    """Launch the kernel on x [num_tokens, in_features] with adjacent columns; returns [num_tokens, out_features]."""
    y = x.new_empty((x.shape[0], out_features))
    if y.numel() == 0:
        return y
    block_m = 16 if x.shape[0] <= 16 else 64
    grid = (triton.cdiv(out_features, 64), triton.cdiv(x.shape[0], block_m))
    nothing = words if zero_point is None else zero_point
    _packed_linear_kernel[grid](
        x_ptr=x, words_ptr=words, scale_ptr=scale, zero_point_ptr=nothing,
        bias_ptr=y if bias is None else bias, y_ptr=y,
        M=x.shape[0], N=out_features, K=in_features, num_groups=scale.shape[1],
        group_size=in_features if group_size == -1 else group_size, stride_xm=x.stride(0),
        NUM_BITS=num_bits, HAS_ZERO=zero_point is not None, HAS_BIAS=bias is not None, BLOCK_M=block_m,
        # One stage: gathered words and scales of several would not fit shared memory.
        num_warps=4 if block_m == 16 else 8, num_stages=1,
    )  # fmt: skip
    return y
