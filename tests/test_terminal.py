# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal are whole at 80 columns: nothing is cut to fit. `evaluate`'s are tested beside it."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from discquant.cli import app
from discquant.cli.plan import _flop


@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-3.1-70b"])
def test_plan(model: str, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    configs = repo_root / "tests" / "planning" / "configs"
    line = ["plan", str(configs / model), "--gpu", "h100", "--host-memory", "4000", "--disk", "4000"]
    done = CliRunner().invoke(app, [*line, "--dataset", "text.txt"], catch_exceptions=False)
    assert "…" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    # Every cell in one line: state formats are of two words.
    assert done.stdout.count("u8 momentum │") == 3
    for heading in ("placement", "device", "host", "disk", "out", "s/step", "fits"):
        assert any(heading in line for line in done.stdout.splitlines() if line.startswith("┃"))


def test_plan_says_whose_figures_and_what_the_time_holds(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    line = ["plan", str(repo_root / "tests" / "planning" / "configs" / "llama-3.1-8b"), "--gpu", "h100"]
    line += [
        "--host-memory", "4000", "--disk", "4000", "--dataset", "text.txt", "--ranks", "2", "--micro-batch", "1",
    ]  # fmt: skip
    done = CliRunner().invoke(app, line, catch_exceptions=False)
    told = " ".join(done.stdout.split())
    assert "device, in and out (moved per step) of each rank, host and disk of all 2" in told
    assert re.search(r"steps, [\d.]+ s of it for gathering the curvature \(assumed", told)
    assert [_flop(number) for number in (3.46e6, 7e9, 2.5e12)] == ["3.5 MFLOP", "7.0 GFLOP", "2.50 TFLOP"]


@pytest.fixture(scope="module")
def quickstart(repo_root: Path) -> ModuleType:
    """The script of `make quickstart` as a module."""
    place = repo_root / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart_removes_its_own_runs_only(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / method for method in quickstart.METHODS]
    for folder in (*runs, tmp_path / "mine"):
        folder.mkdir()
        (folder / "config.json").write_text('{"discquant_run": 1}', encoding="utf-8")
    (runs[0] / "config.json").write_text("{}", encoding="utf-8")  # no run
    (tmp_path / "quickstart.json").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="not empty"):
        quickstart._clear(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(quickstart, "OUT", tmp_path)
    quickstart._clear(tmp_path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "mine", runs[0]]
    quickstart._clear(tmp_path / "new")


def test_quickstart(quickstart: ModuleType) -> None:
    row: dict[str, Any] = {
        "method": "discquant", "kl_mean": 0.0284, "kl_stderr": 0.0012, "top1": 0.912, "exact_match": 0.9648,
        "bits_per_weight": 3.25, "file_bytes": 2_180_000, "seconds": 456.0,
    }  # fmt: skip
    out = io.StringIO()
    quickstart._print([row], Console(file=out, width=80))
    shown = out.getvalue()
    for words in (
        "KL to original",
        "top-1",
        "exact",
        "answers",
        "bits per",
        "weight",
        "file",
        "MB",
        "seconds",
    ):
        assert words in shown
    assert "0.0284 ± 0.0012" in shown and "…" not in shown
