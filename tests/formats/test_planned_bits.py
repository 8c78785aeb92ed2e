# SPDX-License-Identifier: Apache-2.0
"""Bits of a grid before it is laid are those of the laid one."""

from __future__ import annotations

import pytest
import torch

from discquant.config import GridConfig
from discquant.config.grid import GRID_KINDS
from discquant.formats.bits import grid_bits, planned_bits
from discquant.grids import place_grid


@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("kind", [kind for kind in GRID_KINDS if kind != "uniform"])
def test_kinds(kind: str, columns: int) -> None:
    config = GridConfig(*GRID_KINDS[kind], kind=kind)  # type: ignore[arg-type]
    laid = place_grid(torch.randn(6, columns), config)
    assert planned_bits((6, columns), config) == grid_bits(laid, (6, columns), kind)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16, 48, 128])
def test_uniform(group_size: int, sym: bool) -> None:
    """A short last group counts as one, a group wider than the row as the row."""
    config = GridConfig(3, group_size, sym)
    laid = place_grid(torch.randn(5, 100), config)
    assert planned_bits((5, 100), config) == grid_bits(laid, (5, 100))
