# SPDX-License-Identifier: Apache-2.0
"""The command line under torchrun: a killed rank stops the job, another number of ranks resumes it, same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., list[str]]
SAME = ("codes.safetensors", "calibration.safetensors", "config.json", "start_codes.safetensors")


def _hashes(out: Path) -> dict[str, str]:
    exported = sorted((out / "compressed-tensors").rglob("*"))
    files = [*(out / name for name in SAME), *(path for path in exported if path.is_file())]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _torchrun(arguments: list[str], ranks: int) -> list[str]:
    assert arguments[1:3] == ["-m", "discquant"]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "discquant", *arguments[3:], "--baselines", "none",
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_ranks_and_other_counts_end_in_the_same_bytes(
    command: Command, tmp_path: Path, warm_start: Any
) -> None:
    """Two ranks, one killed after the first checkpoint; then one process to the end; and one process alone."""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    job = subprocess.Popen(
        _torchrun(command(shared), 2), cwd=tmp_path, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 900
        while not (shared / "checkpoints" / "step-0000003.json").exists():
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = _children(job.pid)
        assert len(workers) == 2
        os.kill(workers[-1], signal.SIGKILL)
        output, _ = job.communicate(timeout=300)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert job.returncode != 0, output
    assert not any(_alive(pid) for pid in workers)
    assert not (shared / "codes.safetensors").exists()
    for out in (shared, alone):
        done = warm_start.run([*command(out), "--baselines", "none"], tmp_path)
        assert done.returncode == 0, done.stderr
    assert _hashes(shared) == _hashes(alone)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
