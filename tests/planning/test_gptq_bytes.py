# SPDX-License-Identifier: Apache-2.0
"""What rounding layer by layer holds: GPTQ against what is alive, which Hessians stay, every method's own work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from discquant.config import DataConfig, GridConfig, QuantizeConfig
from discquant.grids import place_grid
from discquant.planning.hardware import DEVICES
from discquant.planning.head import head_copy
from discquant.planning.memory import phase_peaks
from discquant.planning.plan import Machine, setting_for
from discquant.planning.rounding import gptq_bytes, gptq_work, greedy_bytes
from discquant.planning.shape import Block, Matrix, ModelShape
from discquant.rounding import gptq

Options = Callable[..., QuantizeConfig]


@pytest.mark.parametrize(("rows", "columns"), [(1024, 256), (96, 512), (4, 256)])
def test_gptq_holds_what_is_planned(rows: int, columns: int, live_bytes: Any) -> None:
    """Tall, wide, and of so few rows that putting the Hessian in order takes more than they do."""
    weight, x = torch.randn(rows, columns), torch.randn(3 * columns, columns)
    grid, hessian = place_grid(weight, GridConfig(3, 32)), (x.T @ x).double()
    with live_bytes([weight, hessian, grid.scale]) as live:
        gptq(weight, hessian, grid)
    planned = gptq_work(Matrix("one", rows, columns))
    assert live.peak <= 1.05 * planned < 1.5 * live.peak


def test_hessians_go_with_their_layers_but_for_those_of_experts() -> None:
    """Equal layers: one is gone when the next is rounded. Experts of a fused parameter are rounded together."""
    hessian = 8.0 * 256**2

    def held(count: int, plain: bool) -> float:
        """Hessians beside the work of a matrix that is rounded at the end, the largest by far."""
        small, large = Matrix("one", 64, 256, count, plain=plain), Matrix("two", 1 << 16, 256)
        return (gptq_bytes(Block((small, large), 0)) - gptq_work(large)) / hessian

    assert held(1, True) == 1  # its own
    assert held(1, False) == 2
    assert held(8, False) == 9


def starting(shape: ModelShape, config: QuantizeConfig) -> dict[str, float]:
    """What rounding layer by layer takes of a CPU's memory, by item."""
    peaks = phase_peaks(shape, setting_for(shape, config, "resident", Machine(DEVICES["cpu"], 1e15, 1e15)))
    return next(peak.host for peak in peaks if peak.name == "start")


def test_no_more_windows_are_planned_than_there_are(shape_8b: ModelShape, options: Options) -> None:
    """However many GPTQ asks for."""
    for method in ("gptq", "guided"):
        few, many = (
            dataclasses.replace(
                options(compute_dtype="float32"), method=method, gptq_samples=asked, data=DataConfig("t.txt", 4, 256)
            )
            for asked in (4, 4096)
        )  # fmt: skip
        assert starting(shape_8b, many) == starting(shape_8b, few)


def test_every_method_s_own_work_is_planned(shape_8b: ModelShape, options: Options) -> None:
    """Guided rounding measures energies first, then rounds as GPTQ does: the more of both, however long the text."""
    for windows in (1, 1024):
        config = dataclasses.replace(
            options(compute_dtype="float32"), data=DataConfig("t.txt", windows, 2048)
        )
        found = {
            method: starting(shape_8b, dataclasses.replace(config, method=method, gptq_samples=windows))
            for method in ("gptq", "guided", "greedy")
        }
        total = {method: sum(items.values()) for method, items in found.items()}
        assert total["guided"] >= total["gptq"] + found["guided"]["energies of gradients"]
        assert found["greedy"]["X^T X and its factor"] == greedy_bytes(shape_8b.largest)
        assert total["greedy"] > total["gptq"]


@pytest.mark.parametrize(("dtype", "copies"), [("float32", 0), ("bfloat16", 1)])
def test_a_head_that_is_wide_is_not_copied(
    dtype: str, copies: int, shape_8b: ModelShape, options: Options
) -> None:
    setting = setting_for(
        shape_8b, options(compute_dtype=dtype), "resident", Machine(DEVICES["h100"], 1e15, 1e15)
    )
    assert head_copy(shape_8b, setting) == copies * 4.0 * shape_8b.vocab * shape_8b.hidden
