# SPDX-License-Identifier: Apache-2.0
"""Items of a plan at the edges: few blocks, long windows, two ranks, codes of 4 bits, no curvature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from discquant.config import DataConfig, GridConfig, QuantizeConfig
from discquant.planning.evaluating import EVALUATION_LOGITS
from discquant.planning.hardware import DEVICES
from discquant.planning.memory import PhasePeak, needed, phase_peaks
from discquant.planning.plan import Machine, setting_for
from discquant.planning.shape import ModelShape

Options = Callable[..., QuantizeConfig]
GPU = Machine(DEVICES["h100"], 1e15, 1e15)


def peak(
    name: str, shape: ModelShape, config: QuantizeConfig, placement: str = "resident", ranks: int = 1
) -> PhasePeak:
    """One phase of a run on a GPU with room for everything."""
    setting = setting_for(shape, config, placement, dataclasses.replace(GPU, ranks=ranks))  # type: ignore[arg-type]
    return next(found for found in phase_peaks(shape, setting) if found.name == name)


def test_there_are_no_more_slots_than_blocks(shape_8b: ModelShape, options: Options) -> None:
    slots = [
        peak("solve", dataclasses.replace(shape_8b, blocks=shape_8b.blocks[:count]), options(), "host").gpu[
            "block slots"
        ]
        for count in (1, 2, 3, 4)
    ]
    assert slots == pytest.approx([slots[0] * count for count in (1, 2, 3, 3)])


def test_windows_are_compared_as_many_as_their_logits_allow(shape_8b: ModelShape, options: Options) -> None:
    """One at least, with three tensors of two bytes each and a chunk in float64; of short windows there are eight."""

    def logits(seqlen: int) -> float:
        """Bytes per logit of one window."""
        config = dataclasses.replace(options(), data=DataConfig("t.txt", 64, seqlen))
        return peak("evaluate", shape_8b, config).gpu["logits of both"] / (seqlen * shape_8b.vocab)

    assert 8192 * shape_8b.vocab > EVALUATION_LOGITS and 6 < logits(8192) < 8
    assert logits(16) > 8 * 6


@pytest.mark.parametrize("ranks", [2, 4])
def test_another_rank_s_gradient_is_received(ranks: int, shape_8b: ModelShape, options: Options) -> None:
    item = "another rank's gradient of a matrix"
    largest = max(m.rows * m.columns for m in shape_8b.largest.matrices)
    assert peak("solve", shape_8b, options(), ranks=ranks).gpu[item] == 4.0 * largest
    assert not peak("solve", shape_8b, options()).gpu.get(item)


def test_activations_of_all_ranks_are_on_the_disk(shape_8b: ModelShape, options: Options) -> None:
    """Each has files of its own for its part of the windows: together as many as one rank alone."""
    item = "boundary activations"
    config = options(batch_size=8, micro_batch=1)
    one, two = (peak("solve", shape_8b, config, "disk", ranks).disk[item] for ranks in (1, 2))
    assert one == two


@pytest.mark.parametrize(("bits", "bytes_each"), [(4, 0.5), (5, 1.0)])
def test_codes_of_four_bits_lie_two_in_a_byte(
    bits: int, bytes_each: float, shape_8b: ModelShape, options: Options
) -> None:
    config = dataclasses.replace(options(), grid=GridConfig(bits, 128), method="gptq")
    assert peak("start", shape_8b, config).host["codes"] == bytes_each * shape_8b.weights


def test_activations_are_those_of_the_longest_pass(shape_8b: ModelShape, options: Options) -> None:
    """Of steps of one window the curvature is gathered on more at once: a 128th of its windows."""
    found = [
        peak(
            "solve", shape_8b, options(batch_size=1, micro_batch=1, curvature=weight, curvature_samples=512), "host"
        ).host["boundary activations"]
        for weight in (0.0, 16.0)
    ]  # fmt: skip
    few = dataclasses.replace(options(batch_size=1, micro_batch=1), data=DataConfig("t.txt", 1, 2048))
    assert found[0] == peak("solve", shape_8b, few, "host").host["boundary activations"]
    assert found[1] == 4 * found[0]


def test_three_checkpoints_fit_beside_each_other(shape_8b: ModelShape, options: Options) -> None:
    """Two that are kept and the one that is being written: a byte of place and one of momentum for each weight."""
    disk = peak("solve", shape_8b, options()).disk["checkpoints (three)"]
    assert disk == pytest.approx(3 * 2 * shape_8b.weights, rel=0.01)


def test_what_is_needed_is_the_largest_phase(shape_8b: ModelShape, options: Options) -> None:
    peaks = phase_peaks(shape_8b, setting_for(shape_8b, options(), "resident", GPU))
    for order in (peaks, peaks[::-1]):
        assert needed(order, "gpu") == max(sum(found.gpu.values()) for found in peaks)


def test_a_remembered_teacher_stays_for_the_solve(shape_8b: ModelShape, options: Options) -> None:
    """Its last hidden states of all windows, in float32."""
    config = dataclasses.replace(options(), data=DataConfig("t.txt", 8, 16))
    assert (
        peak("solve", shape_8b, config).gpu["teacher's last hidden states"] == 4.0 * 8 * 16 * shape_8b.hidden
    )
