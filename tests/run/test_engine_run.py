# SPDX-License-Identifier: Apache-2.0
"""Whole runs under other placements, ranks and limits: the same bytes, or a refusal before anything is opened."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DiskSpaceError,
    OutputExistsError,
    ResumeError,
)
from discquant.planning import compare, memory
from discquant.planning.memory import needed
from discquant.planning.shape import read_shape
from discquant.run import pipeline, solving, stored
from discquant.run.directory import RunDirectory
from discquant.run.events import Events, RunStoppedError
from discquant.run.pipeline import Pipeline
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.memory import HostArena
from discquant.solver.placement import Where
from discquant.solver.ranks import Ranks
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve
from discquant.solver.solver import StepRecord


def _config(dataset: str, **solver: Any) -> QuantizeConfig:
    options = {"iters": 3, "batch_size": 4, "micro_batch": 2, "warmup": 1, **solver}
    return QuantizeConfig(
        grid=GridConfig(3, 32, grid="absmax"), solver=SolverConfig(**options), data=DataConfig(dataset, 8, 16),
        gptq_samples=4, validation_windows=4, checkpoint_every=1, baselines=(),
    )  # fmt: skip


@pytest.mark.slow
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


def test_killed_before_the_first_paced_checkpoint(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    """By default a short run writes one checkpoint, its last; what was lost is made again, in the same bytes."""
    config = dataclasses.replace(_config(dataset), checkpoint_every=None)
    whole = Pipeline(model_dir, tmp_path / "whole", config).execute()
    assert whole["checkpoints"]["count"] == 1 and whole["checkpoints"]["every"] is None
    assert "1 checkpoint" in (tmp_path / "whole" / "report.md").read_text(encoding="utf-8")
    out = tmp_path / "killed"

    def killed(record: StepRecord, iters: int) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline(model_dir, out, config, events=Events(step=killed)).execute()
    assert not list((out / "checkpoints").iterdir())
    assert Pipeline(model_dir, out, config).execute()["checkpoints"]["count"] == 1
    assert (out / "codes.safetensors").read_bytes() == (tmp_path / "whole" / "codes.safetensors").read_bytes()


def test_the_first_block_may_stay_as_it_is(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    """From the format check to the report; in memory, and where its weights are read from the checkpoint."""
    found = set()
    for where in ("resident", "disk"):
        out = tmp_path / where
        config = dataclasses.replace(_config(dataset), ignore=("lm_head", "model.layers.0.*"))
        summary = Pipeline(model_dir, out, config, engine=Engine(where, where)).execute()  # type: ignore[arg-type]
        found.add(hashlib.sha256((out / "codes.safetensors").read_bytes()).hexdigest())
        assert {row["name"].split(".")[2] for row in summary["layers"]} == {"1"}
    assert len(found) == 1


def test_what_was_moved_is_reported(
    model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By steps alone; memory that could not be pinned is said once for the state and once for the activations."""
    seen: list[int] = []
    advance = Solve.advance

    def watched(solve: Solve) -> StepRecord:
        before = solve.solver.placement.bytes_in + solve.solver.boundaries.bytes_moved
        record = advance(solve)
        seen.append(solve.solver.placement.bytes_in + solve.solver.boundaries.bytes_moved - before)
        return record

    monkeypatch.setattr(Solve, "advance", watched)
    monkeypatch.setattr(HostArena, "note", "host memory is not pinned, copies will be slower: a test")
    for placement in ("host", "resident"):
        said: list[str] = []
        engine = Engine(placement, placement)  # type: ignore[arg-type]
        config = _config(dataset)
        summary = Pipeline(
            model_dir, tmp_path / placement, config, events=Events(message=said.append), engine=engine
        ).execute()
        report = (tmp_path / placement / "report.md").read_text(encoding="utf-8")
        moved = summary["plan"]["moved_per_step"]
        pinned = [line for line in said if "not pinned" in line]
        if placement == "resident":
            assert moved is None and "A step moved" not in report and not pinned
            continue
        assert "A step moved" in report and len(pinned) == 2 and "(activations)" in pinned[1]
        weights = sum(row["weights"] for row in summary["layers"])
        # Of fp32 AdamW a step sends home the positions and both moments.
        assert moved["bytes_out"] >= 12 * weights
        assert moved["bytes_in"] + moved["boundary_bytes"] == sum(seen) / len(seen)
        assert moved["boundary_bytes"] > 0 and moved["waited_seconds"] >= 0


def test_validation_knows_the_teacher(
    model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original runs once on windows that never change; the lines are those of a teacher computed each time."""
    remember, outputs = TokenRows.remember_teacher, DecoderChain.teacher_outputs
    held, passes = 3, []  # no other count of windows in the run
    config = dataclasses.replace(_config(dataset), validation_windows=held)

    def forgetful(rows: TokenRows, teacher: Any = None) -> None:
        if len(rows) != held:
            remember(rows, teacher)

    def counted(chain: DecoderChain, batches: Any, teacher: Any = None) -> Any:
        passes.append(sum(len(batch.hidden) for batch in batches))
        return outputs(chain, batches, teacher)

    found = []
    for name in ("known", "anew"):
        with monkeypatch.context() as patch:
            patch.setattr(DecoderChain, "teacher_outputs", counted)
            if name == "anew":
                patch.setattr(TokenRows, "remember_teacher", forgetful)
            passes.clear()
            Pipeline(model_dir, tmp_path / name, config, engine=Engine("disk")).execute()
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([line for line in lines if line.get("kind") == "validation"])
        # One more where the result is measured.
        assert passes.count(held) - 1 == (1 if name == "known" else 2 * len(found[0]))
    assert found[0] == found[1] and [line["step"] for line in found[0]] == [0, 1, 2, 3]
    assert memory.VALIDATION_ROWS == solving.VALIDATION_ROWS


def test_a_killed_run_continues_without_its_files(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    def stop(record: StepRecord, iters: int) -> None:
        if record.step == 2:
            raise RunStoppedError("stopped by the test")

    out = tmp_path / "out"
    with pytest.raises(RunStoppedError):
        Pipeline(model_dir, out, _config(dataset), events=Events(step=stop)).execute()
    # As a killed rank of a placement on disk leaves them.
    (out / "state" / "rank-1").mkdir(parents=True)
    (out / "state" / "rank-1" / "block-0000.state").write_bytes(bytes(64))
    # Begun on another machine: its versions are part of the run, its processor is told.
    record = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for key, value in (("transformers", "5.0"), ("triton", "2.0")):
        other = {**record, "identity": {**record["identity"], key: value}}
        (out / "config.json").write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(ResumeError, match=f"{key} was '{value}', is "):
            Pipeline(model_dir, out, _config(dataset)).execute()
    said: list[str] = []
    (out / "config.json").write_text(json.dumps({**record, "cpu": "Abacus, BEADS"}), encoding="utf-8")
    Pipeline(model_dir, out, _config(dataset), events=Events(message=said.append)).execute()
    assert len([line for line in said if "begun on Abacus, BEADS" in line and record["cpu"] in line]) == 1
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


def test_auto_is_the_plan_s(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is admitted because it fits the disk goes to the disk, and its original is read block by block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model_dir = tmp_path / "model"
    options = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(options).to(torch.bfloat16).save_pretrained(model_dir)
    monkeypatch.setattr("discquant.run.planned.resident_bytes", lambda: 0)
    shape, config = read_shape(model_dir), _config(dataset, iters=1)

    def need(placement: Where) -> float:
        plan = compare.plan_of_run(shape, config, process=0.0, placement=placement)
        return needed(list(plan.peaks), "host")

    resident, disk = need("resident"), need("disk")
    assert disk < 0.9 * resident
    opened: list[bool] = []
    real = pipeline.open_source

    def watched(*given: Any, **options: Any) -> Any:
        opened.append(options["lazy"])
        if name != "small":
            raise ConfigError("seen enough")
        return real(*given, **options)

    monkeypatch.setattr(pipeline, "open_source", watched)
    engine = Engine("auto")
    for name, free, whole, expected in (
        ("roomy", 1e12, 1e12, "resident"),
        ("small", 1e12, disk / 1.09, "disk"),
        ("busy", 1.01 * disk, 1e12, "disk"),  # what others hold now
        ("tight", 0.99 * resident, 1e12, "disk"),  # what is free is not exceeded
        ("full", 1.0, 1e12, "disk"),  # they may leave, and it needs the least
    ):
        monkeypatch.setattr(compare, "host_memory", lambda whole=whole: whole)
        monkeypatch.setattr(compare, "free_host_memory", lambda free=free: free)
        run = Pipeline(model_dir, tmp_path / name, config, engine=engine)
        if name == "small":
            assert run.execute()["plan"]["placement"] == expected
        else:
            with pytest.raises(ConfigError, match="seen enough"):
                run.execute()
        assert run.engine.where == expected and opened.pop() == (expected != "resident")
    assert engine.where == "auto" and engine.folder is None, "the caller's engine was changed"


def test_activations_are_planned(
    model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = compare.make_plan

    def watched(*given: Any, **options: Any) -> Any:
        seen.append(options["activations"])
        return real(*given, **options)

    monkeypatch.setattr(compare, "make_plan", watched)
    Pipeline(model_dir, tmp_path / "out", _config(dataset), engine=Engine("host", "disk")).execute()
    assert seen == ["disk", "disk"]


def test_one_process_at_a_time(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    """A second run into a directory that is being written is refused, and disturbs nothing: no file of its state."""
    out, refused = tmp_path / "out", []

    def second(record: StepRecord, iters: int) -> None:
        if record.step == 2:
            with pytest.raises(OutputExistsError, match="another process is at work"):
                Pipeline(model_dir, out, _config(dataset)).execute()
            refused.append(record.step)
            assert list((out / "state" / "rank-0").glob("*.state"))

    Pipeline(model_dir, out, _config(dataset), events=Events(step=second), engine=Engine("disk")).execute()
    assert refused == [2] and not (out / "state").exists()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in steps if "kind" not in row] == [1, 2, 3]


def test_a_complete_run_writes_what_was_removed(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = dataclasses.replace(_config(dataset), format="compressed-tensors,gptq")
    Pipeline(model_dir, out, config).execute()
    before = hashlib.sha256((out / "gptq" / "model.safetensors").read_bytes()).hexdigest()
    shutil.rmtree(out / "gptq")
    Pipeline(model_dir, out, config).execute()
    assert hashlib.sha256((out / "gptq" / "model.safetensors").read_bytes()).hexdigest() == before


def test_a_damaged_format_is_not_complete(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    """By the sizes in its manifest; without its folder, the same command writes it anew."""
    out = tmp_path / "out"
    config = dataclasses.replace(_config(dataset), method="rtn", format="gptq")
    Pipeline(model_dir, out, config).execute()
    file = out / "gptq" / "model.safetensors"
    content = file.read_bytes()
    for damage, words in (
        (lambda: file.write_bytes(content[:-1]), rf"model.safetensors has {len(content) - 1:,} bytes"),
        (
            file.unlink,
            "model.safetensors is missing; remove that folder, and the same command writes it anew",
        ),
        ((out / "gptq" / "config.json").unlink, "is missing"),
        ((out / "gptq" / "discquant_manifest.json").unlink, "discquant_manifest.json is missing"),
    ):
        damage()
        with pytest.raises(CheckpointError, match=words) as refused:
            Pipeline(model_dir, out, config).execute()
        assert str(out / "gptq") in str(refused.value)
    shutil.rmtree(out / "gptq")
    Pipeline(model_dir, out, config).execute()
    assert file.read_bytes() == content


def test_stopped_while_the_report_is_drawn(
    model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command draws it, and says what the run it finds does not compare with."""
    out, said = tmp_path / "out", list[str]()
    config = dataclasses.replace(_config(dataset), method="rtn")

    def stopped(run: Path) -> None:
        raise RunStoppedError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr("discquant.run.report.write_report", stopped)
        with pytest.raises(RunStoppedError):
            Pipeline(model_dir, out, config).execute()
    assert (out / "summary.json").exists() and not (out / "report.md").exists()
    more = dataclasses.replace(config, baselines=("rtn", "gptq"))
    Pipeline(model_dir, out, more, events=Events(message=said.append)).execute()
    assert (out / "report.md").read_text(encoding="utf-8").startswith("# Run out")
    assert any("complete already" in line for line in said)
    assert [line for line in said if "--baselines gptq" in line and "another OUT" in line]


@pytest.mark.parametrize("name", ["config.json", "calibration.safetensors", "codes.safetensors", "report.md"])
def test_a_full_disk_is_told_by_the_file(
    name: str, model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fills up: the file's name, what to do, and no part of the file; then the same command ends it."""
    out, config = tmp_path / "out", dataclasses.replace(_config(dataset), method="rtn")
    real = stored.sync_path

    def full(path: Path) -> None:
        if name in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(stored, "sync_path", full)
        with pytest.raises(DiskSpaceError, match=rf"{name}: no room .* same command again") as caught:
            Pipeline(model_dir, out, config).execute()
    assert "checkpoint" not in str(caught.value) and not list(out.glob(".*"))
    Pipeline(model_dir, out, config).execute()
    assert (out / "report.md").exists() and (out / "compressed-tensors").is_dir()


def test_a_full_disk_while_metrics_are_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskSpaceError, match=r"metrics\.jsonl: no room"):
        RunDirectory(tmp_path).append_metrics({"step": 1})
