# SPDX-License-Identifier: Apache-2.0
"""Instructions of the projected step per element, and what they say of its speed; needs no GPU.

`python benchmarks/step_instructions.py` compiles for sm_90 the kernels of a measured commit and those of the working
tree, with the same counter. The measured rows give the rate at which the kernel issues instructions; with the slowest
of them and at most the speed of a copy, the present instructions give a predicted share of copy bandwidth. It is a
prediction, and named so in the file.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from harness import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = "a6e1e98"  # the newest commit with rows of projected_step in nvidia-h200.csv
SHAPE = (28672, 4096)
OPTIMIZERS = ("momentum", "lion", "adamw")
FIELDS = (
    "kernels", "optimizer", "instructions_per_element", "slow_per_element", "registers", "measured_share_of_copy",
    "measured_instructions_per_ps", "predicted_share_of_copy",
)  # fmt: skip


def count(commit: str | None) -> dict[str, dict[str, str]]:
    """Rows of the ahead-of-time report by optimizer; the kernels are the commit's, or the working tree's for None."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "triton_kernels"
        kernels.mkdir()
        if commit is not None:
            packed = subprocess.run(
                ["git", "archive", commit, "triton_kernels"], cwd=ROOT, check=True, capture_output=True
            ).stdout
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(folder, filter="data")
        for file in (ROOT / "triton_kernels").glob("*.py"):
            if commit is None or file.name in ("aot.py", "sass.py"):
                (kernels / file.name).write_text(file.read_text())
        table = Path(folder) / "rows.csv"
        subprocess.run(
            [sys.executable, "-m", "triton_kernels.aot", "--targets", "90", "--only", "8bit-f32grad-g64",
             "--csv", str(table), "--cache", str(Path(folder) / "cache")],
            cwd=folder, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        with table.open() as file:
            rows = {row["case"].split("/")[1].split("-")[0]: row for row in csv.DictReader(file)}
    return {optimizer: rows[optimizer] for optimizer in OPTIMIZERS}


def measured() -> dict[str, tuple[float, float, float]]:
    """Optimizer -> (picoseconds per element, picoseconds of a copy of its bytes, share of copy) at MEASURED."""
    found = {}
    with (RESULTS / "nvidia-h200.csv").open() as file:
        for row in csv.DictReader(file):
            shape = f"{SHAPE[0]}x{SHAPE[1]}"
            key = (row["op"], row["provider"], row["shape"], row["commit"])
            if key == ("projected_step", "triton", shape, MEASURED):
                share, time = float(row["share_of_copy"]), float(row["ms_p50"]) * 1e9 / (SHAPE[0] * SHAPE[1])
                found[row["mode"]] = (time, time * share, share)
    return found


def main() -> None:
    """Write benchmarks/results/step_instructions.csv."""
    times = measured()
    before, after = count(MEASURED), count(None)
    rates = {o: float(before[o]["instructions_per_element"]) / times[o][0] for o in OPTIMIZERS}
    rate = min(rates.values())
    with (RESULTS / "step_instructions.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for name, rows in ((MEASURED, before), (machine()["commit"], after)):
            for optimizer, row in rows.items():
                _, copy, share = times[optimizer]
                predicted = min(1.0, copy * rate / float(row["instructions_per_element"]))
                old = name == MEASURED
                writer.writerow([
                    name, optimizer, row["instructions_per_element"], row["slow_per_element"], row["registers"],
                    f"{share:.3f}" if old else "", f"{rates[optimizer]:.1f}" if old else "",
                    f"{predicted:.2f}" if predicted < 1 else "1.00 (at most)",
                ])  # fmt: skip
    print((RESULTS / "step_instructions.csv").read_text())


if __name__ == "__main__":
    main()
