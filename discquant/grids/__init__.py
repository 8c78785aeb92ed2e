# SPDX-License-Identifier: Apache-2.0
"""Grids: the contract between a weight and the codes that a served file can hold."""

from discquant.grids.base import Grid, Neighbours
from discquant.grids.place import place_grid
from discquant.grids.uniform import UniformGrid

__all__ = ["Grid", "Neighbours", "UniformGrid", "place_grid"]
