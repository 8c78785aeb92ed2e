# SPDX-License-Identifier: Apache-2.0
"""What `make gpu` runs after the build: GPU tests, tuning on request, benchmarks, plots, within a time budget.

`python benchmarks/run_gpu.py [--seconds 500] [--tune] [--all]`. Every part has a share of the budget and its own exit
status; a part that runs out of time is cut and named, the others still run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# On a GPU these run the compiled kernels on it, unmarked tests included; ahead-of-time compilation needs none.
TESTS = ("tests/ops", "tests/packed")


def _pytest(*arguments: str) -> list[str]:
    # The script beside the interpreter: `python -m pytest` would put the checkout on sys.path (see the Makefile).
    return [str(Path(sysconfig.get_path("scripts")) / "pytest"), *arguments]


def parts(options: argparse.Namespace) -> list[tuple[str, float, list[str]]]:
    """Name, share of the budget, command."""
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    tests = [path for path in TESTS if (ROOT / path).is_dir()]
    # Small kernels first and the quick benches before the long ones: a cut loses the least.
    benches = [f"benchmarks/bench_{stem}.py" for stem in (
        "solver_step", "soft_weight", "projected_step", "linear_kl", "hadamard", "packed_linear", "pack", "soft_linear",
    ) if (HERE / f"bench_{stem}.py").exists()]  # fmt: skip
    chosen = [] if options.all else ["-k", "not (57344 or (512 and soft_linear)) or packed"]
    clean = ["-o", "addopts=--import-mode=importlib", "-q", "--benchmark-only", "--benchmark-min-rounds=1"]
    if not workers:
        # One process compiles too slowly for all of them: the large shapes and bfloat16 come first.
        workers = ["-m", "gpu"]
    found = [
        (
            "gpu tests",
            0.45,
            _pytest(*tests, *workers, "-q", "--benchmark-skip", "--ignore=tests/ops/test_aot.py"),
        )
    ]
    if options.tune:
        found.append(
            (
                "tune",
                0.4,
                [sys.executable, str(HERE / "tune_soft_linear.py"), "--seconds", str(0.35 * options.seconds)],
            )
        )
    found.append(("benchmarks", 0.47, _pytest(*benches, *clean, *chosen)))
    found.append(("plots", 0.08, [sys.executable, str(HERE / "plot.py")]))
    return found


def main() -> int:
    """Command line; 0 if every part succeeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=500, help="budget of all parts together")
    parser.add_argument(
        "--tune", action="store_true", help="also rewrite soft_linear's table from measurements"
    )
    parser.add_argument("--all", action="store_true", help="every shape")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("run_gpu: no CUDA device is visible", file=sys.stderr)
        return 1
    failed = []
    for name, share, command in parts(options):
        start = time.monotonic()
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=share * options.seconds).returncode
        except subprocess.TimeoutExpired:
            status = 124
        print(
            f"run_gpu: {name}: {'ok' if status == 0 else f'exit status {status}'}, {time.monotonic() - start:.0f} s"
        )
        if status:
            failed.append(name)
    if failed:
        print(f"run_gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
