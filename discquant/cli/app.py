# SPDX-License-Identifier: Apache-2.0
"""The typer application that every command registers with."""

from __future__ import annotations

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Round a transformer's weights to 2-8 bits with the least KL divergence to the original.",
)
