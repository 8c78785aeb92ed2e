# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a solve: one safetensors file per checkpoint, written atomically, the last two kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open

from discquant.run.directory import save_tensors_atomic
from discquant.solver.schedule import GainControl
from discquant.solver.solve import Solve

logger = logging.getLogger(__name__)
KEPT = 2


def save_checkpoint(folder: Path, run: Solve) -> Path:
    """Write the state after the current step; older checkpoints beyond the last two are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    solver = run.solver
    tensors = {
        f"{state.name}.{key}": tensor
        for block in solver.states
        for state in block
        for key, tensor in state.tensors()
    }
    facts = {
        "step": solver.step_number,
        # Exact: the resumed gain must be the same float64.
        "gain": solver.gain.gain.hex(),
        "initial": solver.gain.initial.hex(),
        "target": solver.gain.target,
    }
    path = folder / f"step-{solver.step_number:07d}.safetensors"
    save_tensors_atomic(path, tensors, {"solve": json.dumps(facts)})
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()
    return path


def load_checkpoint(folder: Path, run: Solve) -> int | None:
    """Restore the newest readable checkpoint into `run`; return its step, None if none can be read.

    A checkpoint that cannot be read (a damaged disk: writing is atomic) is passed over with a warning.
    """
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as handle:
                facts = json.loads(handle.metadata()["solve"])
                loaded = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("checkpoint %s cannot be read (%s); using the one before", path.name, error)
            continue
        solver = run.solver
        for block in solver.states:
            for state in block:
                for key, tensor in state.tensors():
                    tensor.copy_(loaded[f"{state.name}.{key}"])
        solver.step_number = facts["step"]
        solver.gain = GainControl(float.fromhex(facts["gain"]), facts["target"])
        solver.gain.initial = float.fromhex(facts["initial"])
        run.skip_rows(facts["step"])
        return int(facts["step"])
    return None
