# SPDX-License-Identifier: Apache-2.0
"""Products with Kronecker factors that are kept as diagonal blocks, so that wide layers stay affordable.

The blocks are symmetric: a state keeps their lower triangles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def factor_shape(size: int, width: int) -> tuple[int, int, int]:
    """Return the shape of a factor over `size` channels whose blocks have at most `width`."""
    width = min(size, width)
    return -(-size // width), width, width


def triangle_shape(size: int, width: int) -> tuple[int, int]:
    """Return the shape of `pack_triangles` of such a factor."""
    count, width, _ = factor_shape(size, width)
    return count, width * (width + 1) // 2


def pack_triangles(blocks: Tensor) -> Tensor:
    """Return the lower triangles of symmetric blocks, row by row.

    Args:
        blocks: Any dtype, [blocks, width, width].

    Returns:
        Same dtype, [blocks, width * (width + 1) / 2].
    """
    width = blocks.shape[1]
    row, column = torch.tril_indices(width, width, device=blocks.device)
    return blocks.flatten(1).index_select(1, row * width + column)


def unpack_triangles(packed: Tensor) -> Tensor:
    """Undo `pack_triangles`: [blocks, width, width], the upper triangles mirrored from the lower ones."""
    width = (math.isqrt(8 * packed.shape[1] + 1) - 1) // 2
    return packed.index_select(1, _mirror(width, packed.device)).view(-1, width, width)


def triangle_trace(packed: Tensor) -> Tensor:
    """Return the trace of the factor that `pack_triangles` gave, in float32 or wider; no dimensions."""
    width = (math.isqrt(8 * packed.shape[1] + 1) - 1) // 2
    place = torch.arange(width, device=packed.device)
    diagonal = packed.index_select(1, place * (place + 3) // 2)
    return diagonal.to(torch.promote_types(packed.dtype, torch.float32)).sum()


@functools.lru_cache
def _mirror(width: int, device: torch.device) -> Tensor:
    """Place of each entry of a symmetric block in its packed lower triangle, int64, [width * width]."""
    place = torch.arange(width, device=device)
    high, low = torch.maximum(place[:, None], place), torch.minimum(place[:, None], place)
    return (high * (high + 1) // 2 + low).flatten()


def gram(rows: Tensor, width: int) -> Tensor:
    """Return the diagonal blocks of rows^T rows.

    Args:
        rows: Floating, [tokens, channels].
        width: Channels per block.

    Returns:
        Dtype of `rows`, [blocks, width, width].
    """
    count, width, _ = factor_shape(rows.shape[1], width)
    padded = nn.functional.pad(rows, (0, count * width - rows.shape[1]))
    pieces = padded.view(-1, count, width).transpose(0, 1)
    return pieces.transpose(1, 2) @ pieces


def times(matrix: Tensor, factor: Tensor) -> Tensor:
    """Return matrix @ blockdiag(factor), [rows, channels], for a matrix [rows, channels] of the same dtype."""
    if factor.shape[0] == 1:
        return matrix @ factor[0]
    columns = matrix.shape[1]
    width = factor.shape[1]
    pieces = [
        matrix[:, begin : begin + width]
        @ block[: columns - begin, : columns - begin]  # the last one may be shorter
        for begin, block in zip(range(0, columns, width), factor, strict=True)
    ]
    return torch.cat(pieces, dim=1)


def _parts(size: int, factor: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the channels of all whole blocks with these, then those of a last one that is shorter."""
    width = factor.shape[1]
    whole, rest = divmod(size, width)  # at least one is whole: a block is no wider than the side
    yield slice(0, whole * width), factor[:whole]
    if rest:
        yield slice(whole * width, size), factor[whole:, :rest, :rest]


def _product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right, [blocks, rows, columns], into a view; 16-bit operands are summed in float32."""
    if left.dtype == out.dtype:
        torch.bmm(left, right, out=out)
    elif left.is_cuda:
        torch.bmm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(left.to(out.dtype), right.to(out.dtype), out=out)


def products_at_once(error: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """`curvature_gradient` in two batched products, and one for each side whose last block is shorter.

    The operands stay where they lie: nothing is cut up or joined. In bfloat16 (all three) tensor cores multiply, E H is
    rounded to it, and the result has float32 sums; which kernels do that depends on no flag of the process.

    Returns:
        float32, or wider as `error` is; contiguous.
    """
    rows, columns = error.shape
    middle = torch.empty_like(error)
    out = torch.empty_like(error, dtype=torch.promote_types(error.dtype, torch.float32))
    for channels, blocks in _parts(columns, inputs):
        shape = blocks.shape[:2]
        left, found = (m[:, channels].unflatten(1, shape).transpose(0, 1) for m in (error, middle))
        _product(found, left, blocks)
    for channels, blocks in _parts(rows, outputs):
        shape = blocks.shape[:2]
        _product(out[channels].unflatten(0, shape), blocks, middle[channels].unflatten(0, shape))
    return out


def curvature_gradient(error: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return G E H, the gradient of 1/2 <E, G E H>.

    Args:
        error: Student's weight minus the original, floating, [out_features, in_features].
        inputs: Blocks of H, same dtype, [blocks, width, width] over in_features.
        outputs: Blocks of G, same dtype, [blocks, width, width] over out_features.

    Returns:
        Shape of `error`, and its dtype; on a GPU at least float32 (`products_at_once`).
    """
    if error.is_cuda:
        return products_at_once(error, inputs, outputs)
    return times(times(error, inputs).T, outputs).T
