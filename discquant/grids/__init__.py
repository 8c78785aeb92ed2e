# SPDX-License-Identifier: Apache-2.0
"""Grids: the contract between a weight and the codes that a served file can hold."""

from discquant.grids.affine import AffineGrid
from discquant.grids.base import Grid, Neighbours
from discquant.grids.place import place_grid, place_uniform
from discquant.grids.table import TableGrid
from discquant.grids.uniform import UniformGrid

__all__ = ["AffineGrid", "Grid", "Neighbours", "TableGrid", "UniformGrid", "place_grid", "place_uniform"]
