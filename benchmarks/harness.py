# SPDX-License-Identifier: Apache-2.0
"""Timing and recording of one measurement: correctness gate, device events with a cold L2, one tidy CSV row.

Append-only: benchmarks/results/<device>.csv. With --benchmark-disable, or under the interpreter, each body runs once
and nothing is recorded.
"""

from __future__ import annotations

import csv
import datetime as dt
import functools
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = (
    "op", "provider", "mode", "shape", "dtype", "ms_p10", "ms_p50", "ms_p90", "peak_mib", "gb_s", "share_of_copy",
    "tflop_s", "times_bare_matmul", "device", "driver", "torch", "triton", "commit", "date",
)  # fmt: skip
GPU = torch.cuda.is_available()
WAIT_CYCLES = 4_000_000  # about 2 ms
DEVICE = torch.device("cuda" if GPU else "cpu")


@functools.cache
def machine() -> dict[str, str]:
    """The columns that are the same for every row of a run."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    cpu = output("sh", "-c", "grep -m1 'model name' /proc/cpuinfo | cut -d: -f2") or platform.machine()
    return {
        "device": torch.cuda.get_device_name()
        if GPU
        else f"cpu {cpu.strip()} threads {torch.get_num_threads()}",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if GPU else "",
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": output("git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"),
        "date": dt.date.today().isoformat(),
    }


def result_file() -> Path:
    """benchmarks/results/<device>.csv."""
    name = re.sub(r"[^a-z0-9]+", "-", machine()["device"].lower()).strip("-")
    return RESULTS / f"{name}.csv"


@functools.cache
def _flush() -> Tensor:
    # Four times the L2 of any present GPU; reading it makes the next launch start cold. Written, it would lie there
    # unsaved, and the launch would pay for its way to memory.
    return torch.zeros(64 * 2**20, dtype=torch.int32, device=DEVICE)


def _time(body: Callable[[], Any]) -> float:
    if not GPU:
        start = time.perf_counter()
        body()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush().sum()
    # The device waits while the host enqueues: a launch costs the host more than a small kernel costs the device.
    torch.cuda._sleep(WAIT_CYCLES)
    begin.record()
    body()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def sample_in_turn(
    bodies: Sequence[Callable[[], Any]], seconds: float = 0.6, most: int = 50
) -> list[list[float]]:
    """Milliseconds of single calls of each body, sorted; device events on a GPU, the clock on a CPU.

    The bodies take turns, so that a chip that changes its clock under load changes it for all alike.
    """
    for body in bodies:
        for _ in range(3 if GPU else 1):
            body()
    if GPU:
        torch.cuda.synchronize()
    rounds: list[list[float]] = []
    spent = 0.0
    while len(rounds) < (5 if GPU else 3) or (spent < seconds * 1e3 * len(bodies) and len(rounds) < most):
        rounds.append([_time(body) for body in bodies])
        spent += sum(rounds[-1])
    return [sorted(times) for times in zip(*rounds, strict=True)]


def sample(body: Callable[[], Any], seconds: float = 0.6, most: int = 50) -> list[float]:
    """Milliseconds of single calls, sorted."""
    return sample_in_turn([body], seconds, most)[0]


@functools.cache
def copy_gb_s() -> float:
    """Read plus write of a 1 GiB (64 MiB on a CPU) copy in this process, GB/s."""
    count = (2**30 if GPU else 2**26) // 4
    source, target = (torch.empty(count, dtype=torch.float32, device=DEVICE) for _ in range(2))
    times = sample(lambda: target.copy_(source))
    return 2 * 4 * count / times[len(times) // 2] / 1e6


def measure(
    benchmark: Any,
    body: Callable[[], Any],
    *,
    op: str,
    provider: str,
    mode: str,
    shape: str,
    dtype: str,
    gate: Callable[[], None] | None = None,
    num_bytes: float | None = None,
    flops: float | None = None,
    bare: Callable[[], Any] | None = None,
) -> None:
    """Check, time and record one provider.

    Args:
        benchmark: pytest-benchmark's fixture.
        body: One call.
        op: Stem of the op.
        provider: Who computes it.
        mode: "forward", "dx", ...
        shape: As in the table.
        dtype: Dtype of the data.
        gate: Raises where the provider's result is wrong at this shape; runs before any timing.
        num_bytes: Bytes that must move; gives GB/s and the share of a copy.
        flops: Floating-point operations; gives TFLOP/s.
        bare: The matmuls alone at this shape, timed in turn with the body.
    """
    if gate is not None:
        gate()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and provider.startswith("triton")
    if benchmark.disabled or interpreted:
        benchmark.pedantic(body, rounds=1, iterations=1)
        return
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    # The peak is the body's own: its memory is read before the bare matmuls run.
    body()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if GPU else None
    times, *others = sample_in_turn([body] if bare is None else [body, bare])
    p10, p50, p90 = (times[int(len(times) * q)] for q in (0.1, 0.5, 0.9))
    row: dict[str, Any] = {
        "op": op, "provider": provider, "mode": mode, "shape": shape, "dtype": dtype,
        "ms_p10": f"{p10:.4f}", "ms_p50": f"{p50:.4f}", "ms_p90": f"{p90:.4f}",
        "peak_mib": "" if peak is None else f"{peak:.1f}", **machine(),
    }  # fmt: skip
    if num_bytes is not None:
        row["gb_s"] = f"{num_bytes / p50 / 1e6:.1f}"
        row["share_of_copy"] = f"{num_bytes / p50 / 1e6 / copy_gb_s():.3f}"
    if flops is not None:
        row["tflop_s"] = f"{flops / p50 / 1e9:.2f}"
    for bare_times in others:
        row["times_bare_matmul"] = f"{p50 / bare_times[len(bare_times) // 2]:.3f}"
    benchmark.extra_info.update({name: row[name] for name in row if name not in machine()})
    benchmark.pedantic(body, rounds=1, iterations=1)
    path = result_file()
    path.parent.mkdir(exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def require_close(actual: Tensor, oracle: Tensor, baseline: Tensor) -> None:
    """The tests' rule: error at most twice that of the baseline plus one unit in the last place."""
    error = (actual.double() - oracle.double()).abs().max().item()
    allowed = (baseline.double() - oracle.double()).abs().max().item()
    allowed = 2 * (allowed + torch.finfo(actual.dtype).eps * oracle.double().abs().max().item())
    if not error <= allowed:
        raise AssertionError(f"gate: error {error:.3e} above {allowed:.3e}")


def require_equal(actual: Tensor, expected: Tensor) -> None:
    """Bitwise."""
    if not torch.equal(actual, expected):
        raise AssertionError(f"gate: {int((actual != expected).sum())} of {actual.numel()} values differ")


def package(name: str) -> Any:
    """An installed peer, or None: its provider is then left out of the run."""
    try:
        return importlib.import_module(name)
    except Exception:  # a peer that is broken on this machine must not stop the others
        return None
