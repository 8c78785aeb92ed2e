# SPDX-License-Identifier: Apache-2.0
"""Wall time and peak resident memory of each phase of a run."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from discquant.solver.memory import return_freed

PHASES = "phases.jsonl"  # in the run directory
PEAKS = ("peak_rss_bytes", "peak_device_bytes")
BEAT = 10.0  # seconds between two lines about a phase under way
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
    """Records phases in the order they ran; on a GPU also the peak of its allocated memory.

    Attributes:
        records: Of this process.
        processes: How many have worked on the run, this one included.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Start empty; `device` is where the run computes, None is the CPU."""
        self._gpu = device if device is not None and device.type == "cuda" else None
        self.records: list[dict[str, Any]] = []
        self._earlier: list[dict[str, Any]] = []
        self._file: Path | None = None
        self._under_way: tuple[str, float] | None = None
        self._told = 0.0  # when a line was last written
        self.processes = 1

    def keep(self, path: Path) -> None:
        """Write records to a file from now on, those so far included; what earlier processes wrote there counts, too.

        One line per record, numbered by process and place; of equal numbers the last counts.
        """
        known: dict[tuple[int, int], dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a kill
                    found = json.loads(line)
                    record = {"name": str(found["name"]), "seconds": float(found["seconds"])}
                    record |= {key: int(found[key]) for key in PEAKS if key in found}
                    known[int(found["process"]), int(found["place"])] = record
        self._earlier, self._file = list(known.values()), path
        self.processes = 1 + max((process for process, _ in known), default=0)
        for place, record in enumerate(self.records):
            self._write(place, record)

    def total(self) -> list[dict[str, Any]]:
        """Return one record per phase: seconds summed over the processes of the run, and the highest of their peaks."""
        found: dict[str, dict[str, Any]] = {}
        for record in (*self._earlier, *self.records):
            entry = found.setdefault(record["name"], {"name": record["name"], "seconds": 0.0})
            entry["seconds"] = round(entry["seconds"] + record["seconds"], 3)
            entry |= {key: max(entry.get(key, 0), record[key]) for key in PEAKS if key in record}
        return list(found.values())

    def beat(self) -> None:
        """Write how long the phase under way has taken, now and then: a killed process writes nothing at its end."""
        if self._under_way is not None and time.perf_counter() - self._told >= BEAT:
            self._write(len(self.records), self._record(*self._under_way))

    def _record(self, name: str, begin: float) -> dict[str, Any]:
        peak = _status_field("VmHWM") or _peak_ever()
        record = {"name": name, "seconds": round(time.perf_counter() - begin, 3), "peak_rss_bytes": peak}
        if self._gpu is not None:
            record["peak_device_bytes"] = torch.cuda.max_memory_allocated(self._gpu)
        return record

    def _write(self, place: int, record: dict[str, Any]) -> None:
        self._told = time.perf_counter()
        if self._file is None:
            return
        line = json.dumps({"process": self.processes, "place": place, **record})
        # The empty line ends one that a kill has torn. No run fails for its times.
        with contextlib.suppress(OSError), self._file.open("a", encoding="utf-8") as handle:
            handle.write(f"{line}\n" if place else f"\n{line}\n")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and note its own peak of resident memory, without what phases before it have freed."""
        gc.collect()
        return_freed()
        _reset_peak()
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        begin = self._told = time.perf_counter()
        self._under_way = (name, begin)
        try:
            yield
        finally:
            self._under_way = None
            self.records.append(self._record(name, begin))
            self._write(len(self.records) - 1, self.records[-1])
