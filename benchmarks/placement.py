# SPDX-License-Identifier: Apache-2.0
"""Identity and cost of placements and ranks: resident = host = disk = 2 = 4 ranks, byte for byte, on the bundled model.

Writes benchmarks/results/placement.json. How cost grows with depth and width is measured by scale.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def fingerprint(out: Path) -> dict[str, str]:
    """Return SHA-256 of the final codes and of every exported file."""
    files = [
        out / "codes.safetensors",
        *sorted(p for p in (out / "compressed-tensors").rglob("*") if p.is_file()),
    ]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(model: Path, out: Path, iters: int, ranks: int, extra: list[str]) -> list[str]:
    """Return a short run of the command line; `ranks` above 1 goes through torchrun."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return [
        *launcher, "discquant", "quantize", str(model), str(out), "--bits", "3", "--group-size", "64", "--dataset",
        "arithmetic", "--nsamples", "32", "--seqlen", "64", "--iters", str(iters), "--batch-size", "8", "--micro-batch",
        "2", "--gptq-samples", "16", "--checkpoint-every", str(max(1, iters // 4)), "--baselines", "none", "--threads",
        "1", *extra,
    ]  # fmt: skip


def measure(model: Path, out: Path, iters: int, ranks: int, extra: list[str]) -> dict[str, Any]:
    """Run and return seconds, peak memory by phase, and the cost of checkpoints."""
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command(model, out, iters, ranks, extra), cwd=out.parent, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(extra) or ranks}: {done.stderr[-2000:]}")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    steps = [
        line["seconds"]
        for line in map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if "kind" not in line
    ]
    return {
        "seconds": round(time.perf_counter() - begin, 2),
        "step_seconds_median": sorted(steps)[len(steps) // 2],
        "peak_rss_bytes": {phase["name"]: phase["peak_rss_bytes"] for phase in summary["phases"]},
        "checkpoints": summary.get("checkpoints"),
        "state_bytes_per_weight": summary.get("state_bytes_per_weight"),
    }


def identity(model: Path, iters: int, folder: Path, state: list[str]) -> dict[str, Any]:
    """Run every placement and number of ranks; tell which gave other bytes than the resident run."""
    cases: dict[str, tuple[int, list[str]]] = {
        "resident": (1, ["--placement", "resident"]),
        "host": (1, ["--placement", "host"]),
        "disk": (1, ["--placement", "disk"]),
        "2 ranks": (2, ["--placement", "resident"]),
        "4 ranks": (4, ["--placement", "host"]),
    }
    found, prints = {}, {}
    for name, (ranks, extra) in cases.items():
        out = folder / name.replace(" ", "-")
        found[name] = measure(model, out, iters, ranks, [*extra, *state])
        prints[name] = fingerprint(out)
        print(name, found[name]["seconds"], "s", flush=True)
    different = [name for name, printed in prints.items() if printed != prints["resident"]]
    return {"runs": found, "files_compared": len(prints["resident"]), "different": different}


def main() -> None:
    """Parse the command line and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_llama")
    parser.add_argument("--iters", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "placement.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "u8").mkdir()
        result = {
            "model": given.model.name,
            "iters": given.iters,
            "identity": identity(
                given.model, given.iters, folder / "u8", ["--state", "u8", "--optimizer", "momentum"]
            ),
            "device": "CPU, one thread per process; not measured on a GPU",
        }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if result["identity"]["different"]:
        raise SystemExit(f"other bytes than resident: {result['identity']['different']}")
    print("identical bytes in every placement and with every number of ranks")


if __name__ == "__main__":
    main()
