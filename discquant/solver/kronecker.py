# SPDX-License-Identifier: Apache-2.0
"""Products with Kronecker factors that are kept as diagonal blocks, so that wide layers stay affordable.

The blocks are symmetric: a state keeps their lower triangles.
"""

from __future__ import annotations

import functools
import math

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
    """Return matrix @ blockdiag(factor), [rows, channels], for a matrix [rows, channels]."""
    if factor.shape[0] == 1:
        return matrix @ factor[0].to(matrix.dtype)
    columns = matrix.shape[1]
    width = factor.shape[1]
    pieces = [
        matrix[:, begin : begin + width]
        @ block[: columns - begin, : columns - begin].to(matrix.dtype)  # the last one may be shorter
        for begin, block in zip(range(0, columns, width), factor, strict=True)
    ]
    return torch.cat(pieces, dim=1)


def curvature_gradient(error: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return G E H, the gradient of 1/2 <E, G E H>.

    Args:
        error: Student's weight minus the original, floating, [out_features, in_features].
        inputs: Blocks of H, floating, [blocks, width, width] over in_features.
        outputs: Blocks of G, floating, [blocks, width, width] over out_features.

    Returns:
        Dtype and shape of `error`.
    """
    return times(times(error, inputs).T, outputs).T
