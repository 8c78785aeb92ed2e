# SPDX-License-Identifier: Apache-2.0
"""The target table of packed inference on rows made by hand: met, missed, and absent are told apart."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def targets(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "packed_targets", repo_root / "benchmarks" / "packed_targets.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def cpu_row(provider: str, bits: int | str, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "op": "packed_linear", "provider": provider, "shape": "8B o", "tokens": 1, "bits": bits, "threads": 1,
        "ms_p25": ms, "gweights_s": 16.8 / ms, "share_of_roof": 0.9, "times_torch_int4": 2.0, **more,
    }  # fmt: skip


def test_reading_bounds_four_tokens(targets: ModuleType) -> None:
    """The faster of the two reads, on the shape where it gains least."""
    rows = [
        {**cpu_row(provider, 4, ms, tokens=4, shape=shape), "ms_turns": ""}
        for shape, times in (("8B o", (1.0, 0.8, 2.4)), ("8B down", (2.0, 3.0, 5.0)))
        for provider, ms in zip(("plain read", "plain read, prefetched", "torch int4"), times, strict=True)
    ]
    text = [{key: str(value) for key, value in row.items()} for row in rows]
    assert targets.reading(text, 4) == {"1": 2.5}
    assert targets.reading(text, 16) == {}


def test_streamed_read_and_what_one_token_reaches_of_it(targets: ModuleType) -> None:
    """Its largest gain over the plain read; of it the least share of each mode, 4 bits and one token alone."""
    rows = [
        {**cpu_row(provider, bits, ms, shape=shape, tokens=tokens), "ms_turns": ""}
        for shape, tokens, times in (
            ("8B o", 1, (1.0, 0.9, 0.6, 0.8, 1.2, 0.3)),
            ("8B down", 1, (2.0, 3.0, 1.0, 1.1, 1.6, 0.3)),
            ("70B o", 1, (2.0, 3.0, 0.1, 1.1, 1.6, 0.3)),
            ("8B qkv", 4, (2.0, 3.0, 0.1, 1.1, 1.6, 0.3)),
        )
        for (provider, bits), ms in zip(
            (
                ("plain read", ""), ("plain read, prefetched", ""), (targets.IN_STREAMS, ""),
                ("discquant a8", 4), ("discquant a15", 4), ("discquant a8", 3),
            ),
            times,
            strict=True,
        )
    ]  # fmt: skip
    text = [{key: str(value) for key, value in row.items()} for row in rows]
    assert targets.streamed(text) == {"1": {"read": 2.0, "a8": 0.6 / 0.8, "a15": 0.6 / 1.2}}
    assert targets.streamed([row for row in text if row["provider"] != targets.IN_STREAMS]) == {}


def test_cpu_targets(targets: ModuleType, tmp_path: Path) -> None:
    rows = [
        cpu_row("discquant a8", 4, 1.0), cpu_row("discquant a8", 3, 0.8),
        cpu_row("discquant a15", 4, 1.2, share_of_roof=0.7), cpu_row("onnxruntime 1 level 4", 4, 1.1),
        cpu_row("ggml Q3_K (CPU)", 3, 0.1),
    ]  # fmt: skip
    text = [verdict.text() for verdict in targets.verdicts(write(tmp_path / "cpu.csv", rows))]
    assert "met     a8, 1 thread: M=1, 4 bit, share of plain read: 0.90 (8B o), >= 0.85" in text
    assert "met     a8, 1 thread: M=1, weights/s of 3 bit over 4 bit: 1.25 (8B o), >= 1.2" in text
    assert "MISSED  a15, 1 thread: M=1, 4 bit, share of plain read: 0.70 (8B o), >= 0.85" in text
    assert (
        "met     a8, 1 thread: M=1, 4 bit, times onnxruntime: 1.10 (8B o, onnxruntime 1 level 4), >= 1"
        in text
    )
    assert any(line.startswith("MISSED  a15, 1 thread: M=1, 4 bit, times onnxruntime: 0.92") for line in text)
    # A 3-bit rival is no rival of 4 bits, and rows that are not there are not met.
    assert "not measured  a8, 1 thread: M=1, 4 bit, times ggml: >= 1" in text
    assert "not measured  a8, 1 thread: M=16, 4 bit, times torch int4: >= 3" in text


def test_ratios_are_taken_turn_by_turn(targets: ModuleType, tmp_path: Path) -> None:
    """A machine that slows down for half of the turns changes neither ratio."""
    turns = {"discquant a8": "1 1 2 2 2", "onnxruntime 1 level 4": "1.5 1.5 3 3 2.9"}
    rows = [cpu_row(name, 4, 1.0, ms_turns=ms) for name, ms in turns.items()]
    rows.append(cpu_row("discquant a8", 3, 1.0, ms_turns="0.8 0.8 1.6 1.6 1.0"))
    text = [verdict.text() for verdict in targets.verdicts(write(tmp_path / "cpu.csv", rows))]
    assert any("times onnxruntime: 1.50" in line for line in text)
    assert any("3 bit over 4 bit: 1.25" in line for line in text)


def gpu_row(provider: str, shape: str, bits: int, ms: float, bare: float | str = "") -> dict[str, Any]:
    return {
        "op": "packed_linear", "provider": provider, "shape": shape, "mode": f"{bits} bit", "ms_p50": ms,
        "share_of_copy": 0.5, "times_bare_matmul": bare,
    }  # fmt: skip


def test_gpu_targets(targets: ModuleType, tmp_path: Path) -> None:
    rows = [
        gpu_row("cuBLAS", "8B gate_up M=1", 4, 3.0), gpu_row("discquant", "8B gate_up M=1", 4, 1.0, 0.33),
        gpu_row("discquant", "8B gate_up M=1", 3, 0.75, 0.25), gpu_row("gemlite", "8B gate_up M=1", 4, 0.9),
        gpu_row("discquant", "8B o M=2048", 4, 1.0, 1.05),
    ]  # fmt: skip
    text = [verdict.text() for verdict in targets.verdicts(write(tmp_path / "gpu.csv", rows))]
    assert "MISSED  decode, 8B gate_up: share of a copy: 0.50 (M=1), >= 0.6" in text
    assert "not measured  decode, 70B gate_up: share of a copy: >= 0.75" in text
    assert any(
        line.startswith("met     decode, time of 3 bit over 4 bit") and "0.75" in line for line in text
    )
    assert any(
        line.startswith("MISSED  decode, times the fastest baseline") and "gemlite" in line for line in text
    )
    assert any(line.startswith("met     prefill, M=2048 on: times cuBLAS bf16: 0.95 (8B o") for line in text)
    assert any(line.startswith("not measured  prefill, M=256 on") for line in text)
