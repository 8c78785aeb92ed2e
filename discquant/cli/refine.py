# SPDX-License-Identifier: Apache-2.0
"""`discquant refine`: a quantized file and its original in, the same file with better codes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from discquant.cli.app import app
from discquant.cli.quantize import STOPPED, _solver
from discquant.config import DataConfig, GridConfig, Method, QuantizeConfig


@app.command()
def refine(
    quantized: Annotated[Path, typer.Argument(help="Quantized model: a folder, or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Run directory; the model lands in it, in the same format.")],
    original: Annotated[str, typer.Option("--original", help="The model that it was quantized from.")],
    dataset: Annotated[str, typer.Option(help="Calibration; see `discquant quantize --help`.")] = "self",
    nsamples: Annotated[int, typer.Option(help="Calibration windows.")] = 512,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    method: Annotated[str, typer.Option(help="discquant, gptq or greedy.")] = "discquant",
    iters: Annotated[int | None, typer.Option(help="Optimizer steps; default from the preset.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Windows per forward pass.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate on frac.")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="gptq (the better of the file's and GPTQ's codes), ref or random."),
    ] = None,
    state: Annotated[str | None, typer.Option(help="Solver state: fp32 or u8.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and rounding noise.")] = 0,
    baselines: Annotated[
        str, typer.Option(help="Methods to measure beside the file, comma separated, or none.")
    ] = "none",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 16,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue a run that is there.")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads; part of what fixes the bytes.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code that comes with the model.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option(help="Read .bin weights of the original with torch's restricted loader.")
    ] = False,
) -> None:
    """Lower the KL divergence of QUANTIZED to its original without changing its format, size or engine.

    Example: discquant refine model-Q4_K.gguf out --original model
    """
    from discquant.progress import ProgressBar
    from discquant.run.pipeline import Events, RunStoppedError
    from discquant.run.refine import RefinePipeline

    given = {
        "iters": iters,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "lr": lr,
        "start": start,
        "state": state,
    }
    chosen: tuple[Method, ...] = ()
    if baselines != "none":
        chosen = tuple(part.strip() for part in baselines.split(",") if part.strip())  # type: ignore[misc]
    config = QuantizeConfig(
        method=method,  # type: ignore[arg-type]
        solver=_solver(GridConfig(), "default", given),
        data=DataConfig(dataset, nsamples, seqlen),
        seed=seed,
        checkpoint_every=checkpoint_every,
        baselines=chosen,
    )
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with ProgressBar() as bar:
        pipeline = RefinePipeline(
            quantized,
            out,
            original,
            config,
            resume=resume,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            events=Events(phase=bar.phase, step=bar.step, message=bar.message),
        )
        try:
            summary = pipeline.execute()
        except RunStoppedError as stopped:
            bar.message(str(stopped))
            raise typer.Exit(STOPPED) from stopped
    found = summary["refine"]
    typer.echo(
        f"KL to the original on held-out text: {found['kl_before']:.5f} before, {found['kl_after']:.5f} after"
        + ("" if found["improved"] else "; not better, the file's codes are kept")
    )
    typer.echo(
        f"{found['codes_outside_neighbours']:,} of {found['codes']:,} codes of the file were neither neighbour of the "
        f"original weight; report: {out / 'report.md'}"
    )
