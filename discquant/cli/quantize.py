# SPDX-License-Identifier: Apache-2.0
"""`discquant quantize`: a model folder into a run directory and the formats that engines serve."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from discquant.cli.app import app
from discquant.config import GRID_KINDS, DataConfig, GridConfig, Method, QuantizeConfig, SolverConfig, preset

STOPPED = 143  # 128 + SIGTERM


def _solver(bits_grid: GridConfig, name: str, given: dict[str, Any]) -> SolverConfig:
    """Return the preset with what the user gave on top."""
    base = preset(name, bits_grid)  # type: ignore[arg-type]
    changed = {key: value for key, value in given.items() if value is not None}
    if "iters" in changed and "warmup" not in changed:
        changed["warmup"] = min(base.warmup, max(1, changed["iters"] // 8))
    return dataclasses.replace(base, **changed)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder of the original model (safetensors), or a hub name.")],
    out: Annotated[Path, typer.Argument(help="Run directory; the model lands in OUT/<format>.")],
    method: Annotated[str, typer.Option(help="rtn, greedy, gptq or discquant.")] = "discquant",
    bits: Annotated[int, typer.Option(help="Bits per code, 2 to 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Columns per scale: 32, 64, 128, or -1 for the whole row.")
    ] = 64,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric grid (3-bit engines need it).")] = True,
    grid: Annotated[
        str, typer.Option(help="absmax, or search for the scale of least squared error.")
    ] = "search",
    kind: Annotated[
        str,
        typer.Option(
            help="uniform, or a grid that a format dictates: nf4, mxfp4, nvfp4, q4_0, q4_1, q4_k, q3_k "
            "(bits, group size and symmetry are then the format's)."
        ),
    ] = "uniform",
    dataset: Annotated[
        str,
        typer.Option(
            help="Calibration: self (sampled from the model), arithmetic, FILE.txt|.jsonl|.parquet, "
            "FILE.safetensors:KEY (token ids), or a datasets name."
        ),
    ] = "self",
    nsamples: Annotated[int, typer.Option(help="Calibration windows.")] = 512,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    preset_name: Annotated[
        str, typer.Option("--preset", help="default (best known) or paper (the published recipe).")
    ] = "default",
    iters: Annotated[int | None, typer.Option(help="Optimizer steps; default from the preset.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Windows per forward pass.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate on frac.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, momentum, lion or sgd.")] = None,
    loss: Annotated[str | None, typer.Option(help="kl, or the paper's variants ce and mse.")] = None,
    start: Annotated[str | None, typer.Option(help="Where frac starts: ref, gptq or random.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Solver state: fp32, bf16, or u8 (3.5-4.5 bytes per weight).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and rounding noise.")] = 0,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Modules to leave alone (name, last part, or glob); repeatable.")
    ] = None,
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="Formats to write, comma separated (compressed-tensors, gptq, autoround, awq, mlx, gguf, onnx, ...), "
            "or none (codes stay in the run directory).",
        ),
    ] = "compressed-tensors",
    baselines: Annotated[
        str, typer.Option(help="Methods to measure beside it, comma separated, or none.")
    ] = "rtn,gptq",
    gptq_samples: Annotated[int, typer.Option(help="Windows for GPTQ and greedy.")] = 256,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 16,
    placement: Annotated[
        str, typer.Option(help="Where the solver's state lives: resident, host, disk, or auto. Same bytes.")
    ] = "auto",
    activations: Annotated[
        str | None,
        typer.Option(help="Where activations between blocks are kept: resident, host or disk. Same bytes."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Original weights: weights, or state (computed from it; no second copy), or auto."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Continue a run that is there (same command, same bytes)."),
    ] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads; part of what fixes the bytes.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code that comes with the model.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option(help="Read .bin weights with torch's restricted loader.")
    ] = False,
) -> None:
    """Quantize MODEL into the run directory OUT.

    Example: discquant quantize examples/tiny_llama out --bits 3 --group-size 64 --dataset arithmetic
    """
    from discquant.run.pipeline import Events, Pipeline, RunStoppedError

    fixed = GRID_KINDS.get(kind, (bits, group_size, sym))
    grid_config = GridConfig(*fixed, grid=grid, kind=kind)  # type: ignore[arg-type]
    given = {
        "iters": iters,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "lr": lr,
        "optimizer": optimizer,
        "loss": loss,
        "start": start,
        "state": state,
        "teacher": teacher,
    }
    chosen: tuple[Method, ...] = ()
    if baselines != "none":
        chosen = tuple(part.strip() for part in baselines.split(",") if part.strip())  # type: ignore[misc]
    config = QuantizeConfig(
        grid=grid_config,
        method=method,  # type: ignore[arg-type]
        solver=_solver(grid_config, preset_name, given),
        data=DataConfig(dataset, nsamples, seqlen),
        format=format_name,
        ignore=tuple(ignore or ["lm_head"]),
        gptq_samples=gptq_samples,
        seed=seed,
        checkpoint_every=checkpoint_every,
        baselines=chosen,
    )
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from discquant.progress import ProgressBar
    from discquant.solver.engine import Engine
    from discquant.solver.ranks import Ranks

    ranks = Ranks.from_environment()
    engine = Engine(placement, activations, ranks=ranks)  # type: ignore[arg-type]
    with ProgressBar() as bar, contextlib.closing(ranks):
        events = Events(phase=bar.phase, step=bar.step, message=bar.message) if ranks.first else Events()
        pipeline = Pipeline(
            model,
            out,
            config,
            resume=resume,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            events=events,
            engine=engine,
        )
        try:
            summary = pipeline.execute()
        except RunStoppedError as stopped:
            bar.message(str(stopped))
            raise typer.Exit(STOPPED) from stopped
    if ranks.first:
        _print_summary(summary, out)


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Held-out text, {summary['held_out']['tokens']} tokens")
    for column in ("method", "KL to original", "top-1 agreement", "perplexity ratio"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, found in summary["methods"].items():
        table.add_row(
            name, f"{found['kl_mean']:.5f}", f"{found['top1']:.4f}", f"{found['perplexity_ratio']:.4f}"
        )
    console = Console()
    console.print(table)
    sizes = summary["sizes"]
    console.print(f"{sizes['bits_per_weight']:.3f} bits per quantized weight; report: {out / 'report.md'}")
