# SPDX-License-Identifier: Apache-2.0
"""Codes of a weight; packed weights on a GPU and bounds for what they give, out of `gpu_cases.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from discquant.formats.codes import QuantizedLinear


@pytest.fixture(scope="session")
def coded() -> Callable[..., QuantizedLinear]:
    """Rounding to nearest on a symmetric abs-max grid."""
    # Here, because on a bare GPU machine what formats need is absent, and no kernel's test asks for it.
    from discquant.formats.codes import QuantizedLinear

    def nearest(name: str, weight: Tensor, bits: int = 4, group: int = 32) -> QuantizedLinear:
        n, k = weight.shape
        groups = -(-k // group)
        padded = nn.functional.pad(weight.detach().float(), (0, groups * group - k)).view(n, groups, group)
        scale = (padded.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).clamp(min=1e-4).bfloat16()
        q = ((padded / scale.float()[..., None]).round() + 2 ** (bits - 1)).clamp(0, 2**bits - 1)
        q = q.to(torch.uint8).view(n, -1)[:, :k].contiguous()
        return QuantizedLinear(name, q, scale, None, bits, group)

    return nearest


@dataclass(frozen=True)
class CpuCase:
    """A packed weight of layout "cpu"."""

    tensors: tuple[Tensor, Tensor, Tensor | None]
    sizes: dict[str, Any]


@pytest.fixture(scope="session")
def make() -> Callable[..., CpuCase]:
    """A weight of random codes."""
    # Here for the same reason.
    from discquant.ops import pack as packing

    def case(n: int, k: int, bits: int, group: int, symmetric: bool) -> CpuCase:
        groups = -(-k // group)
        q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
        words = packing.pack(q, zero, num_bits=bits, group_size=group, layout="cpu")
        scale = packing.pack_groups((torch.rand(n, groups) * 0.1 - 0.03).half(), layout="cpu")
        packed_zero = None if zero is None else packing.pack_groups(zero, layout="cpu")
        sizes = {"out_features": n, "in_features": k, "num_bits": bits, "group_size": group, "layout": "cpu"}
        return CpuCase((words, scale, packed_zero), sizes)

    return case


@pytest.fixture(scope="session")
def gpu_cases() -> ModuleType:
    """`gpu_cases.py`, loaded by its path."""
    spec = importlib.util.spec_from_file_location(
        "packed_gpu_cases", Path(__file__).with_name("gpu_cases.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_case(gpu_cases: ModuleType) -> Callable[..., Any]:
    """A packed weight on the GPU and what it stands for on the CPU."""
    return gpu_cases.Case


@pytest.fixture(scope="session")
def allowed(gpu_cases: ModuleType) -> Callable[..., Any]:
    """Bound of the error against float64."""
    return gpu_cases.allowed


@pytest.fixture(scope="session")
def is_dense(gpu_cases: ModuleType) -> Callable[..., Any]:
    """Whether that many tokens are dequantise + cuBLAS."""
    return gpu_cases.is_dense


@pytest.fixture(scope="session")
def prefill(gpu_cases: ModuleType) -> Callable[..., Any]:
    """The kernel for many tokens, whatever the table says."""
    return gpu_cases.prefill
