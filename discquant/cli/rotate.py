# SPDX-License-Identifier: Apache-2.0
"""`discquant rotate`: the same model in another basis, ahead of quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from discquant.cli.app import app


@app.command()
def rotate(
    model: Annotated[str, typer.Argument(help="Folder of the original model (safetensors), or a hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    seed: Annotated[int, typer.Option(help="Seed of the random signs.")] = 0,
    values: Annotated[bool, typer.Option(help="Turn the values of every attention head too.")] = True,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32 for the rotated weights; default: as they are."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Write MODEL with its weights rotated into OUT: the same function, without channels that stand out.

    What that gains depends on the model: most where a few channels are much larger than the others, and for whole rows.

    Nothing runs in addition when it is served; quantize OUT instead of MODEL then. A head that shares the embedding's
    weights gets its own.

    Example: discquant rotate examples/tiny_llama rotated && discquant quantize rotated out --bits 3
    """
    from discquant.rotation import rotate as run_rotate

    record = run_rotate(model, out, seed=seed, values=values, dtype=dtype, device=device, say=typer.echo)
    if record["head_untied"]:
        typer.echo("the output head shared the embedding's weights; it has its own now")
    typer.echo(
        f"wrote {out}: turned back, its weights are the original's within {record['largest_relative_error']:.1e} of "
        "their norm (rounding)"
    )
