# SPDX-License-Identifier: Apache-2.0
"""`make gpu` without a GPU: the plan, the limits, the table of targets, and tuning end to end with a fake clock."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load(repo_root: Path, stem: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/, loaded by its path."""
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"script_{stem}", repo_root / "benchmarks" / f"{stem}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_gpu(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = _load(repo_root, "run_gpu", monkeypatch)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    return module


def test_a_slow_step_is_cut_and_the_others_run(run_gpu: ModuleType) -> None:
    """Past its limit a command is ended with its children; output so far is kept, and the next command runs."""

    def shell(code: str, log: str) -> Any:
        return run_gpu.Command(log, ["sh", "-c", code])

    slow, quick, wrong = (
        shell("echo began; sleep 300", "slow"),
        shell("echo $WORD", "quick"),
        shell("exit 3", "wrong"),
    )
    quick = quick._replace(environment=(("WORD", "fine"),))
    start = time.monotonic()
    together = run_gpu.execute(run_gpu.Step("s", 3, [slow, quick, wrong], True), 100)
    assert together == [("slow", 124), ("quick", 0), ("wrong", 3)]
    assert time.monotonic() - start < 200
    assert (run_gpu.LOGS / "slow.log").read_text() == "began\n"
    assert (run_gpu.LOGS / "quick.log").read_text() == "fine\n"
    # In turn: the first has a limit of its own and leaves time for the others.
    in_turn = run_gpu.execute(run_gpu.Step("s", 100, [slow._replace(seconds=2), wrong, quick]), 100)
    assert in_turn == [("slow", 124), ("wrong", 3), ("quick", 0)]
    # A budget that is spent runs nothing and says so.
    assert run_gpu.execute(run_gpu.Step("s", 30, [quick]), 0.5) == [("quick", 124)]


def test_plan(run_gpu: ModuleType, repo_root: Path) -> None:
    """Limits fit the budget of nine minutes, every benchmark of the solver's ops is in it, sets are expressions."""
    assert sum(run_gpu.BENCHES.values()) <= 9 * 60
    for stem in ("soft_weight", "soft_linear", "projected_step", "linear_kl", "hadamard", "solver_step"):
        assert stem in run_gpu.BENCHES
        assert (repo_root / "benchmarks" / f"bench_{stem}.py").exists()
    parts = run_gpu.shards([f"t{i}" for i in range(7)] + ["t_gpu"], 3)
    assert [len(part) for part in parts] == [3, 3, 2]
    assert parts[0][0] == "t_gpu"
    assert run_gpu.shards(["only"], 4) == [["only"]]
    for path in (*run_gpu.ELSEWHERE, run_gpu.SANITIZERS.partition("::")[0]):
        assert (repo_root / path).exists()


def test_unknown_devices_are_tuned_before_the_package_can_be_imported(
    run_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fresh machine the process that plans began before the package was installed."""
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 9))
    monkeypatch.setitem(sys.modules, "discquant", None)  # an import of it fails
    options = argparse.Namespace(dry_run=False, tune=[])
    (step,) = run_gpu._tune(options)
    assert step.name == "tune_packed_linear" and step.seconds > run_gpu.TABLES["packed_linear"]
    table = json.loads(run_gpu.PACKED_TABLE.read_text())
    known = run_gpu.LOGS.parent / "table.json"
    monkeypatch.setattr(run_gpu, "PACKED_TABLE", known)
    for bits in (["3"], ["3", "4"]):  # cut off after the first width it is tuned again
        table["devices"]["sm_99"] = {**table["devices"]["default"], "measured": {"bits": bits}}
        known.write_text(json.dumps(table))
        assert bool(list(run_gpu._tune(options))) == (len(bits) == 1)
    for named in (
        ["packed_linear"],
        ["soft_linear"],
        list(run_gpu.TABLES),
    ):  # a known one only where it is named
        options.tune = named
        assert [step.name for step in run_gpu._tune(options)] == [f"tune_{name}" for name in named]
        assert all((run_gpu.HERE / f"tune_{name}.py").exists() for name in named)


def test_targets_are_measured_on_tested_and_tuned_kernels(
    run_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call: a table at its default would let nothing choose the kernel for many tokens."""
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 9))
    planned: list[Any] = []
    real = run_gpu.steps

    def steps(options: Any, wanted: Any, left: Any) -> Any:
        options.dry_run = False
        planned.extend(real(options, wanted))
        return ()

    monkeypatch.setattr(run_gpu, "steps", steps)
    assert run_gpu.main(["--dry-run", "--set", "targets"]) == 0
    names = [step.name for step in planned]
    assert names == ["build", "decode", "packed-tests", "tune_packed_linear", "benchmarks", "targets"]
    # The newest kernels before what was measured before; no file that would have nothing to run.
    logs = [command.log for command in planned[4].commands]
    assert logs.index("bench_packed_linear") < logs.index("bench_soft_linear")
    assert not {f"bench_{stem}" for stem in run_gpu.UNASKED["targets"]} & set(logs)
    tests = planned[2]
    assert tests.together and tests.seconds <= 120
    named = {
        Path(part).name
        for command in tests.commands
        for part in command.arguments
        if part.startswith("tests/")
    }
    assert named == {path.name for path in (run_gpu.ROOT / "tests" / "packed").glob("test_gpu_*.py")}
    assert all(any(part.startswith("tests/") for part in command.arguments) for command in tests.commands)


def test_usual_steps_and_tables(run_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(
        run_gpu, "steps", lambda options, wanted, left: seen.append((options.tune, list(wanted))) or ()
    )
    for arguments in ([], ["--tune"], ["--tune", "packed_linear", "--steps", "tune"]):
        assert run_gpu.main(["--dry-run", *arguments]) == 0
    (none, usual), (both, _), (one, alone) = seen
    assert (none, both, one, alone) == ([], list(run_gpu.TABLES), ["packed_linear"], ["tune"])
    assert "packed-tests" not in usual and len(usual) == len(run_gpu.STEPS) - 1  # they are among the tests
    with pytest.raises(SystemExit):
        run_gpu.main(["--dry-run", "--tune", "hadamard"])


COLLECT = """
import sys, torch
torch.cuda.is_available = lambda: True
sys.path[:] = [path for path in sys.path if path]
import pytest
for stem in sys.argv[2:]:
    pytest.main(["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "--collect-only", "-q",
                 f"benchmarks/bench_{stem}.py", "-k", sys.argv[1]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["quick", "targets", "default"])
def test_rows_of_sets(run_gpu: ModuleType, chosen: str) -> None:
    """As on a GPU, which is not asked: a file without rows would count as failed."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, run_gpu.SETS[chosen], *run_gpu.BENCHES],
        capture_output=True, text=True, cwd=run_gpu.ROOT, timeout=400,
    )  # fmt: skip
    rows = [line.removeprefix("benchmarks/bench_") for line in done.stdout.splitlines() if "::" in line]
    asked = run_gpu.BENCHES.keys() - run_gpu.UNASKED.get(chosen, ())
    assert asked <= {row.partition(".")[0] for row in rows}, done.stderr[-2000:]
    if chosen != "targets":
        return

    def of(stem: str) -> list[str]:
        return [row for row in rows if row.startswith(stem + ".")]

    assert [row.partition("::")[2] for row in of("solver_step")] == [
        "test_elementwise[triton]", "test_solver_step[triton-16384]",
    ]  # fmt: skip
    assert [row.partition("::")[2] for row in of("linear_kl")] == [
        "test_linear_kl[triton-(16384, 4096, 128256)]"
    ]
    linear = of("soft_linear")
    assert len(linear) == 12 and sum("materialise-forward" in row for row in linear) == 4
    assert not any("materialise-d" in row or "dfrac" in row or "512" in row for row in linear)
    assert len(of("packed_linear")) == 16 and len(of("projected_step")) == 6


@pytest.mark.parametrize("chosen", ["quick", "targets", "default", "all"])
def test_decode_has_a_process_before_all_others(run_gpu: ModuleType, chosen: str) -> None:
    """A kernel that never ran on a device must not take the rows of one that did with it."""
    options = argparse.Namespace(
        dry_run=False, tune=[], benches=["packed_linear", "linear_kl"], set=chosen, seconds=500
    )
    decode, benchmarks = run_gpu.steps(options, ["decode", "benchmarks"])
    (first,) = decode.commands
    assert decode.name == "decode" and "test_decode" in first.arguments[first.arguments.index("-k") + 1]
    assert [command.log for command in benchmarks.commands] == ["bench_linear_kl", "bench_packed_linear"]
    deselected = [command for command in benchmarks.commands if "--deselect" in command.arguments]
    assert deselected == benchmarks.commands[1:]
    (alone,) = run_gpu.steps(options, ["benchmarks"])
    assert not any("--deselect" in command.arguments for command in alone.commands)


@pytest.mark.parametrize("stems", [["linear_kl"], ["linear_kl", "hadamard"], ["packed_linear"], []])
def test_benchmarks_are_compiled_beside_the_tests(
    run_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, stems: list[str]
) -> None:
    """Each such command names its files: without one pytest would take every test of the project."""
    monkeypatch.setattr(run_gpu, "_collected", lambda dry: ["tests/a.py::test_a"])
    options = argparse.Namespace(dry_run=False, tune=[], benches=stems, set="default", seconds=500)
    tests, _ = run_gpu.steps(options, ["tests", "benchmarks"])
    warm = [command.arguments for command in tests.commands if command.log.startswith("warm")]
    named = [part for arguments in warm for part in arguments if part.startswith("benchmarks/")]
    expected = set(stems or run_gpu.BENCHES) - {"packed_linear"}  # compiles nothing then
    assert sorted(named) == sorted(f"benchmarks/bench_{stem}.py" for stem in expected)
    assert all(any(part.startswith("benchmarks/") for part in arguments) for arguments in warm)


def test_rows_of_an_earlier_day_are_told(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = _load(repo_root, "targets", monkeypatch)
    days = {"a": "2026-11-27", "b": "2026-11-28", "c": "2026-11-29"}
    rows = [{"op": op, "provider": "triton", "date": day} for op, day in days.items()]
    rows.append({"op": "b", "provider": "reference", "date": "2026-11-29"})
    assert targets.older_rows(rows) == {"a": "2026-11-27", "b": "2026-11-28"}


def test_sanitizers_give_way(run_gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(dry_run=False, tune=[], benches=[], set="default")
    assert [step.name for step in run_gpu.steps(options, ["sanitizers"])] == ["sanitizers"]
    assert not list(run_gpu.steps(options, ["sanitizers"], lambda: 100.0))
    assert "--steps sanitizers" in capsys.readouterr().out


def test_what_a_borrowed_machine_gives_back(run_gpu: ModuleType, tmp_path: Path) -> None:
    run_gpu.LOGS.mkdir(parents=True)
    (run_gpu.LOGS / "a.log").write_text("said")
    for _ in range(2):
        found = run_gpu.archive(tmp_path / "out")
    with tarfile.open(found) as file:
        names = file.getnames()
    assert {"logs/a.log", "discquant/ops/packed_linear_table.json", "benchmarks/results"} <= set(names)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu.tgz"]


def test_without_a_gpu_it_says_so(run_gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    assert run_gpu.main([]) == 1
    assert "no CUDA device is visible" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_gpu.main(["--steps", "fly"])


@pytest.mark.slow
def test_dry_run(repo_root: Path, tmp_path: Path) -> None:
    """Build command, test collection, one benchmark's bodies, targets: the whole road on any machine."""
    done = subprocess.run(
        [sys.executable, str(repo_root / "benchmarks" / "run_gpu.py"), "--dry-run", "--seconds", "400",
         "--benches", "solver_step", "--steps", "build,benchmarks,targets"],
        capture_output=True, text=True, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for line in (
        "run_gpu: build: ok",
        "run_gpu: benchmarks: ok",
        "run_gpu: targets: ok",
        "--no-build-isolation --no-deps",
    ):
        assert line in done.stdout


ROW = {
    "op": "", "provider": "triton", "mode": "", "shape": "", "dtype": "bfloat16", "ms_p50": "", "peak_mib": "",
    "gb_s": "", "share_of_copy": "", "times_bare_matmul": "", "device": "Some GPU", "date": "2026-01-01", "commit": "0",
}  # fmt: skip


def _row(op: str, **fields: str) -> dict[str, str]:
    return {**ROW, "op": op, **fields}


def test_targets(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers worked out by hand; the last row of a kind counts; without rows nothing is claimed."""
    targets = _load(repo_root, "targets", monkeypatch)
    assert {verdict.text()[:22] for verdict in targets.verdicts([])} == {"not measured on a GPU "}
    weights = 200_000_000
    # 3.2 ms at 1000 GB/s of copy: 3.2e9 bytes, 16 per weight, and 4 that the matmul writes.
    step = {"shape": f"16384 tokens, {weights} weights", "mode": "lion", "ms_p50": "40"}
    apart = {
        "shape": f"{weights} weights",
        "mode": "lion, elementwise",
        "gb_s": "500",
        "share_of_copy": "0.5",
    }
    rows = [
        _row("solver_step", **step, times_bare_matmul="9"),
        _row("solver_step", **step, times_bare_matmul=repr(40 / 36)),
        _row("solver_step", **apart, ms_p50="40"),
        _row("solver_step", **apart, ms_p50="3.2"),
        _row(
            "soft_linear",
            provider="triton-fused-deep",
            mode="forward",
            shape="4096x8x8",
            times_bare_matmul="1.1",
        ),
        _row(
            "soft_linear",
            provider="triton-fused-wide",
            mode="forward",
            shape="4096x8x8",
            times_bare_matmul="1.3",
        ),
        _row(
            "soft_linear",
            provider="triton-fused-deep",
            mode="dx",
            shape="16384x8x8",
            times_bare_matmul="1.25",
        ),
        _row("soft_linear", provider="triton-auto", mode="dx", shape="16384x8x8", times_bare_matmul="1.02"),
        _row("soft_linear", provider="triton-auto", mode="dx", shape="512x8x8", times_bare_matmul="5"),
        _row("projected_step", mode="lion", shape="8x8", share_of_copy="0.9"),
        _row("projected_step", mode="adamw", shape="8x8", share_of_copy="0.8"),
        _row(
            "linear_kl", mode="loss+grad", shape="16384x4096x128256", peak_mib="1200", times_bare_matmul="1.2"
        ),
    ]
    lines = [verdict.text() for verdict in targets.verdicts(rows)]
    found = {line.split(": ")[0].split(None, 1)[1].split(",")[0]: line for line in lines}
    assert targets.effective_traffic(rows[3]) == pytest.approx(20)
    assert targets.effective_traffic(rows[1]) is None
    assert lines[0].startswith("met") and "20, target <= 24" in lines[0]
    assert lines[1].startswith("MISSED") and "1.11, target <= 1.1" in lines[1]
    assert found["soft_linear fused forward"].startswith("met")
    assert found["soft_linear fused dx"].startswith("MISSED")
    assert found["soft_linear auto dx where fused falls short"].startswith("met")
    assert found["projected_step_"].startswith("MISSED") and "adamw" in found["projected_step_"]
    assert lines[-2].startswith("met") and "1.12e+09" in lines[-2]
    assert lines[-1].startswith("MISSED")


def test_bound_of_a_weight_that_passes_through_memory(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 ms of bare matmul; 200 M weights of 3.5 bytes at 1000 GB/s take 0.7 ms more. Other tokens do not count."""
    targets = _load(repo_root, "targets", monkeypatch)
    linear = {"provider": "triton-materialise", "mode": "forward"}
    rows = [
        _row("soft_weight", mode="forward", shape="8x8", gb_s="500", share_of_copy="0.5"),
        _row("soft_linear", **linear, shape="4096x20000x10000", ms_p50="1.5", times_bare_matmul="1.5"),
        _row("soft_linear", **linear, shape="4096x2000x10000", ms_p50="1.5", times_bare_matmul="1.5"),
        _row("soft_linear", **linear, shape="16384x20000x10000", ms_p50="0.1", times_bare_matmul="1"),
    ]
    assert targets.materialised_bound(rows, 4096) == pytest.approx(1 / 1.7)
    assert targets.materialised_bound(rows[1:], 4096) is None
    assert targets.materialised_bound([], 4096) is None


def test_tuning_writes_a_table_that_the_op_reads(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake clock: fused wins below 2048 tokens on the large weight only; the file then says so, others kept."""
    tune = _load(repo_root, "tune_soft_linear", monkeypatch)
    from discquant.ops import soft_linear_table as tables

    large, small = 28672 * 4096, 4096 * 4096
    clock: list[float] = []
    monkeypatch.setattr(tune, "sample", lambda body, seconds, most: [clock.append(0.0) or body()])

    def fake(dry: bool) -> Any:
        for tokens in (4096, 512):
            for weights in (large, small):
                for stage in tables.STAGES:
                    for choice in (("materialise", "compact"), ("fused", "compact"), ("fused", "deep")):
                        fused = {"compact": 1.2, "deep": 0.9 if tokens < 2048 and weights == large else 0.99}
                        value = 1.0 if choice[0] == "materialise" else fused[choice[1]]
                        yield stage, weights, tokens, choice, lambda value=value: value

    monkeypatch.setattr(tune, "_measurements", fake)
    entry = tune.device_entry(tune.measure(time.monotonic() + 100, False))
    assert len(clock) == 2 * 2 * 4 * 3
    path = tmp_path / "table.json"
    path.write_text(tables.PATH.read_text())
    before = tables.parse(json.loads(path.read_text()))
    tune.write(path, "sm_103", entry)
    table = tables.parse(json.loads(path.read_text()))
    assert {key: table[key] for key in before} == before
    assert table["sm_103"].measured["device"]
    rules = table[tables.device_key((10, 3), table)].rules["forward"]
    assert tables.pick(rules, 128, large) == ("fused", "deep")
    assert tables.pick(rules, 128, small) == ("materialise", "deep")
    assert tables.pick(rules, 4095, large) == ("fused", "deep")
    assert tables.pick(rules, 4096, large) == tables.pick(rules, 10**6, small) == ("materialise", "deep")
    assert not list(tmp_path.glob("*.partial"))


def test_tuning_drops_what_the_time_did_not_reach(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = _load(repo_root, "tune_soft_linear", monkeypatch)
    times = iter([0.0] * 3 + [100.0] * 9)
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(tune, "sample", lambda body, seconds, most: [1.0])
    rows = [("dx", 10, tokens, ("fused", "compact"), None) for tokens in (4096, 4096, 512, 512)]
    monkeypatch.setattr(tune, "_measurements", lambda dry: iter(rows))
    assert tune.measure(50.0, False) == {"dx": {10: {4096: {("fused", "compact"): 1.0}}}}
    with pytest.raises(ValueError, match="no number of tokens was measured for every shape"):
        tune.rules({10: {}})


@pytest.mark.slow
def test_tuning_end_to_end_on_this_machine(repo_root: Path, tmp_path: Path) -> None:
    """The command itself, kernels interpreted where there is no GPU, on small shapes."""
    done = subprocess.run(
        [sys.executable, str(repo_root / "benchmarks" / "tune_soft_linear.py"), "--dry-run", "--seconds", "300"],
        capture_output=True, text=True, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    entry = json.loads(done.stdout[done.stdout.index("{") :])
    from discquant.ops import soft_linear_table as tables

    (device,) = entry["devices"].values()
    assert set(device) == {"measured", *tables.STAGES}
    assert device["dx"][-1][:2] == [None, None]
