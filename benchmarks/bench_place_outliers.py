# SPDX-License-Identifier: Apache-2.0
"""place_outliers_: one weight in fifty to its place in a bfloat16 matrix; torch.index_put_, which sorts, beside it.

Not among the files of run_gpu.py. By hand: pytest with this file.
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, GPU, measure, require_equal

from discquant.ops import place_outliers_
from discquant.solver.state import pack_places

SHAPES = [(28672, 4096), (8192, 28672)] if GPU else [(256, 510)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", ["triton", "reference"])
def test_place_outliers(benchmark, provider, shape):
    flags = torch.rand(shape, device=DEVICE) < 0.02
    low, count = pack_places(flags)
    value = torch.randn(low.numel(), device=DEVICE).bfloat16()
    weight = torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16)
    body = lambda: place_outliers_(weight, low, count, value, impl=provider)  # noqa: E731
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )

    def gate():
        body()
        require_equal(weight, torch.zeros_like(weight).masked_scatter_(flags, value))

    torch.use_deterministic_algorithms(True, warn_only=True)  # as in a solve
    try:
        measure(
            benchmark, body, op="place_outliers", provider=provider, mode="forward", shape=f"{shape[0]}x{shape[1]}",
            dtype="bf16", gate=gate,
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
