# SPDX-License-Identifier: Apache-2.0
"""One whole solver step on the linears of a Llama-3 8B block, against the bare cuBLAS time of the same matmuls.

Teacher forward, student forward, recompute, dX, dW and the projected step, weights made from the 8-bit state at each
use; attention and norms are left out on both sides.
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, GPU, measure

from discquant.ops import StepOptions, projected_step_deferred_, soft_weight

LINEARS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)] if GPU else [(96, 64), (64, 128)]
TOKENS = [4096, 16384] if GPU else [32]
DTYPE = torch.bfloat16 if GPU else torch.float32
IMPLS = ["triton"] if GPU else ["cpp", "reference"]


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(dy.t(), x, out_dtype=torch.float32) if GPU else torch.mm(dy.t(), x)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("impl", IMPLS)
def test_solver_step(benchmark, impl, tokens):
    layers = []
    for rows, cols in LINEARS:
        frac, ref = torch.randint(0, 256, (2, rows, cols), dtype=torch.uint8, device=DEVICE)
        layers.append({
            "q": torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=DEVICE) & 0xEE,
            "frac": frac, "ref": ref, "scale": torch.rand(rows, cols // 64, device=DEVICE).to(DTYPE) * 0.01,
            "first": torch.zeros_like(frac, dtype=torch.int8),
            "dense": torch.randn(rows, cols, device=DEVICE, dtype=DTYPE),
            "x": torch.randn(tokens, cols, device=DEVICE, dtype=DTYPE),
            "dy": torch.randn(tokens, rows, device=DEVICE, dtype=DTYPE),
        })  # fmt: skip
    options = StepOptions(optimizer="lion", lr=0.03)
    kwargs = {"num_bits": 4, "group_size": 64, "dtype": DTYPE, "impl": impl}

    def step() -> None:
        for layer in layers:
            teacher = soft_weight(layer["q"], layer["ref"], layer["scale"], is_reference=True, **kwargs)
            torch.mm(layer["x"], teacher.t())
            student = soft_weight(layer["q"], layer["frac"], layer["scale"], **kwargs)
            torch.mm(layer["x"], student.t())
        for layer in reversed(layers):
            student = soft_weight(layer["q"], layer["frac"], layer["scale"], **kwargs)
            torch.mm(layer["x"], student.t())
            torch.mm(layer["dy"], student)
            projected_step_deferred_(
                layer["frac"], layer["ref"], _weight_gradient(layer["dy"], layer["x"]), layer["scale"], group_size=64,
                options=options, momentum=layer["first"], impl=impl,
            )  # fmt: skip

    def bare() -> None:
        for layer in layers:
            for _ in range(3):
                torch.mm(layer["x"], layer["dense"].t())
            torch.mm(layer["dy"], layer["dense"])
            _weight_gradient(layer["dy"], layer["x"])

    weights = sum(rows * cols for rows, cols in LINEARS)
    measure(
        benchmark, step, op="solver_step", provider=impl, mode="lion", shape=f"{tokens} tokens, {weights} weights",
        dtype=str(DTYPE)[6:], flops=10.0 * tokens * weights, bare=bare,
    )  # fmt: skip
