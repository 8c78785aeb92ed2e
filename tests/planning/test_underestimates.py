# SPDX-License-Identifier: Apache-2.0
"""What a plan must not leave out: what greedy rounding holds, codes, copies into the device, the teacher's rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from discquant.config import GridConfig, QuantizeConfig
from discquant.grids import place_grid
from discquant.planning.hardware import DEVICES
from discquant.planning.memory import phase_peaks
from discquant.planning.option import seconds_of
from discquant.planning.plan import Machine, setting_for
from discquant.planning.rates import Rates
from discquant.planning.rounding import greedy_bytes
from discquant.planning.setting import remembers_teacher
from discquant.planning.shape import Block, Matrix, ModelShape
from discquant.rounding import greedy

CPU = Machine(DEVICES["cpu"], 1e15, 1e15)
Options = Callable[..., QuantizeConfig]


def phases(shape: ModelShape, config: QuantizeConfig) -> dict[str, dict[str, float]]:
    """Items of each phase on host and disk."""
    peaks = phase_peaks(shape, setting_for(shape, config, "resident", CPU))
    return {peak.name: {**peak.disk, **peak.host} for peak in peaks}


@pytest.mark.parametrize(("rows", "columns"), [(256, 64), (96, 256)])
def test_greedy_holds_what_is_planned(rows: int, columns: int, live_bytes: Any) -> None:
    """Tall and wide matrices, of which every row has codes left to flip."""
    weight, x = torch.randn(rows, columns), torch.randn(3 * columns, columns)
    grid, hessian = place_grid(weight, GridConfig(3, 32)), (x.T @ x).double()
    with live_bytes([weight, hessian, grid.scale]) as live:
        greedy(weight, hessian, grid)
    block = Block((Matrix("one", rows, columns),), 0)
    assert live.peak <= greedy_bytes(block) - hessian.nbytes < 1.5 * live.peak


def test_codes_are_counted(shape_8b: ModelShape, options: Options) -> None:
    """Those of GPTQ and greedy lie two per byte while they are measured; those of the start in a file, one per byte."""
    config = options(start="ref")
    weights = sum(block.weights for block in shape_8b.blocks)
    for baselines, shares in (((), 0.0), (("rtn",), 0.0), (("rtn", "gptq"), 0.5), (("gptq", "greedy"), 1.0)):
        found = phases(shape_8b, dataclasses.replace(config, baselines=baselines))["evaluate"]
        assert found["codes of baselines"] == shares * weights
    wide = dataclasses.replace(config, baselines=("gptq",), grid=GridConfig(8, 128))
    assert phases(shape_8b, wide)["evaluate"]["codes of baselines"] == weights
    started = dataclasses.replace(options(start="gptq"), baselines=("gptq",))
    found = phases(shape_8b, started)
    assert found["evaluate"]["codes of baselines"] == 0.0, "they are those of the start"
    assert found["solve"]["codes at the start"] == weights
    assert phases(shape_8b, config)["solve"]["codes at the start"] == 0.0


def test_copies_in_and_out_take_time(shape_8b: ModelShape, options: Options) -> None:
    """By measured rates: beside what resident state copies, every byte that moves."""
    rates = Rates(
        machine="a machine", dtype="float32", state="u8 momentum", hidden=4096, weights=10_000, tokens=32, forward=1e9,
        backward=2e9, matmul=3e9, head=4e9, soft=1e-9, step=2e-9, copy=1.0,
    )  # fmt: skip
    config = options(compute_dtype="float32")

    def copied(placement: Any) -> tuple[float, float]:
        """Bytes that the seconds of a step have copied, and those that move."""
        setting = setting_for(shape_8b, config, placement, CPU)
        moved, _, slow = seconds_of(shape_8b, setting, CPU, rates)
        _, _, fast = seconds_of(shape_8b, setting, CPU, dataclasses.replace(rates, copy=math.inf))
        return slow - fast, 0.0 if moved is None else moved.total_in + moved.out

    (resident, nothing), (host, moved) = copied("resident"), copied("host")
    assert nothing == 0.0 < moved and host - resident == pytest.approx(moved, rel=1e-6)


@pytest.mark.parametrize(("loss", "remembered"), [("kl", True), ("ce", False), ("mse", False)])
def test_only_the_kl_has_a_teacher_to_remember(
    loss: str, remembered: bool, shape_8b: ModelShape, options: Options
) -> None:
    config = options(loss=loss)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, nsamples=8, seqlen=16))
    assert remembers_teacher(shape_8b, setting_for(shape_8b, config, "resident", CPU)) is remembered
