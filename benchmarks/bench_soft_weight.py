# SPDX-License-Identifier: Apache-2.0
"""soft_weight: packed 4-bit codes + u8 frac + bf16 scale -> bf16 weight, GB/s against a copy."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, GPU, measure, require_close, require_equal
from torch import Tensor

from discquant.ops import soft_weight
from discquant.ops.reference import soft_weight as reference

SHAPES = [(28672, 4096), (4096, 14336), (6144, 4096), (57344, 8192)] if GPU else [(256, 512)]
PROVIDERS = ["triton", "reference", "compiled", "paper"] + ([] if GPU else ["cpp"])


def _paper(low: Tensor, high: Tensor, frac: Tensor) -> Tensor:
    # The published way: lower and upper weights and frac in bf16, three tensors read at every forward.
    return (1 - frac) * low + frac * high


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_soft_weight(benchmark, provider, shape):
    rows, cols = shape
    q = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=DEVICE) & 0xEE
    frac = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(rows, cols // 64, device=DEVICE) + 0.5).bfloat16()
    kwargs = {"num_bits": 4, "group_size": 64, "dtype": torch.bfloat16}
    num_bytes = rows * cols * (0.5 + 1 + 2 / 64 + 2)
    expected = reference.soft_weight(q, frac, scale, **kwargs)
    if provider == "compiled":
        compiled = torch.compile(reference.soft_weight)
        body = lambda: compiled(q, frac, scale, **kwargs)  # noqa: E731
        wide = reference.soft_weight(q, frac, scale, **{**kwargs, "dtype": torch.float64})
        gate = lambda: require_close(body(), wide, expected)  # noqa: E731
    elif provider == "paper":
        low, high = (reference.soft_weight(q, torch.full_like(frac, v), scale, **kwargs) for v in (0, 255))
        position = (frac.float() / 255).bfloat16()
        body = lambda: _paper(low, high, position)  # noqa: E731
        # bfloat16 arithmetic, so it cannot pass the rule; it must only compute the same thing.
        step = 2**-6 * float(expected.abs().max())
        gate = lambda: _within(body(), expected, step)  # noqa: E731
        num_bytes = rows * cols * 8
    else:
        body = lambda: soft_weight(q, frac, scale, **kwargs, impl=provider)  # noqa: E731
        gate = lambda: require_equal(body(), expected)  # noqa: E731
    measure(
        benchmark, body, op="soft_weight", provider=provider, mode="forward", shape=f"{rows}x{cols}", dtype="u8-bf16",
        gate=gate, num_bytes=num_bytes,
    )  # fmt: skip


def _within(actual: Tensor, expected: Tensor, step: float) -> None:
    if (actual.float() - expected.float()).abs().max() > step:
        raise AssertionError("gate: the paper's arithmetic computes something else")
