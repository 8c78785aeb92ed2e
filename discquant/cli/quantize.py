# SPDX-License-Identifier: Apache-2.0
"""`discquant quantize`: a model folder into a run directory and the formats that engines serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from discquant.cli import options
from discquant.cli.app import app
from discquant.config import DataConfig, QuantizeConfig

if TYPE_CHECKING:
    from discquant.run.events import Events
    from discquant.run.pipeline import Pipeline
    from discquant.solver.engine import Engine


@app.command()
def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of the original model (safetensors), or a hub name.")],
    out: Annotated[Path, typer.Argument(help="Run directory; the model lands in OUT/<format>.")],
    method: options.MethodName = "discquant",
    bits: options.Bits = 4,
    group_size: options.GroupSize = 64,
    sym: options.Sym = True,
    grid: options.GridRule = "search",
    kind: options.Kind = "uniform",
    layer_grid: options.LayerGrids = None,
    dataset: Annotated[
        str,
        typer.Option(
            help="self (sampled from the model), arithmetic (bundled; its split calibration), "
            "FILE.txt|.jsonl|.parquet, FILE.safetensors:KEY (token ids), or a data set on the hub: NAME, NAME:SPLIT or "
            "NAME:CONFIG:SPLIT.",
            rich_help_panel=options.TEXT,
        ),
    ] = "self",
    nsamples: options.Samples = 2048,
    seqlen: options.Seqlen = 256,
    preset_name: options.Preset = "default",
    iters: options.Iters = None,
    scale_iters: options.ScaleIters = None,
    batch_size: options.BatchSize = None,
    micro_batch: options.MicroBatch = None,
    lr: options.Lr = None,
    curvature: options.Curvature = None,
    optimizer: options.Optimizer = None,
    loss: options.Loss = None,
    chat_template: options.ChatTemplate = False,
    text_key: options.TextKey = "text",
    start: options.Start = None,
    state: options.State = None,
    compute_dtype: options.ComputeDtype = None,
    seed: options.Seed = 0,
    ignore: options.Ignore = None,
    format_name: options.Formats = "compressed-tensors",
    baselines: options.Baselines = "rtn,gptq",
    gptq_samples: options.GptqSamples = 256,
    checkpoint_every: options.CheckpointEvery = None,
    device: options.Device = "auto",
    placement: options.Placed = "auto",
    activations: options.Activations = None,
    teacher: options.Teacher = None,
    resume: options.Resume = True,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickleAlone = False,
) -> None:
    """Quantize MODEL into the run directory OUT.

    Example: discquant quantize examples/tiny_llama out --bits 3 --group-size 64 --dataset arithmetic
    """
    options.refuse_contradictions(context, kind, bits, group_size, sym)
    options.note_unused(context, method)
    grid_config = options.grid_options(kind, bits, group_size, sym, grid)
    solver = options.solver_options(
        grid_config, preset_name, iters=iters, scale_iters=scale_iters, batch_size=batch_size, micro_batch=micro_batch,
        lr=lr, curvature=curvature, optimizer=optimizer, loss=loss, start=start, state=state,
        compute_dtype=compute_dtype, teacher=teacher,
    )  # fmt: skip
    config = QuantizeConfig(
        grid=grid_config,
        method=method,  # type: ignore[arg-type]
        solver=solver,
        data=DataConfig(dataset, nsamples, seqlen, chat_template, text_key),
        format=format_name,
        ignore=tuple(ignore or ["lm_head"]),
        gptq_samples=gptq_samples,
        seed=seed,
        checkpoint_every=checkpoint_every,
        layers=options.layer_grids(layer_grid, grid_config),
        baselines=options.method_names(baselines),
    )

    def build(events: Events, engine: Engine) -> Pipeline:
        from discquant.run.pipeline import Pipeline

        return Pipeline(
            model, out, config, resume=resume, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
            events=events, engine=engine,
        )  # fmt: skip

    summary = options.run_pipeline(
        build,
        out,
        device=device,
        placement=placement,
        activations=activations,
        threads=threads,
        loss=solver.loss,
    )
    if summary is not None:
        _print_summary(summary, out)


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Held-out text, {summary['held_out']['tokens']} tokens")
    for column in ("method", "KL to original", "top-1 agreement", "perplexity ratio"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, found in summary["methods"].items():
        columns = (("kl_mean", ".5f"), ("top1", ".4f"), ("perplexity_ratio", ".4f"))
        table.add_row(name, *(options.shown(found[key], form) for key, form in columns))
    console = Console()
    console.print(table)
    sizes = summary["sizes"]
    console.print(
        f"{sizes['bits_per_weight']:.3f} bits per quantized weight; report: {out / 'report.md'}",
        highlight=False,
        markup=False,  # paths may hold brackets
    )
