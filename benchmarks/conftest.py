# SPDX-License-Identifier: Apache-2.0
"""Benchmarks run without a GPU too: small shapes, Triton kernels interpreted once for the gate and never timed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Only this folder: the checkout's root would shadow Triton's own package triton_kernels.
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
