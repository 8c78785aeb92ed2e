# SPDX-License-Identifier: Apache-2.0
"""`discquant plan`: memory, traffic and time of a run from config.json alone."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from discquant.cli import options
from discquant.cli.app import app

if TYPE_CHECKING:
    from rich.console import Console

    from discquant.planning.plan import Plan


@app.command()
def plan(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder with config.json (no weights needed), or a hub name.")],
    method: options.MethodName = "discquant",
    bits: options.Bits = 4,
    group_size: options.GroupSize = 64,
    sym: options.Sym = True,
    grid: options.GridRule = "search",
    kind: options.Kind = "uniform",
    layer_grid: options.LayerGrids = None,
    preset_name: options.Preset = "default",
    gpu: Annotated[
        str,
        typer.Option(
            help="h100, h200, a100, 4090, l40s, cpu; auto is what this machine has.",
            rich_help_panel=options.MACHINE,
        ),
    ] = "auto",
    placement: Annotated[
        str,
        typer.Option(
            help="resident, host, disk, or auto: the first of them that fits.",
            rich_help_panel=options.MACHINE,
        ),
    ] = "auto",
    activations: options.Activations = None,
    teacher: options.Teacher = None,
    state: options.State = None,
    optimizer: options.Optimizer = None,
    compute_dtype: options.ComputeDtype = None,
    loss: options.Loss = None,
    seqlen: options.Seqlen = 256,
    nsamples: options.Samples = 2048,
    batch_size: options.BatchSize = None,
    micro_batch: options.MicroBatch = None,
    iters: options.Iters = None,
    scale_iters: options.ScaleIters = None,
    curvature: options.Curvature = None,
    start: options.Start = None,
    dataset: Annotated[
        str, typer.Option(help="As in quantize; self samples from the model.", rich_help_panel=options.TEXT)
    ] = "self",
    baselines: options.Baselines = "rtn,gptq",
    gptq_samples: options.GptqSamples = 256,
    format_name: options.Formats = "compressed-tensors",
    ignore: options.Ignore = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="Device memory in GB instead of the table's.", rich_help_panel=options.MACHINE),
    ] = None,
    host_memory: Annotated[
        float | None,
        typer.Option(help="Host memory in GB instead of this machine's.", rich_help_panel=options.MACHINE),
    ] = None,
    disk: Annotated[
        float | None,
        typer.Option(help="Free disk in GB instead of what is free here.", rich_help_panel=options.MACHINE),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(
            help="Processes that torchrun starts on one machine, each with such a GPU.",
            rich_help_panel=options.MACHINE,
        ),
    ] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time this machine on one block of MODEL and keep the rates.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Say what `quantize` with the same options would need, before it is started.

    For a GPU, unless --preset, --state, --optimizer or --compute-dtype is given, it takes u8, momentum and bfloat16,
    and says so: quantize must be given them.

    Example: discquant plan examples/tiny_llama --bits 3 --gpu 4090
    """
    import shutil

    from discquant.config import DataConfig, QuantizeConfig
    from discquant.errors import ConfigError
    from discquant.formats import registry
    from discquant.planning import hardware
    from discquant.planning.plan import Machine, make_plan
    from discquant.planning.rates import keep_rates, load_rates, machine_name, nearest_rates
    from discquant.planning.shape import chain_shape, empty_model, open_config, stored_dtype
    from discquant.run.checks import check_ignore, check_planned, text_file
    from discquant.run.choices import fallback_notes
    from discquant.solver.chain import DecoderChain
    from discquant.solver.engine import Engine
    from discquant.solver.ranks import Ranks

    Engine(placement, activations)  # type: ignore[arg-type]  # refuses what is none of its words
    if ranks < 1 or ranks & (ranks - 1):
        raise ConfigError(f"plan: --ranks must be a power of two, got {ranks}")
    device = hardware.this_device() if gpu == "auto" else hardware.find_device(gpu)
    if measure and device.name != hardware.this_device().name:
        raise ConfigError(f"plan: --measure times this machine, which is no {gpu}; leave --gpu out")
    for name, value in (("--gpu-memory", gpu_memory), ("--host-memory", host_memory), ("--disk", disk)):
        if value is not None and not 0 < value * hardware.GB < math.inf:
            raise ConfigError(f"plan: {name} must be above 0 and finite, got {value}")
    if gpu_memory is not None:
        if device.memory is None:
            raise ConfigError("plan: --gpu-memory needs a device with memory of its own, got cpu")
        device = dataclasses.replace(device, memory=gpu_memory * hardware.GB)
    own, filled = (state, optimizer, compute_dtype), ""
    if device.memory is not None and own == (None, None, None) and preset_name == "default":
        state, optimizer, compute_dtype = "u8", "momentum", "bfloat16"
        solved = f"--state {state} --optimizer {optimizer} " if method == "discquant" else ""
        filled = f"{solved}--compute-dtype {compute_dtype}"
    options.refuse_contradictions(context, kind, bits, group_size, sym)
    options.note_unused(context, method)
    grid_config = options.grid_options(kind, bits, group_size, sym, grid)
    solver = options.solver_options(
        grid_config, preset_name, iters=iters, scale_iters=scale_iters, batch_size=batch_size, micro_batch=micro_batch,
        curvature=curvature, optimizer=optimizer, loss=loss, start=start, state=state, compute_dtype=compute_dtype,
        teacher=teacher,
    )  # fmt: skip
    config = QuantizeConfig(
        grid=grid_config,
        method=method,  # type: ignore[arg-type]
        solver=solver,
        data=DataConfig(dataset, nsamples, seqlen),
        format=format_name,
        ignore=tuple(ignore or ["lm_head"]),
        gptq_samples=gptq_samples,
        layers=options.layer_grids(layer_grid, grid_config),
        baselines=options.method_names(baselines),
    )
    for name in config.formats:
        registry.by_name(name)
    empty = empty_model(open_config(model, trust_remote_code), trust_remote_code)
    check_ignore(empty, config.ignore)
    chain = DecoderChain(empty, config.ignore)
    check_planned(chain, config, stored_dtype(empty.config))
    shape = chain_shape(chain, name=Path(model).name)
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
    if config.method == "discquant":
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
        filled=filled,
    )
    text = text_file(dataset)
    if text is not None and not text.is_file():
        absent = f"there is no file {text} here: the plan does not read it, quantize would refuse it"
        made = dataclasses.replace(made, warnings=(*made.warnings, absent))
    refs = (ref for own in chain.weights for ref in own)
    replaced = fallback_notes((ref.name, ref.shape, config.grid_of(ref.name)) for ref in refs)
    made = dataclasses.replace(made, warnings=(*made.warnings, *replaced))
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2, allow_nan=False))
    else:
        _print(made)


def _print(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    device = made.machine.device
    gigabyte = 1e9
    console.print(
        f"{made.shape.name}: {made.shape.weights / 1e9:.3f} G weights to quantize in {len(made.shape.blocks)} blocks, "
        f"{made.shape.untouched / 1e9:.3f} G others; "
        + (
            f"{made.setting.layout.name} state, {made.state_bytes_per_weight:.4g} bytes per weight, "
            if made.solved
            else ""
        )
        + made.setting.placement,
        markup=False,  # a folder's name may hold brackets
    )
    config, solver = made.setting.config, made.setting.config.solver
    words = (
        f"--state {solver.state} --optimizer {solver.optimizer}"
        if made.solved
        else f"--method {config.method}"
    )
    console.print(f"for quantize with {words} --compute-dtype {solver.compute_dtype}")
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
    if made.solved:
        _print_options(made, console, columns)
        _print_steps(made, console)
    for warning in made.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _print_options(made: Plan, console: Console, columns: list[str]) -> None:
    """Print what every placement and state format would cost; `columns` of memory."""
    from rich.table import Table

    device, ranks, gigabyte = made.machine.device, made.setting.ranks, 1e9
    # As narrow as it goes: terminals are 80 columns wide.
    title = "Against the alternatives, GB (in and out: moved per step)"
    if ranks > 1:
        own = "device, in and out (moved per step)" if device.memory is not None else "in and out (per step)"
        title = f"Against the alternatives, GB: {own} of each rank, host and disk of all {ranks}"
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


def _flop(number: float) -> str:
    """A number of operations in the largest unit that leaves one before the point."""
    units = (("TFLOP", 1e12, ".2f"), ("GFLOP", 1e9, ".1f"))
    name, unit, form = next((row for row in units if number >= row[1]), ("MFLOP", 1e6, ".1f"))
    return f"{number / unit:,{form}} {name}"


def _print_steps(made: Plan, console: Console) -> None:
    """Say what the steps of a solve take."""
    facts, hide, ranks, gigabyte = made.to_dict(), made.hide, made.setting.ranks, 1e9
    gathering = (
        f", {made.gather_seconds:,.3g} s of it for gathering the curvature" if made.gather_seconds else ""
    )
    console.print(
        f"{_flop(made.work.total)} per token, {_flop(facts['flop_per_step'])} per step of "
        f"{made.setting.step_tokens:,} tokens; {made.step_seconds:,.3g} s per step, "
        f"{made.total_seconds / 3600:,.3g} h for {facts['steps']} steps{gathering} ({facts['rates']})"
    )
    if ranks > 1:
        console.print(
            f"Every rank computes at most {made.setting.tokens:,} of them, and sends and receives "
            f"{made.exchanged / gigabyte:,.2f} GB of gradients per step, whose time is not in the plan."
        )
    if made.machine.accelerated:
        console.print(
            f"Transfers hide from {hide.forward:,.0f} tokens per step forward, {hide.duplex:,.0f} backward with both "
            f"directions at once, {hide.serial:,.0f} one after the other."
        )
