# SPDX-License-Identifier: Apache-2.0
"""Products with Kronecker factors that are kept as diagonal blocks, and their packed triangles."""

from __future__ import annotations

import pytest
import torch

from discquant.solver.kronecker import (
    curvature_gradient,
    factor_shape,
    gram,
    pack_triangles,
    products_at_once,
    times,
    triangle_shape,
    triangle_trace,
    unpack_triangles,
)


def dense(blocks: torch.Tensor, size: int) -> torch.Tensor:
    """The whole factor that its blocks stand for."""
    return torch.block_diag(*blocks)[:size, :size]


@pytest.mark.parametrize(("size", "width"), [(12, 16), (12, 12), (12, 4), (13, 5), (1, 8)])
def test_blocks_are_the_diagonal_of_the_gram_matrix(size: int, width: int) -> None:
    rows = torch.randn(9, size, dtype=torch.float64)
    blocks = gram(rows, width)
    assert blocks.shape == factor_shape(size, width)
    whole = rows.T @ rows
    kept = torch.arange(size) // min(width, size)
    expected = torch.where(kept[:, None] == kept[None, :], whole, torch.zeros_like(whole))
    torch.testing.assert_close(dense(blocks, size), expected)
    matrix = torch.randn(3, size, dtype=torch.float64)
    torch.testing.assert_close(times(matrix, blocks), matrix @ expected)


@pytest.mark.parametrize(("size", "width"), [(12, 4), (13, 5), (1, 8), (130, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_triangles_are_the_symmetric_blocks(size: int, width: int, dtype: torch.dtype) -> None:
    """A little over half the entries, and every one of them again."""
    blocks = gram(torch.randn(9, size), width).to(dtype)
    packed = pack_triangles(blocks)
    assert packed.shape == triangle_shape(size, width) and packed.dtype == dtype
    assert packed[-1, 0] == blocks[-1, 0, 0] and packed[-1, -1] == blocks[-1, -1, -1]
    assert torch.equal(unpack_triangles(packed), blocks)
    # Of blocks that sums in another order left unequal in the last bit, the lower triangle counts.
    found = unpack_triangles(pack_triangles(blocks.triu(1) * 2 + blocks.tril()))
    assert torch.equal(found, blocks)


@pytest.mark.parametrize("width", [64, 5])
def test_term_is_the_gradient_of_its_quadratic(width: int) -> None:
    error = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    inputs = gram(torch.randn(20, 11, dtype=torch.float64), width)
    outputs = gram(torch.randn(20, 7, dtype=torch.float64), width)
    quadratic = 0.5 * (error * (dense(outputs, 7) @ error @ dense(inputs, 11))).sum()
    (expected,) = torch.autograd.grad(quadratic, error)
    torch.testing.assert_close(curvature_gradient(error.detach(), inputs, outputs), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "width"),
    [((7, 11), 64), ((7, 11), 5), ((12, 15), 3), ((16, 64), 16), ((64, 40), 16), ((1, 9), 4)],
)
def test_products_at_once(shape: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    """What a GPU takes: the same gradient, blocks that divide the sides or do not; bfloat16 loses its own bits only."""
    error = torch.randn(shape, dtype=torch.float64).mul(1e-3)
    inputs, outputs = (
        gram(torch.randn(40, size, dtype=torch.float64), width).to(dtype) for size in reversed(shape)
    )
    oracle = curvature_gradient(error, inputs.double(), outputs.double())
    found = products_at_once(error.to(dtype), inputs, outputs)
    assert found.is_contiguous() and found.dtype == torch.promote_types(dtype, torch.float32)
    # The rule of the ops, with what the loop of products gives in this dtype.
    baseline = curvature_gradient(error.to(dtype), inputs, outputs).double()
    allowed = (baseline - oracle).abs().max() + torch.finfo(dtype).eps * oracle.abs().max()
    assert float((found.double() - oracle).abs().max()) <= 2 * float(allowed)
    # A part taken from a wider matrix is not copied first, nor is anything beside it written.
    wide = torch.full((shape[0] + 2, shape[1] + 3), float("nan"), dtype=dtype)
    part = wide[1:-1, 2:-1]
    part.copy_(error)
    assert torch.equal(products_at_once(part, inputs, outputs), found)


def test_rounding_to_bfloat16_is_far_below_the_noise() -> None:
    """Of blocks as wide as the default: half a percent at most of the gradient's norm, where the factors have some."""
    error = torch.randn(512, 1024) * torch.rand(512, 1)
    inputs, outputs = (gram(torch.randn(2048, size) * torch.rand(size), 512) / 2048 for size in (1024, 512))
    narrow = [t.bfloat16() for t in (error, inputs, outputs)]
    exact = curvature_gradient(error.double(), narrow[1].double(), narrow[2].double())
    found = products_at_once(*narrow).double()
    assert float((found - exact).norm() / exact.norm()) < 0.005
    sampled = gram(torch.randn(2048, 512), 512) / 2048
    assert float((sampled[0] - torch.eye(512)).norm() / 512**0.5) > 0.1


def test_the_trace_of_packed_triangles() -> None:
    for size, width in ((12, 4), (13, 5), (1, 8), (130, 64)):
        blocks = gram(torch.randn(9, size), width)
        expected = torch.diagonal(blocks, dim1=1, dim2=2).sum()
        torch.testing.assert_close(triangle_trace(pack_triangles(blocks)), expected)
        narrow = triangle_trace(pack_triangles(blocks).bfloat16())
        assert narrow.dtype == torch.float32 and abs(float(narrow / expected) - 1) < 0.01
