# SPDX-License-Identifier: Apache-2.0
"""The command line: one module per command, which registers with `app` when it is imported here."""

from __future__ import annotations

import os
import sys

from discquant.cli import allocate, env, evaluate, export, generate, inspect, plan, quantize, refine, rotate
from discquant.cli.app import app
from discquant.errors import UserError

__all__ = [
    "allocate",
    "app",
    "env",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "main",
    "plan",
    "quantize",
    "refine",
    "rotate",
]


def main() -> None:
    """Run the command line; a user's error is one sentence and exit status 2, without a traceback."""
    # No handler: Python prints warnings to stderr by itself, and one on the root logger would repeat those of libraries
    # that have their own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (UserError, ValueError, NotImplementedError, OSError) as error:
        # Bad input of every kind carries one of these classes; set DISCQUANT_TRACEBACK=1 to see where.
        from discquant.environment import variable

        if variable("DISCQUANT_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
