# SPDX-License-Identifier: Apache-2.0
"""pack, unpack, repack and dequantise on the CPU, codes per second; the reference beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import measure, require_equal

from discquant import _extension
from discquant.ops import pack as packing
from discquant.ops.packed_linear import dequantize_packed

SHAPE = (4096, 4096)


@pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("layout", ["cpu", "mma"])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("op", ["pack", "unpack", "repack", "dequantize_packed"])
def test_pack(benchmark: Any, op: str, bits: int, layout: str, impl: str) -> None:
    n, k = SHAPE if not benchmark.disabled else (64, 256)
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    grid = {"num_bits": bits, "group_size": 128}
    sizes = {"out_features": n, "in_features": k, "num_bits": bits}
    words = packing.pack(q, **grid, layout=layout)
    scale = packing.pack_groups(torch.rand(n, k // 128).bfloat16(), layout=layout)
    other = "mma" if layout == "cpu" else "cpu"
    bodies = {
        "pack": lambda impl: packing.pack(q, **grid, layout=layout, impl=impl),
        "unpack": lambda impl: packing.unpack(words, **sizes, layout=layout, impl=impl),
        "repack": lambda impl: packing.repack(words, **sizes, layout=layout, new_layout=other, impl=impl),
        "dequantize_packed": lambda impl: dequantize_packed(
            words, scale, **sizes, group_size=128, layout=layout, dtype=torch.bfloat16, impl=impl
        ),
    }
    body = bodies[op]
    moved = {
        "pack": 1 + bits / 8,
        "unpack": 1 + bits / 8,
        "repack": bits / 4,
        "dequantize_packed": 2 + bits / 8,
    }
    measure(
        benchmark, lambda: body(impl), op=op, provider=f"discquant {impl}", mode=f"{layout} {bits} bit",
        shape=f"{n}x{k}", dtype="uint8", num_bytes=moved[op] * n * k,
        gate=lambda: require_equal(body(impl), body("reference")),
    )  # fmt: skip
