# SPDX-License-Identifier: Apache-2.0
"""The exact mode on a CPU: what a dense layer gives on the rounded weight, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from discquant import _extension
from discquant.ops import _packed_paths
from discquant.ops.packed_linear import dequantize_packed, packed_linear

CPP = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
Make = Callable[..., Any]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@CPP
def test_exact_mode_is_the_dense_layer(make: Make) -> None:
    """The exact mode gives what nn.functional.linear gives on the rounded weight."""
    case = make(90, 200, 4, 64, True)
    for dtype in FLOATS:
        x, bias = torch.randn(4, 200).to(dtype), torch.randn(90).to(dtype)
        weight = dequantize_packed(*case.tensors, **case.sizes, dtype=dtype)
        y = packed_linear(x, *case.tensors, bias, **case.sizes, mode="exact", impl="cpp")
        assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@CPP
@pytest.mark.parametrize("limit", [1 << 29, 32 * 200 * 2])
def test_exact_mode_takes_activations_as_they_lie(
    monkeypatch: pytest.MonkeyPatch, limit: int, make: Make
) -> None:
    """A dense layer adds its bias to rounded products where three dimensions of x are strided."""
    monkeypatch.setattr(_packed_paths, "_PANEL_BYTES", limit)
    case = make(90, 200, 4, 64, True)
    for dtype in FLOATS:
        bias = torch.randn(90).to(dtype)
        weight = dequantize_packed(*case.tensors, **case.sizes, dtype=dtype)
        wide = torch.randn(3, 5, 400).to(dtype)
        for x in (
            wide[..., :200],
            wide[..., :200].transpose(0, 1),
            wide[:, :1, 200:],
            wide[0, 0, :200],
            wide[:0, :, :200],
        ):
            y = packed_linear(x, *case.tensors, bias, **case.sizes, mode="exact")
            assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@CPP
def test_exact_mode_by_panels(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    """Panels of a large layer through one scratch per thread: every row from its own panel, answers that stay."""
    monkeypatch.setattr(_packed_paths, "_PANEL_BYTES", 32 * 200 * 2)
    cases = [make(n, 200, bits, 64, False) for n, bits in ((90, 4), (50, 3), (16, 4))]
    eye = torch.eye(200)

    def agrees(case: Any, dtype: torch.dtype) -> bool:
        expected = dequantize_packed(*case.tensors, **case.sizes, dtype=dtype).t()
        kept = [packed_linear(eye.to(dtype), *case.tensors, **case.sizes, mode="exact") for _ in range(20)]
        return all(torch.equal(y, expected) for y in kept)

    with ThreadPoolExecutor(9) as pool:
        assert all(pool.map(agrees, *zip(*itertools.product(cases, FLOATS), strict=True)))


def test_exact_mode_multiplies_a_layer_at_once(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    """A matmul of fewer rows may sum in another order, as oneDNN's does in bfloat16, so the largest are whole."""
    limits: list[int] = []

    def panels(out_features: int, in_features: int, limit: int) -> list[tuple[int, int]]:
        limits.append(limit)
        return [(0, out_features)]

    monkeypatch.setattr(_packed_paths, "_panels", panels)
    case = make(90, 200, 4, 64, True)
    for dtype in FLOATS:
        packed_linear(torch.randn(4, 200).to(dtype), *case.tensors, **case.sizes, mode="exact")
    assert len(limits) == len(FLOATS)
    for limit, dtype in zip(limits, FLOATS, strict=True):
        assert 5 * limit // 4 >= (28672 * 8192 if dtype != torch.float32 else 14336 * 8192)


def test_panels() -> None:
    """Every row once, in whole tiles, at most a quarter over the limit."""
    assert _packed_paths._panels(28672, 4096, 1 << 24) == [(f, f + 4096) for f in range(0, 28672, 4096)]
    for n, k in ((1, 1), (300, 65408), (4097, 10944), (128256, 8192), (1025 * 8, 1 << 14)):
        ranges = _packed_paths._panels(n, k, 1 << 24)
        assert ranges[0][0] == 0 and ranges[-1][1] == n
        assert all(a[1] == b[0] and b[0] % 16 == 0 for a, b in itertools.pairwise(ranges))
        assert max(last - first for first, last in ranges) * k <= max(16 * k, 5 << 22)


@CPP
def test_exact_mode_in_any_mode_of_torch(make: Make) -> None:
    """One scratch for sizes and dtypes in turn; inference mode, autocast and gradients change nothing."""
    cases = [make(n, k, 4, 64, True) for n, k in ((16, 64), (90, 200), (40, 128))]
    for _ in range(2):
        for case, dtype in itertools.product(cases, FLOATS):
            k = case.sizes["in_features"]
            expected = dequantize_packed(*case.tensors, **case.sizes, dtype=dtype).t()
            with torch.inference_mode():
                y = packed_linear(torch.eye(k, dtype=dtype), *case.tensors, **case.sizes, mode="exact")
            assert torch.equal(y, expected)
            with torch.autocast("cpu", torch.bfloat16):
                y = packed_linear(torch.eye(k, dtype=dtype), *case.tensors, **case.sizes, mode="exact")
            assert y.dtype == dtype and torch.equal(y, expected)
    x = torch.randn(2, 128, requires_grad=True)
    words, scale, zero = cases[2].tensors
    op = torch.ops.discquant.packed_linear_exact.default
    y = op(x, words, scale, zero, None, 40, 128, 4, 64, 2)
    # Not the product on the scratch, whose gradient would be wrong.
    assert "NotImplemented" in y.grad_fn.name()
