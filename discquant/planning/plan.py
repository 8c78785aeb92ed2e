# SPDX-License-Identifier: Apache-2.0
"""From a model's sizes, options and a machine to a plan: what fits, what it costs, what to change where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from discquant.config import QuantizeConfig
from discquant.errors import CapacityError
from discquant.planning.hardware import GB, Device
from discquant.planning.memory import (
    PLACEMENTS,
    PhasePeak,
    Placement,
    Setting,
    grid_share,
    keeps_graph,
    needed,
    phase_peaks,
    remembers_teacher,
)
from discquant.planning.rates import Rates, measured_step
from discquant.planning.shape import ModelShape
from discquant.planning.traffic import (
    HidingTokens,
    Moved,
    StepTime,
    Work,
    curvature_work,
    factor_bytes,
    gathering_work,
    moved_per_step,
    step_time,
    tokens_to_hide,
    work_per_token,
)

# The engine fetches a block's whole state for either pass.
FORWARD_PREFIX = False
# Stands for calibration text of the user's own.
TEXT_FILE = "TEXT.jsonl"
# State formats compared with the one asked for.
STATES: tuple[tuple[str, str], ...] = (("fp32", "adamw"), ("u8", "adamw"), ("u8", "momentum"))


@dataclass(frozen=True)
class Machine:
    """Where the plan is for: one rank's device, and bytes of host memory and of free disk that all ranks share."""

    device: Device
    host: float
    disk: float
    ranks: int = 1

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


@dataclass(frozen=True)
class Plan:
    """A plan that fits; `options` compares it with the others."""

    shape: ModelShape
    machine: Machine
    setting: Setting
    peaks: tuple[PhasePeak, ...]
    work: Work
    moved: Moved | None
    hide: HidingTokens
    step: StepTime
    step_seconds: float
    gather_seconds: float
    options: tuple[Option, ...]
    warnings: tuple[str, ...]
    measured: bool

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps and of gathering the curvature; sampling, GPTQ's start and evaluation come on top."""
        return self.gather_seconds + self.step_seconds * self.setting.config.solver.iters

    @property
    def state_bytes_per_weight(self) -> float:
        """State without scales, the curvature's factors included, on average over the model."""
        factors = factor_bytes(self.shape.blocks, self.setting.config)
        return self.setting.layout.total + factors / max(1, self.shape.weights)

    @property
    def exchanged(self) -> float:
        """Bytes that a rank sends, and receives, per step: float32 sums of gradients, once per level of the tree."""
        return 4.0 * self.shape.weights * (self.setting.ranks - 1).bit_length()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; bytes, seconds, FLOP."""
        moved = None if self.moved is None else dataclasses.asdict(self.moved)
        return {
            "model": self.shape.name,
            "blocks": len(self.shape.blocks),
            "quantized_weights": self.shape.weights,
            "other_parameters": self.shape.untouched,
            "device": dataclasses.asdict(self.machine.device),
            "host_bytes_available": self.machine.host,
            "disk_bytes_available": self.machine.disk,
            "placement": self.setting.placement,
            "state": self.setting.layout.name,
            "state_bytes_per_weight": self.state_bytes_per_weight,
            "tokens_per_step": self.setting.step_tokens,
            "ranks": self.setting.ranks,
            "exchanged_bytes_per_step": self.exchanged,
            "phases": [
                {
                    "name": peak.name,
                    "gpu_bytes": peak.total("gpu"),
                    "host_bytes": peak.total("host"),
                    "disk_bytes": peak.total("disk"),
                    "items": {"gpu": peak.gpu, "host": peak.host, "disk": peak.disk},
                }
                for peak in self.peaks
            ],
            "flop_per_token": self.work.total,
            "curvature_flop_per_step": self.work.step,
            "flop_per_step": self.work.total * self.setting.step_tokens + self.work.step,
            "moved_per_step": moved,
            "tokens_to_hide_transfers": dataclasses.asdict(self.hide),
            "step_seconds": self.step_seconds,
            "gather_seconds": self.gather_seconds,
            "steps": self.setting.config.solver.iters,
            "total_seconds": self.total_seconds,
            "rates": "measured on this machine"
            if self.measured
            else f"assumed: {self.machine.device.source}",
            "options": [dataclasses.asdict(option) for option in self.options],
            "warnings": list(self.warnings),
        }


def _fits(peaks: Sequence[PhasePeak], machine: Machine) -> bool:
    memory = machine.device.memory
    return (
        (memory is None or needed(list(peaks), "gpu") <= memory)
        and needed(list(peaks), "host") * machine.ranks <= machine.host
        and needed(list(peaks), "disk") <= machine.disk
    )


def _seconds(
    shape: ModelShape, setting: Setting, machine: Machine, rates: Rates | None
) -> tuple[Moved | None, StepTime, float]:
    """Return traffic, the model's step time, and the step's seconds: measured rates count where there are any."""
    work = work_per_token(shape, setting.config.data.seqlen, step=curvature_work(shape, setting.config))
    moved = None
    if setting.placement != "resident":
        grid = grid_share(shape, setting.config)
        moved = moved_per_step(
            shape,
            setting.layout,
            setting.tokens,
            grid=grid,
            factors=factor_bytes(shape.blocks, setting.config),
            prefix=FORWARD_PREFIX,
        )
    modelled = step_time(work, moved, setting.tokens, machine.device)
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
    seconds += shape.weights * (added + setting.layout.written) / rates.copy
    if moved is not None:  # a copy on this machine competes with the work for the same memory: not hidden
        seconds += (moved.total_in + moved.out) / rates.copy
    return moved, modelled, seconds


def _gathering(shape: ModelShape, config: QuantizeConfig, machine: Machine, rates: Rates | None) -> float:
    """Return seconds of gathering the curvature's factors, once per run (and again where a run is continued)."""
    rows = min(config.solver.curvature_samples, config.data.nsamples)
    work = rows * config.data.seqlen * gathering_work(shape, config)
    return work / (machine.device.flops if rates is None else rates.backward)


def setting_for(
    shape: ModelShape,
    config: QuantizeConfig,
    placement: Placement,
    machine: Machine,
    *,
    process: float = 0.0,
) -> Setting:
    """Return the setting of a run of a model on a machine."""
    element = {"bfloat16": 2, "float32": 4, "float64": 8}[config.solver.compute_dtype]
    return Setting(
        config,
        placement,
        machine.accelerated,
        element,
        process,
        shape.file_bytes,
        shape.blockwise,
        machine.ranks,
    )


def _option(
    shape: ModelShape,
    config: QuantizeConfig,
    placement: Placement,
    machine: Machine,
    rates: Rates | None,
    process: float,
) -> Option:
    setting = setting_for(shape, config, placement, machine, process=process)
    peaks = phase_peaks(shape, setting)
    moved, _, seconds = _seconds(shape, setting, machine, rates)
    return Option(
        placement,
        setting.layout.name,
        needed(peaks, "gpu"),
        needed(peaks, "host") * machine.ranks,
        needed(peaks, "disk"),
        moved.total_in + moved.boundaries if moved else 0.0,
        moved.out + moved.boundaries if moved else 0.0,
        seconds,
        _fits(peaks, machine),
    )


def _with_state(config: QuantizeConfig, state: str, optimizer: str) -> QuantizeConfig:
    solver = dataclasses.replace(config.solver, state=state, optimizer=optimizer)  # type: ignore[arg-type]
    return dataclasses.replace(config, solver=solver)


def _smaller(config: QuantizeConfig) -> list[tuple[str, QuantizeConfig]]:
    """Return changes that need less memory, mildest first, each with the options that make it."""
    found = []
    current, said = config, ""
    if config.data.dataset == "self":  # sampling needs the whole model in memory
        current = dataclasses.replace(current, data=dataclasses.replace(current.data, dataset=TEXT_FILE))
        said = f"--dataset {TEXT_FILE}"
        found.append((said, current))
    if config.solver.curved:
        current = dataclasses.replace(current, solver=dataclasses.replace(current.solver, curvature=0.0))
        said = f"{said} --curvature 0".strip()
        found.append((said, current))
    if config.solver.start == "gptq":
        current = dataclasses.replace(current, solver=dataclasses.replace(current.solver, start="ref"))
        said = f"{said} --start ref --baselines none".strip()
        current = dataclasses.replace(current, baselines=())
        found.append((said, current))
    if (config.solver.state, config.solver.optimizer) != ("u8", "momentum"):
        current = _with_state(current, "u8", "momentum")
        said = f"{said} --state u8 --optimizer momentum".strip()
        found.append((said, current))
    micro = current.solver.micro_batch
    while micro > 1:
        micro //= 2
        solver = dataclasses.replace(current.solver, micro_batch=micro)
        current = dataclasses.replace(current, solver=solver)
        found.append((f"{said} --micro-batch {micro}".strip(), current))
    batch, micro_said = current.solver.batch_size, f"{said} --micro-batch {micro}".strip()
    while batch > 1:
        batch //= 2
        solver = dataclasses.replace(current.solver, batch_size=batch)
        current = dataclasses.replace(current, solver=solver)
        found.append((f"{micro_said} --batch-size {batch}", current))
    return found


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.1f} GB" if num_bytes >= 0.1 * GB else f"{1e3 * num_bytes / GB:,.2f} MB"


def _gigabytes(option: Option, machine: Machine) -> str:
    parts = []
    if machine.device.memory is not None:
        parts.append(f"{_size(option.gpu)} of device memory (there are {_size(machine.device.memory)})")
    parts.append(f"{_size(option.host)} of host memory (there are {_size(machine.host)})")
    parts.append(f"{_size(option.disk)} of disk ({_size(machine.disk)} are free)")
    return ", ".join(parts)


def _refuse(
    shape: ModelShape, config: QuantizeConfig, wanted: Sequence[Placement], machine: Machine, process: float
) -> CapacityError:
    """Return the refusal: what the least demanding placement needs, and the nearest configuration that would fit."""

    def excess(option: Option) -> float:
        memory = machine.device.memory
        ratios = [option.host / machine.host, option.disk / max(1.0, machine.disk)]
        return max([*ratios, option.gpu / memory] if memory else ratios)

    tried = [_option(shape, config, placement, machine, None, process) for placement in wanted]
    best = min(tried, key=excess)
    message = (
        f"plan: {shape.name} with {shape.weights / 1e9:.2f} G weights to quantize fits {machine.device.name} with no "
        f"placement asked for; {best.placement}, the nearest, needs {_gigabytes(best, machine)}"
    )
    least = best
    for said, smaller in [("", config), *_smaller(config)]:
        for placement in PLACEMENTS:
            option = _option(shape, smaller, placement, machine, None, process)
            if option.fits:
                change = f"--placement {placement} {said}".strip()
                return CapacityError(f"{message}. It would fit with {change}")
            least = min(least, option, key=excess)
    return CapacityError(
        f"{message}. No configuration fits; the least demanding ({least.placement}, {least.state}) needs "
        f"{_gigabytes(least, machine)}"
    )


def make_plan(
    shape: ModelShape,
    config: QuantizeConfig,
    machine: Machine,
    *,
    placement: Placement | Literal["auto"] = "auto",
    rates: Rates | None = None,
    process: float = 0.0,
) -> Plan:
    """Plan a run.

    Args:
        shape: The model's sizes.
        config: The run's options.
        machine: Device, host memory, free disk.
        placement: A policy, or "auto": the first of resident, host, disk that fits.
        rates: Measured rates of this machine; None assumes the device's.
        process: What the process holds before it opens a model, bytes.

    Returns:
        The plan.

    Raises:
        ConfigError: The windows are longer than the model's positions.
        CapacityError: It fits with no placement (with none but the one asked for); the message has the numbers and the
            nearest configuration that would.
    """
    long = shape.positions.check(config.data.seqlen) if shape.positions is not None else None
    wanted = PLACEMENTS if placement == "auto" else (placement,)
    chosen: Setting | None = None
    for candidate in wanted:
        setting = setting_for(shape, config, candidate, machine, process=process)
        if _fits(phase_peaks(shape, setting), machine):
            chosen = setting
            break
    if chosen is None:
        raise _refuse(shape, config, wanted, machine, process)
    moved, modelled, seconds = _seconds(shape, chosen, machine, rates)
    factors = factor_bytes(shape.blocks, config)
    hide = tokens_to_hide(shape, chosen.layout, machine.device, factors=factors, prefix=FORWARD_PREFIX)
    own = (config.solver.state, config.solver.optimizer)
    states = [own, *(other for other in STATES if other != own)]
    options = tuple(
        _option(shape, _with_state(config, *other), policy, machine, rates, process)
        for policy in PLACEMENTS
        for other in states
    )
    warnings = [] if long is None else [long]
    enough = max(hide.serial, hide.forward)
    if chosen.placement != "resident" and machine.accelerated and chosen.tokens < enough:
        slowed = modelled.total / max(1e-30, modelled.forward + modelled.backward + modelled.head)
        each = " and rank" if machine.ranks > 1 else ""
        batch = -(-int(enough) * machine.ranks // config.data.seqlen)
        warnings.append(
            f"{chosen.tokens} tokens per step{each} are too few for the transfers to hide: {enough:,.0f} are needed "
            f"({max(hide.duplex, hide.forward):,.0f} if both directions run at once), e.g. --batch-size {batch}; "
            f"a step takes {slowed:.1f} times its work"
        )
    if chosen.placement == "disk":
        warnings.append(
            "the disk's own rate is not in the plan; if it is below the link's, steps take longer"
        )
    return Plan(
        shape,
        machine,
        chosen,
        tuple(phase_peaks(shape, chosen)),
        work_per_token(shape, config.data.seqlen, step=curvature_work(shape, config)),
        moved,
        hide,
        modelled,
        seconds,
        _gathering(shape, config, machine, rates),
        options,
        tuple(warnings),
        rates is not None,
    )
