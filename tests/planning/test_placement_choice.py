# SPDX-License-Identifier: Apache-2.0
"""Which placement a plan chooses, by what is free, and the warnings it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from discquant.config import QuantizeConfig
from discquant.errors import CapacityError
from discquant.planning.hardware import DEVICES, GB
from discquant.planning.memory import needed, phase_peaks
from discquant.planning.plan import Machine, make_plan, setting_for
from discquant.planning.setting import PLACEMENTS
from discquant.planning.shape import ModelShape

ROOMY = 1e15
Options = Callable[..., QuantizeConfig]


def test_activations_decide_what_fits(shape_8b: ModelShape, options: Options) -> None:
    config = options(batch_size=64, micro_batch=1, compute_dtype="float32")
    least = needed(
        phase_peaks(
            shape_8b,
            setting_for(shape_8b, config, "host", Machine(DEVICES["cpu"], ROOMY, ROOMY), activations="disk"),
        ),
        "host",
    )
    tight = Machine(DEVICES["cpu"], 1.01 * least, ROOMY)
    assert (
        make_plan(shape_8b, config, tight, placement="host", activations="disk").setting.boundaries == "disk"
    )
    for activations in (None, "host", "resident"):
        with pytest.raises(CapacityError):
            make_plan(shape_8b, config, tight, placement="host", activations=activations)  # type: ignore[arg-type]
    with pytest.raises(CapacityError):
        make_plan(
            shape_8b, config, dataclasses.replace(tight, disk=1e11), placement="host", activations="disk"
        )


def test_placement_is_the_first_that_fits(
    shape_8b: ModelShape, shape_70b: ModelShape, options: Options
) -> None:
    """Resident on a big device, host memory on a small one, the disk where host memory is small as well."""
    config = options()
    for shape, device, host, expected in (
        (shape_8b, "h200", 64 * GB, "resident"),
        (shape_8b, "4090", 64 * GB, "host"),
        (shape_8b, "4090", 20 * GB, "disk"),
        (shape_70b, "h200", 350 * GB, "host"),
        (shape_70b, "h200", 100 * GB, "disk"),
    ):
        made = make_plan(shape, config, Machine(DEVICES[device], host, ROOMY))
        assert made.setting.placement == expected, (shape.name, device)
        assert [o.fits for o in made.options if o.state == "u8 momentum" and o.placement == expected] == [
            True
        ]
        assert {option.placement for option in made.options} == set(PLACEMENTS)


def test_auto_leaves_a_tenth_of_the_device(shape_8b: ModelShape, options: Options) -> None:
    """Only where nothing else fits, or a placement is named, the device is filled to the last byte."""
    device, config = DEVICES["h100"], options()
    made = {
        p: make_plan(shape_8b, config, Machine(device, ROOMY, ROOMY), placement=p).peaks for p in PLACEMENTS
    }
    peak = needed(list(made["resident"]), "gpu")
    little = 0.99 * needed(list(made["host"]), "host")
    least = 0.99 * needed(list(made["disk"]), "disk")
    for room, host, disk, expected in (
        (1.11, ROOMY, ROOMY, "resident"),
        (1.09, ROOMY, ROOMY, "host"),
        (1.01, little, ROOMY, "disk"),
        (1.01, little, least, "resident"),
    ):
        machine = Machine(dataclasses.replace(device, memory=room * peak), host, disk)
        chosen = make_plan(shape_8b, config, machine)
        assert chosen.setting.placement == expected, (room, host)
        assert any("--placement resident takes it" in text for text in chosen.warnings) == (
            expected != "resident"
        )
        assert make_plan(shape_8b, config, machine, placement="resident").setting.placement == "resident"


def test_too_few_tokens_is_a_warning_with_the_number(shape_70b: ModelShape, options: Options) -> None:
    """Following the warning's advice removes it."""
    machine = Machine(DEVICES["h100"], 400 * GB, ROOMY)
    made = make_plan(shape_70b, options(batch_size=2), machine, placement="host")
    (warning,) = made.warnings
    assert "4096 tokens per step are too few" in warning and "10,127 are needed" in warning
    advised = int(warning.partition("--batch-size ")[2].split(";")[0])
    assert not make_plan(shape_70b, options(batch_size=advised), machine, placement="host").warnings
    assert make_plan(shape_70b, options(batch_size=advised - 1), machine, placement="host").warnings


def test_ranks_share_a_step_and_a_machine(shape_8b: ModelShape, options: Options) -> None:
    """Each has its share of the tokens and its own device; host memory and disk are the machine's."""
    config, roomy = options(curvature=None), Machine(DEVICES["4090"], ROOMY, ROOMY)
    alone = make_plan(shape_8b, config, roomy, placement="disk")
    four = make_plan(shape_8b, config, dataclasses.replace(roomy, ranks=4), placement="disk")
    assert (four.setting.tokens, four.setting.step_tokens) == (
        alone.setting.tokens // 4,
        alone.setting.tokens,
    )
    assert four.step.forward == pytest.approx(alone.step.forward / 4)
    assert four.exchanged == 2 * 4 * shape_8b.weights and alone.exchanged == 0
    state = [{peak.name: peak for peak in made.peaks}["solve"].disk for made in (alone, four)]
    assert state[1]["state"] == 4 * state[0]["state"]
    # Each gathers the curvature's factors on all windows of a step; without them it keeps its share of a step's.
    assert state[1]["boundary activations"] == pytest.approx(4 * state[0]["boundary activations"])
    plain = options(curvature=0.0)
    for made in (roomy, dataclasses.replace(roomy, ranks=4)):
        steps = {peak.name: peak for peak in make_plan(shape_8b, plain, made, placement="disk").peaks}
        assert steps["solve"].disk["boundary activations"] == pytest.approx(state[0]["boundary activations"])
    host = max(peak.total("host") for peak in four.peaks)
    with pytest.raises(CapacityError):
        make_plan(shape_8b, config, Machine(DEVICES["4090"], 3.9 * host, ROOMY, ranks=4), placement="disk")
    assert make_plan(shape_8b, config, Machine(DEVICES["4090"], 4.1 * host, ROOMY, ranks=4), placement="disk")
