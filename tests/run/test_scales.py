# SPDX-License-Identifier: Apache-2.0
"""A run whose scales move once its codes are chosen: resumed, exported, proven, reported; refine keeps a file's."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.config import AS_LAID, DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import ConfigError
from discquant.formats import registry
from discquant.run import report
from discquant.run.events import Events, RunStoppedError
from discquant.run.pipeline import Pipeline
from discquant.run.refine import RefinePipeline
from discquant.solver.solver import StepRecord


def _config(dataset: str, **changes: Any) -> QuantizeConfig:
    options = SolverConfig(
        iters=3, scale_iters=3, scale_lr=1e-2, batch_size=4, micro_batch=2, warmup=1, state="u8", optimizer="momentum"
    )  # fmt: skip
    config = QuantizeConfig(
        grid=GridConfig(3, 32), solver=options, data=DataConfig(dataset, 8, 16), format="gptq,compressed-tensors",
        validation_windows=4, checkpoint_every=1, baselines=("rtn",), gptq_samples=4,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def run(
    model_dir: Path, dataset: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run that was never interrupted, and its summary."""
    out = tmp_path_factory.mktemp("scales") / "out"
    return out, Pipeline(model_dir, out, _config(dataset)).execute()


def _files(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*.safetensors")}


@pytest.mark.parametrize("after", [3, 4])
def test_resumed_it_ends_in_the_same_bytes(
    after: int, run: tuple[Path, dict[str, Any]], model_dir: Path, dataset: str, tmp_path: Path
) -> None:
    """Stopped between the two kinds of steps, and among those that move scales."""

    def stop(record: StepRecord, steps: int) -> None:
        assert steps == 6
        if record.step == after - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStoppedError, match=f"after step {after} of 6"):
        Pipeline(model_dir, tmp_path / "out", _config(dataset), events=Events(step=stop)).execute()
    said: list[str] = []
    Pipeline(model_dir, tmp_path / "out", _config(dataset), events=Events(message=said.append)).execute()
    assert f"continuing after step {after}" in said
    found, expected = _files(tmp_path / "out"), _files(run[0])
    kept = {name for name in expected if "checkpoints" not in name}
    assert kept == {name for name in found if "checkpoints" not in name}
    assert all(found[name] == expected[name] for name in kept)


def test_every_format_holds_the_moved_scales(
    run: tuple[Path, dict[str, Any]], model_dir: Path, dataset: str
) -> None:
    out, _ = run
    options = dataclasses.replace(_config(dataset).solver, scale_iters=0)
    plain = Pipeline(model_dir, out.parent / "plain", _config(dataset, solver=options))
    plain.execute()
    laid = {layer.name: layer for layer in plain.directory.coded_layers()}
    for name in ("gptq", "compressed-tensors"):
        layers = list(registry.find(out / name).read(out / name))
        assert {layer.name for layer in layers} == laid.keys()
        for layer in layers:
            assert torch.equal(layer.q, laid[layer.name].q)
            ratio = layer.grid.scale.float() / laid[layer.name].grid.scale.float()
            assert 0.5 < float(ratio.min()) and float(ratio.max()) < 1.5 and not bool((ratio == 1).all())


def test_the_summary_and_the_report_tell_both(run: tuple[Path, dict[str, Any]]) -> None:
    out, summary = run
    kl = {name: found["kl_mean"] for name, found in summary["methods"].items()}
    assert list(kl) == ["rtn", AS_LAID, "discquant"] and kl["discquant"] != kl[AS_LAID]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("kind") != "validation"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert len({line["moved"] for line in steps[2:]}) == 1 and {line["fractional"] for line in steps[2:]} == {
        0.0
    }
    text = (out / report.REPORT).read_text(encoding="utf-8")
    assert "| DiscQuant, scales as laid |" in text
    assert "All on the grid as it was laid, whose scales DiscQuant then moved, and the same" in text


def test_refine_keeps_the_scales_of_a_file(
    run: tuple[Path, dict[str, Any]], model_dir: Path, dataset: str, tmp_path: Path
) -> None:
    config = _config(dataset, baselines=())
    with pytest.raises(ConfigError, match="scale_iters must be 0, for the file keeps its scales, got 3"):
        RefinePipeline(run[0] / "gptq", tmp_path / "out", model_dir, config)
