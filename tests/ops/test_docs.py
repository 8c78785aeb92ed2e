# SPDX-License-Identifier: Apache-2.0
"""docs/kernels.md: its example of a kernel alone runs, and its launchers have the arguments it names."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch

from discquant.ops import soft_linear


def _page(repo_root: Path) -> str:
    return (repo_root / "docs" / "kernels.md").read_text()


def test_example_of_a_kernel_alone(repo_root: Path, device: torch.device) -> None:
    """Smaller, on this machine's device, in float32 where the interpreter cannot take bfloat16 dots."""
    code = re.search(r"```python\n(.*?)```", _page(repo_root), re.DOTALL)
    assert code is not None
    text = code.group(1).replace("14336, 4096, 4096, 4, 64", "40, 128, 5, 4, 64")
    if device.type == "cpu":
        text = (
            text.replace('"cuda"', '"cpu"').replace(".bfloat16()", ".float()").replace("bfloat16", "float32")
        )
    found: dict[str, Any] = {}
    exec(text, found)
    grid = (found["q_down"], found["frac"], found["scale"])
    expected = soft_linear(found["x"], *grid, num_bits=4, group_size=64, impl="reference")
    assert found["y"].shape == (5, 40)
    error = (found["y"].double() - expected.double()).abs().max()
    assert error <= 256 * torch.finfo(found["y"].dtype).eps * expected.double().abs().max()


def test_launchers_have_the_arguments_named(repo_root: Path) -> None:
    titles = re.findall(r"^### \w+: `(\w+)\((.*?)\)`$", _page(repo_root), re.MULTILINE)
    stems = (
        "soft_weight",
        "soft_linear",
        "projected_step",
        "anchor_codes",
        "place_outliers",
        "linear_kl",
        "hadamard",
    )
    modules = [importlib.import_module(f"discquant.triton_kernels.{stem}") for stem in stems]
    assert len(titles) == 8
    for name, arguments in titles:
        (launcher,) = {getattr(m, name) for m in modules if hasattr(m, name)}
        own = [p for p in inspect.signature(launcher).parameters if p not in ("block", "num_warps")]
        assert own == arguments.split(", "), name
