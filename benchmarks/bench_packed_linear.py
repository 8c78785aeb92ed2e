# SPDX-License-Identifier: Apache-2.0
"""packed_linear on the CPU under pytest-benchmark: the gate of every provider, and one recorded call of ours.

The measurement is `python benchmarks/run_packed_cpu.py`, which writes the table; this runs its parts once on small
shapes (--benchmark-disable), so that they keep working.
"""

from __future__ import annotations

from typing import Any

import cpu_providers as providers
import pytest
import torch
from harness import GPU
from run_packed_cpu import FIELDS, block_rows, measure_shape

from discquant import _extension

CPP = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")


@CPP
@pytest.mark.parametrize("shape", [(192, 256), (97, 384)], ids=str)
def test_every_provider_agrees(shape: tuple[int, int]) -> None:
    before = torch.get_num_threads()
    try:
        rows = measure_shape("small", *shape, [1, 2], [1, 4], 0.0, None)
    finally:
        torch.set_num_threads(before)
    names = {row["provider"] for row in rows}
    assert {"plain read", "discquant a15", "discquant a8", "discquant fp32", "discquant exact"} <= names
    assert ("torch int4" in names) == (shape[0] % 64 == 0)
    assert all(set(row) <= set(FIELDS) for row in rows)


@CPP
def test_block() -> None:
    before = torch.get_num_threads()
    try:
        rows = block_rows(1, 1, (512, 256))
    finally:
        torch.set_num_threads(before)
    assert [row["bits"] for row in rows] == [16, 4, 4, 3, 3]


@CPP
@pytest.mark.parametrize("bits", [3, 4])
def test_cpu(benchmark: Any, bits: int) -> None:
    n, k = (192, 256) if benchmark.disabled else (4096, 4096)
    weight = providers.Weight(n, k)
    provider = providers.ours(weight, bits, ("a15",))[0]
    x = torch.randn(1, k).bfloat16()
    providers.check(provider, weight, x)
    benchmark(provider.calls[0], x)


ON_GPU = pytest.mark.skipif(not GPU, reason="no GPU: packed_linear is not measured on one")
# What the targets ask for comes first.
GPU_SHAPES = ["70B gate_up-57344", "8B gate_up", "8B qkv", "8B o", "8B down", "odd"]


def _measure(benchmark: Any, shape: str, bits: int, tokens: tuple[int, ...]) -> None:
    """Measure; under --benchmark-disable check only: what shares the GPU then would spoil the times."""
    import packed_gpu

    args = (shape.partition("-")[0], bits, tokens, torch.bfloat16)
    record = {"record": not benchmark.disabled}
    benchmark.pedantic(packed_gpu.measure, args, record, rounds=1, iterations=1)


@ON_GPU
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_decode(benchmark: Any, shape: str, bits: int) -> None:
    import packed_gpu

    tokens = (1,) if benchmark.disabled else packed_gpu.DECODE
    _measure(benchmark, shape, bits, tokens)


@ON_GPU
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_prefill(benchmark: Any, shape: str, bits: int) -> None:
    """In a process of its own (run_gpu.py): should its kernel spoil the device, decode is measured already."""
    import packed_gpu

    tokens = (64,) if benchmark.disabled else packed_gpu.PREFILL
    _measure(benchmark, shape, bits, tokens)
