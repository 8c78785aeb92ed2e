# SPDX-License-Identifier: Apache-2.0
"""`discquant evaluate`: candidates against the original on held-out text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from discquant.cli import options
from discquant.cli.app import app
from discquant.environment import compute_device
from discquant.errors import ConfigError


@app.command()
def evaluate(
    original: Annotated[str, typer.Argument(help="Folder of the original model.")],
    candidates: Annotated[
        list[str], typer.Argument(help="Models, quantized or not, or run directories to compare with it.")
    ],
    dataset: Annotated[
        str,
        typer.Option(
            help="Text to measure on; see `discquant quantize --help`. Of the bundled text take arithmetic:heldout: "
            "arithmetic alone is arithmetic:calibration, which runs are calibrated on.",
            rich_help_panel=options.TEXT,
        ),
    ] = "self",
    nsamples: Annotated[int, typer.Option(help="Windows.", rich_help_panel=options.TEXT)] = 64,
    seqlen: options.Seqlen = 256,
    exact_match: Annotated[
        int | None,
        typer.Option(help="Also answer this many held-out arithmetic problems (bundled generator)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the text.", rich_help_panel=options.TEXT)] = 1,
    chat_template: options.ChatTemplate = False,
    text_key: options.TextKey = "text",
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
    device: options.Device = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here too.")] = None,
) -> None:
    """Compare CANDIDATES with ORIGINAL: KL (mean, quantiles, max), top-1 agreement, perplexity, bits per weight."""
    from discquant.evaluation.evaluate import evaluate as run_evaluation
    from discquant.evaluation.evaluate import write_json
    from discquant.evaluation.table import print_table
    from discquant.run.served import load_run_model

    if json_file is not None:
        parent = json_file.absolute().parent
        if not parent.is_dir():
            raise ConfigError(f"evaluate: --json {json_file}: there is no folder {parent}")
        if json_file.is_dir() or not os.access(parent, os.W_OK):
            what = "it is a folder" if json_file.is_dir() else f"{parent} is not writable"
            raise ConfigError(f"evaluate: --json {json_file}: {what}")

    def open_run(run: Path, its_original: str | Path | None) -> Any:
        return load_run_model(
            run, original=its_original, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )

    where = compute_device(device)
    options.set_threads(threads)
    rows = run_evaluation(
        original,
        candidates,
        dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        exact_match_problems=exact_match,
        seed=seed,
        batch_size=batch_size,
        device=where,
        chat_template=chat_template,
        text_key=text_key,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        open_run=open_run,
    )
    print_table(rows)
    if json_file is not None:
        write_json(rows, json_file)
