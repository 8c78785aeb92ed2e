# SPDX-License-Identifier: Apache-2.0
"""The traffic of a solver step stays within its target, and the committed count is the present one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

LIMIT = 24.0  # bytes per weight outside the matmuls, 8-bit state, teacher included
RECIPE_LIMIT = 66.0  # with the terms of the default recipe


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels")
def test_counted_traffic(repo_root: Path) -> None:
    """One pass more over a block's weights, by whatever operator, is above the limit."""
    spec = importlib.util.spec_from_file_location("step_traffic", Path(__file__).with_name("step_traffic.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.measure()
    assert found["bytes_per_weight"] <= LIMIT, found["operators"]
    committed = json.loads((repo_root / "benchmarks" / "results" / "step_traffic.json").read_text())
    eager, recipe = committed.pop("with_norms_of_transformers"), committed.pop("default_recipe")
    for text in ("docs/kernels.md", "CHANGELOG.md"):  # written by hand
        told = (repo_root / text).read_text(encoding="utf-8")
        assert f"{found['bytes_per_token_and_hidden']:.0f} bytes per token" in told and f"{eager:.0f}" in told
        assert f"{found['bytes_per_weight']:.1f}" in told and f"{recipe['bytes_per_weight']:.1f}" in told
    assert eager > 1.5 * found["bytes_per_token_and_hidden"]
    assert found == committed, "run python tests/run/step_traffic.py"
    assert module.measure_recipe() == recipe and recipe["bytes_per_weight"] <= RECIPE_LIMIT
