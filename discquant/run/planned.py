# SPDX-License-Identifier: Apache-2.0
"""A run's own plan: made from config.json, which settles where the state lives; again once the model is open; and held
against what the run took.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from discquant.config import QuantizeConfig
from discquant.errors import UserError
from discquant.formats.lazy import is_lazy
from discquant.planning.compare import against_plan, plan_of_run
from discquant.planning.plan import Plan
from discquant.planning.setting import Allocating
from discquant.planning.shape import ModelShape, read_shape, shape_of
from discquant.run.directory import METRICS, RunDirectory
from discquant.run.phases import resident_bytes
from discquant.solver.engine import Engine


def free_disk(out: Path) -> float:
    """Return the bytes that a run in `out` may fill: what is free there, and what an earlier part of it has written."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    own = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.is_dir() else 0
    return float(shutil.disk_usage(place).free + own)


def local_ranks() -> int:
    """Return how many processes of a run share this machine's memory."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def place_run(
    model: str,
    config: QuantizeConfig,
    engine: Engine,
    out: Path,
    *,
    blockwise: bool = True,
    trust_remote_code: bool = False,
    allocating: Allocating | None = None,
) -> Plan | None:
    """Plan a run from the model's config.json, before a weight is opened: refuse what cannot fit, and settle `auto`.

    Args:
        model: The original.
        config: The run's options.
        engine: Where the state is asked to live, and what computes.
        out: The run directory, for the disk it is on.
        blockwise: Whether the original's blocks may be read one by one.
        trust_remote_code: As for `open_source`.
        allocating: See `make_plan`.

    Returns:
        The plan, whose setting says where the state lives; None where config.json cannot be read.

    Raises:
        ConfigError: Its windows are longer than the model's positions.
        CapacityError: It cannot fit; the message has the numbers and what would.
    """
    try:
        shape = read_shape(model, config.ignore, trust_remote_code=trust_remote_code)
    except UserError:  # opening the model says what is wrong with it
        return None
    shape = dataclasses.replace(shape, blockwise=blockwise)
    return _planned(shape, config, engine, out, process=float(resident_bytes()), allocating=allocating)


def plan_run(model: Any, shape: ModelShape | None, config: QuantizeConfig, engine: Engine, out: Path) -> Plan:
    """Plan a run whose model is open.

    Args:
        model: Opened, and where it runs.
        shape: Its sizes by config.json, which also says how wide its weights are stored; None takes the model's.
        config: The run's options.
        engine: Where the solver's state will live, and what computes.
        out: The run directory, for the disk it is on.

    Returns:
        The plan; its process is what this one holds besides the model.

    Raises:
        CapacityError: The run cannot fit this machine's memory.
    """
    held = sum(
        p.numel() * p.element_size()
        for p in {id(p): p for p in model.parameters()}.values()
        if p.device.type == "cpu"
    )
    process = max(0.0, float(resident_bytes() - held))
    shape = shape or shape_of(model, config.ignore, name=type(model).__name__)
    shape = dataclasses.replace(shape, blockwise=is_lazy(model))
    return _planned(shape, config, engine, out, process=process)


def _planned(
    shape: ModelShape,
    config: QuantizeConfig,
    engine: Engine,
    out: Path,
    *,
    process: float,
    allocating: Allocating | None = None,
) -> Plan:
    return plan_of_run(
        shape,
        config,
        process=process,
        placement=engine.where,
        disk=free_disk(out),
        device=engine.device,
        ranks=local_ranks(),
        activations=engine.activations,
        allocating=allocating,
    )


def compare_run(
    plan: Plan,
    directory: RunDirectory,
    phases: Sequence[dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return plan against actual for the summary; a miss is said in one line.

    Args:
        plan: From `plan_run`.
        directory: The run; its metrics hold the seconds of every step.
        phases: Records of `Phases`.
        say: Takes the line.
    """
    steps = []
    path = directory.path / METRICS
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if line.get("kind") != "validation"]
    found = against_plan(plan, phases, steps)
    if found["within"]["memory"] is False:
        say(f"note: peak memory was {found['peak_ratio']:.2f} times the plan's")
    if found["within"]["time"] is False:
        say(f"note: a step took {found['step_seconds']['ratio']:.2f} times the plan's")
    return found


def report_lines(summary: dict[str, Any]) -> list[str]:
    """Return the report's section on plan and actual, no lines where the summary has none."""
    found = summary.get("plan") or {}
    rows = found.get("memory") or []
    if not rows:
        return []
    lines = [
        "## Plan against actual",
        "",
        "| phase | planned MB | actual MB | actual / planned |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        planned, actual = row["planned_bytes"] / 1e6, row["actual_bytes"] / 1e6
        lines.append(f"| {row['phase']} | {planned:,.0f} | {actual:,.0f} | {row['ratio']:.2f} |")
    told = f"Peak of the run: {found['peak_ratio']:.2f} times the plan's (held to 10 %)."
    seconds = found.get("step_seconds")
    if seconds and seconds.get("planned"):
        told += (
            f" A step took {seconds['actual']:.3g} s, {seconds['ratio']:.2f} times the plan's "
            f"{seconds['planned']:.3g} s (held to 25 %)."
        )
    elif seconds:
        told += (
            f" A step took {seconds['actual']:.3g} s; this machine's rates are not measured "
            "(`discquant plan MODEL --measure`), so the plan has no time for it."
        )
    moved = found.get("moved_per_step")
    if moved:
        told += (
            f" A step moved {moved['bytes_in'] / 1e6:,.0f} MB of state to the compute device, "
            f"{moved['bytes_out'] / 1e6:,.0f} MB of it back and {moved['boundary_bytes'] / 1e6:,.0f} MB of activations "
            f"both ways; the solve waited {moved['waited_seconds']:.2g} s of a step for them."
        )
    return [*lines, "", told, ""]
