# SPDX-License-Identifier: Apache-2.0
"""One way to carry out a run on a machine: what it needs, what a step takes, whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from discquant.planning.allocating import peaks_of
from discquant.planning.hardware import Device
from discquant.planning.memory import PhasePeak, needed
from discquant.planning.rates import Rates, measured_step
from discquant.planning.setting import (
    Placement,
    Setting,
    grid_share,
    keeps_graph,
    remembers_teacher,
    state_of,
)
from discquant.planning.shape import ModelShape
from discquant.planning.traffic import (
    Moved,
    StepTime,
    boundary_bytes,
    curvature_work,
    factor_bytes,
    moved_per_step,
    step_time,
    work_per_token,
)

# What a run may take beyond its plan.
MEMORY_TOLERANCE = 0.10
# The engine fetches a block's whole state for either pass.
FORWARD_PREFIX = False


@dataclass(frozen=True)
class Machine:
    """Where the plan is for: one rank's device, and bytes of host memory and of free disk that all ranks share.

    The margins are the shares by which a plan may exceed host memory and disk before it counts as not fitting.
    """

    device: Device
    host: float
    disk: float
    ranks: int = 1
    host_margin: float = 0.0
    disk_margin: float = 0.0

    @property
    def accelerated(self) -> bool:
        """Whether there is a device with memory of its own."""
        return self.device.memory is not None


@dataclass(frozen=True)
class Option:
    """One row of the comparison: a placement and a state format; bytes of a rank's device and of the whole machine."""

    placement: Placement
    state: str
    gpu: float
    host: float
    disk: float
    moved_in: float
    moved_out: float
    seconds: float
    fits: bool


def fits(peaks: Sequence[PhasePeak], machine: Machine, *, spare: float = 0.0) -> bool:
    """Return whether a machine has room for the peaks of all its ranks, and on a device for that share of them more."""
    memory = machine.device.memory
    return (
        (memory is None or needed(list(peaks), "gpu") * (1 + spare) <= memory)
        and needed(list(peaks), "host") * machine.ranks <= machine.host * (1 + machine.host_margin)
        and needed(list(peaks), "disk") <= machine.disk * (1 + machine.disk_margin)
    )


def seconds_of(
    shape: ModelShape, setting: Setting, machine: Machine, rates: Rates | None
) -> tuple[Moved | None, StepTime, float]:
    """Return traffic, the model's step time, and the step's seconds: measured rates count where there are any.

    A method that rounds layer by layer takes no steps: nothing and 0.
    """
    if setting.config.method != "discquant":
        return None, StepTime(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 0.0
    work = work_per_token(shape, setting.config.data.seqlen, step=curvature_work(shape, setting.config))
    moved = None
    if setting.placement == "resident" and (
        setting.boundaries == "disk" or (setting.boundaries == "host" and setting.accelerator)
    ):
        moved = Moved(0.0, 0.0, 0.0, boundary_bytes(shape, setting.tokens, setting.element))
    elif setting.placement != "resident":
        grid = grid_share(shape, setting.config)
        moved = moved_per_step(
            shape,
            state_of(shape.blocks, setting),
            setting.tokens,
            grid=grid,
            factors=factor_bytes(shape.blocks, setting.config),
            element=setting.element,
            offload=setting.boundaries != "resident",
            prefix=FORWARD_PREFIX,
        )
    device = machine.device.computing(setting.config.solver.compute_dtype)
    modelled = step_time(work, moved, setting.tokens, device)
    if rates is None:
        return moved, modelled, modelled.total
    seconds = measured_step(
        rates,
        shape,
        tokens=setting.tokens,
        seqlen=setting.config.data.seqlen,
        teacher_known=remembers_teacher(shape, setting),
        keep_graph=keeps_graph(shape, setting),
    )
    seconds += work.step / rates.matmul
    # Gradients of micro-batches are added in float32, two in and one out; the bytes that a step changes are kept.
    added = 1.5 * 4 * (-(-setting.tokens // setting.micro_tokens) - 1)
    seconds += shape.weights * (added + state_of(shape.blocks, setting).written) / rates.copy
    if moved is not None:  # a copy on this machine competes with the work for the same memory: not hidden
        seconds += (moved.total_in + moved.out) / rates.copy
    return moved, modelled, seconds


def option_of(shape: ModelShape, setting: Setting, machine: Machine, rates: Rates | None = None) -> Option:
    """Return a setting as a row of the comparison."""
    peaks = peaks_of(shape, setting)
    moved, _, seconds = seconds_of(shape, setting, machine, rates)
    return Option(
        setting.placement,
        setting.layout.name,
        needed(peaks, "gpu"),
        needed(peaks, "host") * machine.ranks,
        needed(peaks, "disk"),
        moved.total_in + moved.boundaries if moved else 0.0,
        moved.out + moved.boundaries if moved else 0.0,
        seconds,
        fits(peaks, machine),
    )
