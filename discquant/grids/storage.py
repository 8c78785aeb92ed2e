# SPDX-License-Identifier: Apache-2.0
"""A grid as named tensors and plain facts, and back: how a run directory keeps the grids of its codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from discquant.grids.affine import AffineGrid
from discquant.grids.base import Grid
from discquant.grids.table import TableGrid
from discquant.grids.uniform import UniformGrid


def store(grid: Grid) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `restore` needs.

    Args:
        grid: Any grid of this package.

    Returns:
        Tensors by short name, and facts that JSON holds.

    Raises:
        TypeError: A grid of another package.
    """
    facts: dict[str, Any] = {"num_bits": grid.num_bits, "group_size": grid.group_size}
    if isinstance(grid, UniformGrid):
        tensors = {"scale": grid.scale, "zero_point": grid.zero_point, "g_idx": grid.g_idx}
    elif isinstance(grid, AffineGrid):
        facts |= {"kind": "affine", "compute": str(grid.compute).removeprefix("torch.")}
        tensors = {"scale": grid.scale, "minimum": grid.minimum}
    elif isinstance(grid, TableGrid):
        facts |= {"kind": grid.kind}
        tensors = {
            "scale": grid.scale,
            "table": grid.table,
            "block_scale": grid.block_scale,
            "tensor_scale": grid.tensor_scale,
        }
    else:
        raise TypeError(f"store: grid must be one of discquant.grids, got {type(grid).__name__}")
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, facts


def restore(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Grid:
    """Undo `store`.

    Raises:
        ValueError: Tensors or facts do not make a grid.
    """
    bits, group = int(facts["num_bits"]), int(facts["group_size"])
    kind = str(facts.get("kind", "uniform"))
    if "scale" not in tensors:
        raise ValueError("restore: tensors must hold a scale, got none")
    scale = tensors["scale"]
    if kind == "uniform":
        zero = tensors.get("zero_point")
        return UniformGrid(bits, group, zero is None, scale, zero, g_idx=tensors.get("g_idx"))
    if kind == "affine":
        compute: torch.dtype = getattr(torch, str(facts["compute"]))
        return AffineGrid(bits, group, scale, tensors["minimum"], compute)
    return TableGrid(
        bits,
        group,
        tensors["table"],
        scale,
        tensors.get("block_scale"),
        tensors.get("tensor_scale"),
        kind,
    )
