# SPDX-License-Identifier: Apache-2.0
"""GPTQ and greedy rounding against brute force, an independent GPTQ and each other."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from discquant.config import GridConfig
from discquant.grids import Grid, UniformGrid, place_grid
from discquant.rounding import gptq, greedy
from discquant.rounding.gptq import gptq_factor, slice_rows


def _problem(rows: int, columns: int, samples: int = 200) -> tuple[Tensor, Tensor]:
    mix = torch.randn(columns, columns)
    x = torch.randn(samples, columns) @ mix
    return torch.randn(rows, columns) * 0.1, x.T @ x


def _loss(weight: Tensor, hessian: Tensor, grid: Grid, q: Tensor) -> Tensor:
    error = (weight - grid.dequantize(q, torch.float32)).double()
    return ((error @ hessian.double()) * error).sum(dim=1)


def _oracle(weight: Tensor, hessian: Tensor, grid: Grid, damp: float) -> np.ndarray:
    """GPTQ as in the paper's appendix: the inverse Hessian itself, one column removed at a time; numpy, no blocks."""
    w = weight.double().numpy().copy()
    h = hessian.double().numpy()
    h = h + damp * h.diagonal().mean() * np.eye(len(h))
    order = np.argsort(-hessian.double().numpy().diagonal(), kind="stable")
    inverse = np.linalg.inv(h)
    size = w.shape[1] if grid.group_size == -1 else grid.group_size
    q = np.zeros(w.shape, dtype=np.uint8)
    left = list(order)
    for j in order:
        step = grid.scale[:, j // size].double().numpy()
        zero = 2 ** (grid.num_bits - 1) if grid.zero_point is None else grid.zero_point[:, j // size].numpy()
        q[:, j] = np.clip(np.rint(w[:, j] / step + zero), 0, 2**grid.num_bits - 1)
        error = (w[:, j] - step * (q[:, j].astype(float) - zero)) / inverse[j, j]
        left.remove(j)
        w[:, left] -= np.outer(error, inverse[j, left])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_gptq_equals_the_oracle(group_size: int, sym: bool) -> None:
    weight, hessian = _problem(5, 80)
    grid = place_grid(weight, GridConfig(3, group_size, sym))
    q = gptq(weight, hessian, grid, damp=0.01, block_size=17)
    assert np.array_equal(q.numpy(), _oracle(weight, hessian, grid, 0.01))


KINDS = (
    GridConfig(3, 32),
    GridConfig(4, -1, sym=False),
    GridConfig(4, 64, kind="nf4"),
    *(GridConfig.of_kind(kind) for kind in ("q2_k", "q4_k", "q5_k", "q6_k")),
)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.kind}-{config.group_size}")
@pytest.mark.parametrize("rows_at_once", [1, 7])
def test_slices_of_rows_give_the_same_codes(
    rows_at_once: int, config: GridConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = _problem(24, 256)
    hessian[5] = hessian[:, 5] = 0
    grid = place_grid(weight, config)
    whole = gptq(weight, hessian, grid)
    # The package's function of this name hides the module.
    monkeypatch.setattr(sys.modules["discquant.rounding.gptq"], "SLICE_BYTES", 8 * 256 * rows_at_once)
    assert slice_rows(256) == rows_at_once and slice_rows(1 << 20) == 1
    assert torch.equal(gptq(weight, hessian, grid), whole)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.kind}-{config.group_size}")
def test_columns_hold_one_value_per_group_and_round_to_the_nearest_level(config: GridConfig) -> None:
    weight = torch.randn(6, 256) * 0.1
    grid = place_grid(weight, config)
    order = torch.randperm(256)
    columns = grid.columns(order)
    held = [value for value in vars(columns).values() if isinstance(value, Tensor)]
    assert all(value.numel() <= max(grid.scale.numel(), 256) for value in held)
    levels = torch.arange(2**grid.num_bits, dtype=torch.uint8)
    for j in (0, 100, 255):
        for rows in (slice(None), slice(2, 5)):
            values = weight[rows, order[j]].double()
            q, served = columns.nearest(j, values, rows)
            every = torch.stack(
                [
                    grid.dequantize(level.expand(weight.shape), torch.float64)[rows, order[j]]
                    for level in levels
                ]
            )
            assert torch.equal(served.float(), every.gather(0, q.long().unsqueeze(0))[0].float())
            best = (every - values).abs().amin(dim=0)
            # The levels above went through float32 products.
            slack = torch.finfo(torch.float32).eps * served.abs()
            assert bool(((served - values).abs() <= best + slack).all())


def test_gptq_leaves_its_arguments_alone() -> None:
    weight, hessian = _problem(3, 32)
    kept = weight.clone(), hessian.double()
    wide = hessian.double()
    gptq(weight, wide, place_grid(weight, GridConfig(3, 32)))
    assert torch.equal(weight, kept[0]) and torch.equal(wide, kept[1])


def test_both_beat_nearest_and_greedy_stays_between_the_neighbours() -> None:
    weight, hessian = _problem(16, 64)
    grid = place_grid(weight, GridConfig(3, 32))
    nearest = _loss(weight, hessian, grid, grid.nearest(weight)).sum()
    q = greedy(weight, hessian, grid)
    q_down, _ = grid.neighbours(weight)
    assert bool(((q == q_down) | (q == q_down + 1)).all())
    assert _loss(weight, hessian, grid, q).sum() < 0.7 * nearest
    assert _loss(weight, hessian, grid, gptq(weight, hessian, grid)).sum() < 0.7 * nearest


def test_greedy_ends_where_no_single_flip_helps() -> None:
    weight, hessian = _problem(3, 24)
    grid = place_grid(weight, GridConfig(3, -1))
    q = greedy(weight, hessian, grid, damp=0.0, max_passes=10)
    q_down, _ = grid.neighbours(weight)
    best = _loss(weight, hessian, grid, q)
    for column in range(24):
        flipped = q.clone()
        flipped[:, column] = 2 * q_down[:, column] + 1 - q[:, column]
        assert bool((_loss(weight, hessian, grid, flipped) >= best * (1 - 1e-9)).all())


def test_gptq_against_all_roundings() -> None:
    """On a small problem GPTQ lies between the best of all two-neighbour roundings and the median one."""
    weight, hessian = _problem(1, 10)
    grid = place_grid(weight, GridConfig(4, -1))
    q_down, _ = grid.neighbours(weight)
    every = torch.tensor(list(itertools.product((0, 1), repeat=10)), dtype=torch.uint8)
    losses = _loss(
        weight.expand(1024, -1),
        hessian,
        place_grid(weight.expand(1024, -1), GridConfig(4, -1)),
        q_down + every,
    )
    found = float(_loss(weight, hessian, grid, gptq(weight, hessian, grid, damp=1e-4)))
    assert found <= float(losses.median())
    rank = float((losses < found).float().mean())
    assert rank < 0.05


def test_dead_columns_and_singular_hessians() -> None:
    weight, hessian = _problem(4, 32, samples=8)  # rank 8
    hessian[5] = 0
    hessian[:, 5] = 0
    grid = place_grid(weight, GridConfig(3, 32))
    q = gptq(weight, hessian, grid, damp=1e-6)
    assert torch.equal(q[:, 5], grid.nearest(weight)[:, 5])
    assert int(q.max()) < 8


def test_damping_grows_until_the_hessian_is_definite() -> None:
    """Sums that lost what they cancel in: an eigenvalue of -0.0005 of the mean takes the fourth attempt."""
    weight, hessian = _problem(4, 32, samples=8)  # rank 8
    hessian = hessian.double()
    hessian.diagonal().sub_(5e-4 * float(hessian.diagonal().mean()))
    grid = place_grid(weight, GridConfig(3, 32))
    expected = gptq(weight, hessian, grid, damp=1e-3)
    assert torch.equal(gptq(weight, hessian, grid, damp=1e-6), expected)
    assert not torch.equal(gptq(weight, hessian, grid, damp=1e-2), expected)


def test_damping_grows_until_the_inverse_is_definite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor may exist of a matrix that is so near to singular that its inverse has none."""
    _, hessian = _problem(1, 32)
    expected = gptq_factor(hessian, damp=0.1)
    real, inverses = torch.linalg.cholesky_ex, itertools.count()

    def narrow(work: Tensor, *, upper: bool = False, out: Any) -> Any:
        found = real(work, upper=upper, out=out)
        if upper and next(inverses) == 0:
            out[1].fill_(30)
        return found

    monkeypatch.setattr(torch.linalg, "cholesky_ex", narrow)
    assert torch.equal(gptq_factor(hessian, damp=0.01).inverse, expected.inverse)


@pytest.mark.parametrize("method", [gptq, greedy])
def test_units_change_no_code(method: Any) -> None:
    """Any positive multiple of the Hessian, with dead columns too, and of weight and grid; all exact here."""
    weight, hessian = _problem(16, 64)
    hessian = hessian.double()
    dead = torch.arange(0, 64, 2)
    hessian[dead] = hessian[:, dead] = 0
    grid = place_grid(weight, GridConfig(3, 32))
    assert isinstance(grid, UniformGrid)
    codes = method(weight, hessian, grid, damp=0.1)
    for power in (-40, -20, 20):
        for unit in (1.0, 2.0**-16):
            scaled = dataclasses.replace(grid, scale=grid.scale * unit)
            assert torch.equal(method(weight * unit, hessian * 2.0**power, scaled, damp=0.1), codes)


def test_every_column_dead() -> None:
    weight, hessian = _problem(4, 32)
    grid = place_grid(weight, GridConfig(3, 32))
    assert torch.equal(gptq(weight, 0 * hessian, grid), grid.nearest(weight))


def test_rejects_bad_input() -> None:
    weight, hessian = _problem(2, 16)
    grid = place_grid(weight, GridConfig())
    for method in (gptq, greedy):
        with pytest.raises(ValueError, match="hessian must be"):
            method(weight, hessian[:8, :8], grid)
        for bad in (torch.nan, torch.inf):
            with pytest.raises(ValueError, match="hessian must be finite"):
                method(weight, hessian * bad, grid)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_factor_serves_several_grids(act_order: bool) -> None:
    """The same codes as from the Hessian, each time."""
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(6, 40, generator=generator), torch.randn(90, 40, generator=generator)
    hessian = (x.T @ x).double()
    factor = gptq_factor(hessian, damp=0.05, act_order=act_order)
    for bits in (2, 4):
        grid = place_grid(weight, GridConfig(bits, 16))
        expected = gptq(weight, hessian, grid, damp=0.05, act_order=act_order)
        assert torch.equal(gptq(weight, factor, grid), expected)
    with pytest.raises(ValueError, match=r"hessian must be \[8, 8\], got \[40, 40\]"):
        gptq(weight[:, :8], factor, place_grid(weight[:, :8], GridConfig(4, 8)))
