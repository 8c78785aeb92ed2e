# SPDX-License-Identifier: Apache-2.0
"""Held-out text in which no position could be measured: a dash in every table, and no error at a run's end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from discquant.cli import options

Run = Callable[..., tuple[int, str, str]]


def test_quantize_prints_a_dash(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"kl_mean": None, "top1": 0.5, "perplexity_ratio": None}
    summary = {"held_out": {"tokens": 1}, "methods": {"rtn": found}, "sizes": {"bits_per_weight": 3.25}}
    monkeypatch.setattr(options, "run_pipeline", lambda *given, **named: summary)
    status, output, error = run("quantize", "model", str(tmp_path / "out"))
    assert status == 0, error
    (row,) = (line for line in output.splitlines() if "rtn" in line)
    assert row.count(" - ") == 2 and "0.5000" in row


def test_refine_prints_a_dash(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"kl_before": None, "kl_after": None, "improved": False}
    found |= {"codes_outside_neighbours": 0, "codes": 1}
    monkeypatch.setattr(options, "run_pipeline", lambda *given, **named: {"refine": found})
    status, output, error = run("refine", "file", str(tmp_path / "out"), "--original", "model")
    assert status == 0, error
    assert "held-out text: - before, - after; not better" in output
