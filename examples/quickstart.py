# SPDX-License-Identifier: Apache-2.0
"""Quantize the bundled model at 3 bits, compare with RTN and GPTQ on held-out text and problems, generate text.

Run by `make quickstart`; writes build/quickstart/ and prints one table. Everything is offline. More steps give a lower
KL, and machines differ by a factor of three: the plan for this machine, timed first, decides how many steps are taken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from discquant.calibration.arithmetic import problems, prompt
from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.evaluation.evaluate import evaluate
from discquant.generation import stream
from discquant.planning.hardware import host_memory, this_device
from discquant.planning.plan import Machine, make_plan
from discquant.planning.shape import read_shape
from discquant.planning.timing import measure
from discquant.progress import ProgressBar
from discquant.run.directory import RunDirectory
from discquant.run.pipeline import Events, Pipeline

HERE = Path(__file__).resolve().parent
MODEL = HERE / "tiny_llama"
OUT, RESULT = HERE.parent / "build" / "quickstart", "quickstart.json"
METHODS = ("rtn", "gptq", "discquant")
GRID = GridConfig(bits=3, group_size=64, sym=True, grid="search")
STEPS = (1024, 512, 256)  # DiscQuant takes the first that fits the time
SEQLEN = 256


def _clear(out: Path) -> None:
    """Remove the runs of an earlier quickstart from its own folder; anybody else's must be empty.

    Raises:
        SystemExit: It is not.
    """
    if out.resolve() != OUT and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"quickstart: --out {out} is not empty; give another folder")
    for folder in (out / method for method in METHODS):
        if RunDirectory.is_run(folder):
            shutil.rmtree(folder)
    (out / RESULT).unlink(missing_ok=True)


def _config(method: str, iters: int) -> QuantizeConfig:
    """The default recipe; as many windows as DiscQuant's steps read, so that none is read twice."""
    solver = SolverConfig(iters=iters)
    data = DataConfig(dataset="arithmetic", nsamples=iters * solver.batch_size, seqlen=SEQLEN)
    return QuantizeConfig(grid=GRID, method=method, solver=solver, data=data, baselines=())  # type: ignore[arg-type]


def _steps(minutes: float, console: Console) -> int:
    """Time one block on this machine; return the most steps whose planned time fits in `minutes`."""
    config = _config("discquant", STEPS[0])
    shape = read_shape(str(MODEL), config.ignore)
    rates = measure(MODEL, shape, config)
    machine = Machine(this_device(), host_memory(), float(shutil.disk_usage(HERE).free))
    for iters in STEPS:
        plan = make_plan(shape, _config("discquant", iters), machine, placement="resident", rates=rates)
        if plan.total_seconds <= 60 * minutes:
            break
    console.print(
        f"{iters} steps: {plan.step_seconds:.2f} s each on this machine, planned {plan.total_seconds / 60:.1f} minutes "
        f"(of {minutes:g} at most)"
    )
    return iters


def _run(method: str, out: Path, iters: int) -> float:
    """Quantize with one method; return the seconds it took."""
    config = _config(method, iters)
    begin = time.perf_counter()
    with ProgressBar() as bar:
        Pipeline(
            MODEL, out, config, events=Events(phase=bar.phase, step=bar.step, message=bar.message)
        ).execute()
    return time.perf_counter() - begin


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _print(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Bundled model, 3 bits symmetric, groups of 64; held-out text and problems")
    # Headings of two lines: a terminal is 80 columns wide.
    names = ("", "KL to original", "top-1", "exact\nanswers", "bits per\nweight", "file\nMB", "seconds")
    for index, column in enumerate(names):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['kl_mean']:.4f} ± {row['kl_stderr']:.4f}" if row["kl_mean"] else "0",
            f"{row['top1']:.2%}",
            f"{row['exact_match']:.1%}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['file_bytes'] / 1e6:.2f}",
            f"{row['seconds']:.0f}" if row["seconds"] else "",
        )
    console.print(table)


def main() -> None:
    """Run everything and write quickstart.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="an empty folder, or the default")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems to answer")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows to measure on")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="DiscQuant's time, which decides its steps"
    )
    parser.add_argument("--steps", type=int, help="steps whatever they take")
    parser.add_argument("--record", action="store_true", help="also write benchmarks/results/quickstart.json")
    arguments = parser.parse_args()
    console = Console()
    _clear(arguments.out)
    iters = arguments.steps or _steps(arguments.minutes, console)
    seconds = {}
    for method in METHODS:
        console.rule(method)
        seconds[method] = _run(method, arguments.out / method, iters)
    console.rule("measure")
    exported = [arguments.out / method / "compressed-tensors" for method in METHODS]
    found = evaluate(
        MODEL,
        [MODEL, *exported],
        "arithmetic:heldout",
        nsamples=arguments.windows,
        seqlen=SEQLEN,
        exact_match_problems=arguments.problems,
    )
    rows = [
        {
            **row,
            "method": name,
            "file_bytes": _file_bytes(folder),
            "seconds": round(seconds.get(name, 0.0), 1),
            "iters": iters if name == "discquant" else None,
        }
        for row, name, folder in zip(found, ("original", *METHODS), [MODEL, *exported], strict=True)
    ]
    for row in rows:
        row["path"] = (
            Path(row["path"]).name if row["method"] == "original" else f"{row['method']}/compressed-tensors"
        )
    text = json.dumps(rows, indent=2) + "\n"
    (arguments.out / RESULT).write_text(text, encoding="utf-8")
    if arguments.record:
        target = HERE.parent / "benchmarks" / "results" / RESULT
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    _print(rows, console)
    console.rule("generate, from the 3-bit file")
    question = prompt(problems("heldout", 1, seed=7)[0])
    console.print(question, highlight=False)
    stream(exported[-1], question, max_new_tokens=160, temperature=0.0, seed=0)
    console.print(f"Runs with reports are in {arguments.out}", highlight=False)


if __name__ == "__main__":
    main()
