# SPDX-License-Identifier: Apache-2.0
"""GPTQ on a given grid: columns in turn, each column's rounding error fed to those that come after it.

Groups stay where they are (static, contiguous): `act_order` only orders the solve, so files carry no permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from discquant.grids import Grid


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Return the upper Cholesky factor of (H + damp * mean(diag H) * I)^-1; the damping grows until it exists."""
    mean = float(hessian.diagonal().mean())
    for attempt in range(8):
        damped = hessian + torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device) * (
            damp * 10**attempt * mean
        )
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if int(failed) == 0:
                return upper
    raise ValueError("gptq: hessian must be finite and positive semidefinite; no damping made it definite")


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
) -> Tensor:
    """Round a weight matrix so that its outputs on the calibration data change little.

    For column j in order: q_j = round(w_j to the grid); e = (w_j - dequant(q_j)) / U_jj;
    w_k -= e U_jk for the columns k after j, with U^T U = (H + damp * mean(diag H) I)^-1, H = X^T X.

    Args:
        weight: Floating, [out_features, in_features].
        hessian: X^T X (any positive multiple), floating, [in_features, in_features].
        grid: Grid of this weight.
        damp: Share of the mean diagonal added to it.
        act_order: Solve columns of large diagonal first.
        block_size: Columns whose updates are applied together.

    Returns:
        Codes, uint8, [out_features, in_features].

    Raises:
        ValueError: Shapes disagree, or no damping makes the Hessian definite.

    Note:
        Codes may lie more than one level from the weight. Float64 inside.

    Source:
        GPTQ, arXiv 2210.17323.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ValueError(f"gptq: hessian must be [{columns}, {columns}], got {list(hessian.shape)}")
    hessian = hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    order = (
        torch.argsort(hessian.diagonal(), descending=True, stable=True)
        if act_order
        else torch.arange(columns)
    )
    order = order.to(weight.device)
    factor = _inverse_factor(hessian[order][:, order], damp)
    levels = grid.columns(order)
    work = weight.double()[:, order].clone()
    q = torch.empty_like(work)
    for begin in range(0, columns, block_size):
        end = min(begin + block_size, columns)
        errors = torch.zeros(rows, end - begin, dtype=torch.float64, device=weight.device)
        for j in range(begin, end):
            q[:, j], served = levels.nearest(j, work[:, j])
            error = (work[:, j] - served) / factor[j, j]
            work[:, j + 1 : end] -= error.unsqueeze(1) * factor[j, j + 1 : end]
            errors[:, j - begin] = error
        work[:, end:] -= errors @ factor[begin:end, end:]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    codes[:, order] = q.to(torch.uint8)
    return codes
