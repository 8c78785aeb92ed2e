# SPDX-License-Identifier: Apache-2.0
"""Bits per weight, counted in one way for runs, files, manifests and cards.

Codes count, and what is kept per group: scales, zero points, minima. What a file keeps once per matrix or column (its
shape, a global scale, the order of its columns) does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from discquant.formats.coded import Format
from discquant.formats.gguf_types import TYPES
from discquant.grids import AffineGrid, Grid, TableGrid
from discquant.grids.gguf import gguf_kind


def bits_per_weight(layers: Iterable[tuple[int, tuple[int, int]]]) -> float | None:
    """All bits over all weights.

    Args:
        layers: Bits and (out_features, in_features) of each layer.

    Returns:
        The quotient; None where there is no weight.
    """
    bits = weights = 0
    for found, (rows, columns) in layers:
        bits += found
        weights += rows * columns
    return bits / weights if weights else None


def file_bits_per_weight(chosen: Format, path: Path) -> float | None:
    """`bits_per_weight` of a quantized file, from its headers.

    Raises:
        CheckpointError, MissingModelError, NotImplementedError: It cannot be read.
    """
    return bits_per_weight((row.weight_bits, row.shape) for row in chosen.describe(path).layers)


def grid_bits(grid: Grid, shape: tuple[int, int], kind: str = "uniform") -> int:
    """Bits of a layer that is in no file yet: as its GGUF block has them, else 16 for each scale and minimum.

    Args:
        grid: The layer's grid.
        shape: (out_features, in_features).
        kind: `GridConfig.kind`; the grids of GGUF types do not remember how their scales are stored.

    Returns:
        Bits of codes, scales, zero points (of the codes' width) and minima; block scales of tables as wide as they are.
    """
    rows, columns = shape
    block = TYPES.get(gguf_kind(kind, columns).upper()) if kind.upper() in TYPES else None
    if block is not None:
        return 8 * rows * block.row_bytes(columns)
    scales = grid.block_scale if isinstance(grid, TableGrid) else None
    groups = grid.scale.numel()
    bits = rows * columns * grid.num_bits + groups * (16 if scales is None else 8 * scales.element_size())
    bits += 0 if grid.zero_point is None else groups * grid.num_bits
    return bits + (16 * groups if isinstance(grid, AffineGrid) else 0)
