# SPDX-License-Identifier: Apache-2.0
"""Bits per weight, counted in one way for runs, files, manifests and cards.

Codes count, and what is kept per group: scales, zero points, minima. What a file keeps once per matrix or column (its
shape, a global scale, the order of its columns) does not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import torch

from discquant.config import GridConfig
from discquant.formats.coded import Format
from discquant.formats.gguf_fit import planned_type
from discquant.formats.gguf_types import TYPES
from discquant.formats.onnx_blocks import WIDTHS, block_size
from discquant.formats.scheme import Scheme
from discquant.grids import AffineGrid, Grid, TableGrid, place_grid
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


@functools.lru_cache(maxsize=4096)
def _row_bits(columns: int, config: GridConfig) -> int:
    """Bits of one row: what they count shows in no value, so any row will do."""
    row = torch.linspace(-1, 1, columns).unsqueeze(0)
    return grid_bits(place_grid(row, dataclasses.replace(config, grid="absmax")), (1, columns), config.kind)


def planned_bits(shape: tuple[int, int], config: GridConfig) -> int:
    """`grid_bits` of a grid that is not laid yet.

    Args:
        shape: (out_features, in_features).
        config: Which grid the weight will be put on.

    Raises:
        UnrepresentableError: The rows do not fill the blocks of the kind.
    """
    return shape[0] * _row_bits(shape[1], config)


def stored_bits(format_name: str, shape: tuple[int, int], config: GridConfig) -> int:
    """Bits of a layer in a file: GGUF and ONNX hold codes of some widths in wider ones.

    Args:
        format_name: In the registry.
        shape: (out_features, in_features).
        config: Which grid the weight will be put on; one that the format can hold.

    Returns:
        As `describe` counts them; where the values decide between two types, of the larger. Of other formats
        `planned_bits`.
    """
    rows, columns = shape
    if format_name == "gguf":
        return 8 * rows * planned_type(Scheme.planned(shape, config), columns).row_bytes(columns)
    if format_name == "onnx":
        scheme = Scheme.planned(shape, config)
        width = next(width for width in WIDTHS if width >= scheme.num_bits)
        block = block_size(scheme.group_size)
        blocks = -(-columns // block)
        zeros = 0 if scheme.symmetric else 8 * -(-blocks * width // 8)
        return rows * (blocks * (block * width + 32) + zeros)
    return planned_bits(shape, config)
