# SPDX-License-Identifier: Apache-2.0
"""GPTQ on a given grid: columns in turn, each column's rounding error fed to those that come after it.

Groups stay where they are (static, contiguous): `act_order` only orders the solve, so files carry no permutation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from discquant.grids import Grid

# Rows are independent given the factor: so many bytes of float64 rows are solved at once.
SLICE_BYTES = 1 << 28
COPIED_COLUMNS = 64  # of the Hessian at once, put in the order of the solve


def slice_rows(columns: int) -> int:
    """Return how many rows of a matrix are solved at once."""
    return max(1, SLICE_BYTES // (8 * max(1, columns)))


def _permute_into(work: Tensor, hessian: Tensor, order: Tensor) -> None:
    """work[i, j] = hessian[order[i], order[j]], a few columns at a time."""
    for begin in range(0, len(order), COPIED_COLUMNS):
        part = order[begin : begin + COPIED_COLUMNS]
        work[:, begin : begin + COPIED_COLUMNS] = hessian.index_select(1, part).index_select(0, order)


def live_diagonal(hessian: Tensor) -> Tensor:
    """Return the diagonal of a Hessian in float64, the mean of the others (or 1) where it is 0: at a dead column."""
    diagonal = hessian.diagonal().double()
    live = diagonal[diagonal != 0]
    return torch.where(diagonal == 0, live.mean() if live.numel() else 1.0, diagonal)


def _inverse_factor(hessian: Tensor, order: Tensor, diagonal: Tensor, damp: float) -> Tensor:
    """Return the upper Cholesky factor of (H + damp * mean(diag H) * I)^-1; the damping grows until it exists.

    H is `hessian` with this diagonal, in the given order of columns. Factor, inverse and inverse factor overwrite one
    another: one [in_features, in_features] in float64 beside `hessian`.
    """
    size = len(order)
    # LAPACK works in place on columns.
    work = torch.empty(size, size, dtype=torch.float64, device=order.device).mT
    failed = torch.zeros((), dtype=torch.int32, device=order.device)
    for attempt in range(8):
        _permute_into(work, hessian, order)
        own = work.diagonal().copy_(diagonal[order])
        own += damp * 10**attempt * float(own.mean())
        torch.linalg.cholesky_ex(work, out=(work, failed))
        if int(failed) == 0:
            torch.cholesky_inverse(work, out=work)
            torch.linalg.cholesky_ex(work, upper=True, out=(work, failed))
            if int(failed) == 0:
                return work
    raise ValueError("gptq: hessian must be finite and positive semidefinite; no damping made it definite")


class Factor(NamedTuple):
    """What GPTQ needs of a Hessian, whatever the grid.

    Attributes:
        order: Of the columns, int64, [in_features].
        inverse: Upper Cholesky factor of the damped inverse in that order, float64, [in_features, in_features].
    """

    order: Tensor
    inverse: Tensor


def gptq_factor(hessian: Tensor, *, damp: float = 0.01, act_order: bool = True) -> Factor:
    """Return what `gptq` makes of a Hessian, for several grids of one weight.

    Args:
        hessian: See `gptq`, as the others.
        damp: See there.
        act_order: See there.

    Raises:
        ValueError: No damping makes the Hessian definite.
    """
    diagonal = live_diagonal(hessian)
    order = (
        torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    )
    order = order.to(hessian.device)
    return Factor(order, _inverse_factor(hessian, order, diagonal, damp))


def gptq(
    weight: Tensor,
    hessian: Tensor | Factor,
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
        hessian: X^T X (any positive multiple), floating, [in_features, in_features]; or what `gptq_factor` made of it,
            which has the damping and the order.
        grid: Grid of this weight.
        damp: Share of the mean diagonal added to it.
        act_order: Solve columns of large diagonal first.
        block_size: Columns whose updates are applied together.

    Returns:
        Codes, uint8, [out_features, in_features].

    Raises:
        ValueError: Shapes disagree, or no damping makes the Hessian definite.

    Note:
        Codes may lie more than one level from the weight. Float64 inside: one [in_features, in_features] beside the
        Hessian, and a slice of rows.

    Source:
        GPTQ, arXiv 2210.17323.
    """
    rows, columns = weight.shape
    shape = hessian.inverse.shape if isinstance(hessian, Factor) else hessian.shape
    if shape != (columns, columns):
        raise ValueError(f"gptq: hessian must be [{columns}, {columns}], got {list(shape)}")
    made = hessian if isinstance(hessian, Factor) else gptq_factor(hessian, damp=damp, act_order=act_order)
    order, factor = made
    levels = grid.columns(order)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    size = slice_rows(columns)
    for first in range(0, rows, size):
        here = slice(first, min(first + size, rows))
        work = weight[here].index_select(1, order).double()
        q = torch.empty_like(work, dtype=torch.uint8)
        for begin in range(0, columns, block_size):
            end = min(begin + block_size, columns)
            errors = torch.zeros(len(work), end - begin, dtype=torch.float64, device=weight.device)
            for j in range(begin, end):
                code, served = levels.nearest(j, work[:, j], here)
                q[:, j] = code.to(torch.uint8)
                error = (work[:, j] - served) / factor[j, j]
                work[:, j + 1 : end] -= error.unsqueeze(1) * factor[j, j + 1 : end]
                errors[:, j - begin] = error
            work[:, end:] -= errors @ factor[begin:end, end:]
        codes[here, order] = q
    return codes
