# SPDX-License-Identifier: Apache-2.0
"""What a run that failed leaves for the next one: nothing that still writes, and files that are named where damaged."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import CheckpointError, ResumeError
from discquant.run import checkpoint
from discquant.run.directory import RunDirectory
from discquant.run.pipeline import Pipeline
from discquant.run.windows import CALIBRATION, keep_windows, run_windows
from discquant.solver.solver import Solver


def _config(dataset: str) -> QuantizeConfig:
    solver = SolverConfig(iters=3, batch_size=4, micro_batch=2, warmup=1, start="ref")
    return QuantizeConfig(
        grid=GridConfig(3, 32, grid="absmax"), solver=solver, data=DataConfig(dataset, 8, 16), format="none",
        validation_windows=4, checkpoint_every=1, baselines=(),
    )  # fmt: skip


def test_no_writer_outlives_its_run(
    model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step fails while a checkpoint is being written: when that is told, the checkpoint is complete."""
    config, write, step = _config(dataset), checkpoint.save_tensors_atomic, Solver.step

    def slow(*given: Any) -> None:
        time.sleep(0.1)
        write(*given)

    def failing(solver: Solver, *given: Any) -> Any:
        if solver.step_number == 1:
            raise ValueError("a step that fails")
        return step(solver, *given)

    Pipeline(model_dir, tmp_path / "whole", config).execute()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors_atomic", slow)
        patch.setattr(Solver, "step", failing)
        with pytest.raises(ValueError, match="a step that fails"):
            Pipeline(model_dir, tmp_path / "failed", config).execute()
        assert not [thread for thread in threading.enumerate() if thread.name == "discquant-checkpoint"]
    assert (tmp_path / "failed" / "checkpoints" / "step-0000001.json").exists()
    Pipeline(model_dir, tmp_path / "failed", config).execute()
    whole, failed = (tmp_path / name / "codes.safetensors" for name in ("whole", "failed"))
    assert whole.read_bytes() == failed.read_bytes()


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "garbage", "keys", "dtype", "shape", "source", "negative"]
)
def test_damaged_windows_are_named(damage: str, tmp_path: Path) -> None:
    from discquant.calibration import Windows

    directory, path = RunDirectory(tmp_path), tmp_path / CALIBRATION
    ids, mask = torch.randint(3, 97, (4, 8)), torch.ones(4, 8, dtype=torch.bool)
    keep_windows(directory, Windows.make(ids, mask, "text"))
    source: Any = None  # not asked where the windows are kept
    assert torch.equal(run_windows(directory, _config("text.txt"), source).input_ids, ids)
    content, good = path.read_bytes(), {"input_ids": ids.int(), "mask": mask.to(torch.uint8)}
    others = {
        "keys": {"ids": good["input_ids"], "mask": good["mask"]},
        "dtype": {**good, "input_ids": ids.float()},
        "shape": {**good, "mask": good["mask"][:2]},
        "source": good,
        "negative": {**good, "input_ids": -ids.int()},
    }
    if damage in others:
        save_file(others[damage], path, None if damage == "source" else {"source": "text"})
    else:
        path.write_bytes({"empty": b"", "cut": content[:-9], "garbage": b"\xff" * len(content)}[damage])
    with pytest.raises(CheckpointError) as refused:
        run_windows(directory, _config("text.txt"), source)
    assert str(path) in str(refused.value) and "choose another OUT" in str(refused.value)


def test_another_run_is_told_to_any_command(tmp_path: Path) -> None:
    """`refine` and `quantize` share the directory, and neither is told of the other's name."""
    directory = RunDirectory(tmp_path)
    identity = {"config": dataclasses.asdict(_config("text.txt"))}
    directory.start({}, identity)
    with pytest.raises(ResumeError, match=r"^run: .* holds another run; different: config\.seed was 0, is 1"):
        directory.check({"config": {**identity["config"], "seed": 1}}, resume=True)
