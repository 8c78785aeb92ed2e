# SPDX-License-Identifier: Apache-2.0
"""Wall time and peak resident memory of each phase of a run."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from discquant.solver.memory import return_freed

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Return the resident memory of this process now (its peak where the system does not tell)."""
    return _status_field("VmRSS") or _peak_ever()


def _status_field(name: str) -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _peak_ever() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # not Linux, or not permitted: the peak stays that of the process
        _CLEAR.write_text("5")


class Phases:
    """Records phases in the order they ran; on a GPU also the peak of its allocated memory."""

    def __init__(self, device: torch.device | None = None) -> None:
        """Start empty; `device` is where the run computes, None is the CPU."""
        self._gpu = device if device is not None and device.type == "cuda" else None
        self.records: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and note its own peak of resident memory, without what phases before it have freed."""
        gc.collect()
        return_freed()
        _reset_peak()
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        begin = time.perf_counter()
        try:
            yield
        finally:
            peak = _status_field("VmHWM") or _peak_ever()
            self.records.append(
                {"name": name, "seconds": round(time.perf_counter() - begin, 3), "peak_rss_bytes": peak}
            )
            if self._gpu is not None:
                self.records[-1]["peak_device_bytes"] = torch.cuda.max_memory_allocated(self._gpu)
