# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel for many tokens on a GPU: exact weights, float64 bounds, clusters, its own checks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from discquant import _extension

pytestmark = pytest.mark.gpu

Make = Callable[..., Any]
HALF = [torch.float16, torch.bfloat16]
GRIDS = list(itertools.product([3, 4], [32, 64, 128, 256, -1], [True, False]))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_prefill(
    bits: int, group: int, symmetric: bool, dtype: torch.dtype, make_case: Make, allowed: Make, prefill: Make
) -> None:
    """Bit-exact weights through the tensor cores, float64 bounds, equal bits in every run, ragged tiles."""
    case = make_case(200, 328, bits, group, symmetric, dtype)
    one = torch.eye(328, dtype=dtype, device="cuda")
    for part in (60, 328):
        y = torch.cat([prefill(case, rows) for rows in one.split(part)]).cpu()
        assert torch.equal(y, case.served(dtype).t())
    for n, k in ((97, 320), (1040, 4104), (4096, 1032)):
        case = make_case(n, k, bits, group, symmetric, dtype)
        weight = case.served(dtype).double().cuda()
        for tokens in (1, 33, 64, 129, 300):
            x, bias = torch.randn(tokens, k).to(dtype).cuda(), torch.randn(n).to(dtype).cuda()
            y = prefill(case, x, bias)
            oracle = x.double() @ weight.t() + bias.double()
            limit = allowed(x, weight, oracle) + 2.0**-23 * bias.double().abs()
            assert ((y.double() - oracle).abs() <= limit).all(), (n, k, tokens)
            assert all(torch.equal(prefill(case, x, bias), y) for _ in range(5))


def test_prefill_shares_tiles_where_it_can(make_case: Make) -> None:
    """A build for sm_90 uses clusters there: nothing else would show that the driver was told otherwise."""
    case, splits = make_case(1024, 4096, 4, 128, True), []
    for tokens in (20, 4096):
        x = torch.zeros(tokens, 4096, device="cuda").half()
        splits.append(torch.ops.discquant.packed_prefill_splits(x, *case.tensors, 1024, 4096, 4, 128))
    print(f"parts of K at 20 and 4096 tokens: {splits}")
    major, minor = torch.cuda.get_device_capability()
    assert (splits[0] > 1) == (
        major >= 9 and (_extension.cuda_code(major, minor) or "").startswith(f"{major}{minor}")
    )


def test_prefill_checks_for_itself(make_case: Make, prefill: Make) -> None:
    case = make_case(64, 128, 4, 64, True)
    x = torch.zeros(20, 128, device="cuda").half()
    for bad in (
        x.bfloat16(),
        x.float(),
        x[:, :64],
        x.cpu(),
        torch.zeros(20, 129, device="cuda").half()[:, 1:],
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            prefill(case, bad)
    assert prefill(case, x[:0]).shape == (0, 64)
    op, sizes = torch.ops.discquant.packed_linear_prefill.default, (64, 128, 4, 64)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (x, *case.tensors, None, *sizes), test_utils=tests)
