# SPDX-License-Identifier: Apache-2.0
"""`discquant env`: what this machine has."""

from __future__ import annotations

import json

import typer

from discquant.cli.app import app


@app.command()
def env() -> None:
    """Print what this machine has and which kernels will be used, as JSON (paste it into bug reports)."""
    from discquant.environment import facts

    typer.echo(json.dumps(facts(), indent=2))
