# SPDX-License-Identifier: Apache-2.0
"""`discquant export`: a finished run in further formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from discquant.cli.app import app


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="Run directory, or a quantized model (then --original too).")],
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="Comma separated: compressed-tensors, gptq, gptq-v2, autoround, awq, mlx, gguf, onnx.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Parent of a folder per format; default: the run directory; PATH-formats beside a quantized model."
        ),
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="The original model, if PATH is no run or its original has moved.")
    ] = None,
) -> None:
    """Write the codes of PATH in each FORMAT: nothing is rounded again, every file is proven from disk.

    Example: discquant export out --format gptq,mlx
    """
    from discquant.formats.registry import parse_names
    from discquant.run.export import export as run_export

    run_export(path, parse_names(format_name), out, original=original, say=typer.echo)
