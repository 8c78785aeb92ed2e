# SPDX-License-Identifier: Apache-2.0
"""Start the command line many times without importing torch and transformers each time (ten seconds of a core).

A fresh process imports them, then forks for every command: a real process with its own pid, signals and exit status.
Run as a script it is that process; `WarmStart` is the test's side. It has no threads of its own when it forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRELOADED = (
    "torch", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.generation", "matplotlib.backends.backend_agg",
    "discquant.cli", "discquant.run.pipeline", "discquant.run.report",
)  # fmt: skip


class Started:
    """A command at work, with the part of `subprocess.Popen` that the tests use."""

    def __init__(self, folder: Path) -> None:
        """Wait for the pid."""
        self._folder = folder
        self.returncode: int | None = None
        while not (pid := self._read("pid")):
            time.sleep(0.002)
        self.pid = int(pid)

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, None while it runs."""
        if self.returncode is None and (status := self._read("status")):
            self.returncode = int(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; subprocess.TimeoutExpired past `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("discquant", timeout or 0.0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait; return what it wrote."""
        self.wait(timeout)
        return self._read("stdout"), self._read("stderr")

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class WarmStart:
    """The forking process; closed with the test session."""

    def __init__(self) -> None:
        """Start it; it imports while the test goes on."""
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            text=True,
            cwd=self._folder.name,
        )

    def start(self, arguments: list[str], cwd: Path) -> Started:
        """Start [python, "-m", "discquant", ...] in `cwd`."""
        assert arguments[1:3] == ["-m", "discquant"]
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        assert self._process.stdin is not None
        request = {"arguments": arguments[3:], "cwd": str(cwd), "folder": str(folder)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Started(folder)

    def run(
        self, arguments: list[str], cwd: Path, timeout: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Start, wait, and return what `subprocess.run` would."""
        started = self.start(arguments, cwd)
        stdout, stderr = started.communicate(timeout)
        return subprocess.CompletedProcess(arguments, started.wait(), stdout, stderr)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


def _write(path: Path, text: str) -> None:
    """A reader never sees half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def _become(arguments: list[str], cwd: str, folder: Path) -> int:
    """Run the command line in this forked process; return its exit status."""
    import runpy

    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
    sys.argv = ["discquant", *arguments]
    try:
        runpy.run_module("discquant", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _serve() -> None:
    """Fork once per line: a parent that waits and writes the status, and the command itself."""
    import gc
    import importlib
    import traceback

    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # the commands collect often, and none of this is theirs
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        if os.fork():
            continue
        pid = os.fork()
        if pid:
            _write(folder / "pid", str(pid))
            _, status = os.waitpid(pid, 0)
            _write(folder / "status", str(os.waitstatus_to_exitcode(status)))
            os._exit(0)
        status = 1
        try:
            status = _become(request["arguments"], request["cwd"], folder)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


if __name__ == "__main__":
    _serve()
