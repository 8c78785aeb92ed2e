# SPDX-License-Identifier: Apache-2.0
"""The grid contract, and every trap of the published grid."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from discquant.config import GridConfig
from discquant.grids import UniformGrid, place, place_grid
from discquant.grids.uniform import SCALE_RANGE

GROUPS = (-1, 32, 64, 128)


def _configs() -> list[GridConfig]:
    return [
        GridConfig(bits, group, sym, rule)  # type: ignore[arg-type]
        for bits in (2, 3, 4, 8)
        for group in GROUPS
        for sym in (True, False)
        for rule in ("absmax", "search")
    ]


def _weight(rows: int = 6, columns: int = 172) -> Tensor:
    return torch.randn(rows, columns) * 0.05


@pytest.mark.parametrize("config", _configs(), ids=str)
def test_contract(config: GridConfig) -> None:
    """Position reproduces the weight; neighbours enclose it; codes are in range; nearest is nearest."""
    weight = _weight()
    grid = place_grid(weight, config)
    q_down, frac_ref = grid.neighbours(weight)
    assert q_down.dtype == torch.uint8
    assert int(q_down.max()) <= 2**config.bits - 2
    rebuilt = grid.soft_weight(q_down, frac_ref, torch.float32)
    assert (rebuilt - weight).abs().max() <= 2.0**config.bits * 2e-7 * weight.abs().max()
    down, up = grid.dequantize(q_down, torch.float32), grid.dequantize(q_down + 1, torch.float32)
    down, up = torch.minimum(down, up), torch.maximum(down, up)  # a negative scale turns them round
    inside = (frac_ref >= 0) & (frac_ref <= 1)
    slack = 1e-6 * weight.abs().max()
    assert bool(((down - slack <= weight) & (weight <= up + slack))[inside].all())
    q = grid.nearest(weight)
    assert bool(((q == q_down) | (q == q_down + 1)).all())
    chosen = (grid.dequantize(q, torch.float32) - weight).abs()
    assert bool((chosen <= torch.minimum((down - weight).abs(), (up - weight).abs()) + slack).all())
    for per_row in _levels_per_group(grid, q):
        assert per_row <= 2**config.bits


def _levels_per_group(grid: UniformGrid, q: Tensor) -> list[int]:
    size = q.shape[1] if grid.group_size == -1 else grid.group_size
    values = grid.dequantize(q, torch.float32)
    return [len(chunk[0].unique()) for chunk in values.split(size, dim=1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sym", [True, False])
def test_soft_weight_at_the_ends_is_the_served_weight(sym: bool, dtype: torch.dtype) -> None:
    """One canonical dequantisation: frac 0 and 1 give the served neighbours bit for bit, in every dtype."""
    weight = _weight()
    grid = place_grid(weight, GridConfig(3, 32, sym))
    q_down, _ = grid.neighbours(weight)
    for end in (0.0, 1.0):
        soft = grid.soft_weight(q_down, torch.full(weight.shape, end), dtype)
        assert torch.equal(soft, grid.dequantize(q_down + int(end), dtype))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("rule", ["absmax", "search"])
def test_codes_weights_codes(sym: bool, rule: str) -> None:
    grid = place_grid(_weight(), GridConfig(4, 64, sym, rule))  # type: ignore[arg-type]
    q = torch.randint(0, 16, (6, 172), dtype=torch.uint8)
    assert torch.equal(grid.nearest(grid.dequantize(q, torch.float32)), q)


@given(st.integers(2, 8), st.sampled_from(GROUPS), st.booleans(), st.integers(1, 200), st.floats(-12, 4))
def test_scales_are_exact_in_every_served_dtype(
    bits: int, group: int, sym: bool, columns: int, magnitude: float
) -> None:
    weight = torch.randn(2, columns) * 10.0**magnitude
    scale = place_grid(weight, GridConfig(bits, group, sym)).scale
    assert scale.dtype == torch.bfloat16
    assert scale.shape == (2, 1 if group == -1 else -(-columns // group))
    assert float(scale.float().abs().min()) >= SCALE_RANGE[torch.bfloat16][0]
    assert torch.equal(scale.float(), scale.half().float())


def test_shorter_last_group_has_its_own_scale() -> None:
    weight = torch.ones(1, 172)
    weight[:, 160:] = 0.01
    grid = place_grid(weight, GridConfig(4, 32, True, "absmax"))
    assert grid.scale.shape == (1, 6)
    assert float(grid.scale[0, -1]) < 0.02 * float(grid.scale[0, 0])


def test_positive_overflow_chooses_between_the_top_two_levels() -> None:
    """The published grid freezes a positive largest weight half a step above the top level; here it may move."""
    weight = torch.linspace(-0.9, 1.0, 32).unsqueeze(0)
    grid = place_grid(weight, GridConfig(3, 32, True, "absmax"))
    q_down, frac_ref = grid.neighbours(weight)
    assert int(q_down[0, -1]) == 6
    assert 1.0 < float(frac_ref[0, -1]) <= 1.5
    assert int(grid.nearest(weight)[0, -1]) == 7


def test_negative_absmax_lies_between_the_two_lowest_levels() -> None:
    weight = torch.linspace(-1.0, 0.9, 32).unsqueeze(0)
    grid = place_grid(weight, GridConfig(3, 32, True, "absmax"))
    q_down, frac_ref = grid.neighbours(weight)
    assert int(q_down[0, 0]) == 0
    assert 0.5 <= float(frac_ref[0, 0]) < 0.55  # scales are rounded up


@given(st.integers(2, 8), st.sampled_from(GROUPS), st.booleans())
def test_absmax_positions_fit_the_8_bit_code(bits: int, group: int, sym: bool) -> None:
    """Scales are rounded up, so no weight lies more than half a step outside."""
    weight = torch.randn(4, 130) * 0.3
    _, frac_ref = place_grid(weight, GridConfig(bits, group, sym, "absmax")).neighbours(weight)
    slack = 2.0 ** (bits - 20)
    assert -0.5 - slack <= float(frac_ref.min())
    assert float(frac_ref.max()) <= 1.5 + slack


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rule", ["absmax", "search"])
def test_one_signed_group_is_not_clipped(sign: float, rule: str) -> None:
    """The published scale takes max(w), not max|w|: a one-signed group loses most of its range there."""
    weight = sign * torch.linspace(0.1, 1.0, 64).unsqueeze(0)
    for sym in (True, False):
        grid = place_grid(weight, GridConfig(4, 64, sym, rule))  # type: ignore[arg-type]
        error = (grid.dequantize(grid.nearest(weight), torch.float32) - weight).abs().max()
        assert error <= 1.6 * float(grid.scale.float().abs().max())
        assert error < 0.12
        if sym and rule == "search":  # all of the larger half of the levels
            assert sign * float(grid.scale) < 0
            assert error < 0.08


def test_zero_group_and_zero_weights_are_on_the_grid() -> None:
    weight = torch.randn(2, 64)
    weight[:, :32] = 0.0
    weight[:, 40] = 0.0
    for sym in (True, False):
        grid = place_grid(weight, GridConfig(3, 32, sym))
        _, frac_ref = grid.neighbours(weight)
        zeros = weight == 0
        assert bool((frac_ref[zeros] == 0).all() or (frac_ref[zeros] == 1).all())
        assert bool((grid.dequantize(grid.nearest(weight), torch.float32)[zeros] == 0).all())


def test_on_grid_weights_have_one_neighbour() -> None:
    """A weight that is a grid point sits at frac_ref exactly 0 (or 1 at the top level)."""
    scale = torch.full((1, 1), 0.125, dtype=torch.bfloat16)
    grid = UniformGrid(3, -1, True, scale)
    q = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    q_down, frac_ref = grid.neighbours(grid.dequantize(q, torch.float32))
    assert frac_ref.tolist() == [[0.0] * 7 + [1.0]]
    assert q_down.tolist() == [[0, 1, 2, 3, 4, 5, 6, 6]]


def test_half_way_the_lower_code_is_nearest() -> None:
    """As in the published method; beyond the ends there is no other code."""
    grid = UniformGrid(2, -1, True, torch.full((1, 1), 0.125))
    weight = (torch.arange(-2.5, 2.5) * 0.125)[None]
    assert grid.nearest(weight).tolist() == [[0, 0, 1, 2, 3]]


def test_position_is_computed_in_float32() -> None:
    """In bfloat16 a few weights in a hundred would land on the grid by rounding alone."""
    weight = (torch.randn(64, 256) * 0.02).bfloat16()
    grid = place_grid(weight, GridConfig(3, 32, True, "absmax"))
    _, frac_ref = grid.neighbours(weight)
    on_grid = ((frac_ref == 0) | (frac_ref == 1)).float().mean()
    step = grid.scale.repeat_interleave(32, dim=1)
    in_bfloat16 = (weight / step + 4).frac().eq(0).float().mean()
    assert float(in_bfloat16) > 0.01
    assert float(on_grid) < 0.2 * float(in_bfloat16)


@pytest.mark.parametrize("sym", [True, False])
def test_search_never_loses_to_absmax(sym: bool) -> None:
    weight = torch.randn(32, 128) * torch.rand(32, 1)
    errors = {}
    for rule in ("absmax", "search"):
        grid = place_grid(weight, GridConfig(3, 32, sym, rule))  # type: ignore[arg-type]
        q = grid.nearest(weight)
        error = (grid.dequantize(q, torch.float32) - weight).square()
        errors[rule] = error.view(32, 4, 32).sum(-1)
    slack = 1e-5 * errors["absmax"].max()
    assert bool((errors["search"] <= errors["absmax"] + slack).all())
    assert float(errors["search"].sum()) < 0.9 * float(errors["absmax"].sum())


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.91), (3, 0.91), (4, 0.93)])
def test_search_takes_the_better_sign(bits: int, gain: float) -> None:
    """A level more on the side of the larger weights, against the best of positive scales tried one by one."""
    weight = torch.randn(64, 64)
    zero, top = 2 ** (bits - 1), 2**bits - 1
    best = torch.full((64,), torch.inf)
    for ratio in torch.linspace(0.3, 1.1, 200):
        scale = (weight.abs().amax(1, keepdim=True) * 2 / top * ratio).bfloat16().float()
        error = (torch.round(weight / scale).clamp(-zero, top - zero) * scale - weight).square().sum(1)
        best = torch.minimum(best, error)
    grid = place_grid(weight, GridConfig(bits, 64))
    found = (grid.dequantize(grid.nearest(weight), torch.float32) - weight).square().sum(1)
    assert bool((grid.scale < 0).any()) and bool((grid.scale > 0).any())
    assert float(found.sum()) < gain * float(best.sum())
    assert bool((found <= 1.02 * best).all())  # the coarse search misses little where the sign gains nothing


@pytest.mark.parametrize("bits", [2, 3])
def test_search_of_scale_and_zero_point_is_near_the_best_of_all(bits: int) -> None:
    """Against every zero point with a hundred scales, of weights that do not lie around zero."""
    weight, top = torch.randn(64, 64) + 0.3, 2**bits - 1
    low = weight.amin(1, keepdim=True)
    full = (weight.amax(1, keepdim=True) - low) / top
    best = torch.full((64,), torch.inf)
    for ratio in torch.linspace(0.3, 1.1, 100):
        scale = (full * ratio).bfloat16().float()
        for zero in range(top + 1):
            lost = (torch.round(weight / scale) + zero).clamp(0, top).sub(zero) * scale - weight
            best = torch.minimum(best, lost.square().sum(1))
    grid = place_grid(weight, GridConfig(bits, 64, False))
    found = (grid.dequantize(grid.nearest(weight), torch.float32) - weight).square().sum(1)
    assert float(found.sum()) < 1.005 * float(best.sum()) and bool((found < 1.1 * best).all())


@pytest.mark.parametrize("sym", [True, False])
def test_a_scale_that_a_file_holds_is_taken_as_it_is(sym: bool) -> None:
    """absmax rounds up what does not fit, and nothing else; a group as wide as the row keeps its size."""
    weight = torch.linspace(-7.0, 7.0 if sym else 0.0, 64)[None] / 16
    grid = place_grid(weight, GridConfig(3, 64, sym, "absmax"))
    assert float(grid.scale) == (2 if sym else 1) / 16 and grid.group_size == 64
    assert place_grid(weight, GridConfig(3, 128, sym, "absmax")).group_size == -1


def test_rows_are_independent_of_how_they_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 100)
    for sym in (True, False):
        whole = place_grid(weight, GridConfig(3, 32, sym))
        monkeypatch.setattr(place, "_CHUNK", 300)
        rows = place_grid(weight, GridConfig(3, 32, sym))
        monkeypatch.undo()
        assert torch.equal(whole.scale, rows.scale)
        assert sym or torch.equal(whole.zero_point, rows.zero_point)


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="must have elements"):
        place_grid(torch.zeros(0, 64), GridConfig(3, 32))
    with pytest.raises(ValueError, match="finite"):
        place_grid(torch.tensor([[1.0, float("nan")]]), GridConfig())
    with pytest.raises(ValueError, match="2 dimensions"):
        place_grid(torch.zeros(3), GridConfig())
    for sign in (1, -1):
        with pytest.raises(ValueError, match="magnitude"):
            place_grid(torch.full((1, 8), sign * 1e6), GridConfig())
    with pytest.raises(ValueError, match="scale"):
        UniformGrid(4, -1, True, torch.full((1, 1), torch.inf))
    with pytest.raises(ValueError, match="zero_point"):
        UniformGrid(4, -1, False, torch.ones(1, 1))
    for bad in ({"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": 33}, {"grid": "best"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GridConfig(**bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rescaled(dtype: torch.dtype) -> None:
    """Scales stay numbers of the file, keep sign and range; no change gives the scale itself, whatever it is."""
    scale = torch.tensor([[1.0, -0.5, 0.0, 3e-6]]).to(dtype)
    grid = UniformGrid(4, 8, True, scale)
    assert torch.equal(grid.rescaled(torch.zeros(1, 4)).scale, scale)
    moved = grid.rescaled(torch.tensor([[0.25, -9.0, 0.3, -0.1]])).scale
    assert moved.dtype == dtype and moved[0, :3].tolist() == [1.25, -0.25, 0.0]
    assert moved[0, 3] == (2.0**-17 if dtype == torch.bfloat16 else torch.tensor(3e-6 * 0.9).to(dtype))
    assert torch.equal(grid.scale, scale)
    near = torch.linspace(0.9, 1.1, 64).to(torch.bfloat16)[None]
    held = UniformGrid(4, 8, True, near).rescaled(torch.full((1, 64), 0.01)).scale
    assert torch.equal(held, held.to(torch.float16).to(torch.bfloat16)) and not torch.equal(held, near)
