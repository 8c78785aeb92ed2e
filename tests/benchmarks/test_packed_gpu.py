# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark of packed_linear with stand-ins for the GPU: what it times, checks and writes."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def packed_gpu(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Layers without codes, a clock that stands still, and results in the test's folder."""
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    module = importlib.import_module("packed_gpu")

    def layer(n: int, k: int, bits: int, dtype: torch.dtype) -> SimpleNamespace:
        return SimpleNamespace(n=n, k=k, bits=bits, dtype=dtype, num_bytes=1)

    def check(name: str, layer: Any, x: Any, call: Any) -> None:
        call()
        assert name != "wrong", "wrong: error 1"

    normal = torch.randn
    for name, stand_in in {
        "Layer": layer, "check": check, "copy_gb_s": lambda: 1.0, "machine": dict,
        "result_file": lambda: tmp_path / "rows.csv",
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(torch, "randn", lambda *sizes, device: normal(*sizes))
    return module


class Benchmark:
    """pytest-benchmark's fixture, as far as a single call goes."""

    def __init__(self, disabled: bool) -> None:
        self.disabled = disabled

    def pedantic(
        self, target: Any, args: Any = (), kwargs: Any = None, rounds: int = 1, iterations: int = 1
    ) -> None:
        target(*args, **(kwargs or {}))


@pytest.mark.parametrize("disabled", [True, False])
def test_disabled_benchmarks_check_and_record_nothing(
    packed_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    """A dozen test processes share the GPU then: times would be noise, and a row is for good."""
    calls: list[str] = []
    timed: list[int] = []
    names = ["cuBLAS", "wrong", "discquant"]

    def providers(layer: Any, x: Any) -> Any:
        return [(name, 1, [lambda name=name: calls.append(name)]) for name in names]

    def times(calls: list[Any]) -> list[float]:
        timed.append(len(calls))
        return [1.0] * 50

    monkeypatch.setattr(packed_gpu, "providers", providers)
    monkeypatch.setattr(packed_gpu, "times", times)
    bench = importlib.import_module("bench_packed_linear")
    for body, tokens in ((bench.test_decode, packed_gpu.DECODE), (bench.test_prefill, packed_gpu.PREFILL)):
        calls.clear()
        timed.clear()
        with pytest.raises(AssertionError, match=r"tokens, wrong: error 1"):
            body(Benchmark(disabled), "8B qkv", 4)
        rounds = 1 if disabled else len(tokens)
        assert calls == names * rounds
        assert len(timed) == (0 if disabled else 2 * rounds)
    rows = tmp_path / "rows.csv"
    assert rows.exists() != disabled
    if not disabled:
        with rows.open(newline="") as file:
            found = list(csv.DictReader(file))
        assert len(found) == 2 * (len(packed_gpu.DECODE) + len(packed_gpu.PREFILL))
        assert {row["provider"] for row in found} == {"cuBLAS", "discquant"}
