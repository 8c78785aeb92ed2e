# SPDX-License-Identifier: Apache-2.0
"""The gain on the KL gradient: set from the first gradients, or as the official code does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from discquant.grids import Grid
from discquant.ops.reference.soft_weight import expand_groups
from discquant.solver.chain import Chain, Prepared
from discquant.solver.gradients import block_gradients
from discquant.solver.solver import Solver
from discquant.solver.weight_ref import assemble, take_matrices

GAIN_SAMPLES, GAIN_POOLED = 1 << 16, 1_000_000  # entries of one gradient, and of all, that set the gain


def published_gain(chain: Chain, grids: Mapping[str, Grid], rho: float) -> float:
    """Return rho / delta2, delta2 = mean over layers of 12 mean((RTN(W) - W)^2): the official code's scaling."""
    errors = []
    for refs in chain.weights:
        for ref in refs:
            grid, weight = grids[ref.name].to(chain.device), ref.matrix().float()
            errors.append(
                12 * float((grid.dequantize(grid.nearest(weight), torch.float32) - weight).square().mean())
            )
    delta2 = sum(errors) / len(errors)
    return rho / max(delta2, 1e-30)


def calibrate_gain(solver: Solver, batches: Sequence[Prepared]) -> float:
    """Return the gain at which `saturation` of the entries reach the clamp at the rounded-to-nearest model.

    At the original weights the KL gradient is zero, so the first gradients cannot set it. Entries that are exactly zero
    (of experts that no token of these batches chose) tell nothing about it and are not counted.

    Args:
        solver: With its states; not changed.
        batches: Micro-batches to measure on.

    Returns:
        The gain on dKL/dfrac; 1 where every entry is zero, or none may move.
    """
    samples: list[Tensor] = []

    def originals(index: int) -> Iterator[Tensor]:
        states = solver.placement.fetch(index).states
        for ref, state in zip(solver.chain.weights[index], states, strict=True):
            known = state.teacher_weight(solver.dtype)
            yield ref.matrix() if known is None else known

    def nearest(index: int) -> dict[str, Tensor]:
        states = solver.placement.fetch(index).states
        served = (
            state.nearest_weight(original, solver.served).to(solver.dtype)
            for state, original in zip(states, originals(index), strict=True)
        )
        return assemble(solver.chain.weights[index], served)

    def sink(index: int, grads: dict[str, Tensor]) -> None:
        refs = solver.chain.weights[index]
        states = solver.placement.fetch(index).states
        for matrix, state in zip(take_matrices(refs, grads), states, strict=True):
            grad = matrix.float()
            gap, group_size = state.gap()
            flat = (grad * expand_groups(gap.float(), group_size, grad.shape[1])).abs()[state.live()]
            flat = flat[flat != 0]
            samples.append(flat[:: max(1, flat.numel() // GAIN_SAMPLES)].clone())

    block_gradients(
        solver.chain,
        nearest,
        batches,
        sink,
        loss=solver.config.loss,
        teacher=solver.teacher,
        boundaries=solver.boundaries,
    )
    pooled = torch.cat(samples)
    if not pooled.numel():
        return 1.0
    thinned = pooled[:: max(1, pooled.numel() // GAIN_POOLED)]
    level = float(torch.quantile(thinned, 1 - solver.config.saturation))
    return solver.config.grad_clamp / max(level, 1e-30)  # which float32 still holds, as the gain
