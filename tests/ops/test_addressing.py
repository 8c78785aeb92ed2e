# SPDX-License-Identifier: Apache-2.0
"""What kernels address: strided inputs, also vectors; codes past a table; rows that reach past 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from discquant.triton_kernels import hadamard as hadamard_kernels
from discquant.triton_kernels import soft_linear as kernels
from discquant.triton_kernels.soft_linear_tiles import CONFIGS
from torch import Tensor

from discquant.ops import (
    StepOptions,
    hadamard,
    linear_kl,
    projected_step_,
    soft_linear,
    soft_linear_dfrac,
    soft_linear_dx,
    soft_linear_step_,
    soft_weight,
)

ROWS, COLS, TOKENS = 8, 32, 5
STRATEGIES = ("fused", "materialise")


def _spread(tensor: Tensor) -> Tensor:
    """Equal to `tensor`, every other element of a larger one."""
    wide = torch.full([2 * size for size in tensor.shape], 77, dtype=tensor.dtype, device=tensor.device)
    strided = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return strided.copy_(tensor)


def _results(codes: Tensor, grid: Any, table: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Everything that Triton kernels make of a table."""
    x = torch.linspace(-1, 1, TOKENS * COLS, device=codes.device).view(TOKENS, COLS)
    dy = torch.linspace(2, -1, TOKENS * ROWS, device=codes.device).view(TOKENS, ROWS)
    common: dict[str, Any] = {"num_bits": 3, "group_size": 16, "table": table, "impl": "triton"}
    frac = grid.frac.clone().requires_grad_()
    weight = soft_weight(codes, frac, grid.scale, **common)
    weight.sum().backward()
    found = {"weight": weight.detach(), "weight gradient": frac.grad}
    for strategy in STRATEGIES:
        options = {**common, "strategy": strategy}
        found[f"y {strategy}"] = soft_linear(x, codes, grid.frac, grid.scale, None, bias, **options)
        found[f"dx {strategy}"] = soft_linear_dx(dy, codes, grid.frac, grid.scale, **options)
        found[f"dfrac {strategy}"] = soft_linear_dfrac(dy, x, codes, grid.scale, **options)
    options = StepOptions(optimizer="sgd", lr=0.05)
    step = {"group_size": 16, "options": options, "q_down": codes, "table": table, "impl": "triton"}
    ref = torch.full_like(grid.frac, 0.4)
    for name, op, gradient in (
        ("step", projected_step_, (dy.t() @ x,)),
        ("step in the epilogue", soft_linear_step_, ()),
    ):
        found[name] = grid.frac.clone()
        if gradient:
            op(found[name], ref, *gradient, grid.scale, **step)
        else:
            op(dy, x, found[name], ref, grid.scale, **step)
    return found


def test_vectors_of_any_stride(make_grid, assert_equal, device):
    """A table and a bias, every other element of larger ones."""
    grid = make_grid((ROWS, COLS), num_bits=3, group_size=16, table=True)
    bias = torch.randn(ROWS, device=device)
    expected = _results(grid.q_down, grid, grid.table, bias)
    for name, value in _results(grid.q_down, grid, _spread(grid.table), _spread(bias)).items():
        assert_equal(value, expected[name], name)


def test_codes_past_the_table(make_grid, assert_equal, device):
    """They read as the last level: what lies behind a table is not the caller's."""
    grid = make_grid((ROWS, COLS), num_bits=3, group_size=16, table=True)
    codes = grid.q_down.clone()
    codes[::2, ::3], codes[1, 1] = 200, 8
    table = torch.full((300,), float("nan"), device=device)[:8].copy_(grid.table)
    bias = torch.zeros(ROWS, device=device)
    expected = _results(codes.clamp(max=7), grid, grid.table, bias)
    for name, value in _results(codes, grid, table, bias).items():
        assert_equal(value, expected[name], name)
    if device.type == "cpu":
        common: dict[str, Any] = {"num_bits": 3, "group_size": 16, "table": table}
        assert_equal(soft_weight(codes, grid.frac, grid.scale, **common, impl="cpp"), expected["weight"])
        with pytest.raises(IndexError):
            soft_weight(codes, grid.frac, grid.scale, **common, impl="reference")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_groups_that_are_not_there(dtype, make_grid, assert_equal, device):
    """Kernels read the nearest group: what lies beside a scale is not the caller's. The reference refuses."""
    grid = make_grid((ROWS, COLS), group_size=8, minimum=torch.float32, index=True)
    index = grid.g_idx.to(dtype)
    index[::3], index[1::5] = -1, 4
    if dtype == torch.int64:
        # What 32 bits would wrap into another group.
        index[2::7], index[4::9] = 2**32, -(2**32) + 1
    x = torch.linspace(-1, 1, TOKENS * COLS, device=device).view(TOKENS, COLS)
    dy = torch.linspace(2, -1, TOKENS * ROWS, device=device).view(TOKENS, ROWS)
    common: dict[str, Any] = {"num_bits": 4, "group_size": 8}

    def results(g_idx: Tensor, **options: Any) -> list[Tensor]:
        weight = {**common, "minimum": grid.minimum, "g_idx": g_idx}
        found = [soft_weight(*grid[:3], **weight, impl=impl) for impl in options["impls"]]
        for strategy in STRATEGIES:
            kernel = {"strategy": strategy, "impl": "triton"}
            found.append(soft_linear(x, *grid[:3], **weight, **kernel))
            found.append(soft_linear_dx(dy, *grid[:3], **weight, **kernel))
            found.append(soft_linear_dfrac(dy, x, grid.q_down, grid.scale, **common, g_idx=g_idx, **kernel))
        return found

    impls = ("triton", "cpp") if device.type == "cpu" else ("triton",)
    for value, expected in zip(
        results(index, impls=impls), results(index.clamp(0, 3), impls=impls), strict=True
    ):
        assert_equal(value, expected)
    if device.type == "cpu":
        for wrong in (-1, 4):
            one = index.clamp(0, 3)
            one[5] = wrong
            with pytest.raises(IndexError):
                soft_weight(*grid[:3], **common, g_idx=one, impl="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_kl_of_strided_inputs(dtype, assert_equal, device):
    student, teacher = torch.randn(2, 7, 12, dtype=dtype, device=device)
    weight, bias = (
        torch.randn(33, 12, dtype=dtype, device=device),
        torch.randn(33, dtype=dtype, device=device),
    )
    mask = torch.arange(7, device=device) % 3 != 1
    expected = linear_kl(student, teacher, weight, bias=bias, mask=mask, chunk_size=3, impl="triton")
    inputs, vectors = (
        [_spread(tensor) for tensor in (student, teacher, weight)],
        (_spread(bias), _spread(mask)),
    )
    found = linear_kl(*inputs, bias=vectors[0], mask=vectors[1], chunk_size=3, impl="triton")
    # Matmuls may sum strided rows in another order.
    for left, right in zip(found, expected, strict=True):
        assert (left - right).abs().max() <= 64 * torch.finfo(dtype).eps * right.abs().max()
    one = torch.ones(1, dtype=dtype, device=device)
    vectors = (one.expand(33), one.bool().expand(7))
    constant = linear_kl(student, teacher, weight, bias=vectors[0], mask=vectors[1], impl="triton")
    plain = linear_kl(student, teacher, weight, bias=one.repeat(33), impl="triton")
    assert_equal(constant.per_token, plain.per_token)


@pytest.mark.parametrize("size", [32, 24])
def test_hadamard_of_strided_inputs(size, assert_equal, device):
    x, signs = torch.randn(3, 4, size, device=device), torch.randn(size, device=device).sign()
    for inverse in (False, True):
        expected = hadamard(x, signs, inverse=inverse, impl="triton")
        found = hadamard(_spread(x), _spread(signs), inverse=inverse, impl="triton")
        assert_equal(found, expected)
        if size == 32:
            # The launcher alone: K = 1, so the matrix is one entry.
            one = torch.ones(1, 1, dtype=torch.int8, device=device)
            flat = hadamard_kernels.hadamard_fwd(x.view(12, size), _spread(signs), one, inverse)
            assert_equal(flat.view_as(x), expected)
        turned = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert_equal(hadamard(turned, signs, inverse=inverse, impl="triton"), expected)


class _Recorder:
    """Stands for a kernel; keeps the arguments of its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launches.append(args)


def test_rows_longer_than_32_bits(monkeypatch):
    """The forward kernel counts along a row in 32 bits: what reaches further comes as a copy, and nothing else does."""
    recorder = _Recorder()
    monkeypatch.setattr(kernels, "_soft_linear_fwd_kernel", recorder)

    def apart(rows: int, cols: int, dtype: torch.dtype, stride: int) -> Tensor:
        return torch.empty_strided((rows, cols), (1, stride), dtype=dtype, device="meta")

    byte, single = torch.uint8, torch.float32
    for stride, copied in ((2**31 // COLS - 1, False), (2**31 // COLS, True)):
        # Of scales there is one for each two columns here, of packed codes too.
        tensors = [
            apart(TOKENS, COLS, single, stride), apart(ROWS, COLS // 2, byte, 2 * stride),
            apart(ROWS, COLS, byte, stride), apart(ROWS, COLS // 2, single, 2 * stride),
            apart(ROWS, COLS // 2, byte, 2 * stride),
        ]  # fmt: skip
        kernels.soft_linear_fwd(*tensors, None, None, 4, 2, False, CONFIGS["compact"])
        for given, passed in zip(tensors, recorder.launches[-1][1:6], strict=True):
            assert (passed is not given) == copied
            assert passed.is_contiguous() == copied
