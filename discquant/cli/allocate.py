# SPDX-License-Identifier: Apache-2.0
"""`discquant allocate`: which layer gets how many bits, ahead of quantization."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from discquant.cli import options
from discquant.cli.app import app
from discquant.config import DataConfig, QuantizeConfig, SolverConfig
from discquant.errors import ConfigError

if TYPE_CHECKING:
    from discquant.allocation import Allocation


@app.command()
def allocate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of the original model (safetensors), or a hub name.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write, for `quantize --layer-grid @OUT`.")],
    average_bits: Annotated[
        float, typer.Option(help="Bits per weight at most, scales included, on average over all layers.")
    ],
    choices: Annotated[
        str,
        typer.Option(
            help="What a layer may get, comma separated: widths, kinds of a format (q3_k), width and group size (4g32)."
        ),
    ] = "2,3,4,5,6,8",
    measured: Annotated[
        Path | None,
        typer.Option(
            help="An earlier OUT: choose from its figures at another size. No model is read; takes no other option."
        ),
    ] = None,
    group_size: options.GroupSize = 64,
    sym: options.Sym = True,
    grid: options.GridRule = "search",
    codes: Annotated[
        str,
        typer.Option(
            help="Whose errors are measured: gptq, or rtn, which is faster and less like what a solve reaches."
        ),
    ] = "gptq",
    format_name: Annotated[
        str, typer.Option("--format", help="Formats that must be able to hold every layer's grid, or none.")
    ] = "none",
    dataset: Annotated[
        str, typer.Option(help="Calibration text, as of quantize.", rich_help_panel=options.TEXT)
    ] = "self",
    nsamples: options.Samples = 1024,
    seqlen: options.Seqlen = 256,
    chat_template: options.ChatTemplate = False,
    text_key: options.TextKey = "text",
    compute_dtype: options.ComputeDtype = None,
    seed: options.Seed = 0,
    ignore: options.Ignore = None,
    device: options.Device = "auto",
    placement: options.Placed = "auto",
    activations: options.Activations = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Measure what each width costs each layer in KL, and choose within a size; layers that engines join share one.

    Example: discquant allocate examples/tiny_llama grids.json --average-bits 3.25 --dataset arithmetic &&
    discquant quantize examples/tiny_llama out --layer-grid @grids.json --dataset arithmetic
    """
    from discquant.environment import compute_device
    from discquant.progress import ProgressBar
    from discquant.run.allocate import allocate_model, choose_again
    from discquant.solver.engine import Engine

    if measured is not None:
        _alone(context)
        say = functools.partial(typer.echo, err=True)
        _print(choose_again(measured, out, average_bits, model=model, say=say), out)
        return
    base = options.grid_options("uniform", 4, group_size, sym, grid)
    given = {} if compute_dtype is None else {"compute_dtype": compute_dtype}
    config = QuantizeConfig(
        grid=base,
        solver=SolverConfig(**given),  # type: ignore[arg-type]
        data=DataConfig(dataset, nsamples, seqlen, chat_template, text_key),
        format=format_name,
        ignore=tuple(ignore or ["lm_head"]),
        seed=seed,
    )
    words = options.grid_choices(choices, base)
    where = compute_device(device)
    options.set_threads(threads)
    with ProgressBar() as bar:
        bar.phase("allocate")
        found = allocate_model(
            model, out, config, words, average_bits, codes=codes,  # type: ignore[arg-type]
            engine=Engine(placement, activations, where),  # type: ignore[arg-type]
            trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, say=bar.message,
            progress=lambda done, total: bar.message(f"block {done}/{total}"),
        )  # fmt: skip
    _print(found, out)


def _alone(context: typer.Context) -> None:
    """Refuse what was given beside --measured: the figures are of the options that they were made with.

    Raises:
        ConfigError: Something was.
    """
    own = ("model", "out", "average_bits", "measured")
    given = [spelled for name, spelled in options.given_options(context).items() if name not in own]
    if given:
        raise ConfigError(
            f"allocate: --measured takes no other option but --average-bits, got {', '.join(given)}"
        )


def _print(found: Allocation, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="KL that rounding is expected to cost, before any solve")
    for column in ("grid", "layers", "share of weights", "bits/weight everywhere", "expected KL everywhere"):
        table.add_column(column, justify="left" if column == "grid" else "right")
    total = sum(unit.weights for unit in found.units)
    for choice in found.grids:
        own = [unit for unit in found.units if unit.chosen == choice]
        table.add_row(
            choice,
            str(sum(len(unit.modules) for unit in own)),
            f"{sum(unit.weights for unit in own) / total:.1%}",
            options.shown(found.bits(choice), ".3f"),
            options.shown(found.damage(choice), ".5f"),
        )
    table.add_section()
    layers = str(sum(len(unit.modules) for unit in found.units))
    bits, damage = options.shown(found.bits(), ".3f"), options.shown(found.damage(), ".5f")
    table.add_row("as chosen", layers, "100.0%", bits, damage)
    console = Console()
    console.print(table)
    console.print(f"quantize with --layer-grid @{out}", highlight=False, markup=False)
