# SPDX-License-Identifier: Apache-2.0
"""The plan of `discquant allocate`: what it holds, and advice in its own options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from discquant.config import DataConfig, QuantizeConfig
from discquant.errors import CapacityError
from discquant.planning import allocating
from discquant.planning.hardware import DEVICES, GB, find_device
from discquant.planning.plan import Machine, make_plan
from discquant.planning.setting import Allocating
from discquant.planning.shape import ModelShape

SIX = Allocating(6, hessians=True)
ROOMY = 1e15


def test_all_windows_and_a_block_s_errors_and_hessians_are_counted(
    shape_8b: ModelShape, options: Callable[..., QuantizeConfig]
) -> None:
    config = dataclasses.replace(options(), data=DataConfig("t.jsonl", 1024, 256))
    machine = Machine(dataclasses.replace(find_device("h100"), memory=ROOMY), ROOMY, ROOMY)
    block, row = shape_8b.largest, 1024 * 256 * shape_8b.hidden * 2

    def last(placement: str, choices: Allocating = SIX) -> allocating.PhasePeak:
        made = make_plan(
            shape_8b, allocating.options(config), machine, placement=placement, allocating=choices  # type: ignore[arg-type]
        )  # fmt: skip
        assert [peak.name for peak in made.peaks] == ["open", "calibrate", "allocate"]
        return made.peaks[-1]

    here, host, disk = (last(placement) for placement in ("resident", "host", "disk"))
    hessians = sum(8 * m.columns**2 * m.count for m in block.matrices)
    assert here.gpu["boundary activations"] == (len(shape_8b.blocks) + 1) * row
    assert here.gpu["errors of a block"] == 6 * 2 * block.weights
    assert here.gpu["X^T X and its factor"] > hessians
    assert (
        host.host["boundary activations"] == disk.disk["boundary activations"] == len(shape_8b.blocks) * row
    )
    assert host.gpu["hidden states"] == disk.gpu["hidden states"] == 4 * row
    # Kept where the blocks run they are among the block inputs; without a GPU also on the host, but as copies.
    cpu = Machine(DEVICES["cpu"], ROOMY, ROOMY)
    for placement, rows in (("resident", 0), ("host", 4)):
        made = make_plan(
            shape_8b, allocating.options(config), cpu, placement=placement, allocating=SIX  # type: ignore[arg-type]
        )  # fmt: skip
        assert made.peaks[-1].host["hidden states"] == rows * row
    # A float64 number for each choice, window and layer; ids of every token, which the unfinished file has, too.
    layers = sum(matrix.count for one in shape_8b.blocks for matrix in one.matrices)
    assert here.host["what is measured"] == 8 * 6 * 1024 * layers and here.host["windows"] == 8 * 1024 * 256
    assert here.disk["OUT.unfinished (two)"] == 2 * 8 * 1024 * (6 * layers + 256)
    fewer = last("resident", Allocating(2, hessians=False))
    assert not fewer.gpu.get("X^T X and its factor") and fewer.total("gpu") < here.total("gpu")


def test_advice_names_options_that_the_command_has(
    shape_8b: ModelShape, options: Callable[..., QuantizeConfig]
) -> None:
    from typer.main import get_command

    from discquant.cli import app

    known = {option for p in get_command(app).commands["allocate"].params for option in p.opts}  # type: ignore[attr-defined]
    config = dataclasses.replace(options(start="gptq", curvature=None), data=DataConfig("self", 1024, 256))
    config = allocating.options(config)
    for memory, host, disk in (
        (24 * GB, 40 * GB, ROOMY),
        (12 * GB, 4 * GB, 30 * GB),
        (40 * GB, 20 * GB, 5 * GB),
    ):
        machine = Machine(dataclasses.replace(DEVICES["4090"], memory=memory), host, disk)
        with pytest.raises(CapacityError, match="It would fit with") as refused:
            make_plan(shape_8b, config, machine, placement="resident", allocating=SIX)
        flags = str(refused.value).rpartition("fit with ")[2].split()
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        assert given.keys() <= known
        data = DataConfig(
            given.get("--dataset", "self"),
            int(given.get("--nsamples", 1024)),
            int(given.get("--seqlen", 256)),
        )
        advised = dataclasses.replace(config, data=data)
        assert make_plan(
            shape_8b, advised, machine, placement=given["--placement"],  # type: ignore[arg-type]
            activations=given.get("--activations"), allocating=SIX,  # type: ignore[arg-type]
        )  # fmt: skip


def test_a_live_plan_is_the_command_s_own(tmp_path: Path, configs: Path) -> None:
    """`place_run` takes it: no phase of a GPTQ run."""
    from discquant.run.planned import place_run
    from discquant.solver.engine import Engine

    config = allocating.options(QuantizeConfig(data=DataConfig("t.jsonl", 8, 64)))
    made = place_run(
        str(configs / "llama-3.1-8b"), config, Engine("disk"), tmp_path / "grids.json", allocating=SIX
    )
    assert made is not None and [peak.name for peak in made.peaks] == ["open", "calibrate", "allocate"]
