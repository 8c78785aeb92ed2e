# SPDX-License-Identifier: Apache-2.0
"""How many of a file's codes are no neighbour of the original weight."""

from __future__ import annotations

import torch
from torch import nn

from discquant.config import GridConfig
from discquant.formats.coded import CodedLayer
from discquant.grids import place_grid
from discquant.run.refine import _outside
from discquant.solver.module_chain import ModuleChain


def test_codes_beyond_both_neighbours_are_counted() -> None:
    """Neighbours on either side are none of them, also where a weight lies beyond the grid's end."""
    chain = ModuleChain(nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 8, bias=False)))
    layers, moved = {}, {"0": 5, "1": 0}
    for ref in chain.weights[0]:
        weight = ref.matrix()
        grid = place_grid(weight, GridConfig(4, -1, False))
        q_down, _ = grid.neighbours(weight)
        q = q_down + torch.randint(0, 2, q_down.shape, dtype=torch.uint8)
        rows = torch.arange(moved[ref.name]) % len(q)
        columns = torch.arange(moved[ref.name])
        low = q_down[rows, columns]
        q[rows, columns] = torch.where(low > 7, low - 1, low + 2)
        layers[ref.name] = CodedLayer(ref.name, q, grid)
    assert _outside(chain, layers) == {"codes": 4 * 32 + 8 * 4, "codes_outside_neighbours": 5}
