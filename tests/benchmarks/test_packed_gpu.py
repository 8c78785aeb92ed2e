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


class Graph:
    """A graph of the provider that a call names when it is asked; notes every replay."""

    replayed: list[str] = []

    def __init__(self, calls: Any) -> None:
        self.name = calls[0].__defaults__[0]
        if self.name == "uncapturable":
            raise RuntimeError("operation not permitted when stream is capturing")

    def milliseconds(self) -> float:
        self.replayed.append(self.name)
        return 0.5 if self.name == "slow" else 0.1


@pytest.fixture
def packed_gpu(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Layers without codes, a clock that stands still, and results in the test's folder."""
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    module = importlib.import_module("packed_gpu")

    def layer(n: int, k: int, bits: int, dtype: torch.dtype) -> SimpleNamespace:
        return SimpleNamespace(n=n, k=k, bits=bits, dtype=dtype, num_bytes=1)

    class Gate:
        def __init__(self, layer: Any, x: Any) -> None:
            pass

        def check(self, name: str, call: Any) -> None:
            call()
            assert name != "wrong", "wrong: error 1"

    normal = torch.randn
    for name, stand_in in {
        "Layer": layer, "Gate": Gate, "Graph": Graph, "copy_gb_s": lambda: 1.0, "machine": dict,
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
    names = ["cuBLAS", "wrong", "uncapturable", "discquant"]

    def providers(layer: Any, x: Any) -> Any:
        return [(name, 1, [lambda name=name: calls.append(name)]) for name in names]

    monkeypatch.setattr(packed_gpu, "providers", providers)
    bench = importlib.import_module("bench_packed_linear")
    for body, tokens in ((bench.test_decode, packed_gpu.DECODE), (bench.test_prefill, packed_gpu.PREFILL)):
        calls.clear()
        Graph.replayed.clear()
        with pytest.raises(AssertionError, match=r"tokens, wrong: error 1") as found_wrong:
            body(Benchmark(disabled), "8B qkv", 4)
        assert ("uncapturable: no graph" in str(found_wrong.value)) != disabled
        rounds = 1 if disabled else len(tokens)
        assert calls == names * rounds
        replays = 0 if disabled else 1 + packed_gpu.REPLAYS  # the first tells how long they are
        assert Graph.replayed == ["cuBLAS", "discquant"] * replays * rounds
    rows = tmp_path / "rows.csv"
    assert rows.exists() != disabled
    if not disabled:
        with rows.open(newline="") as file:
            found = list(csv.DictReader(file))
        assert len(found) == 2 * (len(packed_gpu.DECODE) + len(packed_gpu.PREFILL))
        assert {row["provider"] for row in found} == {"cuBLAS", "discquant"}


def test_graphs_take_turns(packed_gpu: ModuleType) -> None:
    """A throttled chip hits all alike; long launches sit most rounds out, and their quantiles are of what there is."""
    Graph.replayed.clear()
    graphs = [Graph([lambda name=name: name]) for name in ("a", "slow", "b")]
    times = packed_gpu.times_in_turn(graphs, replays=20)
    assert [len(of) for of in times] == [20, 5, 20]
    assert Graph.replayed == ["a", "slow", "b"] + (["a", "slow", "b"] + ["a", "b"] * 3) * 5
    assert packed_gpu.times_in_turn([]) == []
    assert [packed_gpu.quantile(range(50), share) for share in (0.1, 0.5, 0.9)] == [5, 25, 45]
    assert [packed_gpu.quantile(range(5), share) for share in (0.1, 0.5, 0.9)] == [0, 2, 4]


@pytest.mark.parametrize("spoil", ["nothing", "far row", "NaN", "shape", "512 rows of the library's own"])
def test_gate_looks_at_every_output(repo_root: Path, monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    module = importlib.import_module("packed_gpu")
    weight, x = torch.randn(600, 256).bfloat16(), torch.randn(3, 256).bfloat16()
    gate = module.Gate(SimpleNamespace(dense=lambda: weight, k=256), x)
    y = torch.nn.functional.linear(x, weight)
    if spoil == "far row":
        y[2, 599] += 4
    elif spoil == "NaN":
        y[0, 550] = float("nan")
    elif spoil == "shape":
        y = y[:, :599]
    elif spoil.startswith("512"):
        gate.whole[1, 3] += 4
        y[1, 3] += 4
    if spoil == "nothing":
        gate.check("ours", lambda: y)
    else:
        with pytest.raises(AssertionError, match="ours: "):
            gate.check("ours", lambda: y)


def test_tuning_times_the_ways_in_turn(packed_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for few tokens sits out where it is hopeless; what is wrong ends the tuning."""
    tune = importlib.import_module("tune_packed_linear")
    monkeypatch.setattr(tune, "TOKENS", (64, 1024))
    monkeypatch.setattr(packed_gpu, "SHAPES", dict.fromkeys(tune.SHAPES, (8, 8)))

    def way(name: str, says: str) -> Any:
        def make(layer: Any, x: Any) -> list[Any]:
            return [lambda says=says: says]

        make.__name__ = name
        return make

    for name, says in (("tensor_cores", "a"), ("dequantised", "slow"), ("prefill", "b")):
        monkeypatch.setattr(packed_gpu, name, way(name, says))
    Graph.replayed.clear()
    few, dense, many = tune.measure(4, float("inf"))
    shapes = len(tune.SHAPES)
    assert few == {64: pytest.approx(0.1 * shapes), 1024: float("inf")}
    assert dense == dict.fromkeys((64, 1024), pytest.approx(0.5 * shapes))
    assert many == dict.fromkeys((64, 1024), pytest.approx(0.1 * shapes))
    assert Graph.replayed[:3] == ["a", "slow", "b"]
    with pytest.raises(SystemExit, match="out of time"):
        tune.measure(4, 0.0)
    monkeypatch.setattr(packed_gpu, "prefill", way("wrong", "b"))
    with pytest.raises(AssertionError, match="wrong"):
        tune.measure(4, float("inf"))
