# SPDX-License-Identifier: Apache-2.0
"""hadamard: rotation of rows, GB/s against a copy; the dense matmul beside it."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, GPU, measure, require_close

from discquant.ops import hadamard

SHAPES = [(16384, 4096), (16384, 14336), (4096, 28672), (16384, 11008)] if GPU else [(16, 256), (8, 224)]
DTYPE = torch.bfloat16 if GPU else torch.float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", ["reference", "compiled", "dense-matmul", "triton"])
def test_hadamard(benchmark, provider, shape):
    rows, size = shape
    x = torch.randn(rows, size, device=DEVICE, dtype=DTYPE)
    signs = (torch.randint(0, 2, (size,), device=DEVICE) * 2 - 1).to(torch.int8)
    if provider == "dense-matmul":
        dense = hadamard(torch.eye(size, device=DEVICE, dtype=DTYPE), signs, impl="reference")
        body = lambda: x @ dense  # noqa: E731
    elif provider == "compiled":
        compiled = torch.compile(lambda t: hadamard(t, signs, impl="reference"))
        body = lambda: compiled(x)  # noqa: E731
    else:
        body = lambda: hadamard(x, signs, impl=provider)  # noqa: E731

    def gate():
        part = slice(0, 8)
        oracle = hadamard(x[part].double(), signs, impl="reference")
        require_close(body()[part], oracle, hadamard(x[part], signs, impl="reference"))

    measure(
        benchmark, body, op="hadamard", provider=provider, mode="forward", shape=f"{rows}x{size}", dtype=str(DTYPE)[6:],
        gate=None if provider == "dense-matmul" else gate, num_bytes=2.0 * rows * size * x.element_size(),
    )  # fmt: skip
