# SPDX-License-Identifier: Apache-2.0
"""place_outliers_: every value at its place and nothing else changed, whatever the pieces hold. Nothing to derive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from discquant.ops import place_outliers_
from discquant.ops.reference.place_outliers import OUTLIER_PIECE, unpack_places
from discquant.solver.state import pack_places

OP = torch.ops.discquant.place_outliers_.default
SHAPES = [(1, 1), (3, 85), (7, 300), (64, 512), (1, 255 * 40)]
IMPLS = ("reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _arguments(
    shape: tuple[int, int], share: float, value: torch.dtype, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weight, places, counts and values; where they go."""
    flags = torch.rand(shape) < share
    low, count = pack_places(flags)
    values = torch.randn(low.numel(), dtype=torch.float64).to(value)
    weight = torch.randn(shape).to(dtype)
    return (*(t.to(device) for t in (weight, low, count, values)), flags.to(device))  # type: ignore[return-value]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_oracle(shape, share, impl, assert_equal, device):
    """As a mask fills them in the same order; pieces without any, and full ones."""
    weight, low, count, value, flags = _arguments(shape, share, torch.bfloat16, torch.float32, device)
    expected = weight.masked_scatter(flags, value.float())
    place_outliers_(weight, low, count, value, impl=impl)
    assert_equal(weight, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_once_to_the_weight(dtype, value, impl, assert_equal, device):
    weight, low, count, values, flags = _arguments((5, 200), 0.1, value, dtype, device)
    expected = weight.masked_scatter(flags, values.to(dtype))
    place_outliers_(weight, low, count, values, impl=impl)
    assert_equal(weight, expected)


def test_float64_is_the_references(assert_equal, device):
    weight, low, count, value, flags = _arguments((5, 200), 0.1, torch.float64, torch.float64, device)
    with pytest.raises(
        NotImplementedError, match=r"place_outliers_: impl must cover .* = triton, got float64"
    ):
        place_outliers_(weight, low, count, value, impl="triton")
    expected = weight.masked_scatter(flags, value)
    place_outliers_(weight, low, count, value)
    assert_equal(weight, expected)


@pytest.mark.parametrize("block", [(1, 16), (4, 256), (64, 8)])
def test_independent_of_tiling(block, assert_equal, device):
    from discquant.triton_kernels.place_outliers import place_outliers

    weight, low, count, value, flags = _arguments((31, 333), 0.07, torch.float16, torch.bfloat16, device)
    expected = weight.masked_scatter(flags, value.bfloat16())
    place_outliers(weight, low, count, value, block=block)
    assert_equal(weight, expected)


def test_every_other_element(assert_equal, device):
    """Of what is read; the weight is contiguous."""
    weight, low, count, value, flags = _arguments((9, 100), 0.2, torch.float32, torch.float32, device)
    low, count, value = (torch.stack([t, t], 1)[:, 0] for t in (low, count, value))
    expected = weight.masked_scatter(flags, value)
    place_outliers_(weight, low, count, value, impl="triton")
    assert_equal(weight, expected)


def test_places_are_those_packed(device):
    flags = torch.rand(6, 150, device=device) < 0.4
    low, count = pack_places(flags)
    assert torch.equal(unpack_places(low, count), flags.flatten().nonzero().flatten())
    assert int(low.max()) < OUTLIER_PIECE


def test_opcheck(device):
    weight, low, count, value, _ = _arguments((6, 100), 0.2, torch.bfloat16, torch.float32, device)
    torch.library.opcheck(OP, (weight, low, count, value))


def test_compile(device):
    def place(weight, low, count, value):
        weight = weight + 1
        place_outliers_(weight, low, count, value, impl="triton")
        return weight * 2

    compiled = torch.compile(place, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((6, 100), (9, 200)):
        *arguments, _ = _arguments(shape, 0.2, torch.bfloat16, torch.float32, device)
        assert torch.equal(compiled(*arguments), place(*arguments))


def test_rejects_bad_input(device):
    weight, low, count, value, _ = _arguments((4, 100), 1.0, torch.bfloat16, torch.float32, device)
    for error, message, args in (
        (TypeError, "place_outliers_: weight must be of type = Tensor, got NoneType", (None, low, count, value)),
        (TypeError, "place_outliers_: value must be of type = Tensor, got float", (weight, low, count, 0.5)),
        (ValueError, r"place_outliers_: weight must have shape = .* got \[100\]", (weight[0], low, count, value)),
        (ValueError, "place_outliers_: weight must be = contiguous, got strides", (weight.t(), low, count, value)),
        (ValueError, r"place_outliers_: low must have shape = .* got \[1, 400\]", (weight, low[None], count, value)),
        (ValueError, r"place_outliers_: count must have shape = \[2\], got \[1\]", (weight, low, count[:1], value)),
        (ValueError, r"place_outliers_: value must have the shape of low = \[400\], got \[9\]",
         (weight, low, count, value[:9])),
        (ValueError, "place_outliers_: weight must have a dtype of", (weight.int(), low, count, value)),
        (ValueError, "place_outliers_: low must have a dtype of", (weight, low.long(), count, value)),
        (ValueError, "place_outliers_: count must have a dtype of", (weight, low, count.int(), value)),
        (ValueError, "place_outliers_: value must have a dtype of", (weight, low, count, low)),
        (ValueError, "place_outliers_: count must be on the device = .*, got meta",
         (weight, low, count.to("meta"), value)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            place_outliers_(*args)
    with pytest.raises(NotImplementedError, match="place_outliers_: impl must cover these arguments = cpp"):
        place_outliers_(weight, low, count, value, impl="cpp")
    with pytest.raises(ValueError, match="place_outliers_: impl must be one of"):
        place_outliers_(weight, low, count, value, impl="fast")
