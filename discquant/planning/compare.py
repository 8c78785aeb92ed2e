# SPDX-License-Identifier: Apache-2.0
"""A run against its plan: memory of each phase and time per step, for summary.json and report.md."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from discquant.config import QuantizeConfig
from discquant.errors import CapacityError
from discquant.planning.hardware import DEVICES, free_host_memory, host_memory, this_device
from discquant.planning.option import MEMORY_TOLERANCE
from discquant.planning.plan import Machine, Plan, make_plan
from discquant.planning.rates import load_rates, machine_name, nearest_rates
from discquant.planning.setting import PLACEMENTS, Allocating, Placement
from discquant.planning.shape import ModelShape

# Python, torch and transformers before a model is opened; a run takes its own reading instead.
PROCESS_BYTES = 0.45e9
TIME_TOLERANCE = 0.25
# Plan phases that one phase of a run spans.
SPANS = {"round": ("teacher", "start", "solve")}


def plan_of_run(
    shape: ModelShape,
    config: QuantizeConfig,
    *,
    process: float,
    placement: Placement | Literal["auto"] = "resident",
    disk: float = 1e18,
    device: torch.device | None = None,
    ranks: int = 1,
    activations: Placement | None = None,
    allocating: Allocating | None = None,
) -> Plan:
    """Plan a run of a model in memory on this machine, with its rates where they were measured.

    `auto` takes the first placement that fits what is free now. Where none does, others may still leave: then the least
    demanding one that fits the machine's whole memory, which is what counts, too, where a placement is named. Beside an
    accelerator what `auto` puts on the host is pinned and cannot be swapped: no byte beyond that memory counts then.

    Args:
        shape: The model's sizes.
        config: The run's options.
        process: Resident memory of the process before the model was opened, bytes.
        placement: Where the state will live.
        disk: Bytes of disk that the run may fill.
        device: Where it computes; None is the CPU.
        ranks: Processes that share this machine, each with a device of its own where there are any.
        activations: Where activations between blocks are kept; None follows the placement.
        allocating: See `make_plan`.

    Returns:
        The plan.

    Raises:
        ConfigError, CapacityError: See `make_plan`.
    """
    solver = config.solver
    rates = nearest_rates(
        load_rates(),
        machine=machine_name(),
        dtype=solver.compute_dtype,
        state=f"{solver.state} {solver.optimizer}",
        weights=shape.largest.weights,
        tokens=min(solver.micro_batch, solver.batch_size) * config.data.seqlen,
    )
    # A plan is good to 10 %: what exceeds the memory by no more is not refused.
    on_gpu = device is not None and device.type == "cuda"
    where = this_device(device.index or 0) if device is not None and on_gpu else DEVICES["cpu"]
    machine = Machine(where, host_memory(), disk, ranks, MEMORY_TOLERANCE, MEMORY_TOLERANCE)
    planned = functools.partial(
        make_plan,
        shape,
        config,
        placement=placement,
        rates=rates,
        process=process,
        activations=activations,
        allocating=allocating,
    )
    if placement == "auto":
        if where.memory is not None:
            where = dataclasses.replace(where, memory=float(torch.cuda.mem_get_info(device)[0]))
            machine = dataclasses.replace(machine, host_margin=0.0)
        free = min(machine.host * (1 + machine.host_margin), free_host_memory() + process)
        with contextlib.suppress(CapacityError):
            return planned(dataclasses.replace(machine, device=where, host=free, host_margin=0.0))
        for least in reversed(PLACEMENTS):
            with contextlib.suppress(CapacityError):
                return planned(machine, placement=least)
    return planned(machine)


def against_plan(
    plan: Plan, phases: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compare what a run took with its plan.

    Args:
        plan: Made before the run.
        phases: Records with `name` and `peak_rss_bytes`, on a GPU also `peak_device_bytes`.
        steps: Metric lines with `seconds`.

    Returns:
        Rows of phase, planned and actual bytes and their ratio; seconds per step (the median; planned only where this
        machine's rates are known); `within` says whether all ratios of memory are within 10 % and time within 25 %.
    """
    planned = {peak.name: peak.total("host") for peak in plan.peaks}
    at_device = {peak.name: peak.total("gpu") for peak in plan.peaks}
    rows: list[dict[str, Any]] = []
    for record in phases:
        spans = SPANS.get(str(record["name"]), (str(record["name"]),))
        known = [planned[name] for name in spans if name in planned]
        if not known:
            continue
        expected, actual = max(known), float(record["peak_rss_bytes"])
        rows.append({"phase": record["name"], "planned_bytes": expected, "actual_bytes": actual})
        if "peak_device_bytes" in record:
            on_device = max(at_device[name] for name in spans if name in at_device)
            rows[-1] |= {
                "planned_device_bytes": on_device,
                "actual_device_bytes": record["peak_device_bytes"],
            }
    for row in rows:
        row["ratio"] = round(row["actual_bytes"] / row["planned_bytes"], 4)
    found: dict[str, Any] = {"memory": rows, "placement": plan.setting.placement}
    within: dict[str, bool | None] = {
        "memory": None,
        "time": None,
    }
    if rows:
        peak = max(row["actual_bytes"] for row in rows) / max(row["planned_bytes"] for row in rows)
        found["peak_ratio"] = round(peak, 4)
        within["memory"] = abs(peak - 1) <= MEMORY_TOLERANCE
    seconds = [float(line["seconds"]) for line in steps if line.get("seconds") is not None]
    if seconds:
        actual_step = statistics.median(seconds)
        found["step_seconds"] = {
            "actual": actual_step,
            "planned": plan.step_seconds if plan.measured else None,
        }
        if plan.measured:
            ratio = actual_step / plan.step_seconds
            found["step_seconds"]["ratio"] = round(ratio, 4)
            within["time"] = abs(ratio - 1) <= TIME_TOLERANCE
    return {**found, "within": within}
