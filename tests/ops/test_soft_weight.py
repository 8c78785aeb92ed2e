# SPDX-License-Identifier: Apache-2.0
"""soft_weight: the seven properties, and equality with the reference bit for bit in float32."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from discquant.ops import _registry as registry
from discquant.ops import soft_linear, soft_weight
from discquant.ops.reference import soft_weight as reference
from discquant.ops.reference.projected_step import decode_frac_ref

OP = torch.ops.discquant.soft_weight.default
CPP = torch.ops.discquant.soft_weight_cpp2_.default
BWD = torch.ops.discquant.soft_weight_bwd.default
CASES = {
    "aligned": ((16, 256), {"group_size": 64}),
    "odd": ((17, 131), {"group_size": 32, "packed": True, "zero": True}),
    "prime-table": ((7, 61), {"group_size": 16, "table": True}),
    "one": ((1, 1), {"group_size": -1}),
    "empty": ((0, 8), {"group_size": -1}),
    "no-columns": ((3, 0), {"group_size": 4}),
    "gather": ((5, 300), {"group_size": 100, "zero": True}),
    "row": ((3, 70), {"group_size": -1, "packed": True}),
    "three-bits": ((4, 64), {"group_size": 32, "num_bits": 3, "zero": True}),
    "table-packed": ((3, 40), {"group_size": 16, "table": True, "packed": True}),
    "minimum": ((9, 72), {"group_size": 16, "minimum": torch.float32, "packed": True}),
    "minimum-bfloat": ((4, 70), {"group_size": -1, "minimum": torch.bfloat16, "num_bits": 8}),
    "minimum-half": ((5, 61), {"group_size": 24, "minimum": torch.float16}),
    "index": ((6, 130), {"group_size": 32, "index": True, "zero": True}),
    "index-packed": ((3, 45), {"group_size": 16, "index": True, "packed": True}),
    "index-minimum": ((3, 64), {"group_size": 16, "index": True, "minimum": torch.bfloat16}),
    "index-table": ((3, 33), {"group_size": 16, "index": True, "table": True}),
}
# One small grid of each kind.
KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"zero": True}, "table": {"table": True}, "minimum": {"minimum": torch.float32},
    "index": {"index": True, "zero": True},
}  # fmt: skip


def _options(case: dict[str, Any], grid: Any) -> dict[str, Any]:
    return {
        "num_bits": case.get("num_bits", 4), "group_size": case["group_size"], "table": grid.table, **grid.further(),
    }  # fmt: skip


@pytest.mark.parametrize("impl", ["triton", "cpp"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("frac", [torch.float32, torch.uint8, torch.uint16, torch.bfloat16])
def test_equals_reference(name, frac, impl, make_grid, assert_equal, device):
    """float32 results equal the reference bit for bit, whatever the storage of frac."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    shape, case = CASES[name]
    grid = make_grid(shape, frac=frac, **case)
    args, options = grid[:4], _options(case, grid)
    assert_equal(
        soft_weight(*args, **options, impl=impl), soft_weight(*args, **options, impl="reference"), name
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, dtype, make_grid, assert_close):
    """Output and gradient against float64, for every result dtype."""
    shape, case = CASES[name]
    scale = torch.float64 if dtype == torch.float64 else torch.float32
    grid = make_grid(shape, frac=scale, scale=scale, **case)
    results = {}
    for impl, wide in (("triton", False), ("reference", False), ("oracle", True)):
        tensors = [t.double() if wide and t is not None and t.is_floating_point() else t for t in grid]
        tensors[1] = tensors[1].detach().requires_grad_()
        out = soft_weight(
            *tensors[:4], **_options(case, type(grid)(*tensors)), dtype=torch.float64 if wide else dtype,
            impl="reference" if wide else impl,
        )  # fmt: skip
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out)
        (grad,) = torch.autograd.grad((out * weight.to(out.dtype)).sum(), tensors[1])
        results[impl] = (out.detach(), grad)
    for i, what in enumerate(("weight", "grad")):
        assert_close(results["triton"][i], results["oracle"][i], results["reference"][i], what)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transpose", [False, True])
def test_gradcheck(kind, transpose, make_grid):
    grid = make_grid((3, 11), frac=torch.float64, scale=torch.float64, group_size=8, **KINDS[kind])
    # Away from frac = 1, where a table's upper level is taken as it is.
    frac = (grid.frac * 0.9).requires_grad_()

    def weight(position):
        return soft_weight(
            grid.q_down, position, *grid[2:4], table=grid.table, **grid.further(), num_bits=4, group_size=8,
            transpose=transpose, impl="triton",
        )  # fmt: skip

    assert torch.autograd.gradcheck(weight, (frac,))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_gradient_of_a_table_at_both_ends(impl, make_grid, device):
    """The gap to the upper level, also where that level is taken as it is."""
    grid = make_grid((3, 32), table=True, packed=True)
    kwargs = {"num_bits": 4, "group_size": 32, "table": grid.table, "impl": impl}
    codes, one = grid.codes.long(), torch.ones(1, 32, device=device)
    gap = grid.scale * (grid.table[codes + 1] - grid.table[codes])
    for layer in (
        lambda frac: soft_weight(grid.q_down, frac, grid.scale, **kwargs),
        lambda frac: soft_linear(one, grid.q_down, frac, grid.scale, **kwargs),
    ):
        for place in (0.0, 0.5, 1.0):
            frac = torch.full((3, 32), place, device=device, requires_grad=True)
            layer(frac).sum().backward()
            assert torch.equal(frac.grad, gap), place


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("name", ["table", "zero_point"])
def test_float64_of_a_grid(name, impl, make_grid):
    """One float64 input is enough: nothing is rounded to float32 on the way."""
    grid = make_grid((3, 32))
    value = torch.rand((16,) if name == "table" else (3, 1), dtype=torch.float64, device=grid.scale.device)
    kwargs = {"num_bits": 4, "group_size": 32, "dtype": torch.float64, name: value.sort(0).values}
    found = soft_weight(grid.q_down, torch.zeros_like(grid.frac), grid.scale, **kwargs, impl=impl)
    code = grid.codes.long()
    expected = kwargs[name][code] if name == "table" else code - kwargs[name]
    assert torch.equal(found, grid.scale.double() * expected)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("minimum", [torch.float32, torch.bfloat16])
def test_gradient_passes_the_rounding_of_levels(minimum, impl, make_grid, assert_equal):
    """Gradient of frac is the step itself, also at both ends, where neighbouring levels round to one number."""
    grid = make_grid((3, 32), minimum=minimum, num_bits=8, group_size=16)
    scale = grid.scale * 1e-3
    frac = torch.linspace(0, 1, 96, device=scale.device).view(3, 32).requires_grad_()
    out = soft_weight(
        grid.q_down, frac, scale, minimum=grid.minimum, num_bits=8, group_size=16, dtype=torch.float32, impl=impl
    )  # fmt: skip
    out.sum().backward()
    assert_equal(frac.grad, scale.repeat_interleave(16, dim=1))


def test_grad_subsets(make_grid):
    """frac is the one differentiable input; without it nothing is recorded, scale and table are refused."""
    grid = make_grid((4, 32), table=True)
    kwargs = {"num_bits": 4, "group_size": 32, "impl": "triton"}
    assert not soft_weight(grid.q_down, grid.frac, grid.scale, table=grid.table, **kwargs).requires_grad
    frac = grid.frac.clone().requires_grad_()
    assert soft_weight(grid.q_down, frac, grid.scale, table=grid.table, **kwargs).requires_grad
    for name in ("scale", "table"):
        tensors = {"scale": grid.scale, "table": grid.table}
        tensors[name] = tensors[name].clone().requires_grad_()
        with pytest.raises(NotImplementedError, match=f"soft_weight: {name} must be a constant"):
            soft_weight(grid.q_down, frac, tensors["scale"], table=tensors["table"], **kwargs)
    minimum = grid.scale.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="soft_weight: minimum must be a constant"):
        soft_weight(grid.q_down, frac, grid.scale, minimum=minimum, **kwargs)


@pytest.mark.parametrize("frac", [torch.float32, torch.uint8, torch.float64])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(frac, permuted, make_grid):
    scale = torch.float64 if frac == torch.float64 else torch.float32
    grid = make_grid((6, 40), frac=frac, scale=scale, group_size=16, packed=not permuted, zero=True)
    q_down, position = grid.q_down, grid.frac
    if permuted:
        q_down, position = (t.t().contiguous().t() for t in (q_down, position))
    torch.library.opcheck(
        OP, (q_down, position, grid.scale, grid.zero_point, None, 4, 16, scale, False, False)
    )
    gradient = torch.randn(6, 40, device=q_down.device, dtype=scale)
    torch.library.opcheck(BWD, (gradient, q_down, grid.scale, None, 4, 16, scale))
    if frac == torch.float32:
        other = make_grid((6, 40), group_size=16, minimum=torch.bfloat16, index=True)
        further = (other.minimum, other.g_idx)
        torch.library.opcheck(
            OP, (q_down, position, other.scale, None, None, 4, 16, scale, False, False, *further)
        )
        torch.library.opcheck(BWD, (gradient, q_down, other.scale, None, 4, 16, scale, other.g_idx))


@pytest.mark.parametrize(
    "case", [{"zero": True, "packed": True}, {"table": True}, {"minimum": torch.float32, "index": True}]
)
def test_opcheck_cpp(case, make_grid):
    """The C++ operator, where it is built; it fills the tensor that it is given."""
    if registry.cpp_problem(torch.device("cpu"), "soft_weight_cpp2_") is not None:
        return
    grid = make_grid((6, 40), frac=torch.uint8, group_size=16, **case)
    weight, further = (
        [None if tensor is None else tensor.cpu() for tensor in tensors] for tensors in (grid[:5], grid[6:])
    )
    for transpose in (False, True):
        out = torch.empty((40, 6) if transpose else (6, 40))
        torch.library.opcheck(CPP, (out, *weight, 4, 16, False, transpose, *further))


@pytest.mark.parametrize("kind", ["plain", "minimum", "index"])
def test_compile(kind, make_grid, assert_equal):
    """One graph, also with sizes that vary."""

    def weight(q_down, frac, scale, further):
        return soft_weight(q_down, frac, scale, **further, num_bits=4, group_size=16, impl="triton") * 2

    compiled = torch.compile(weight, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 64), (9, 48)):
        grid = make_grid(
            shape, group_size=16, minimum=torch.bfloat16 if kind == "minimum" else None, index=kind == "index"
        )
        frac = grid.frac.clone().requires_grad_()
        out = compiled(grid.q_down, frac, grid.scale, grid.further())
        assert_equal(out.detach(), weight(grid.q_down, grid.frac, grid.scale, grid.further()))
        out.sum().backward()
        assert_equal(frac.grad, reference.expand_groups(2 * grid.scale, 16, shape[1], grid.g_idx))


@pytest.mark.parametrize("impl", ["reference", "triton", "auto"])
@pytest.mark.parametrize("table", [False, True])
def test_end_points(impl, table, make_grid, assert_equal):
    """frac 0 and 1 give the grid's own two neighbours exactly, in every storage of frac."""
    grid = make_grid((5, 64), zero=not table, table=table)
    step = grid.scale.repeat_interleave(32, dim=1)
    for value in (0, 1):
        codes = grid.codes.float() + value
        if table:
            expected = step * grid.table[codes.long()]
        else:
            expected = step * (codes - grid.zero_point.repeat_interleave(32, dim=1).float())
        for dtype, top in ((torch.float32, 1), (torch.uint8, 255), (torch.uint16, 65535)):
            frac = torch.full((5, 64), value * top, dtype=torch.int32, device=step.device).to(dtype)
            out = soft_weight(
                grid.q_down,
                frac,
                grid.scale,
                grid.zero_point,
                num_bits=4,
                group_size=32,
                table=grid.table,
                impl=impl,
            )
            assert_equal(out, expected, f"{dtype} {value}")


@pytest.mark.parametrize("impl", ["triton", "cpp"])
def test_reference_codes_and_transpose(impl, make_grid, assert_equal, device):
    """The teacher's weight from uint8 codes, and the transposed write."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    grid = make_grid((9, 70), frac=torch.uint8, packed=True, zero=True)
    args, kwargs = (grid.q_down, grid.frac, grid.scale, grid.zero_point), {"num_bits": 4, "group_size": 32}
    expected = reference.soft_weight(
        grid.q_down, decode_frac_ref(grid.frac, torch.float32), *args[2:], num_bits=4, group_size=32
    )
    assert_equal(soft_weight(*args, **kwargs, is_reference=True, impl=impl), expected)
    turned = soft_weight(*args, **kwargs, is_reference=True, transpose=True, impl=impl)
    assert turned.is_contiguous()
    assert_equal(turned, expected.t().contiguous())


def test_strides(make_grid, assert_equal):
    """Transposed and sliced inputs give the same as contiguous ones."""
    grid = make_grid((6, 64), group_size=32)
    expected = soft_weight(grid.q_down, grid.frac, grid.scale, num_bits=4, group_size=32, impl="triton")
    odd = [t.t().contiguous().t() for t in (grid.q_down, grid.frac, grid.scale)]
    assert_equal(soft_weight(*odd, num_bits=4, group_size=32, impl="triton"), expected, "transposed")
    wide = torch.rand(12, 130, device=grid.frac.device)
    wide[::2, 2::2] = grid.frac
    sliced = wide[::2, 2::2]
    assert_equal(
        soft_weight(grid.q_down, sliced, grid.scale, num_bits=4, group_size=32, impl="triton"),
        expected,
        "sliced",
    )


def test_strides_of_a_minimum_and_an_index(make_grid, assert_equal):
    """Each as it lies: the minimum in other strides than the scale, every other entry of an int64 index."""
    grid = make_grid((6, 64), minimum=torch.float32, index=True)
    options = {"num_bits": 4, "group_size": 32, "impl": "triton"}
    expected = soft_weight(*grid[:3], **options, **grid.further())
    turned = grid.minimum.t().contiguous().t()
    index = torch.full((128,), -7, dtype=torch.int64, device=turned.device)
    index[1::2] = grid.g_idx
    assert_equal(soft_weight(*grid[:3], **options, minimum=turned, g_idx=index[1::2]), expected)


@pytest.mark.parametrize("impl", ["reference", "triton", "auto"])
@pytest.mark.parametrize("engine", [torch.float32, torch.float16, torch.bfloat16])
def test_end_points_of_a_minimum(engine, impl, make_grid, assert_equal):
    """frac 0 and 1 give scale * q + minimum as computed in the engine's own dtype, exactly."""
    grid = make_grid((5, 64), minimum=engine, packed=True)
    scale = grid.scale.to(engine)
    step, minimum = (t.repeat_interleave(32, dim=1) for t in (scale, grid.minimum))
    for value in (0, 1):
        expected = (step * (grid.codes + value).to(engine) + minimum).float()
        for dtype, top in ((torch.float32, 1), (torch.uint8, 255), (torch.bfloat16, 1)):
            frac = torch.full_like(grid.frac, value * top).to(dtype)
            kwargs = {"num_bits": 4, "group_size": 32, "minimum": grid.minimum, "dtype": torch.float32}
            out = soft_weight(grid.q_down, frac, scale, **kwargs, impl=impl)
            assert_equal(out, expected, f"{dtype} {value}")


def test_every_group_mode(make_grid, assert_equal):
    """Group sizes that divide the tile, are divided by it, do neither, or exceed the row."""
    for cols, group_size in itertools.product((48, 97), (8, 16, 24, 32, 64, 1000)):
        grid = make_grid((3, cols), group_size=group_size, zero=True)
        options = {"num_bits": 4, "group_size": group_size}
        assert_equal(
            soft_weight(*grid[:4], **options, impl="triton"),
            soft_weight(*grid[:4], **options, impl="reference"),
            f"{cols} columns in groups of {group_size}",
        )


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic(kind, make_grid, assert_equal):
    grid = make_grid((8, 96), frac=torch.uint8, **KINDS[kind])
    options = _options({"group_size": 32}, grid)
    first, second = (soft_weight(*grid[:4], **options, impl="triton") for _ in range(2))
    assert_equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_llama_shapes_on_gpu(dtype, make_grid, assert_close):
    grid = make_grid((14336, 4096), frac=torch.uint8, group_size=64, packed=True, zero=True)
    kwargs = {"num_bits": 4, "group_size": 64}
    oracle = soft_weight(*grid[:4], **kwargs, dtype=torch.float64, impl="reference")
    baseline = soft_weight(*grid[:4], **kwargs, dtype=dtype, impl="reference")
    assert_close(soft_weight(*grid[:4], **kwargs, dtype=dtype, impl="triton"), oracle, baseline)


@pytest.mark.parametrize(
    ("low", "high", "denominator", "rest"),
    [
        (0, 255, 255, -2.319175823606301e-10),
        (0, 65535, 65535, 3.552767888909125e-15),
        (-63, 192, 126, -4.582698387434192e-10),
    ],
)
def test_quotient_by_a_reciprocal_in_two_parts(low, high, denominator, rest):
    """What `common.divide_code` does on a GPU, in exact rationals: always the correctly rounded quotient."""
    inverse = np.float32(1) / np.float32(denominator)
    assert np.float32(float(Fraction(1, denominator) - Fraction(float(inverse)))) == np.float32(rest)
    for code in range(low, high + 1):
        small = np.float32(float(Fraction(code) * Fraction(rest)))
        found = Fraction(code) * Fraction(float(inverse)) + Fraction(float(small))
        assert np.float32(float(found)) == np.float32(code / denominator), code
