# SPDX-License-Identifier: Apache-2.0
"""Packed weights on a GPU and bounds for what they give, out of `gpu_cases.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


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
