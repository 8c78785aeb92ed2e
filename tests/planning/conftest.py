# SPDX-License-Identifier: Apache-2.0
"""Llama sizes from config.json alone, and the setting of memory.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.planning.shape import ModelShape, read_shape

CONFIGS = Path(__file__).parent / "configs"
TOKENS, SEQLEN = 16384, 2048


@pytest.fixture(scope="session")
def configs() -> Path:
    """Folders that hold nothing but a config.json."""
    return CONFIGS


@pytest.fixture(scope="session")
def shape_8b() -> ModelShape:
    """Llama-3.1-8B's sizes."""
    return read_shape(CONFIGS / "llama-3.1-8b")


@pytest.fixture(scope="session")
def shape_70b() -> ModelShape:
    """Llama-3.1-70B's sizes."""
    return read_shape(CONFIGS / "llama-3.1-70b")


@pytest.fixture(scope="session")
def options() -> Callable[..., QuantizeConfig]:
    """The setting of memory.md: 16384 tokens per step in windows of 2048, bfloat16, u8 momentum; others by keyword."""

    def build(**solver: Any) -> QuantizeConfig:
        chosen = {
            "state": "u8",
            "optimizer": "momentum",
            "batch_size": TOKENS // SEQLEN,
            "micro_batch": 2,
            "iters": 1024,
            "compute_dtype": "bfloat16",
            "start": "ref",
            "curvature": 0.0,  # memory.md has none
            **solver,
        }
        return QuantizeConfig(
            grid=GridConfig(bits=3, group_size=128),
            solver=SolverConfig(**chosen),
            data=DataConfig("text.txt", 512, SEQLEN),
            baselines=(),
        )

    return build
