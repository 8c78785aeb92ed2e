# SPDX-License-Identifier: Apache-2.0
"""The README: its Python example runs in a fresh process without Triton and _C, its tables are what the results say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name == "discquant._C":
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.slow
def test_example_runs(repo_root: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    text = (repo_root / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    example = example.replace("examples/tiny_llama", str(tiny_llama_dir))
    script = tmp_path / "example.py"
    script.write_text(f"{BLOCK}\n{example}\nassert len(layers) == 28\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_tables_are_current(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(repo_root / "benchmarks" / "tables.py"), "--check"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, "run python benchmarks/tables.py"
