# SPDX-License-Identifier: Apache-2.0
"""What `make gpu` runs: build, tests, decode, tuning, benchmarks, sanitizers, targets, plots; all under limits.

`python benchmarks/run_gpu.py [--set quick|targets|default|all] [--steps build,...] [--seconds 500] [--tune [TABLES]]`.
Needs no network and no package beyond torch, Triton, pytest and pytest-benchmark; what else is missing is named and its
rows are skipped. A step that fails or runs out of time is named and the others still run; rows are kept as they come.
--dry-run plans everything and, on any machine, runs each benchmark body once on small shapes without recording.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOGS = ROOT / "build" / "gpu"
PACKED_TABLE = ROOT / "discquant" / "ops" / "packed_linear_table.json"
# On a GPU these run the compiled kernels on it, unmarked tests included; what compiles or emulates needs none.
TESTS = ("tests/ops", "tests/packed", "tests/solver/test_soft_block.py", "tests/solver/test_norms.py")
ELSEWHERE = ("tests/ops/test_aot.py", "tests/ops/test_compiled_kernels.py", "tests/packed/test_native.py")
SANITIZERS = "tests/packed/test_gpu_contract.py::test_compute_sanitizer"
# The packed kernels alone, a process each so that none takes another's results with it: file, -k. Not collected first,
# which takes as long as some of them.
PACKED_TESTS = {
    "prefill": ("prefill", ""), "repeats": ("repeats", ""), "contract": ("contract", "not compute_sanitizer"),
    "exact": ("values", "bit_exact"), "values": ("values", "not bit_exact"),
}  # fmt: skip
OPTIONAL = ("liger_kernel", "cut_cross_entropy", "bitsandbytes", "torchao", "matplotlib", "hypothesis")
# The most telling first: a cut loses the least. Limits in seconds, from the rows of the default set at about 1.2 s a
# row (0.6 s of samples, data, gate) and 10 s for each graph that torch.compile builds; in every file ours come first.
BENCHES = {
    "solver_step": 50, "projected_step": 60, "linear_kl": 60, "packed_linear": 110, "soft_linear": 130,
    "soft_weight": 40, "hadamard": 30, "pack": 30, "anchor_codes": 15, "place_outliers": 15,
}  # fmt: skip
# packed_linear goes before all else with few tokens: its other kernels have processes of their own, after the tuning.
DECODE = 100
# Tables that can be tuned -> seconds for it at most.
TABLES = {"packed_linear": 90, "soft_linear": 170}
# Rows of a set, as pytest's -k. `default` leaves out the solver's 70B shapes, few tokens and what compiles for long;
# `targets` is what the target tables ask for and nothing beside it: where the table says materialise, dX by that name
# is the same as by `auto`, and the forward pass gives the bound of a weight that passes through memory.
_PACKED = "(test_decode or test_prefill)"
_OURS = "triton and not fused and not compiled and not 57344 and not 512 and not 3584 and not 11008"
SETS = {
    "quick": f"({_OURS}) or ({_PACKED} and gate_up and not 57344)",
    "targets": f"({_OURS} and not epilogue and not dfrac and not (materialise and dx) "
    "and not (linear_kl and 8192) and not ((linear_kl or test_solver_step) and not 16384)) "
    f"or ({_PACKED} and not odd and not down)",
    "default": f"not (57344 and not {_PACKED}) and not 11008 and not (soft_linear and (512 or wide or lion)) "
    "and not (compiled and linear_kl) and not (compiled and hadamard and (14336 or 28672))",
    "all": "",
}
# Files without a row in a set: pytest calls it an error to have nothing to run.
_BESIDE = ("pack", "anchor_codes", "place_outliers")
UNASKED = {"quick": _BESIDE, "targets": ("hadamard", *_BESIDE)}
STEPS = ("build", "tests", "decode", "packed-tests", "tune", "benchmarks", "sanitizers", "targets", "plots")
# Of a set, where --steps does not say: the targets count what the dispatcher chooses, so its table comes first.
STEPS_OF = {"targets": ("build", "decode", "packed-tests", "tune", "benchmarks", "targets")}
_INSTALL = [
    sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT),
]  # fmt: skip
GRACE = 6.0  # seconds for an interrupted process to write its summary
SMALL = "not compiled"  # without a GPU: the compiler of torch.compile takes longer than all the rest


class Command(NamedTuple):
    """One process and where its output goes."""

    log: str
    arguments: list[str]
    environment: tuple[tuple[str, str], ...] = ()
    seconds: float | None = None  # a limit of its own, where its step has several commands in turn


class Step(NamedTuple):
    """Commands of a step; `together` runs them at once."""

    name: str
    seconds: float
    commands: list[Command]
    together: bool = False


def _pytest(*arguments: str) -> list[str]:
    # Not `python -m pytest`, which puts the checkout on sys.path (see the Makefile), nor a script from elsewhere.
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "-p", "no:cacheprovider", *arguments]


def run(command: Command, seconds: float) -> tuple[subprocess.Popen[bytes], float]:
    """Start a command in a process group of its own; return it with its deadline."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{command.log}.log").open("wb") as log:
        process = subprocess.Popen(
            command.arguments, cwd=ROOT, env={**os.environ, **dict(command.environment)}, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return process, time.monotonic() + seconds


def finish(process: subprocess.Popen[bytes], deadline: float) -> int:
    """Wait; past the deadline interrupt, so that pytest tells what it found so far, then end the whole group: 124."""
    for asked, seconds in ((signal.SIGINT, deadline - time.monotonic()), (signal.SIGKILL, GRACE)):
        try:
            status = process.wait(timeout=max(0.1, seconds))
            return status if asked == signal.SIGINT else 124
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, asked)
    process.wait()
    return 124


def execute(step: Step, seconds: float) -> list[tuple[str, int]]:
    """Run a step within `seconds`; return the exit status of each command."""
    limit = min(step.seconds, seconds)
    if step.together:
        started = [(command.log, *run(command, limit)) for command in step.commands]
        return [(log, finish(process, deadline)) for log, process, deadline in started]
    end = time.monotonic() + limit
    found = []
    for command in step.commands:
        own, left = command.seconds or limit, end - time.monotonic()
        found.append((command.log, finish(*run(command, min(own, left))) if left > 1 else 124))
    return found


def shards(tests: Sequence[str], count: int) -> list[list[str]]:
    """Deal test ids round robin, those on Llama shapes first, so that no process gets all the slow ones."""
    ordered = sorted(tests, key=lambda test: "gpu" not in test.lower())
    return [part for part in (ordered[i::count] for i in range(count)) if part]


def _collected(dry: bool) -> list[str]:
    paths = [path for path in TESTS if (ROOT / path).exists()]
    ignored = [f"--ignore={path}" for path in ELSEWHERE]
    listing = _pytest(
        *paths, "--collect-only", "-q", *ignored, f"--deselect={SANITIZERS}", "--benchmark-skip"
    )
    if dry:
        listing += ["-k", "rule or cover or packed_layout"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired as error:  # what measures goes on without them
        print(f"run_gpu: tests were not collected within {error.timeout:.0f} s", file=sys.stderr)
        return []
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    if not tests:
        print(done.stdout[-1500:], done.stderr[-500:], file=sys.stderr)
    return tests


def _build(dry: bool) -> Iterator[Command]:
    if dry:
        yield Command("build", [sys.executable, "-c", f"print({' '.join(_INSTALL)!r})"])
        return
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}" + "a" * (major >= 9)
    yield Command("build", _INSTALL, (
        ("DISCQUANT_BUILD", "cuda"), ("TORCH_CUDA_ARCH_LIST", arch), ("PIP_BREAK_SYSTEM_PACKAGES", "1"),
    ))  # fmt: skip


def _tune(options: argparse.Namespace) -> Iterator[Step]:
    """The tables that --tune names, and the packed kernels' one where it does not know this device yet."""
    known = True
    if not options.dry_run:
        import torch

        # The file itself: this process began before the package was installed and cannot import it.
        table = json.loads(PACKED_TABLE.read_text(encoding="utf-8"))
        major, minor = torch.cuda.get_device_capability()
        measured = table["devices"].get(f"sm_{major}{minor}", {}).get("measured") or {}
        known = set(measured.get("bits", ())) == {"3", "4"}
    for name, seconds in TABLES.items():
        if name in options.tune or (name == "packed_linear" and not known):
            command = [sys.executable, str(HERE / f"tune_{name}.py"), "--seconds", str(seconds)]
            # More than its own limit, after which it ends by itself: to start, and to finish what it measures.
            yield Step(f"tune_{name}", seconds + 20, [Command(f"tune_{name}", command)])


def steps(
    options: argparse.Namespace, wanted: Sequence[str], left: Callable[[], float] = lambda: float("inf")
) -> Iterator[Step]:
    """The steps in order; each is planned when its turn comes, since tests are collected from what was built.

    `left` tells how many seconds of the budget there are: what checks alone gives way to what measures.
    """
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    if "build" in wanted:
        yield Step("build", 180, list(_build(options.dry_run)))
    files = [stem for stem in BENCHES if (HERE / f"bench_{stem}.py").exists()]
    asked = options.benches or BENCHES.keys() - UNASKED.get(options.set, ())
    files = [stem for stem in files if stem in asked]
    chosen = SMALL if options.dry_run else SETS[options.set]
    common = ["-o", "addopts=--import-mode=importlib", "-q", "-rs", *(["-k", chosen] if chosen else [])]
    if "tests" in wanted:
        tests = _collected(options.dry_run)
        # The newest kernel by itself: should it spoil the device for its process, the others' tests still tell.
        newest = [test for test in tests if "prefill" in test]
        others = [test for test in tests if test not in newest]
        parts = [*shards(others, 1 if options.dry_run else workers), *([newest] if newest else [])]
        # Together they use every core; each on its own would take all of them.
        threads = (("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers))),)
        commands = [
            Command(f"tests_{i}", _pytest("-q", "--benchmark-skip", "-rf", *part), threads)
            for i, part in enumerate(parts)
        ]
        if "benchmarks" in wanted and not options.dry_run:
            # Their bodies once, beside the tests: compiling takes longer than measuring and disturbs nothing here.
            # Nothing of packed_linear is compiled then, and a kernel that never ran may spoil the device.
            paths = [f"benchmarks/bench_{stem}.py" for stem in files if stem != "packed_linear"]
            commands += [
                # Without a path pytest would take every test of the project.
                Command(f"warm_{i}", _pytest(*half, *common, "--benchmark-disable"))
                for i, half in enumerate((paths[::2], paths[1::2]))
                if half
            ]
        yield Step("tests", 190, commands, True)
    once = ["--benchmark-disable"] if options.dry_run else ["--benchmark-only", "--benchmark-min-rounds=1"]
    packed = "benchmarks/bench_packed_linear.py"
    apart = "decode" in wanted and "packed_linear" in files
    if apart:
        # Before anything that has a newer kernel in its process.
        few = [*common[:-2], "-k", f"test_decode and ({chosen})" if chosen else "test_decode"]
        limit = options.seconds if options.dry_run else DECODE
        yield Step("decode", limit, [Command("bench_decode", _pytest(packed, *few, *once))])
    if "packed-tests" in wanted and not options.dry_run:
        threads = (("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(PACKED_TESTS)))),)
        yield Step("packed-tests", 100, [
            Command(f"packed_{name}", _pytest(
                f"tests/packed/test_gpu_{stem}.py", "-q", "-rf", *(["-k", only] if only else [])
            ), threads)
            for name, (stem, only) in PACKED_TESTS.items()
        ], True)  # fmt: skip
    if "tune" in wanted:
        yield from _tune(options)
    if "benchmarks" in wanted:
        yield Step("benchmarks", options.seconds, [
            Command(f"bench_{stem}", _pytest(
                f"benchmarks/bench_{stem}.py", *common, *once,
                *(["--deselect", f"{packed}::test_decode"] if apart and stem == "packed_linear" else []),
            ), seconds=None if options.dry_run else BENCHES[stem])
            for stem in files
        ])  # fmt: skip
    if "sanitizers" in wanted and not options.dry_run and left() < 180:
        print("run_gpu: sanitizers: left out for time; they run alone with --steps sanitizers", flush=True)
    elif "sanitizers" in wanted and not options.dry_run:
        yield Step("sanitizers", 400, [Command("sanitizers", _pytest(SANITIZERS, "-v", "-rs"))])
    if "targets" in wanted:
        sys.path.insert(0, str(HERE))
        from harness import result_file

        yield Step("targets", 30, [
            Command("targets", [sys.executable, str(HERE / "targets.py")]),
            *([Command("targets_packed", [sys.executable, str(HERE / "packed_targets.py"), str(result_file())])]
              if result_file().exists() else []),
        ])  # fmt: skip
    if "plots" in wanted:
        if importlib.util.find_spec("matplotlib") is None:
            print("run_gpu: plots: skipped, matplotlib is not installed")
        else:
            yield Step("plots", 40, [Command("plots", [sys.executable, str(HERE / "plot.py")])])


def archive(folder: Path) -> Path:
    """Write gpu.tgz, with whatever the steps write, into a folder: of a borrowed machine often all that comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".gpu.tgz.partial"
    with tarfile.open(partial, "w:gz") as file:
        for path in (HERE / "results", LOGS, *(ROOT / "discquant" / "ops").glob("*_table.json")):
            if path.exists():
                file.add(
                    path, arcname=str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
                )
    return partial.replace(folder / "gpu.tgz")


def _report(step: Step, found: list[tuple[str, int]], spent: float) -> list[str]:
    """Print how a step went, with the tails of what failed; return the names of what failed."""
    failed = [log for log, status in found if status]
    print(
        f"run_gpu: {step.name}: {'ok' if not failed else 'FAILED ' + ', '.join(failed)}, {spent:.0f} s",
        flush=True,
    )
    for log, status in found:
        text = (LOGS / f"{log}.log").read_text(errors="replace") if (LOGS / f"{log}.log").exists() else ""
        skipped = re.findall(r"^SKIPPED .*$", text, re.MULTILINE)
        lines = [line for line in text.splitlines() if line.strip()]
        named = [line for line in lines if re.search(r"^FAILED|^ERROR|error:", line)][-25:] if status else []
        last = [*named, *lines[-1:]] if named else lines[-(15 if status else 1) :]
        shown = text.splitlines() if step.name == "targets" else [*skipped, *last]
        why = " (out of time)" if status == 124 else ""
        print("\n".join(f"  {log}{why}: {line}" for line in shown), flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if every step succeeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=500, help="budget of all steps together")
    parser.add_argument("--set", choices=tuple(SETS), default="default", help="which benchmark rows")
    parser.add_argument(
        "--steps", default="",
        help=f"comma separated, of {', '.join(STEPS)}, in this order; default all but packed-tests, which are among "
        f"the tests; with --set targets {', '.join(STEPS_OF['targets'])}",
    )  # fmt: skip
    parser.add_argument("--benches", default="", help="only these benchmark files, comma separated stems")
    parser.add_argument(
        "--tune", nargs="?", const=",".join(TABLES), default="", metavar="TABLES",
        help=f"measure these anew, comma separated, of {', '.join(TABLES)} (the second takes about 3 minutes); without "
        "a name both",
    )  # fmt: skip
    parser.add_argument(
        "--copy-to", type=Path, metavar="DIR",
        help="keep results, tables and logs there too, as one archive, renewed after every step",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="no GPU: plan, and run each body once on small shapes"
    )
    options = parser.parse_args(arguments)
    usual = STEPS_OF.get(options.set, tuple(step for step in STEPS if step != "packed-tests"))
    wanted = [step for step in options.steps.split(",") if step] or list(usual)
    options.benches = [stem for stem in options.benches.split(",") if stem]
    options.tune = [name for name in options.tune.split(",") if name]
    if options.copy_to is not None:
        inside = options.copy_to.resolve()
        if inside.is_relative_to(LOGS.resolve()) or inside.is_relative_to((HERE / "results").resolve()):
            parser.error(f"--copy-to must lie outside of what it copies, got {options.copy_to}")
    for kind, given, known in (
        ("step", wanted, STEPS), ("benchmark", options.benches, BENCHES), ("table", options.tune, TABLES),
    ):  # fmt: skip
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {kind} {unknown[0]}, there are {', '.join(known)}")
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        print("run_gpu: no CUDA device is visible (--dry-run works without one)", file=sys.stderr)
        return 1
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    print(f"run_gpu: not installed, their rows are skipped: {', '.join(missing) or 'nothing'}", flush=True)
    end = time.monotonic() + options.seconds
    failed: list[str] = []
    for step in steps(options, wanted, lambda: end - time.monotonic()):
        start = time.monotonic()
        # Targets and plots are quick and tell what was found, so they keep half a minute of any budget.
        reserve = 0 if step.name in ("targets", "plots") else 30
        found = execute(step, max(5.0, end - start - reserve))
        failed += _report(step, found, time.monotonic() - start)
        if options.copy_to is not None:
            try:
                archive(options.copy_to)
            except OSError as cause:  # the steps are worth more than their copy
                print(f"run_gpu: --copy-to: {cause}", file=sys.stderr)
        if step.name == "build" and failed:
            # Everything but the packed CUDA kernels still runs.
            plain = [*_INSTALL] if not options.dry_run else [sys.executable, "-c", "pass"]
            again = Step("build without extension", 60, [
                Command("build_plain", plain, (("DISCQUANT_BUILD", "none"), ("PIP_BREAK_SYSTEM_PACKAGES", "1")))
            ])  # fmt: skip
            start = time.monotonic()
            failed += _report(again, execute(again, 60), time.monotonic() - start)
    if failed:
        print(f"run_gpu: failed: {', '.join(failed)}; logs in {LOGS.relative_to(ROOT)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
