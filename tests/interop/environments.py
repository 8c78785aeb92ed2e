# SPDX-License-Identifier: Apache-2.0
"""One virtual environment per tool under .venvs/, built from requirements/<tool>.txt; a failure becomes a message."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAMP = "interop-stamp"
TOOLS = tuple(sorted(path.stem for path in (HERE / "requirements").glob("*.txt")))
# What a tool's build needs: gptqmodel without its CUDA extension, llama.cpp with one compiler at a time so that
# the machine stays usable, and neither with parts that nothing here uses.
BUILD_ENVIRONMENT = {
    "BUILD_CUDA_EXT": "0",
    "CMAKE_ARGS": "-DLLAVA_BUILD=OFF",
    "CMAKE_BUILD_PARALLEL_LEVEL": "1",
}
# vLLM's CPU build brings these for another torch; with the pinned one they fail on import.
REMOVE = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
NICE = 19
# transformers with compressed-tensors, gguf and ONNX Runtime are among the project's own packages.
PROJECT = "project"


class EnvironmentFailedError(RuntimeError):
    """A tool did not install; the message is the last line of its installer."""


def folder(tool: str) -> Path:
    """Where the tool's environment lies."""
    return ROOT / ".venvs" / tool


def python(tool: str) -> Path:
    """Its interpreter."""
    return Path(sys.executable) if tool == PROJECT else folder(tool) / "bin" / "python"


def requirements(tool: str) -> Path:
    """Its pinned requirements."""
    return ROOT / "constraints.txt" if tool == PROJECT else HERE / "requirements" / f"{tool}.txt"


def is_built(tool: str) -> bool:
    """Whether the environment was completed from the present requirements."""
    if tool == PROJECT:
        return True
    stamp = folder(tool) / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == _digest(tool)


def build(tool: str, logs: Path, limit: float) -> None:
    """Make the environment unless it is there.

    Args:
        tool: Name of a requirements file.
        logs: Folder for the installer's output.
        limit: Seconds.

    Raises:
        EnvironmentFailedError: The installer failed or took too long.
    """
    if is_built(tool):
        return
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{tool}.log"
    if not python(tool).exists():
        subprocess.run([sys.executable, "-m", "venv", folder(tool)], check=True)
    steps = [["install", "-q", "--no-compile", "-r", str(requirements(tool))]]
    if tool in REMOVE:
        steps.append(["uninstall", "-q", "-y", *REMOVE[tool]])
    with log.open("w", encoding="utf-8") as handle:
        for step in steps:
            try:
                done = subprocess.run(
                    ["nice", "-n", str(NICE), python(tool), "-m", "pip", *step],
                    stdout=handle,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **BUILD_ENVIRONMENT},
                    timeout=limit,
                    check=False,
                )
            except subprocess.TimeoutExpired as late:
                raise EnvironmentFailedError(f"pip was stopped after {limit:.0f} s") from late
            if done.returncode:
                raise EnvironmentFailedError(last_error(log))
    (folder(tool) / STAMP).write_text(_digest(tool), encoding="utf-8")


def last_error(log: Path) -> str:
    """The line of a log that says most: the last that names an error, else the last."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    named = [line for line in lines if "Error" in line or "ERROR" in line or "error:" in line]
    return (named or lines or ["no output"])[-1][:300]


def _digest(tool: str) -> str:
    parts = requirements(tool).read_bytes() + repr(REMOVE.get(tool)).encode()
    return hashlib.sha256(parts).hexdigest() + "\n"
