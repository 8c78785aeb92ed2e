# SPDX-License-Identifier: Apache-2.0
"""The run directory: configuration with fingerprint, metrics, codes; every write is atomic.

config.json  metrics.jsonl  phases.jsonl  calibration.safetensors  start_codes.safetensors  checkpoints/
codes.safetensors  summary.json  report.md  <format>/ (the served model, one folder per format)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from discquant.config import SolverConfig
from discquant.errors import MissingModelError, OutputExistsError, ResumeError
from discquant.formats.checkpoint import RUN_MARKER
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.safetensors_file import read_header, read_tensor
from discquant.grids import Grid
from discquant.grids.storage import restore, store
from discquant.run.stored import Given, replacing, room_for, save_tensors_atomic

CONFIG, METRICS, CODES = "config.json", "metrics.jsonl", "codes.safetensors"
SUMMARY, REPORT = "summary.json", "report.md"
# Options that earlier versions did not have, at what those did: of the run, and of its solver.
SINCE: dict[str, Any] = {"layers": []}
SOLVER_SINCE = {"scale_iters": 0, "scale_lr": SolverConfig.scale_lr}


def write_atomic(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new one, never a part.

    Raises:
        DiskSpaceError: There is no room; the file that was there stays.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        """Bind to a path; nothing is written yet."""
        self.path = path

    @staticmethod
    def is_run(path: Path) -> bool:
        """Return whether `path` holds a run."""
        try:
            return bool(json.loads((path / CONFIG).read_text(encoding="utf-8")).get(RUN_MARKER))
        except (OSError, ValueError, AttributeError):
            return False

    def config(self) -> dict[str, Any]:
        """Return the recorded configuration.

        Raises:
            MissingModelError: `path` is no run directory.
        """
        if not self.is_run(self.path):
            raise MissingModelError(f"run: {self.path} is not a run directory of discquant")
        loaded: dict[str, Any] = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        return loaded

    def formats(self) -> tuple[str, ...]:
        """Return the names of the formats that the run was asked for; each lies in a folder of that name."""
        said = str(self.config()["identity"]["config"]["format"]).split(",")
        return tuple(name for name in map(str.strip, said) if name and name != "none")

    def recorded_threads(self) -> int | None:
        """Return the CPU threads that the run here was begun with, None where there is no run."""
        if not self.is_run(self.path):
            return None
        found = self.config().get("identity", {}).get("threads")
        return found if type(found) is int and found > 0 else None

    def check(self, identity: Mapping[str, Any], *, resume: bool) -> bool:
        """See whether this run may be made or continued here; nothing is written.

        Args:
            identity: Everything that determines the result's bytes.
            resume: Whether continuing is allowed.

        Returns:
            True if an earlier part of this run is there.

        Raises:
            OutputExistsError: The directory is not empty and holds no run, or resuming is not allowed.
            ResumeError: It holds a different run; the message names what differs.
        """
        # A run killed at its very first write leaves only a temporary file.
        if not self.path.exists() or all(entry.name == f".{CONFIG}.tmp" for entry in self.path.iterdir()):
            return False
        if not self.is_run(self.path):
            raise OutputExistsError(f"run: {self.path} is not empty and holds no run of discquant")
        if not resume:
            raise OutputExistsError(f"run: {self.path} already holds a run; choose another OUT or --resume")
        changed = _differences(_completed(self.config()["identity"]), json.loads(json.dumps(identity)))
        if changed:
            advice = "Repeat the command that made it, or choose another OUT"
            if all(text.startswith("config.format was ") for text in changed):
                advice += (
                    f"; `discquant export {self.path} --format ...` writes further formats of a finished run"
                )
            raise ResumeError(
                f"run: {self.path} holds another run; different: {'; '.join(changed)}. {advice}"
            )
        return True

    def start(self, record: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Make the directory and write config.json: `record` and `identity`."""
        self.path.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(identity))
        write_atomic(
            self.path / CONFIG, json.dumps({RUN_MARKER: 1, **record, "identity": plain}, indent=2) + "\n"
        )

    def truncate_metrics(self, step: int) -> None:
        """Drop metric lines after `step` (a killed run wrote them after its last checkpoint)."""
        path = self.path / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                continue
            if entry["step"] <= step:
                kept.append(line)
        write_atomic(path, "".join(line + "\n" for line in kept))

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            DiskSpaceError: There is no room; a part of the line is dropped when the run continues.
        """
        path = self.path / METRICS
        with room_for(path), path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        write_atomic(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    @property
    def complete(self) -> bool:
        """Whether the run reached its end (the summary is written last)."""
        return (self.path / SUMMARY).exists()

    def save_codes(self, codes: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> None:
        """Write final codes with their grids, one layer in memory at a time."""
        tensors: dict[str, Given] = {}
        header: dict[str, Any] = {}
        for name in codes:
            parts, header[name] = store(grids[name])
            tensors |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
            tensors[f"{name}.q"] = functools.partial(codes.__getitem__, name)
        save_tensors_atomic(self.path / CODES, tensors, {"layers": json.dumps(header, sort_keys=True)})

    def coded_layers(self) -> Iterator[CodedLayer]:
        """Yield the final codes with their grids, one layer at a time.

        Raises:
            MissingModelError: The run has not finished.
        """
        path = self.path / CODES
        if not path.exists():
            raise MissingModelError(
                f"run: {self.path} has no final codes yet; repeat its command to finish it"
            )
        # Not through a memory map: pages of a map stay resident until it is closed, so that memory would grow with
        # the model.
        stored, metadata = read_header(path)
        keys: dict[str, list[str]] = {}
        for key in stored:
            name, _, part = key.rpartition(".")
            keys.setdefault(name, []).append(part)
        for name, facts in json.loads(metadata["layers"]).items():
            parts = {part: read_tensor(stored[f"{name}.{part}"]) for part in keys[name]}
            yield CodedLayer(name, parts.pop("q"), restore(parts, facts))

    def layers(self) -> Iterator[QuantizedLinear]:
        """Yield the final codes of a run on uniform grids, one layer at a time.

        Raises:
            MissingModelError: The run has not finished.
            UnrepresentableError: A grid is not uniform; `coded_layers` gives all kinds.
        """
        for layer in self.coded_layers():
            yield layer.linear()


def _completed(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with the options that came after its version: a run of that version is one of theirs, too."""
    config = identity.get("config")
    if not isinstance(config, dict) or not isinstance(solver := config.get("solver"), dict):
        return identity
    return {**identity, "config": {**SINCE, **config, "solver": {**SOLVER_SINCE, **solver}}}


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted({*found, *wanted}):
        name = f"{prefix}{key}"
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += _differences(old, new, f"{name}.")
        elif key == "layers" and isinstance(old, list) and isinstance(new, list):
            changed += _rules_differ(name, old, new)
        elif old != new:
            changed.append(f"{name} was {old!r}, is {new!r}")
    return changed


def _rules_differ(name: str, old: list[Any], new: list[Any]) -> list[str]:
    """Say how many rules of two lists differ: there may be hundreds, and a kilobyte is no error line."""
    if old == new:
        return []
    number = max(sum(rule not in new for rule in old), sum(rule not in old for rule in new))
    if not number:
        return [f"{name}: the rules' order differs"]
    return [f"{name}: {number} rule{'s differ' if number > 1 else ' differs'}"]
