# SPDX-License-Identifier: Apache-2.0
"""The record that solvers hand to formats: dequantization by its definition, and refusal of what contradicts itself."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from discquant.formats import QuantizedLinear


def layer(rows: int, columns: int, num_bits: int, group_size: int, symmetric: bool) -> QuantizedLinear:
    groups = -(-columns // (columns if group_size == -1 else group_size))
    q = torch.randint(0, 1 << num_bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) + 0.01).bfloat16()
    zero = None if symmetric else torch.randint(0, 1 << num_bits, (rows, groups), dtype=torch.uint8)
    return QuantizedLinear("some.layer", q, scale, zero, num_bits, group_size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 4, 5, 32])
def test_dequantize_is_the_exact_product_rounded_once(
    num_bits: int, group_size: int, symmetric: bool
) -> None:
    """Against rational arithmetic; 13 columns leave a shorter last group."""
    given = layer(3, 13, num_bits, group_size, symmetric)
    size = 13 if group_size == -1 else group_size
    zero = given.zero_point
    exact = [
        [
            Fraction(float(given.scale[n, k // size]))
            * (int(given.q[n, k]) - (1 << (num_bits - 1) if zero is None else int(zero[n, k // size])))
            for k in range(13)
        ]
        for n in range(3)
    ]
    wide = given.dequantize(torch.float32)
    assert [[Fraction(value) for value in row] for row in wide.tolist()] == exact
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(given.dequantize(dtype), wide.to(dtype))


def test_empty() -> None:
    empty = layer(0, 8, 4, 4, True)
    assert empty.dequantize(torch.bfloat16).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [[1]]}, TypeError, "some.layer: q must be a Tensor, got list"),
        (
            {"q": torch.zeros(2, 8)},
            ValueError,
            "some.layer: q must be uint8 of 2 dimensions, got torch.float32",
        ),
        (
            {"q": torch.full((2, 8), 8, dtype=torch.uint8)},
            ValueError,
            r"some.layer: q must be below 2\^num_bits = 8",
        ),
        (
            {"scale": torch.ones(2, 3)},
            ValueError,
            r"scale must be floating with .* = \[2, 2\], got .* \[2, 3\]",
        ),
        ({"scale": torch.ones(2, 2).int()}, ValueError, "scale must be floating"),
        ({"scale": torch.full((2, 2), float("nan"))}, ValueError, "some.layer: scale must be finite"),
        ({"zero_point": torch.zeros(2, 2)}, ValueError, "some.layer: zero_point must be uint8"),
        (
            {"zero_point": torch.full((2, 2), 9, dtype=torch.uint8)},
            ValueError,
            r"zero_point must be below .* = 8, got 9",
        ),
        ({"num_bits": 9}, ValueError, "some.layer: num_bits must be an integer from 2 to 8, got 9"),
        ({"group_size": 0}, ValueError, "some.layer: group_size must be -1 or positive, got 0"),
    ],
)
def test_rejects_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"q": torch.zeros(2, 8, dtype=torch.uint8), "scale": torch.ones(2, 2), "zero_point": None}
    with pytest.raises(error, match=message):
        QuantizedLinear(**({"name": "some.layer", "num_bits": 3, "group_size": 4} | good | change))  # type: ignore[arg-type]
