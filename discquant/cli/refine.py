# SPDX-License-Identifier: Apache-2.0
"""`discquant refine`: a quantized file and its original in, the same file with better codes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from discquant.cli import options
from discquant.cli.app import app
from discquant.config import DataConfig, GridConfig, QuantizeConfig

if TYPE_CHECKING:
    from discquant.run.events import Events
    from discquant.run.pipeline import Pipeline
    from discquant.solver.engine import Engine


@app.command()
def refine(
    context: typer.Context,
    quantized: Annotated[Path, typer.Argument(help="Quantized model: a folder, or a GGUF or ONNX file.")],
    out: Annotated[Path, typer.Argument(help="Run directory; the model lands in it, in the same format.")],
    original: Annotated[str, typer.Option("--original", help="The model that it was quantized from.")],
    dataset: Annotated[
        str, typer.Option(help="Calibration; see `discquant quantize --help`.", rich_help_panel=options.TEXT)
    ] = "self",
    nsamples: options.Samples = 2048,
    seqlen: options.Seqlen = 256,
    chat_template: options.ChatTemplate = False,
    text_key: options.TextKey = "text",
    method: Annotated[str, typer.Option(help="discquant, guided, gptq or greedy.")] = "discquant",
    iters: options.Iters = None,
    batch_size: options.BatchSize = None,
    micro_batch: options.MicroBatch = None,
    lr: options.Lr = None,
    curvature: options.Curvature = None,
    optimizer: options.Optimizer = None,
    start: Annotated[
        str | None,
        typer.Option(help="gptq (the better of the file's and GPTQ's codes), ref or random."),
    ] = None,
    state: options.State = None,
    compute_dtype: options.ComputeDtype = None,
    seed: options.Seed = 0,
    baselines: options.Baselines = "none",
    checkpoint_every: options.CheckpointEvery = None,
    device: options.Device = "auto",
    placement: options.Placed = "auto",
    activations: options.Activations = None,
    teacher: options.Teacher = None,
    resume: options.Resume = True,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Lower the KL divergence of QUANTIZED to its original without changing its format, size or engine.

    Example: discquant refine model-Q4_K.gguf out --original model
    """
    options.note_unused(context, method)
    solver = options.solver_options(
        GridConfig(), "default", iters=iters, batch_size=batch_size, micro_batch=micro_batch, lr=lr,
        curvature=curvature, optimizer=optimizer, start=start, state=state, compute_dtype=compute_dtype,
        teacher=teacher,
    )  # fmt: skip
    config = QuantizeConfig(
        method=method,  # type: ignore[arg-type]
        solver=solver,
        data=DataConfig(dataset, nsamples, seqlen, chat_template, text_key),
        seed=seed,
        checkpoint_every=checkpoint_every,
        baselines=options.method_names(baselines),
    )

    def build(events: Events, engine: Engine) -> Pipeline:
        from discquant.run.refine import RefinePipeline

        return RefinePipeline(
            quantized, out, original, config, resume=resume, trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle, events=events, engine=engine,
        )  # fmt: skip

    summary = options.run_pipeline(
        build, out, device=device, placement=placement, activations=activations, threads=threads
    )
    if summary is None:
        return
    found = summary["refine"]
    typer.echo(
        f"KL to the original on held-out text: {options.shown(found['kl_before'], '.5f')} before, "
        f"{options.shown(found['kl_after'], '.5f')} after"
        + ("" if found["improved"] else "; not better, the file's codes are kept")
    )
    typer.echo(
        f"{found['codes_outside_neighbours']:,} of {found['codes']:,} codes of the file were neither neighbour of the "
        f"original weight; report: {out / 'report.md'}"
    )
