# SPDX-License-Identifier: Apache-2.0
"""`discquant generate`: stream text from a model."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from discquant.cli import options
from discquant.cli.app import app


@app.command()
def generate(
    model: Annotated[
        Path, typer.Argument(help="Exported model (folder or file), run directory, or an ordinary model.")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; else at least 1e-30.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed when sampling, from -2**63 to 2**64 - 1.")] = 0,
    mode: Annotated[
        str,
        typer.Option(
            help="Packed layers: auto (fast), exact (the rounded model's bits), plain, or on the CPU a15, a8, fp32."
        ),
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template", help="Put PROMPT through the tokenizer's chat template, as a user's message."
        ),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Continue PROMPT, streaming, and print tokens per second."""
    from discquant.environment import compute_device
    from discquant.generation import stream

    # A terminal that cannot show a letter must not end the text there.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        mode=mode,
        device=None if device is None else str(compute_device(device)),
        chat_template=chat_template,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
