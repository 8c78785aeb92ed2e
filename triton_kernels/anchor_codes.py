# SPDX-License-Identifier: Apache-2.0
"""code = table[256 * side + code of frac_ref], sides packed eight per byte: what the linear term prefers, in one pass.

One program per [BLOCK_M, BLOCK_K] tile: 1 1/8 bytes read and one written per coordinate. The table of 512 bytes stays
in the first cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import adjacent, load_masked


@triton.jit
def _anchor_codes_kernel(
    out_ptr, ref_ptr, side_ptr, table_ptr,
    out_features, in_features,
    stride_om, stride_ok, stride_rm, stride_rk, stride_bm, stride_bk,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Rows are the first dimension of the grid: the second ends at 65535.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(1).to(tl.int64) * BLOCK_K
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_b = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    mask_m = offs_m < out_features
    mask = None if EVEN else mask_m[:, None] & (offs_k < in_features)[None, :]
    mask_b = None if EVEN else mask_m[:, None] & (offs_b < (in_features + 7) // 8)[None, :]
    code = load_masked(ref_ptr + offs_m[:, None] * stride_rm + offs_k[None, :] * stride_rk, mask)
    bits = load_masked(side_ptr + offs_m[:, None] * stride_bm + offs_b[None, :] * stride_bk, mask_b).to(
        tl.int32
    )
    # Each line deals a byte's bits out to two, the lower half first; bits above the lowest are cut off at the end.
    halves = tl.interleave(bits, bits >> 4)
    quarters = tl.interleave(halves, halves >> 2)
    side = tl.interleave(quarters, quarters >> 1) & 1
    found = tl.load(table_ptr + (code.to(tl.int32) + side * 256))
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_k[None, :] * stride_ok, found, mask=mask)


def anchor_codes_fwd(
    frac_ref: Tensor, side: Tensor, table: Tensor, block: tuple[int, int] | None = None, num_warps: int = 4
) -> Tensor:
    """Launch the kernel; arguments as `discquant.ops.anchor_codes`, already checked."""
    rows, cols = frac_ref.shape
    out = frac_ref.new_empty((rows, cols))
    if out.numel() == 0:
        return out
    # Sixteen codes of a row per thread: one load, and two bytes of sides. The largest power of two that divides a row
    # leaves no tile that needs a mask.
    power = cols & -cols
    wide = min(2048, power if power >= 64 else triton.next_power_of_2(max(16, cols)))
    block_m, block_k = block or (2048 // wide, wide)
    _anchor_codes_kernel[(triton.cdiv(rows, block_m), triton.cdiv(cols, block_k))](
        out, frac_ref, side, adjacent(table),
        rows, cols, *out.stride(), *frac_ref.stride(), *side.stride(),
        EVEN=rows % block_m == 0 and cols % block_k == 0, BLOCK_M=block_m, BLOCK_K=block_k,
        num_warps=num_warps,
    )  # fmt: skip
    return out
