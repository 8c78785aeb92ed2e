# SPDX-License-Identifier: Apache-2.0
"""Options that commands share, and how both start a run and show its progress."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from discquant.config import GRID_KINDS, GridConfig, LayerGrid, Method, SolverConfig, parse_grid, preset
from discquant.errors import ConfigError

if TYPE_CHECKING:
    from discquant.run.events import Events
    from discquant.run.pipeline import Pipeline
    from discquant.solver.engine import Engine

MOST_THREADS = 1024

# The groups that --help shows options in: narrower tables leave the texts room at 80 columns.
GRID, METHOD, TEXT, MACHINE, RUN = "Grid", "Method", "Text", "Machine", "Run and files"
# Parameters that change nothing of a run of another method than discquant.
SOLVER_ONLY = (
    "preset_name",
    "iters",
    "scale_iters",
    "lr",
    "curvature",
    "optimizer",
    "loss",
    "start",
    "state",
    "teacher",
)

MethodName = Annotated[
    str,
    typer.Option(help="rtn, greedy, gptq, guided (GPTQ by gradients) or discquant.", rich_help_panel=METHOD),
]
Bits = Annotated[int, typer.Option(help="Bits per code, 2 to 8.", rich_help_panel=GRID)]
GroupSize = Annotated[
    int,
    typer.Option(
        help="Columns per scale: a multiple of 8 (32, 64, 128 have kernels), or -1 for the whole row.",
        rich_help_panel=GRID,
    ),
]
Sym = Annotated[
    bool, typer.Option("--sym/--asym", help="Symmetric grid (3-bit engines need it).", rich_help_panel=GRID)
]
GridRule = Annotated[
    str, typer.Option(help="absmax, or search for the scale of least squared error.", rich_help_panel=GRID)
]
Kind = Annotated[
    str,
    typer.Option(
        help="uniform, or a grid that a format dictates: nf4, mxfp4, nvfp4, q4_0, q4_1, q5_0, q5_1, "
        "q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs (bits, group size and symmetry are then the format's).",
        rich_help_panel=GRID,
    ),
]
LayerGrids = Annotated[
    list[str] | None,
    typer.Option(
        "--layer-grid",
        help="Another grid for some layers; repeatable, the last that covers a layer counts. PATTERN:SPEC, PATTERN as "
        "of --ignore, SPEC a width (down_proj:4), a kind (v_proj:q6_k) or KEY=VALUE pairs "
        "('*.0.*:bits=8,group_size=32'); or @FILE of `discquant allocate`.",
        rich_help_panel=GRID,
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        "--preset", help="default (best known) or paper (the published recipe).", rich_help_panel=METHOD
    ),
]
Loss = Annotated[
    str | None, typer.Option(help="kl, or the paper's variants ce and mse.", rich_help_panel=METHOD)
]
Start = Annotated[
    str | None, typer.Option(help="Where frac starts: ref, gptq or random.", rich_help_panel=METHOD)
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        help="Modules to leave alone with all below them (name, last part, or glob); repeatable.",
        rich_help_panel=GRID,
    ),
]
Formats = Annotated[
    str,
    typer.Option(
        "--format",
        help="Formats to write, comma separated (compressed-tensors, gptq, autoround, awq, mlx, gguf, onnx, ...), "
        "or none (codes stay in the run directory).",
        rich_help_panel=RUN,
    ),
]
GptqSamples = Annotated[
    int, typer.Option(help="Windows for GPTQ, guided and greedy.", rich_help_panel=METHOD)
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template",
        help="Put plain text and question-answer pairs through the tokenizer's chat template.",
        rich_help_panel=TEXT,
    ),
]
TextKey = Annotated[
    str, typer.Option(help="Key of the text in .jsonl, .parquet and data sets.", rich_help_panel=TEXT)
]
Samples = Annotated[int, typer.Option(help="Calibration windows.", rich_help_panel=TEXT)]
Seqlen = Annotated[int, typer.Option(help="Tokens per window.", rich_help_panel=TEXT)]
Iters = Annotated[
    int | None, typer.Option(help="Optimizer steps; default from the preset.", rich_help_panel=METHOD)
]
ScaleIters = Annotated[
    int | None,
    typer.Option(
        help="Steps after those, codes fixed, in which the scales move on the loss; default 0: the grid as laid.",
        rich_help_panel=METHOD,
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Windows per step.", rich_help_panel=METHOD)]
MicroBatch = Annotated[int | None, typer.Option(help="Windows per forward pass.", rich_help_panel=METHOD)]
Lr = Annotated[float | None, typer.Option(help="Peak learning rate on frac.", rich_help_panel=METHOD)]
Optimizer = Annotated[str | None, typer.Option(help="adamw, momentum, lion or sgd.", rich_help_panel=METHOD)]
Curvature = Annotated[
    float | None,
    typer.Option(
        help="Weight of the curvature term; 0 leaves it and its memory out; default from the damage.",
        rich_help_panel=METHOD,
    ),
]
State = Annotated[
    str | None,
    typer.Option(help="Solver state: fp32, bf16, or u8 (3.5-4.5 bytes per weight).", rich_help_panel=METHOD),
]
ComputeDtype = Annotated[
    str | None,
    typer.Option(
        help="Forward and backward passes: float32 (default), bfloat16 (a GPU's fast path) or float64.",
        rich_help_panel=MACHINE,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of data order and rounding noise.", rich_help_panel=METHOD)]
Baselines = Annotated[
    str, typer.Option(help="Methods to measure beside it, comma separated, or none.", rich_help_panel=METHOD)
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(
        help="Steps between checkpoints; by default 16, or more where they would take over 2.5 % of the time.",
        rich_help_panel=RUN,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: auto (the GPU where there is one), cpu, cuda or cuda:N; fixes the bytes.",
        rich_help_panel=MACHINE,
    ),
]
Placed = Annotated[
    str,
    typer.Option(
        help="Where the solver's state lives: resident, host, disk, or auto. Same bytes.",
        rich_help_panel=MACHINE,
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="Where activations between blocks are kept: resident, host or disk. Same bytes.",
        rich_help_panel=MACHINE,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Original weights: weights, or state (computed from it; no second copy), or auto.",
        rich_help_panel=METHOD,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Continue a run that is there (same command, same bytes).",
        rich_help_panel=RUN,
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; part of what fixes the bytes.", rich_help_panel=MACHINE)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=RUN
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read .bin weights of the original with torch's restricted loader.",
        rich_help_panel=RUN,
    ),
]
AllowPickleAlone = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read .bin weights of the original with torch's restricted loader; give --format none with it, for "
        "formats are written from safetensors.",
        rich_help_panel=RUN,
    ),
]


def given_options(context: typer.Context) -> dict[str, str]:
    """Return the options that the command line gives, as they are spelled there, by the names of their parameters."""
    return {
        parameter.name: parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name is not None
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    }


def refuse_contradictions(context: typer.Context, kind: str, bits: int, group_size: int, sym: bool) -> None:
    """Refuse a width, group or symmetry beside a kind that has another.

    Raises:
        ConfigError: One was given.
    """
    fixed = GRID_KINDS.get(kind)
    if fixed is None:
        return
    given = given_options(context)
    asked = {"bits": bits, "group_size": group_size, "sym": sym}
    own = dict(zip(asked, fixed, strict=True))
    wrong = [given[name] for name, value in asked.items() if name in given and value != own[name]]
    if wrong:
        raise ConfigError(
            f"--kind {kind} has {own['bits']} bits, groups of {own['group_size']} and is "
            f"{'symmetric' if own['sym'] else 'asymmetric'}; leave {', '.join(wrong)} out"
        )


def note_unused(context: typer.Context, method: str) -> None:
    """Say which options of the solver were given to a method that has none."""
    if method == "discquant":
        return
    given = given_options(context)
    unused = [given[name] for name in SOLVER_ONLY if name in given]
    if unused:
        typer.echo(f"note: {method} takes no solver steps; without effect: {', '.join(unused)}", err=True)


def grid_options(kind: str, bits: int, group_size: int, sym: bool, grid: str) -> GridConfig:
    """Return the grid of the options; a format's own kind fixes bits, group size and symmetry.

    Raises:
        ValueError: A value out of range, or a word that is none of the choices.
    """
    fixed = GRID_KINDS.get(kind, (bits, group_size, sym))
    return GridConfig(*fixed, grid=grid, kind=kind)  # type: ignore[arg-type]


def layer_grids(rules: list[str] | None, grid: GridConfig) -> tuple[LayerGrid, ...]:
    """Return the rules of `--layer-grid`; what a uniform one does not say is as in `grid`.

    Raises:
        ValueError: One cannot be read, or a value is out of range.
        MissingModelError, CheckpointError: The same of a file.
    """
    from discquant.run.allocate import read_layers

    found: list[LayerGrid] = []
    for rule in rules or ():
        found += read_layers(Path(rule[1:])) if rule.startswith("@") else [LayerGrid.parse(rule, grid)]
    return tuple(found)


def grid_choices(text: str, base: GridConfig) -> dict[str, GridConfig]:
    """Return the grids of `--choices` by their words: widths, kinds, or width and group size as in 4g32.

    Raises:
        ValueError: One cannot be read, or a value is out of range.
    """
    words = dict.fromkeys(part.strip() for part in text.split(",") if part.strip())
    return {word: parse_grid(word, base) for word in words}


def solver_options(grid: GridConfig, preset_name: str, **given: Any) -> SolverConfig:
    """Return the preset with what the user gave on top; None is not given.

    Raises:
        ValueError: A value out of range, or a word that is none of the choices.
    """
    base = preset(preset_name, grid)  # type: ignore[arg-type]
    changed = {key: value for key, value in given.items() if value is not None}
    if "iters" in changed and "warmup" not in changed:
        changed["warmup"] = min(base.warmup, max(1, changed["iters"] // 8))
    return dataclasses.replace(base, **changed)


def shown(value: float | None, form: str) -> str:
    """Return a number in a form; a dash where nothing could be measured."""
    return "-" if value is None else format(value, form)


def method_names(text: str) -> tuple[Method, ...]:
    """Return the methods of a comma-separated option; empty for none."""
    if text == "none":
        return ()
    return tuple(part.strip() for part in text.split(",") if part.strip())  # type: ignore[misc]


def set_threads(threads: int | None) -> None:
    """Give torch this many CPU threads; None leaves them.

    Raises:
        ConfigError: Less than one.
    """
    import torch

    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:  # torch ends in a crash where the system has no more
        raise ConfigError(f"--threads must be from 1 to {MOST_THREADS}, got {threads}")
    torch.set_num_threads(threads)


def run_pipeline(
    build: Callable[[Events, Engine], Pipeline],
    out: Path,
    *,
    device: str,
    placement: str,
    activations: str | None,
    threads: int | None,
    loss: str = "kl",
) -> dict[str, Any] | None:
    """Run a pipeline to its end with a progress bar, together with the other processes that torchrun started.

    Args:
        build: Makes the pipeline.
        out: Its run directory.
        device: Word for the compute device; refused before anything else where it is not there.
        placement: See `Engine`.
        activations: See `Engine`.
        loss: What a step reports, as the solver names it.
        threads: CPU threads of torch; None takes those that the run in `out` was begun with, or leaves them.

    Returns:
        The summary; None in every process but the first.
    """
    from discquant.environment import compute_device
    from discquant.progress import ProgressBar
    from discquant.run.directory import RunDirectory
    from discquant.run.events import Events, RunStoppedError
    from discquant.solver.engine import Engine
    from discquant.solver.ranks import Ranks

    where = compute_device(device, Ranks.local())
    if threads is None:  # torchrun sets another number than a process of its own has
        threads = RunDirectory(out).recorded_threads()
    set_threads(threads)
    ranks = Ranks.from_environment(where)
    engine = Engine(placement, activations, where, ranks=ranks)  # type: ignore[arg-type]
    with ProgressBar(loss.upper()) as bar, contextlib.closing(ranks):
        events = Events(phase=bar.phase, step=bar.step, message=bar.message) if ranks.first else Events()
        try:
            summary = build(events, engine).execute()
        except RunStoppedError as stopped:
            bar.message(str(stopped))
            raise typer.Exit(128 + stopped.signal) from stopped
    return summary if ranks.first else None
