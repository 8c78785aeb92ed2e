# SPDX-License-Identifier: Apache-2.0
"""Greedy coordinate descent on the layer's quadratic loss, between the two neighbours of each weight."""

from __future__ import annotations

import torch
from torch import Tensor

from discquant.grids import Grid

# A flip that lowers the loss by less than this share of its own d^2 H_jj is rounding of the sums, whatever the units.
RELATIVE_GAIN = 1e-12


def greedy(
    weight: Tensor, hessian: Tensor, grid: Grid, *, damp: float = 0.01, max_passes: float = 1.0
) -> Tensor:
    """Start from nearest; in each row flip, again and again, the code whose change lowers the loss most.

    loss(row) = e H e^T with e = w - dequant(q); flipping coordinate j by d changes it by
    d^2 H_jj - 2 d (e H)_j. Rows are independent and run side by side; a row stops when no flip helps.

    Args:
        weight: Floating, [out_features, in_features].
        hessian: X^T X (any positive multiple), floating, [in_features, in_features].
        grid: Grid of this weight.
        damp: Share of the mean diagonal added to the Hessian's diagonal.
        max_passes: At most this many flips per row, in units of in_features.

    Returns:
        Codes, uint8, [out_features, in_features], each one of the weight's two neighbours.

    Raises:
        ValueError: Shapes disagree, or the Hessian is not finite.

    Source:
        Greedy coordinate descent as in CDQuant (arXiv 2406.17542), restricted to two neighbours.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ValueError(f"greedy: hessian must be [{columns}, {columns}], got {list(hessian.shape)}")
    h = hessian.double() / max(float(hessian.diagonal().mean()), 1e-300)
    if not bool(h.isfinite().all()):
        raise ValueError("greedy: hessian must be finite, got NaN or Inf")
    h.diagonal().add_(damp)
    q_down, frac_ref = grid.neighbours(weight)
    down = grid.dequantize(q_down, torch.float64)
    up = grid.dequantize(q_down + 1, torch.float64)
    live = (frac_ref != 0) & (frac_ref != 1)
    is_up = frac_ref > 0.5
    error = weight.double() - torch.where(is_up, up, down)
    pull = error @ h
    gap = up - down
    diagonal = h.diagonal()
    active = torch.arange(rows, device=weight.device)
    for _ in range(int(max_passes * columns)):
        # A flip moves the served weight by +gap (down -> up) or -gap.
        delta = torch.where(is_up[active], -gap[active], gap[active])
        change = delta.square() * diagonal - 2 * delta * pull[active]
        change = torch.where(live[active], change, torch.full_like(change, torch.inf))
        best, column = change.min(dim=1)
        own = gap[active].gather(1, column.unsqueeze(1)).squeeze(1).square() * diagonal[column]
        improves = best < -RELATIVE_GAIN * own
        if not bool(improves.any()):
            break
        active, column = active[improves], column[improves]
        moved = delta[improves].gather(1, column.unsqueeze(1))
        pull[active] -= moved * h[column]
        is_up[active, column] = ~is_up[active, column]
    return q_down + is_up.to(torch.uint8)
