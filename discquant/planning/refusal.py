# SPDX-License-Identifier: Apache-2.0
"""What is said where a run fits with no placement: the numbers, and the nearest configuration that would fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from discquant.config import ComputeDtype, QuantizeConfig
from discquant.errors import CapacityError, ConfigError
from discquant.planning.hardware import GB
from discquant.planning.option import Machine, Option, option_of
from discquant.planning.setting import PLACEMENTS, Placement, Setting
from discquant.planning.shape import ModelShape

# Stands for calibration text of the user's own.
TEXT_FILE = "TEXT.jsonl"
LEAST_SAMPLES = 16  # windows for GPTQ and its like that advice goes down to
# Fewer, or shorter ones, are not advised for `allocate`, whose figures are means over windows.
FEWEST_WINDOWS, SHORTEST_WINDOW = 64, 64


def with_state(config: QuantizeConfig, state: str, optimizer: str) -> QuantizeConfig:
    """Return a configuration with another state format and optimizer."""
    solver = dataclasses.replace(config.solver, state=state, optimizer=optimizer)  # type: ignore[arg-type]
    return dataclasses.replace(config, solver=solver)


def _places(given: Placement | None) -> dict[tuple[Placement, Placement], str]:
    """Return where state and activations may live, mildest change first, each with the options that say so.

    `given` is where activations were asked for; None follows the placement.
    """
    asked = [(placement, given or placement) for placement in PLACEMENTS]
    followed = [(placement, placement) for placement in PLACEMENTS]
    found = {}
    for placement, kept in dict.fromkeys((*asked, *followed, *itertools.product(PLACEMENTS, PLACEMENTS))):
        changed = "" if kept == (given or placement) else f" --activations {kept}"
        found[placement, kept] = f"--placement {placement}{changed}"
    return found


def _rounding(config: QuantizeConfig) -> str:
    """Return the name of what rounds the weights, or makes DiscQuant's start."""
    return config.solver.start if config.method == "discquant" else config.method


def _fewer_samples(config: QuantizeConfig) -> list[tuple[str, QuantizeConfig]]:
    """Return the configuration with fewer windows for what is rounded layer by layer, each half of the one before."""
    used = {_rounding(config), *config.baselines}
    found: list[tuple[str, QuantizeConfig]] = []
    samples = min(config.gptq_samples, config.data.nsamples)
    while samples > LEAST_SAMPLES and used & {"gptq", "guided", "greedy"}:
        samples = max(LEAST_SAMPLES, samples // 2)
        found.append((f"--gptq-samples {samples}", dataclasses.replace(config, gptq_samples=samples)))
    return found


def _less_solving(config: QuantizeConfig) -> list[tuple[str, QuantizeConfig]]:
    """Return changes of DiscQuant's start and state, mildest first."""
    # What the windows are for may be left out, too: fewer are not said with what comes after.
    found = _fewer_samples(config)
    current, said = config, ""
    if config.solver.curved:
        current = dataclasses.replace(current, solver=dataclasses.replace(current.solver, curvature=0.0))
        said = "--curvature 0"
        found.append((said, current))
    if config.solver.start == "gptq":
        current = dataclasses.replace(current, solver=dataclasses.replace(current.solver, start="ref"))
        said = f"{said} --start ref{' --baselines none' if config.baselines else ''}".strip()
        current = dataclasses.replace(current, baselines=())
        found.append((said, current))
    if (config.solver.state, config.solver.optimizer) != ("u8", "momentum"):
        current = with_state(current, "u8", "momentum")
        said = f"{said} --state u8 --optimizer momentum".strip()
        found.append((said, current))
    return found


def _smaller(config: QuantizeConfig, accelerated: bool) -> list[tuple[str, QuantizeConfig]]:
    """Return changes that need less memory, mildest first, each with the options that make it."""
    found = []
    current, said = config, ""
    if config.data.dataset == "self":  # sampling needs the whole model in memory
        current = dataclasses.replace(current, data=dataclasses.replace(current.data, dataset=TEXT_FILE))
        said = f"--dataset {TEXT_FILE}"
        found.append((said, current))
    if set(config.baselines) - {"rtn", _rounding(config)}:  # only measured: no byte of the result changes
        current = dataclasses.replace(current, baselines=())
        said = f"{said} --baselines none".strip()
        found.append((said, current))
    if config.method == "discquant" and (changes := _less_solving(current)):
        found += [(f"{said} {change}".strip(), changed) for change, changed in changes]
        said, current = found[-1]
    # CPUs compute in bfloat16 far more slowly.
    narrow: ComputeDtype = "bfloat16" if accelerated else "float32"
    if config.solver.compute_dtype not in (narrow, "bfloat16"):
        current = dataclasses.replace(
            current, solver=dataclasses.replace(current.solver, compute_dtype=narrow)
        )
        said = f"{said} --compute-dtype {narrow}".strip()
        found.append((said, current))
    micro = current.solver.micro_batch
    while micro > 1:
        micro //= 2
        solver = dataclasses.replace(current.solver, micro_batch=micro)
        current = dataclasses.replace(current, solver=solver)
        found.append((f"{said} --micro-batch {micro}".strip(), current))
    if micro < config.solver.micro_batch:
        said = f"{said} --micro-batch {micro}".strip()
    if config.method != "discquant":
        found += [(f"{said} {fewer}".strip(), changed) for fewer, changed in _fewer_samples(current)]
        said, current = found[-1] if found else (said, current)
    batch = current.solver.batch_size
    while batch > 1:
        batch //= 2
        solver = dataclasses.replace(current.solver, batch_size=batch)
        current = dataclasses.replace(current, solver=solver)
        found.append((f"{said} --batch-size {batch}".strip(), current))
    return found


def _shorter(config: QuantizeConfig, accelerated: bool) -> list[tuple[str, QuantizeConfig]]:
    """Return what `_smaller` does of `discquant allocate`, which has no options of a solve."""
    current, said, found = config, "", []
    if config.data.dataset == "self":
        current = dataclasses.replace(current, data=dataclasses.replace(current.data, dataset=TEXT_FILE))
        said = f"--dataset {TEXT_FILE}"
        found.append((said, current))
    narrow: ComputeDtype = "bfloat16" if accelerated else "float32"
    if config.solver.compute_dtype not in (narrow, "bfloat16"):
        solver = dataclasses.replace(current.solver, compute_dtype=narrow)
        current = dataclasses.replace(current, solver=solver)
        said = f"{said} --compute-dtype {narrow}".strip()
        found.append((said, current))
    for option, least in (("nsamples", FEWEST_WINDOWS), ("seqlen", SHORTEST_WINDOW)):
        begun, size = said, getattr(current.data, option)
        while size > least:
            size //= 2
            data = dataclasses.replace(current.data, **{option: size})
            current = dataclasses.replace(current, data=data)
            said = f"{begun} --{option} {size}".strip()
            found.append((said, current))
    return found


def every_rank_has_some(config: QuantizeConfig, ranks: int) -> bool:
    """Return whether every rank has micro-batches of a step, without which a run on several is refused."""
    from discquant.solver.ranks import Ranks

    if config.method != "discquant":
        return True
    try:
        Ranks(0, ranks).span(-(-config.solver.batch_size // config.solver.micro_batch))
    except ConfigError:
        return False
    return True


def _size(num_bytes: float, digits: int = 1) -> str:
    if num_bytes >= 0.1 * GB:
        return f"{num_bytes / GB:,.{digits}f} GB"
    return f"{1e3 * num_bytes / GB:,.{digits + 1}f} MB"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.2f} G" if weights >= 1e8 else f"{weights / 1e6:.2f} M"


def _sizes(needed: float, there: float) -> tuple[str, str]:
    """Return both with as many digits as tell them apart."""
    pairs = [(_size(needed, digits), _size(there, digits)) for digits in (1, 2, 3)]
    return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])


def _gigabytes(option: Option, machine: Machine) -> str:
    parts = []
    if machine.device.memory is not None:
        parts.append("{} of device memory (there are {})".format(*_sizes(option.gpu, machine.device.memory)))
    host, disk = (
        f"; up to {margin:.0%} more is let through" if margin else ""
        for margin in (machine.host_margin, machine.disk_margin)
    )
    parts.append("{} of host memory (there are {}{})".format(*_sizes(option.host, machine.host), host))
    parts.append("{} of disk ({} are free{})".format(*_sizes(option.disk, machine.disk), disk))
    return ", ".join(parts)


def refusal(
    shape: ModelShape,
    config: QuantizeConfig,
    wanted: Sequence[Placement],
    machine: Machine,
    setting_of: Callable[[QuantizeConfig, Placement, Placement | None], Setting],
    *,
    activations: Placement | None = None,
    filled: str = "",
) -> CapacityError:
    """Return the refusal: what the least demanding placement needs, and the nearest configuration that would fit.

    Args:
        shape: The model's sizes.
        config: The options that do not fit.
        wanted: Placements that were asked for.
        machine: What they do not fit on.
        setting_of: Makes the setting of a configuration, a placement of the state and one of activations.
        activations: Where activations were asked for; None follows the placement.
        filled: Options in `config` that the user has not given; what would fit is said with them.
    """

    def excess(option: Option) -> float:
        memory = machine.device.memory
        host, disk = machine.host * (1 + machine.host_margin), machine.disk * (1 + machine.disk_margin)
        ratios = [option.host / host, option.disk / max(1.0, disk)]
        return max([*ratios, option.gpu / memory] if memory else ratios)

    tried = [option_of(shape, setting_of(config, placement, activations), machine) for placement in wanted]
    best = min(tried, key=excess)
    message = (
        f"plan: {shape.name} with {_count(shape.weights)} weights to quantize fits {machine.device.name} with none of "
        f"the placements {', '.join(wanted)}; {best.placement}, the nearest, needs {_gigabytes(best, machine)}"
    )
    least = best
    allocating = setting_of(config, wanted[0], activations).allocating is not None
    changes = (_shorter if allocating else _smaller)(config, machine.accelerated)
    for said, smaller in [("", config), *changes]:
        if not every_rank_has_some(smaller, machine.ranks):
            continue
        for (placement, kept), places in _places(activations).items():
            option = option_of(shape, setting_of(smaller, placement, kept), machine)
            if option.fits:
                change = " ".join(filter(None, (places, said, filled)))
                return CapacityError(f"{message}. It would fit with {change}")
            least = min(least, option, key=excess)
    solved = config.method == "discquant" and not allocating  # the others hold no state
    words = ", ".join((least.placement, least.state) if solved else (least.placement,))
    return CapacityError(
        f"{message}. No configuration fits; the least demanding ({words}) needs {_gigabytes(least, machine)}"
    )
