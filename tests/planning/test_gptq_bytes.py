# SPDX-License-Identifier: Apache-2.0
"""What GPTQ of a matrix and of a block hold, against what is alive; which Hessians stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from discquant.config import GridConfig
from discquant.grids import place_grid
from discquant.planning.rounding import gptq_bytes, gptq_work
from discquant.planning.shape import Block, Matrix
from discquant.rounding import gptq


@pytest.mark.parametrize(("rows", "columns"), [(1024, 256), (96, 512), (4, 256)])
def test_gptq_holds_what_is_planned(rows: int, columns: int, live_bytes: Any) -> None:
    """Tall, wide, and of so few rows that putting the Hessian in order takes more than they do."""
    weight, x = torch.randn(rows, columns), torch.randn(3 * columns, columns)
    grid, hessian = place_grid(weight, GridConfig(3, 32)), (x.T @ x).double()
    with live_bytes([weight, hessian, grid.scale]) as live:
        gptq(weight, hessian, grid)
    planned = gptq_work(Matrix("one", rows, columns))
    assert live.peak <= 1.05 * planned < 1.5 * live.peak


def test_hessians_go_with_their_layers_but_for_those_of_experts() -> None:
    """Equal layers: one is gone when the next is rounded. Experts of a fused parameter are rounded together."""
    hessian = 8.0 * 256**2

    def held(count: int, active: float) -> float:
        """Hessians beside the work of a matrix that is rounded at the end, the largest by far."""
        small, large = Matrix("one", 64, 256, count, active), Matrix("two", 1 << 16, 256)
        return (gptq_bytes(Block((small, large), 0)) - gptq_work(large)) / hessian

    assert held(1, 1.0) == 1  # its own
    assert held(1, 0.5) == 2
    assert held(8, 0.5) == 9
