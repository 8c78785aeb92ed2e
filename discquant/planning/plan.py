# SPDX-License-Identifier: Apache-2.0
"""From a model's sizes, options and a machine to a plan: what fits, what it costs, what to change where it does not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from discquant.config import QuantizeConfig
from discquant.planning.allocating import peaks_of
from discquant.planning.memory import PhasePeak
from discquant.planning.option import (
    FORWARD_PREFIX,
    MEMORY_TOLERANCE,
    Machine,
    Option,
    fits,
    option_of,
    seconds_of,
)
from discquant.planning.rates import Rates
from discquant.planning.refusal import every_rank_has_some, refusal, with_state
from discquant.planning.setting import PLACEMENTS, Allocating, Placement, Setting, state_of
from discquant.planning.shape import ModelShape
from discquant.planning.traffic import (
    HidingTokens,
    Moved,
    StepTime,
    Work,
    curvature_work,
    factor_bytes,
    gathering_work,
    tokens_to_hide,
    work_per_token,
)

__all__ = ["Machine", "Option", "Plan", "make_plan", "setting_for"]

# State formats compared with the one asked for.
STATES: tuple[tuple[str, str], ...] = (("fp32", "adamw"), ("u8", "adamw"), ("u8", "momentum"))


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
    def solved(self) -> bool:
        """Whether the run's method takes steps."""
        return self.setting.config.method == "discquant"

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps and of gathering the curvature; sampling, GPTQ's start and evaluation come on top."""
        return self.gather_seconds + self.step_seconds * self.steps

    @property
    def steps(self) -> int:
        """Optimizer steps; none of a method that rounds layer by layer, whose time is not in the plan."""
        return self.setting.config.solver.steps if self.solved else 0

    @property
    def state_bytes_per_weight(self) -> float:
        """State without scales, the curvature's factors included, on average over the model."""
        factors = factor_bytes(self.shape.blocks, self.setting.config)
        return state_of(self.shape.blocks, self.setting).total + factors / max(1, self.shape.weights)

    @property
    def exchanged(self) -> float:
        """Bytes that a rank sends, and receives, per step: float32 sums of gradients, once per level of the tree."""
        return 4.0 * self.shape.weights * (self.setting.ranks - 1).bit_length()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; bytes, seconds, FLOP."""
        device = self.machine.device.computing(self.setting.config.solver.compute_dtype)
        moved = None if self.moved is None else dataclasses.asdict(self.moved)
        return {
            "model": self.shape.name,
            "blocks": len(self.shape.blocks),
            "quantized_weights": self.shape.weights,
            "other_parameters": self.shape.untouched,
            "device": dataclasses.asdict(self.machine.device),
            "host_bytes_available": self.machine.host,
            "disk_bytes_available": self.machine.disk,
            "method": self.setting.config.method,
            "placement": self.setting.placement,
            "activations": self.setting.boundaries,
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
            "steps": self.steps,
            "total_seconds": self.total_seconds,
            "rates": "measured on this machine" if self.measured else f"assumed: {device.source}",
            "options": [dataclasses.asdict(option) for option in self.options],
            "warnings": list(self.warnings),
        }


def _gathering(shape: ModelShape, config: QuantizeConfig, machine: Machine, rates: Rates | None) -> float:
    """Return seconds of gathering the curvature's factors, once per run (and again where a run is continued)."""
    rows = min(config.solver.curvature_samples, config.data.nsamples)
    work = rows * config.data.seqlen * gathering_work(shape, config)
    device = machine.device.computing(config.solver.compute_dtype)
    return work / (device.flops if rates is None else rates.backward)


def setting_for(
    shape: ModelShape,
    config: QuantizeConfig,
    placement: Placement,
    machine: Machine,
    *,
    process: float = 0.0,
    activations: Placement | None = None,
    allocating: Allocating | None = None,
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
        activations,
        allocating,
    )


def make_plan(
    shape: ModelShape,
    config: QuantizeConfig,
    machine: Machine,
    *,
    placement: Placement | Literal["auto"] = "auto",
    rates: Rates | None = None,
    process: float = 0.0,
    activations: Placement | None = None,
    filled: str = "",
    allocating: Allocating | None = None,
) -> Plan:
    """Plan a run.

    Args:
        shape: The model's sizes.
        config: The run's options.
        machine: Device, host memory, free disk.
        placement: A policy, or "auto": the first of resident, host, disk that fits, if one does with a tenth of the
            device's peak to spare, for that cannot be swapped; else the first that fits at all.
        rates: Measured rates of this machine; None assumes the device's.
        process: What the process holds before it opens a model, bytes.
        activations: Where activations between blocks are kept; None follows the placement.
        filled: Options in `config` that the user has not given, as words: advice repeats them.
        allocating: Of `discquant allocate`; its options are `allocating.options`.

    Returns:
        The plan.

    Raises:
        ConfigError: The windows are longer than the model's positions.
        CapacityError: It fits with no placement (with none but the one asked for); the message has the numbers and the
            nearest configuration that would.
    """
    long = shape.positions.check(config.data.seqlen) if shape.positions is not None else None
    wanted = PLACEMENTS if placement == "auto" else (placement,)

    def setting_of(
        config: QuantizeConfig, placement: Placement, activations: Placement | None = activations
    ) -> Setting:
        return setting_for(
            shape, config, placement, machine, process=process, activations=activations, allocating=allocating
        )

    def enough_windows(batch: int) -> str:
        """Return the advice to take so many windows per step, nothing where the same placement has no room for them."""
        solver = dataclasses.replace(config.solver, batch_size=batch)
        advised = setting_of(dataclasses.replace(config, solver=solver), chosen.placement)
        shared = every_rank_has_some(advised.config, machine.ranks)
        return f", e.g. --batch-size {batch}" if shared and fits(peaks_of(shape, advised), machine) else ""

    settings = [setting_of(config, candidate) for candidate in wanted]
    fitting = [setting for setting in settings if fits(peaks_of(shape, setting), machine)]
    if not fitting:
        raise refusal(shape, config, wanted, machine, setting_of, activations=activations, filled=filled)
    roomy = (s for s in fitting if fits(peaks_of(shape, s), machine, spare=MEMORY_TOLERANCE))
    chosen = next(roomy, fitting[0])
    moved, modelled, seconds = seconds_of(shape, chosen, machine, rates)
    factors = factor_bytes(shape.blocks, config)
    device = machine.device.computing(config.solver.compute_dtype)
    hide = tokens_to_hide(
        shape, state_of(shape.blocks, chosen), device, factors=factors, prefix=FORWARD_PREFIX
    )
    own = (config.solver.state, config.solver.optimizer)
    solved = config.method == "discquant"
    states = [own, *(other for other in STATES if other != own and solved)]
    options = tuple(
        option_of(shape, setting_of(with_state(config, *other), policy), machine, rates)
        for policy in PLACEMENTS
        for other in states
    )
    warnings = [] if long is None else [long]
    if chosen is not fitting[0]:
        warnings.append(
            f"{fitting[0].placement} fits the device with less than {MEMORY_TOLERANCE:.0%} of its peak to spare, which "
            f"a run may exceed; --placement {fitting[0].placement} takes it all the same"
        )
    enough = max(hide.serial, hide.forward)
    if solved and chosen.placement != "resident" and machine.accelerated and chosen.tokens < enough:
        slowed = modelled.total / max(1e-30, modelled.forward + modelled.backward + modelled.head)
        each = " and rank" if machine.ranks > 1 else ""
        advice = enough_windows(-(-int(enough) * machine.ranks // config.data.seqlen))
        warnings.append(
            f"{chosen.tokens} tokens per step{each} are too few for the transfers to hide: {enough:,.0f} are needed "
            f"({max(hide.duplex, hide.forward):,.0f} if both directions run at once){advice}; "
            f"a step takes {slowed:.1f} times its work"
        )
    if "disk" in (chosen.placement, chosen.boundaries):
        warnings.append(
            "the disk's own rate is not in the plan; if it is below the link's, steps take longer"
        )
    return Plan(
        shape,
        machine,
        chosen,
        tuple(peaks_of(shape, chosen)),
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
