# SPDX-License-Identifier: Apache-2.0
"""Whole runs under other placements, ranks and limits: the same bytes, or a refusal before anything is opened."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import CapacityError, ConfigError
from discquant.planning import compare
from discquant.run import pipeline
from discquant.run.directory import RunDirectory
from discquant.run.events import Events, RunStoppedError
from discquant.run.pipeline import Pipeline
from discquant.solver.engine import Engine
from discquant.solver.ranks import Ranks
from discquant.solver.solver import StepRecord


def _config(dataset: str, **solver: Any) -> QuantizeConfig:
    options = {"iters": 3, "batch_size": 4, "micro_batch": 2, "warmup": 1, **solver}
    return QuantizeConfig(
        grid=GridConfig(3, 32, grid="absmax"), solver=SolverConfig(**options), data=DataConfig(dataset, 8, 16),
        gptq_samples=4, validation_windows=4, checkpoint_every=1, baselines=(),
    )  # fmt: skip


def test_state_and_activations_anywhere_give_the_same_bytes(
    model_dir: Path, dataset: str, tmp_path: Path
) -> None:
    """Every pair, resident state with activations elsewhere included; nothing of it is left behind."""
    found = set()
    for where, activations in itertools.product(("resident", "host", "disk"), repeat=2):
        out = tmp_path / f"{where}-{activations}"
        summary = Pipeline(model_dir, out, _config(dataset), engine=Engine(where, activations)).execute()
        found.add(hashlib.sha256((out / "codes.safetensors").read_bytes()).hexdigest())
        assert summary["plan"]["placement"] == where
        assert not (out / "state").exists()
    assert len(found) == 1


def test_a_killed_run_s_files_go_when_it_continues(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    def stop(record: StepRecord, iters: int) -> None:
        if record.step == 2:
            raise RunStoppedError("stopped by the test")

    out = tmp_path / "out"
    with pytest.raises(RunStoppedError):
        Pipeline(model_dir, out, _config(dataset), events=Events(step=stop)).execute()
    # As a killed rank of a placement on disk leaves them.
    (out / "state" / "rank-1").mkdir(parents=True)
    (out / "state" / "rank-1" / "block-0000.state").write_bytes(bytes(64))
    Pipeline(model_dir, out, _config(dataset)).execute()
    assert (out / "summary.json").exists() and not (out / "state").exists()
    assert (
        RunDirectory(out).recorded_threads()
        == json.loads((out / "config.json").read_text())["identity"]["threads"]
    )
    assert RunDirectory(tmp_path).recorded_threads() is None


def test_refused_before_the_model_is_opened(
    model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*arguments: object, **options: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(pipeline, "open_source", opened)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--micro-batch"):
        Pipeline(model_dir, out, _config(dataset), engine=Engine(ranks=Ranks(0, 4))).execute()
    monkeypatch.setattr(compare, "host_memory", lambda: 1e6)
    with pytest.raises(CapacityError, match="of host memory"):
        Pipeline(model_dir, out, _config(dataset)).execute()
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "open_source", opened)
    monkeypatch.setattr("discquant.run.planned.free_disk", lambda out: 1e3)
    with pytest.raises(CapacityError, match="of disk"):
        Pipeline(model_dir, out, _config(dataset)).execute()
    assert not out.exists()
