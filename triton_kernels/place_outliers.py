# SPDX-License-Identifier: Apache-2.0
"""weight[255 * piece + low] = value: values to places that pieces of 255 weights count, in place.

A program looks for those of a few pieces; all places differ, so that any order gives the same bytes (torch sorts them
first where it shall be deterministic).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import adjacent, cast

PIECE = tl.constexpr(255)


@triton.jit
def _place_outliers_kernel(
    weight_ptr, low_ptr, count_ptr, end_ptr, value_ptr, pieces, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = piece < pieces
    count = tl.load(count_ptr + piece, mask=inside, other=0).to(tl.int32)
    begin = tl.load(end_ptr + piece, mask=inside, other=0) - count
    for k0 in range(0, tl.max(count, axis=0), BLOCK_K):
        offs = k0 + tl.arange(0, BLOCK_K)
        mask = offs[None, :] < count[:, None]
        place = begin.to(tl.int64)[:, None] + offs[None, :]
        low = tl.load(low_ptr + place, mask=mask, other=0).to(tl.int32)
        value = tl.load(value_ptr + place, mask=mask, other=0).to(tl.float32)
        target = weight_ptr + (piece * PIECE)[:, None] + low
        tl.store(target, cast(value, weight_ptr.dtype.element_ty), mask=mask)


def place_outliers(
    weight: Tensor, low: Tensor, count: Tensor, value: Tensor, block: tuple[int, int] | None = None
) -> None:
    """Launch the kernel; arguments as `discquant.ops.place_outliers_`, already checked."""
    if low.numel() == 0:
        return
    block_p, block_k = block or (32, 16)
    _place_outliers_kernel[(triton.cdiv(count.numel(), block_p),)](
        weight, adjacent(low), adjacent(count), count.cumsum(0, dtype=torch.int32), adjacent(value), count.numel(),
        BLOCK_P=block_p, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
