# SPDX-License-Identifier: Apache-2.0
"""Products with Kronecker factors that are kept as diagonal blocks, so that wide layers stay affordable."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def factor_shape(size: int, width: int) -> tuple[int, int, int]:
    """Return the shape of a factor over `size` channels whose blocks have at most `width`."""
    width = min(size, width)
    return -(-size // width), width, width


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
