# SPDX-License-Identifier: Apache-2.0
"""Format, lint and strict types, as tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "--strict", "discquant"]],
    ids=["ruff-check", "ruff-format", "mypy-strict"],
)
def test_clean(command: list[str], repo_root: Path) -> None:
    pytest.importorskip(command[0])
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=repo_root)
    assert done.returncode == 0, done.stdout + done.stderr
