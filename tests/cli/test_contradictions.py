# SPDX-License-Identifier: Apache-2.0
"""Options that contradict each other are refused, and options without effect are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from discquant.cli import app

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("command", ["quantize", "plan"])
@pytest.mark.parametrize(
    "given, words",
    [
        (("--bits", "2"), "leave --bits out"),
        (("--bits", "4", "--group-size", "64"), "leave --group-size out"),
        (("--bits", "2", "--sym"), "leave --bits, --sym out"),
    ],
)
def test_a_kind_has_its_own_shape(
    command: str, given: tuple[str, ...], words: str, run: Run, model: Path, tmp_path: Path
) -> None:
    places = (str(model), str(tmp_path / "out"))[: 2 if command == "quantize" else 1]
    code, _, error = run(command, *places, "--kind", "q4_k", *given)
    assert code == 2 and "--kind q4_k has 4 bits, groups of 32 and is asymmetric" in error and words in error
    assert not (tmp_path / "out").exists()


def test_what_a_kind_has_anyway_may_be_said(run: Run, model: Path) -> None:
    shape = ("--kind", "q4_k", "--bits", "4", "--group-size", "32", "--asym")
    code, _, error = run("plan", str(model), "--seqlen", "32", "--format", "none", *shape)
    assert code == 0 and "--kind" not in error


def test_solver_options_of_other_methods_are_named(run: Run, model: Path) -> None:
    line = ("plan", str(model), "--seqlen", "32", "--iters", "8", "--batch-size", "4")
    code, _, error = run(*line, "--method", "rtn", "--preset", "paper")
    assert code == 0 and "rtn takes no solver steps; without effect: --preset, --iters" in error
    assert "without effect" not in run(*line)[2]


@pytest.mark.parametrize("command", sorted(c.name or c.callback.__name__ for c in app.registered_commands))  # type: ignore[union-attr]
def test_help_is_whole_at_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = CliRunner().invoke(app, [command, "--help"], catch_exceptions=False).stdout
    assert "…" not in told and max(map(len, told.splitlines())) <= 80
