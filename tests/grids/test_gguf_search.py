# SPDX-License-Identifier: Apache-2.0
"""Scales of GGUF types: what a search finds against trying all, what is laid without one, what files can hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from discquant.config import GRID_KINDS, GridKind
from discquant.formats.gguf_fit import fit_grid, grid_of
from discquant.grids import AffineGrid, Grid
from discquant.grids.gguf import SUPER_KINDS, place_gguf
from discquant.grids.table import IQ4_LEVELS


def error(grid: Grid, weight: Tensor) -> Tensor:
    """Squared error of rounding to nearest, by group."""
    lost = grid.dequantize(grid.nearest(weight), torch.float32) - weight
    return lost.square().unflatten(1, (-1, grid.group_size)).sum(-1)


def uneven() -> Tensor:
    """Groups of 16 whose sizes lie far apart within 256 columns, of either sign alone and of both."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, 16, 2, 16, generator=generator) * torch.logspace(-5, 0, 32).view(16, 2, 1)
    weight[:4], weight[4:8] = weight[:4].abs(), -weight[4:8].abs()
    return weight.flatten(1)


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "iq4_nl"])
def test_a_searched_scale_is_near_the_best_of_all(kind: GridKind) -> None:
    """Of either sign: there is one level more on one side. Against 600 scales tried one by one."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    bits, group, _ = GRID_KINDS[kind]
    low = -(1 << (bits - 1))
    levels = torch.tensor(IQ4_LEVELS if kind == "iq4_nl" else [float(q) for q in range(low, -low)])
    values = weight.unflatten(1, (-1, group))
    best = torch.full(values.shape[:2], torch.inf)
    for end in torch.linspace(0.6, 1.4, 300) * float(levels[0]):
        for sign in (1, -1):
            scale = (values.abs().amax(-1, keepdim=True) / end * sign).half().float()
            place = torch.bucketize(values / scale, (levels[1:] + levels[:-1]) / 2)
            best = torch.minimum(best, (levels[place] * scale - values).square().sum(-1))
    assert float(error(place_gguf(weight, kind), weight).sum()) < 1.02 * float(best.sum())


@pytest.mark.parametrize("kind", ["q4_0", "q5_0"])
def test_without_a_search_the_lowest_level_is_the_largest_weight(kind: GridKind) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    values = weight.unflatten(1, (-1, 32))
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True)).squeeze(-1)
    low = -(1 << (GRID_KINDS[kind][0] - 1))
    assert torch.equal(place_gguf(weight, kind, search=False).scale, (largest / low).half())


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("kind", SUPER_KINDS)
def test_a_file_holds_groups_of_any_size_beside_each_other(kind: GridKind, search: bool) -> None:
    """As integers in their range times one scale; none is 0, where every code would stand for the same weight."""
    grid = place_gguf(uneven(), kind, search=search)
    type_, parts, _ = fit_grid(grid, 512)
    assert type_.name.lower() == kind and not bool((grid.scale == 0).any())
    stored = grid_of(type_, parts)
    assert torch.equal(stored.scale, grid.scale)
    if isinstance(grid, AffineGrid):
        assert isinstance(stored, AffineGrid) and torch.equal(stored.minimum, grid.minimum)
