# SPDX-License-Identifier: Apache-2.0
"""What every grid promises, whatever file it comes from: one canonical dequantisation, two neighbours, nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from discquant.config import GridConfig, GridKind
from discquant.grids import AffineGrid, Grid, TableGrid, UniformGrid, place_grid
from discquant.grids.table import E2M1_LEVELS, NF4_LEVELS, e2m1_codes, e2m1_nibbles
from discquant.rounding import gptq, greedy

ROWS, COLUMNS = 4, 256
KINDS = tuple(kind for kind in get_args(GridKind) if kind != "uniform")


def _weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS) * 0.05


def _scales(groups: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(ROWS, groups) * 0.02 + 0.01).to(dtype)


def _signed(groups: int, dtype: torch.dtype = torch.float16) -> Tensor:
    sign = torch.where(torch.rand(ROWS, groups) < 0.5, -1.0, 1.0)
    return (sign * _scales(groups)).to(dtype)


def _multiples(bits: int, most: int) -> UniformGrid:
    """Q3_K, Q6_K."""
    d = (torch.randn(ROWS, 1) * 1e-3).half().float()
    return UniformGrid(bits, 16, True, d * torch.randint(-most - 1, most + 1, (ROWS, COLUMNS // 16)))


def _affine_multiples(bits: int, group: int, most: int) -> AffineGrid:
    """Q2_K, Q4_K, Q5_K."""
    d, dmin = ((torch.rand(ROWS, 1) * 1e-3).half().float() for _ in range(2))
    sc, mn = (torch.randint(1, most + 1, (ROWS, COLUMNS // group)) for _ in range(2))
    return AffineGrid(bits, group, d * sc, -(dmin * mn))


MADE: dict[str, Callable[[], Grid]] = {
    "negative scales": lambda: UniformGrid(4, 32, True, _signed(8)),
    "float32 scales": lambda: UniformGrid(3, 64, True, _scales(4)),
    "zero points": lambda: UniformGrid(
        4, 64, False, _scales(4, torch.float16), torch.randint(0, 16, (ROWS, 4), dtype=torch.uint8)
    ),
    "act-order": lambda: UniformGrid(
        4, 64, False, _signed(4), torch.randint(0, 16, (ROWS, 4), dtype=torch.uint8),
        g_idx=(torch.arange(COLUMNS) // 64)[torch.randperm(COLUMNS)],
    ),
    "act-order symmetric": lambda: UniformGrid(
        3, 64, True, _scales(4), g_idx=(torch.arange(COLUMNS) // 64)[torch.randperm(COLUMNS)]
    ),
    "file q3_k": lambda: _multiples(3, 31),
    "file q6_k": lambda: _multiples(6, 127),
    "file q2_k": lambda: _affine_multiples(2, 16, 15),
    "file q4_k": lambda: _affine_multiples(4, 32, 63),
    "file q5_k": lambda: _affine_multiples(5, 32, 63),
    "q4_1": lambda: AffineGrid(4, 32, _signed(8), torch.randn(ROWS, 8).half() * 0.05),
    "mlx float16": lambda: AffineGrid(3, 64, _signed(4), torch.randn(ROWS, 4).half() * 0.05, torch.float16),
    "mlx bfloat16": lambda: AffineGrid(4, 64, _scales(4, torch.bfloat16), -_scales(4, torch.bfloat16)),
    "nf4": lambda: TableGrid.nf4(_scales(4)),
    "file iq4_nl": lambda: TableGrid.iq4(_signed(8) / 16, "iq4_nl"),
    "mxfp4": lambda: TableGrid.mxfp4(torch.randint(115, 123, (ROWS, 8), dtype=torch.uint8)),
    "nvfp4": lambda: TableGrid.nvfp4((_scales(16) * 4000).to(torch.float8_e4m3fn), torch.tensor([5376.0])),
} | {
    f"placed {kind} {rule}": (
        lambda kind=kind, rule=rule: place_grid(  # type: ignore[misc]
            _weight(), GridConfig(*_fixed(kind), grid=rule, kind=kind)
        )
    )
    for kind in KINDS
    for rule in ("absmax", "search")
}  # fmt: skip


def _fixed(kind: GridKind) -> tuple[int, int, bool]:
    config = GridConfig.of_kind(kind)
    return config.bits, config.group_size, config.sym


@pytest.fixture(params=list(MADE))
def grid(request: pytest.FixtureRequest) -> Grid:
    return MADE[request.param]()


# GPTQ and greedy take a step per column: one grid of each arithmetic is enough.
@pytest.fixture(
    params=[
        "negative scales",
        "act-order",
        "file q3_k",
        "file q6_k",
        "file q2_k",
        "file q5_k",
        "mlx float16",
        "nf4",
        "file iq4_nl",
        "placed nvfp4 search",
    ]
)
def some_grid(request: pytest.FixtureRequest) -> Grid:
    return MADE[request.param]()


def _levels(grid: Grid) -> Tensor:
    """Every level of every coordinate, float32, [2^b, out_features, in_features]."""
    return torch.stack(
        [
            grid.dequantize(torch.full((ROWS, COLUMNS), q, dtype=torch.uint8), torch.float32)
            for q in range(2**grid.num_bits)
        ]
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.uint8, torch.uint16, torch.bfloat16])
def test_soft_weight_at_the_ends_is_served(grid: Grid, kind: torch.dtype) -> None:
    q_down, _ = grid.neighbours(_weight())
    packed = q_down[:, 0::2] | (q_down[:, 1::2] << 4) if grid.num_bits <= 4 else q_down
    top = {torch.uint8: 255, torch.uint16: 65535}.get(kind, 1)
    for end in (0, 1):
        frac = torch.full((ROWS, COLUMNS), end * top).to(kind)
        for dtype, codes in ((torch.float32, q_down), (torch.bfloat16, packed), (torch.float16, q_down)):
            assert torch.equal(grid.soft_weight(codes, frac, dtype), grid.dequantize(q_down + end, dtype))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("compute", [torch.float32, torch.float16, torch.bfloat16])
def test_affine_weights_of_the_op_are_the_grids_own(compute: torch.dtype, kind: torch.dtype) -> None:
    """The op gives the bits of interpolating between what `dequantize` gives, as every grid may do."""
    stored = torch.float16 if compute == torch.float32 else compute
    for bits, group in ((4, 32), (8, -1), (3, 96)):
        groups = 1 if group == -1 else -(-COLUMNS // group)
        grid = AffineGrid(bits, group, _signed(groups, stored), torch.randn(ROWS, groups).to(stored), compute)
        q_down = torch.randint(0, grid.max_code, (ROWS, COLUMNS), dtype=torch.uint8)
        places = torch.rand(ROWS, COLUMNS)
        places[:, ::5], places[:, 1::5] = 0, 1
        frac = (places * 255).to(kind) if kind == torch.uint8 else places.to(kind)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            expected = Grid.soft_weight(grid, q_down, frac, dtype)
            assert torch.equal(grid.soft_weight(q_down, frac, dtype), expected)
        teacher = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8)
        found, expected = (
            make(q_down, teacher, torch.float32, is_reference=True)
            for make in (grid.soft_weight, functools.partial(Grid.soft_weight, grid))
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["act-order", "act-order symmetric"])
@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_act_order_is_a_scale_per_column(name: str, kind: torch.dtype) -> None:
    """The bits of a grid that holds every column's own scale and zero point."""
    grid = MADE[name]()
    assert isinstance(grid, UniformGrid) and grid.g_idx is not None
    columns = grid.g_idx.long()
    zero = None if grid.zero_point is None else grid.zero_point[:, columns]
    wide = UniformGrid(grid.num_bits, 1, grid.symmetric, grid.scale[:, columns], zero)
    q_down = torch.randint(0, grid.max_code, (ROWS, COLUMNS), dtype=torch.uint8)
    frac = torch.rand(ROWS, COLUMNS) if kind == torch.float32 else q_down * 10
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(grid.soft_weight(q_down, frac, dtype), wide.soft_weight(q_down, frac, dtype))


def test_neighbours_bracket_and_position_reproduces(grid: Grid) -> None:
    weight = _weight()
    q_down, frac_ref = grid.neighbours(weight)
    assert q_down.dtype == torch.uint8 and int(q_down.max()) <= grid.max_code - 1
    assert frac_ref.dtype == torch.float32 and bool(torch.isfinite(frac_ref).all())
    levels = _levels(grid)
    down, up = grid.dequantize(q_down, torch.float32), grid.dequantize(q_down + 1, torch.float32)
    gap, group = grid.gap(q_down)
    movable = (frac_ref != 0) & (frac_ref != 1)
    # A position of float32 rounding away from a level may name the pair on its other side.
    slack = 4e-7 * levels.abs().amax(dim=0)
    inside = movable & (frac_ref > 0) & (frac_ref < 1)
    assert bool((torch.minimum(down, up) - slack <= weight)[inside].all())
    assert bool((weight <= torch.maximum(down, up) + slack)[inside].all())
    # Beyond the ends, the pair is the outermost one on that side.
    outside = movable & ~inside
    top, bottom = levels.amax(dim=0), levels.amin(dim=0)
    assert bool(((weight >= top - slack) | (weight <= bottom + slack))[outside].all())
    repeated = gap if group == 1 else gap.repeat_interleave(group, dim=1)
    lowest_unit = torch.finfo(torch.float16).eps if _in_half(grid) else 0.0
    error = (up - down - repeated.float()).abs()
    assert bool((error <= slack + lowest_unit * levels.abs().amax(dim=0))[movable].all())
    rebuilt = grid.soft_weight(q_down, frac_ref, torch.float32)
    bound = slack * (1 + frac_ref.abs()) + 2 * lowest_unit * levels.abs().amax(dim=0)
    assert bool(((rebuilt - weight).abs() <= bound)[movable].all())


def _in_half(grid: Grid) -> bool:
    return isinstance(grid, AffineGrid) and grid.compute != torch.float32


def test_nearest_is_nearest(grid: Grid) -> None:
    weight = _weight()
    levels = _levels(grid)
    least = (levels - weight).abs().amin(dim=0)
    found = (grid.dequantize(grid.nearest(weight), torch.float32) - weight).abs()
    unit = torch.finfo(torch.float16).eps if _in_half(grid) else 4e-7
    assert bool((found <= least + unit * levels.abs().amax(dim=0)).all())


def test_codes_weights_codes(grid: Grid) -> None:
    """A served weight is on the grid, its code comes back (or one of equal weight), and it never moves."""
    q = torch.randint(0, grid.max_code + 1, (ROWS, COLUMNS), dtype=torch.uint8)
    weight = grid.dequantize(q, torch.float32)
    q_down, frac_ref = grid.neighbours(weight)
    again = grid.dequantize(grid.nearest(weight), torch.float32)
    assert torch.equal(again, weight)
    distinct = (_levels(grid).diff(dim=0) != 0).all(dim=0)
    assert torch.equal(grid.nearest(weight)[distinct], q[distinct])
    assert bool(((frac_ref == 0) | (frac_ref == 1)).all())
    assert int(q_down.max()) < grid.max_code


@pytest.mark.parametrize(
    "make",
    [
        lambda s: UniformGrid(4, 32, True, s),
        lambda s: UniformGrid(4, 32, False, s.half(), torch.full(s.shape, 15, dtype=torch.uint8)),
        lambda s: UniformGrid(4, 32, True, s, g_idx=torch.arange(COLUMNS) // 32),
        lambda s: AffineGrid(4, 32, s, torch.full(s.shape, 0.03)),
        lambda s: TableGrid.nf4(s, 32),
        lambda s: TableGrid.nvfp4(
            s.repeat_interleave(2, dim=1).to(torch.float8_e4m3fn), torch.tensor([1.0])
        ),
    ],
)  # fmt: skip
def test_a_group_of_one_level_never_moves(make: Callable[[Tensor], Grid]) -> None:
    """A zero scale (a K-quant sub-block of sc = 0): finite everywhere, no coordinate of it may move."""
    scale = _scales(8)
    scale[:, 3] = 0.0
    grid = make(scale)
    weight = _weight()
    q_down, frac_ref = grid.neighbours(weight)
    assert bool(torch.isfinite(frac_ref).all())
    assert bool((frac_ref[:, 96:128] == 0).all())
    assert bool(((frac_ref[:, :96] != 0) & (frac_ref[:, :96] != 1)).any())
    soft = grid.soft_weight(q_down, torch.rand(ROWS, COLUMNS), torch.float32)
    assert torch.equal(soft[:, 96:128], grid.dequantize(q_down, torch.float32)[:, 96:128])
    hessian = torch.eye(COLUMNS)
    for codes in (grid.nearest(weight), gptq(weight, hessian, grid), greedy(weight, hessian, grid)):
        assert bool(torch.isfinite(grid.dequantize(codes, torch.float32)).all())


def test_layerwise_methods_work_on_every_kind(some_grid: Grid) -> None:
    """GPTQ and greedy beat nearest on the layer's own loss, with codes in range."""
    grid = some_grid
    x = torch.randn(512, COLUMNS) @ torch.randn(COLUMNS, COLUMNS).tril() / 16
    hessian = x.T @ x
    weight = _weight()

    def loss(codes: Tensor) -> float:
        error = grid.dequantize(codes, torch.float64) - weight.double()
        return float(((error @ hessian.double()) * error).sum())

    nearest = loss(grid.nearest(weight))
    for method in (gptq, greedy):
        codes = method(weight, hessian, grid)
        assert codes.dtype == torch.uint8 and int(codes.max()) <= grid.max_code
        assert loss(codes) < nearest


def test_gptq_of_an_identity_hessian_is_nearest(some_grid: Grid) -> None:
    """With uncorrelated inputs nothing is fed on: the column rounding of GPTQ is the grid's own nearest."""
    grid = some_grid
    weight = _weight()
    found = grid.dequantize(gptq(weight, torch.eye(COLUMNS), grid), torch.float32) - weight
    nearest = grid.dequantize(grid.nearest(weight), torch.float32) - weight
    unit = torch.finfo(torch.float16).eps if _in_half(grid) else 4e-7
    assert bool((found.abs() <= nearest.abs() + unit * _levels(grid).abs().amax(dim=0)).all())


def test_e8m0_scales_are_powers_of_two() -> None:
    exponents = torch.arange(255, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** (e - 127) for e in range(255)], dtype=torch.float64)
    assert torch.equal(TableGrid.mxfp4(exponents.unsqueeze(0)).scale.double().squeeze(0), expected)


def test_e2m1_nibbles() -> None:
    """Codes are the nibbles in ascending order of what they stand for; both zeros have one."""
    nibbles = torch.arange(16, dtype=torch.uint8)
    magnitude = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[(nibbles & 7).long()]
    value = torch.where(nibbles & 8 != 0, -magnitude, magnitude)
    codes = e2m1_codes(nibbles)
    assert sorted(codes.tolist()) == list(range(16))
    assert torch.equal(torch.tensor(E2M1_LEVELS)[codes.long()], value)
    assert torch.equal(e2m1_nibbles(codes), nibbles)


def test_the_two_zeros_are_no_neighbours() -> None:
    grid = TableGrid.mxfp4(torch.full((1, 1), 127, dtype=torch.uint8))
    weight = torch.tensor([[-0.4, -0.0, 0.0, 0.4, 7.0, -7.0] + [0.0] * 26])
    q_down, frac_ref = grid.neighbours(weight)
    assert q_down[0, :6].tolist() == [6, 8, 8, 8, 14, 0]
    assert frac_ref[0, 1] == 0 and frac_ref[0, 2] == 0
    assert frac_ref[0, 4] == 1.5 and frac_ref[0, 5] == -0.5


def test_nf4_table_is_that_of_the_normal_distribution() -> None:
    """Quantiles of the published construction: eight at or above zero, eight at or below, offset 0.9677083."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((below, torch.zeros(1, dtype=torch.float64), above)).sort().values
    assert torch.allclose(levels / levels.abs().max(), torch.tensor(NF4_LEVELS).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "mxfp4", "nvfp4"])
def test_search_never_loses_to_absmax(kind: GridKind) -> None:
    weight = torch.randn(32, 256) * torch.rand(32, 1)
    errors = {}
    for rule in ("absmax", "search"):
        grid = place_grid(weight, GridConfig(*_fixed(kind), grid=rule, kind=kind))  # type: ignore[arg-type]
        error = (grid.dequantize(grid.nearest(weight), torch.float32) - weight).square()
        errors[rule] = error.unflatten(1, (-1, grid.group_size)).sum(-1)
    assert bool((errors["search"] <= errors["absmax"] * (1 + 1e-4) + 1e-9).all())
    assert float(errors["search"].sum()) < float(errors["absmax"].sum())


@given(st.sampled_from(("nf4", "mxfp4", "nvfp4")), st.floats(-8, 4), st.integers(1, 3))
def test_placed_scales_cover_the_weight(kind: GridKind, magnitude: float, blocks: int) -> None:
    """absmax: no weight beyond the ends; scales positive, and exactly what the file can hold."""
    weight = torch.randn(3, 64 * blocks) * 10.0**magnitude
    grid = place_grid(weight, GridConfig(*_fixed(kind), grid="absmax", kind=kind))
    assert isinstance(grid, TableGrid) and grid.table is not None
    assert bool((grid.scale > 0).all())
    reach = grid.scale.repeat_interleave(grid.group_size, dim=1) * float(grid.table[-1])
    assert bool((weight.abs() <= reach * (1 + 1e-6)).all())
    if kind == "mxfp4":
        assert bool((torch.frexp(grid.scale).mantissa == 0.5).all())
    if kind == "nvfp4":
        assert grid.block_scale is not None and grid.tensor_scale is not None
        assert torch.equal(grid.scale, grid.block_scale.float() / grid.tensor_scale)


@pytest.mark.parametrize("kind", ["nf4", "mxfp4", "nvfp4"])
def test_zero_blocks_stay_zero(kind: GridKind) -> None:
    weight = torch.randn(4, 128)
    weight[:, :64] = 0.0
    grid = place_grid(weight, GridConfig.of_kind(kind))
    assert bool((grid.dequantize(grid.nearest(weight), torch.float32)[:, :64] == 0).all())


def test_rejects_bad_input() -> None:
    one = torch.ones(2, 1)
    for make, word in (
        (lambda: UniformGrid(4, -1, True, one * torch.nan), "scale"),
        (lambda: UniformGrid(4, -1, True, one, g_idx=torch.tensor([0, 1])), "g_idx"),
        (lambda: AffineGrid(4, -1, one, one * torch.inf), "minimum"),
        (lambda: AffineGrid(4, -1, one, torch.ones(2, 2)), "minimum"),
        (lambda: TableGrid.nf4(-one), "scale"),
        (lambda: TableGrid.mxfp4(torch.full((1, 1), 255, dtype=torch.uint8)), "255"),
        (lambda: TableGrid.nvfp4(one.to(torch.float8_e4m3fn), torch.zeros(1)), "tensor_scale"),
        (lambda: TableGrid(4, -1, torch.zeros(3), one), "table"),
        (lambda: place_grid(torch.zeros(2, 40), GridConfig.of_kind("nf4")), "64"),
        (lambda: place_grid(one * torch.nan, GridConfig.of_kind("mxfp4")), "finite"),
        (lambda: GridConfig(3, 32, True, kind="nf4"), "nf4"),
        (lambda: GridConfig(kind="nf5"), "kind"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=word):
            make()
