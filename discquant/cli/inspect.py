# SPDX-License-Identifier: Apache-2.0
"""`discquant inspect`: what a quantized file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from discquant.cli.app import app


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Quantized model (folder or file), or a run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what PATH is: format, bits, groups, every layer, bits per weight, engines that serve it, what would break."""
    from discquant.run.inspection import inspect as run_inspect
    from discquant.run.inspection import print_report

    found = run_inspect(path)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_report(found)
