# SPDX-License-Identifier: Apache-2.0
"""`discquant plan`: memory, traffic and time of a run from config.json alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from discquant.cli import options
from discquant.cli.app import app

if TYPE_CHECKING:
    from discquant.planning.plan import Plan


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder with config.json (no weights needed), or a hub name.")],
    bits: Annotated[int, typer.Option(help="Bits per code, 2 to 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Columns per scale, or -1 for the whole row.")] = 64,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric grid.")] = True,
    gpu: Annotated[
        str, typer.Option(help="h100, h200, a100, 4090, l40s, cpu; auto is what this machine has.")
    ] = "auto",
    placement: Annotated[
        str, typer.Option(help="resident, host, disk, or auto: the first of them that fits.")
    ] = "auto",
    activations: options.Activations = None,
    state: Annotated[
        str | None, typer.Option(help="fp32, bf16 or u8; default fp32 on the CPU, u8 on an accelerator.")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="adamw, momentum, lion or sgd; default of the preset, momentum with u8."),
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    nsamples: Annotated[int, typer.Option(help="Calibration windows.")] = 2048,
    batch_size: Annotated[int | None, typer.Option(help="Windows per step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Windows per forward pass.")] = None,
    iters: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    curvature: Annotated[
        float | None, typer.Option(help="Weight of the curvature term; 0 leaves it and its memory out.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="gptq, ref or random.")] = None,
    dataset: Annotated[str, typer.Option(help="As in quantize; self samples from the model.")] = "self",
    baselines: Annotated[str, typer.Option(help="As in quantize, or none.")] = "rtn,gptq",
    format_name: Annotated[
        str, typer.Option("--format", help="Formats to write, comma separated, or none.")
    ] = "compressed-tensors",
    ignore: Annotated[list[str] | None, typer.Option(help="Modules to leave alone; repeatable.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="Device memory in GB instead of the table's.")
    ] = None,
    host_memory: Annotated[
        float | None, typer.Option(help="Host memory in GB instead of this machine's.")
    ] = None,
    disk: Annotated[float | None, typer.Option(help="Free disk in GB instead of what is free here.")] = None,
    ranks: Annotated[
        int, typer.Option(help="Processes that torchrun starts on one machine, each with such a GPU.")
    ] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time this machine on one block of MODEL and keep the rates.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Say what quantizing MODEL would need, before it is started.

    Example: discquant plan examples/tiny_llama --bits 3 --gpu 4090
    """
    import shutil

    from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
    from discquant.errors import ConfigError
    from discquant.formats import registry
    from discquant.planning import hardware
    from discquant.planning.plan import Machine, make_plan
    from discquant.planning.rates import keep_rates, load_rates, machine_name, nearest_rates
    from discquant.planning.shape import empty_model, open_config, shape_of
    from discquant.run.checks import check_ignore
    from discquant.solver.engine import Engine
    from discquant.solver.ranks import Ranks

    Engine(placement, activations)  # type: ignore[arg-type]  # refuses what is none of its words
    if ranks < 1 or ranks & (ranks - 1):
        raise ConfigError(f"plan: --ranks must be a power of two, got {ranks}")
    device = hardware.this_device() if gpu == "auto" else hardware.find_device(gpu)
    if measure and device.name != hardware.this_device().name:
        raise ConfigError(f"plan: --measure times this machine, which is no {gpu}; leave --gpu out")
    for name, value in (("--gpu-memory", gpu_memory), ("--host-memory", host_memory), ("--disk", disk)):
        if value is not None and not value > 0:
            raise ConfigError(f"plan: {name} must be above 0, got {value}")
    if gpu_memory is not None:
        if device.memory is None:
            raise ConfigError("plan: --gpu-memory needs a device with memory of its own, got cpu")
        device = dataclasses.replace(device, memory=gpu_memory * hardware.GB)
    accelerated = device.memory is not None
    chosen_state = state or ("u8" if accelerated else "fp32")
    given: dict[str, Any] = {
        "state": chosen_state,
        "optimizer": optimizer or ("momentum" if chosen_state == "u8" and accelerated else None),
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "iters": iters,
        "curvature": curvature,
        "start": start,
        "compute_dtype": "bfloat16" if accelerated else "float32",
    }
    solver = dataclasses.replace(
        SolverConfig(), **{key: value for key, value in given.items() if value is not None}
    )
    config = QuantizeConfig(
        grid=GridConfig(bits, group_size, sym),
        solver=solver,
        data=DataConfig(dataset, nsamples, seqlen),
        format=format_name,
        ignore=tuple(ignore or ["lm_head"]),
        baselines=options.method_names(baselines),
    )
    for name in config.formats:
        registry.by_name(name)
    empty = empty_model(open_config(model, trust_remote_code), trust_remote_code)
    check_ignore(empty, config.ignore)
    shape = shape_of(empty, config.ignore, name=Path(model).name)
    if measure:
        from discquant.planning.timing import measure as time_here

        file = keep_rates(time_here(model, shape, config, trust_remote_code=trust_remote_code))
        typer.echo(f"rates of this machine: {file}", err=True)
    rates = None
    if gpu == "auto" or (gpu == "cpu" and not hardware.this_device().memory):
        rates = nearest_rates(
            load_rates(),
            machine=machine_name(),
            dtype=solver.compute_dtype,
            state=f"{solver.state} {solver.optimizer}",
            weights=shape.largest.weights,
            tokens=min(solver.micro_batch, solver.batch_size) * seqlen,
        )
    machine = Machine(
        device,
        hardware.host_memory() if host_memory is None else host_memory * hardware.GB,
        float(shutil.disk_usage(".").free) if disk is None else disk * hardware.GB,
        ranks,
    )
    Ranks(0, ranks).span(-(-solver.batch_size // solver.micro_batch))  # refuses ranks without a share
    from discquant.planning.compare import PROCESS_BYTES

    made = make_plan(
        shape,
        config,
        machine,
        placement=placement,  # type: ignore[arg-type]
        rates=rates,
        process=PROCESS_BYTES,
        activations=activations,  # type: ignore[arg-type]
    )
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
    else:
        _print(made)


def _print(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts, device = made.to_dict(), made.machine.device
    gigabyte = 1e9
    console.print(
        f"{made.shape.name}: {made.shape.weights / 1e9:.3f} G weights to quantize in {len(made.shape.blocks)} blocks, "
        f"{made.shape.untouched / 1e9:.3f} G others; {made.setting.layout.name} state, "
        f"{made.state_bytes_per_weight:.4g} bytes per weight, {made.setting.placement}",
        markup=False,  # a folder's name may hold brackets
    )
    solver = made.setting.config.solver
    console.print(
        f"for quantize with --state {solver.state} --optimizer {solver.optimizer} "
        f"--compute-dtype {solver.compute_dtype}"
    )
    ranks = made.setting.ranks
    table = Table(title="Peak memory per phase, GB" + (f", each of {ranks} ranks" if ranks > 1 else ""))
    columns = (["device"] if device.memory is not None else []) + ["host", "disk"]
    table.add_column("phase")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("largest item")
    for peak in made.peaks:
        items = {**peak.host, **peak.gpu}
        largest = max(items, key=lambda name: items[name])
        cells = [f"{peak.total('gpu' if c == 'device' else c) / gigabyte:,.3f}" for c in columns]
        table.add_row(peak.name, *cells, f"{largest} {items[largest] / gigabyte:,.3f}")
    console.print(table)
    # As narrow as it goes: terminals are 80 columns wide.
    title = "Against the alternatives, GB (in and out: moved per step)" + (
        ", of all ranks" if ranks > 1 else ""
    )
    alternatives = Table(title=title, collapse_padding=True)
    for column in ("placement", "state", *columns, "in", "out", "s/step", "fits"):
        left = column in ("placement", "state")
        alternatives.add_column(column, justify="left" if left else "right", overflow="fold")
    for option in made.options:
        sizes = [option.gpu] if device.memory is not None else []
        sizes += [option.host, option.disk, option.moved_in, option.moved_out]
        alternatives.add_row(
            option.placement,
            option.state,
            *(f"{size / gigabyte:,.{2 if size < 100 * gigabyte else 0}f}" for size in sizes),
            f"{option.seconds:,.3g}",
            "yes" if option.fits else "no",
        )
    console.print(alternatives)
    hide = made.hide
    console.print(
        f"{made.work.total / 1e9:,.1f} GFLOP per token, {facts['flop_per_step'] / 1e12:,.2f} TFLOP per step of "
        f"{made.setting.step_tokens:,} tokens; {made.step_seconds:,.3g} s per step, "
        f"{made.total_seconds / 3600:,.3g} h for {facts['steps']} steps ({facts['rates']})"
    )
    if ranks > 1:
        console.print(
            f"Every rank computes at most {made.setting.tokens:,} of them, and sends and receives "
            f"{made.exchanged / gigabyte:,.2f} GB of gradients per step, whose time is not in the plan."
        )
    if device.memory is not None:
        console.print(
            f"Transfers hide from {hide.forward:,.0f} tokens per step forward, {hide.duplex:,.0f} backward with both "
            f"directions at once, {hide.serial:,.0f} one after the other."
        )
    for warning in made.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
