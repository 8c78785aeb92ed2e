# SPDX-License-Identifier: Apache-2.0
"""What a continued run can trust: ranks at one step, files that are what was written, stops in the last step, times."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.calibration import Windows
from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import CheckpointError, ResumeError
from discquant.formats.safetensors_file import read_header, read_tensor
from discquant.formats.source import open_source
from discquant.run import phases, windows
from discquant.run.checkpoint import Checkpointer
from discquant.run.directory import RunDirectory
from discquant.run.events import Events, RunStoppedError, StopSignal
from discquant.run.phases import PHASES, Phases
from discquant.run.pipeline import Pipeline
from discquant.run.solving import START_CODES, Solving
from discquant.run.stored import save_tensors_atomic
from discquant.run.windows import CALIBRATION, keep_windows, run_windows, split_windows
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids
from discquant.solver.solver import Solver, StepRecord


def _config(dataset: str, **solver: Any) -> QuantizeConfig:
    options = SolverConfig(**{"iters": 3, "batch_size": 4, "micro_batch": 2, "warmup": 1, **solver})
    return QuantizeConfig(
        grid=GridConfig(3, 32, grid="absmax"), solver=options, data=DataConfig(dataset, 8, 16), format="none",
        validation_windows=4, checkpoint_every=1, baselines=(), gptq_samples=4,
    )  # fmt: skip


class _Rank:
    """One of two ranks in threads; all that is asked of it is to gather."""

    def __init__(self, rank: int, values: list[Any], together: threading.Barrier) -> None:
        self.rank, self.first, self._values, self._together = rank, rank == 0, values, together

    def gather(self, values: list[Any]) -> list[Any]:
        self._values[self.rank] = values
        self._together.wait()
        found = [value for part in self._values for value in part]
        self._together.wait()
        return found


def _two(work: Callable[[_Rank], Any]) -> list[Any]:
    """Let two ranks work at once; what each returned, or the error it ended in."""
    together = threading.Barrier(2, timeout=60)
    values: list[Any] = [None, None]

    def caught(rank: int) -> Any:
        try:
            return work(_Rank(rank, values, together))
        except ResumeError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(caught, range(2)))


@pytest.mark.parametrize(("damaged", "step"), [((), 2), ((2,), 1), ((1, 2), None)])
def test_ranks_resume_from_one_step(
    damaged: tuple[int, ...], step: int | None, model_dir: Path, dataset: str, tmp_path: Path
) -> None:
    """The newest that every rank can read, be it of another disk; none at all is told on every rank."""
    config = _config(dataset, start="ref")
    chain = DecoderChain(open_source(model_dir, dtype=torch.float32).model)
    ids = torch.randint(3, 97, (8, 16))

    def begin() -> Solve:
        rows = TokenRows(chain, ids, None, 2)
        return Solve(chain, lay_grids(chain, config.grid), rows, config)

    solves, states = [begin(), begin()], {}
    for rank, run in enumerate(solves):
        writer = Checkpointer(tmp_path / str(rank) / "checkpoints", run)
        for number in (1, 2):
            run.advance()
            writer.save()
            writer.wait()
            states[number] = run.solver.states[1][0].frac.clone()
    for number in damaged:
        (file,) = (tmp_path / "1" / "checkpoints").glob(f"block-0001-*{number}.safetensors")
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(bytes(content))
    expected = solves[0].advance()

    def restore(rank: _Rank) -> Any:
        engine: Any = dataclasses.replace(Engine(), ranks=rank)  # type: ignore[arg-type]
        directory = RunDirectory(tmp_path / str(rank.rank))
        Solving(directory, config, engine, Events(), StopSignal())._restore(solves[rank.rank])
        return solves[rank.rank].solver.step_number

    found = _two(restore)
    if step is None:
        for error in found:
            assert isinstance(error, ResumeError) and "by every rank (rank 0: 2, rank 1: none)" in str(error)
        return
    assert found == [step, step]
    for run in solves:
        assert torch.equal(run.solver.states[1][0].frac, states[step])
        while run.solver.step_number < 2:
            run.advance()
        assert run.advance() == expected  # the rows' order, too, has gone back


def test_ranks_with_other_windows_are_told(dataset: str, tmp_path: Path) -> None:
    def check(rank: _Rank) -> None:
        engine: Any = dataclasses.replace(Engine(), ranks=rank)  # type: ignore[arg-type]
        solving = Solving(RunDirectory(tmp_path), _config(dataset), engine, Events(), StopSignal())
        chain: Any = None
        solving._check_same_text(TokenRows(chain, torch.full((2, 4), rank.rank), None, 1))

    for error in _two(check):
        assert isinstance(error, ResumeError) and "rank 0: " in str(error) and "rank 1: " in str(error)


def _stopped(model_dir: Path, out: Path, config: QuantizeConfig, step: int) -> None:
    def stop(record: StepRecord, iters: int) -> None:
        if record.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStoppedError, match="stopped by SIGTERM"):
        Pipeline(model_dir, out, config, events=Events(step=stop)).execute()


@pytest.mark.parametrize("name", [CALIBRATION, START_CODES])
def test_a_file_that_is_not_what_was_written_is_refused(
    name: str, model_dir: Path, dataset: str, tmp_path: Path
) -> None:
    """A flipped bit of the windows or of the codes to start from; the advice gives the bytes of an undisturbed run."""
    config, out = _config(dataset, start="gptq"), tmp_path / "out"
    whole = Pipeline(model_dir, tmp_path / "whole", config)
    whole.execute()
    _stopped(model_dir, out, config, 1)
    content = bytearray((out / name).read_bytes())
    content[-200 if name == CALIBRATION else -5] ^= 1  # of the ids, before the mask
    (out / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="choose another OUT, or remove the file") as refused:
        Pipeline(model_dir, out, config).execute()
    assert name in str(refused.value)
    (out / name).unlink()
    Pipeline(model_dir, out, config).execute()
    for kept in ("codes.safetensors", CALIBRATION, START_CODES):
        assert (out / kept).read_bytes() == (tmp_path / "whole" / kept).read_bytes()


def test_files_of_earlier_versions_load(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    """They say no digests; the run goes on from them."""
    config, out = _config(dataset, start="gptq"), tmp_path / "out"
    _stopped(model_dir, out, config, 1)
    for name in (CALIBRATION, START_CODES):
        stored, metadata = read_header(out / name)
        assert metadata.pop("digest" if name == CALIBRATION else "sha256")
        tensors = {key: read_tensor(info) for key, info in stored.items()}
        save_tensors_atomic(out / name, tensors, metadata)
    assert Pipeline(model_dir, out, config).execute()["processes"] == 2


@pytest.mark.parametrize("moment", ["in the step", "after it"])
def test_a_signal_in_the_last_step_stops_the_run(
    moment: str, model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was reached is in the last checkpoint; evaluation and export are the next run's."""
    config, out, step = _config(dataset, start="ref"), tmp_path / "out", Solver.step

    def signalled(solver: Solver, *given: Any) -> Any:
        if solver.step_number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(solver, *given)

    if moment == "in the step":
        monkeypatch.setattr(Solver, "step", signalled)
        with pytest.raises(RunStoppedError, match="SIGTERM after step 3 of 3; the same command continues"):
            Pipeline(model_dir, out, config).execute()
        monkeypatch.undo()
    else:
        _stopped(model_dir, out, config, 3)
    assert (out / "checkpoints" / "step-0000003.json").exists() and not (out / "codes.safetensors").exists()
    said: list[str] = []
    Pipeline(model_dir, out, config, events=Events(message=said.append)).execute()
    assert "continuing after step 3" in said


@pytest.mark.parametrize(("rows", "tail"), [(8, True), (8, False), (2, True)])
def test_the_padded_tail_of_a_text_is_solved_on(
    rows: int, tail: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full windows are held out; without a tail nothing changes, and a run that was begun otherwise keeps its split."""
    config, ids = _config("text.txt"), torch.arange(rows * 4).view(rows, 4)
    mask = torch.ones(rows, 4, dtype=torch.bool)
    mask[-1, 1:] = not tail
    made = Windows.make(ids, mask, "text.txt")
    monkeypatch.setattr(windows, "load_windows", lambda *given, **named: made)
    source: Any = type("Source", (), {"tokenizer": None, "model": None})
    found = run_windows(RunDirectory(tmp_path / "fresh"), config, source)
    train, held = split_windows(found, config)
    if tail and rows == 8:
        assert bool(held.mask.all()) and torch.equal(held.input_ids, ids[6:7])
        assert torch.equal(train.input_ids, torch.cat([ids[:6], ids[7:]]))
    else:
        assert found.digest == made.digest
    directory = RunDirectory(tmp_path)
    keep_windows(directory, made)
    assert run_windows(directory, config, source).digest == made.digest


@pytest.mark.parametrize(
    ("asked", "came", "solved"),
    [(8, 12, 8), (8, 11, 8), (8, 9, 8), (8, 8, 7), (8, 5, 4), (8, 2, 1), (1, 5, 1)],
)
def test_as_many_windows_are_solved_on_as_were_asked_for(
    asked: int, came: int, solved: int, tmp_path: Path
) -> None:
    """No more, and as many as the text leaves beside a fifth; a run goes on with the split it was begun with."""
    config = dataclasses.replace(_config("text.txt"), data=DataConfig("text.txt", asked, 8))
    made, directory = Windows.make(torch.arange(came * 8).view(came, 8)), RunDirectory(tmp_path)
    train, held = split_windows(made, config, directory)
    assert (len(train), len(held)) == (solved, came - solved)
    keep_windows(directory, made)  # as earlier versions did
    assert len(split_windows(made, config, directory)[1]) == min(4, max(1, came // 5))
    (tmp_path / CALIBRATION).unlink()
    keep_windows(directory, made, 1)
    assert len(split_windows(made, config, directory)[1]) == 1
    (tmp_path / CALIBRATION).unlink()
    keep_windows(directory, made, came)
    with pytest.raises(CheckpointError, match=f"at least 1 of its {came} windows, and not all: got {came}"):
        split_windows(made, config, directory)


def test_times_are_summed_over_the_processes(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    config = _config(dataset, start="ref")
    _stopped(model_dir, tmp_path, config, 2)
    summary = Pipeline(model_dir, tmp_path, config).execute()
    lines = [json.loads(line) for line in (tmp_path / PHASES).read_text().split("\n") if line]
    assert summary["processes"] == 2 and {line["process"] for line in lines} == {1, 2}
    for record in summary["phases"]:
        own = [line for line in lines if line["name"] == record["name"]]
        assert record["seconds"] == pytest.approx(sum(line["seconds"] for line in own), abs=1e-3)
        assert record["peak_rss_bytes"] == max(line["peak_rss_bytes"] for line in own)
    assert [line["process"] for line in lines if line["name"] == "round"] == [1, 2]
    told = "summed over the 2 times that the command ran"
    assert told in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_times_of_killed_processes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the last line tells: one that a kill has torn is passed over and spoils no other."""
    file = tmp_path / PHASES
    monkeypatch.setattr(phases, "BEAT", 0.0)
    killed = Phases()
    with killed.phase("open"):
        pass
    killed.keep(file)
    with killed.phase("round"):
        killed.beat()
        killed.beat()
        so_far = file.read_text()
    last = json.loads(so_far.splitlines()[-1])
    assert last["name"] == "round" and so_far.count('"round"') == 2
    file.write_text(so_far + '{"process": 1, "pla')
    again = Phases()
    with again.phase("open"):
        pass
    again.keep(file)
    assert again.processes == 2
    found = {record["name"]: record["seconds"] for record in again.total()}
    assert list(found) == ["open", "round"] and found["round"] == last["seconds"]
    third = Phases()
    third.keep(file)
    assert third.processes == 3 and [record["name"] for record in third.total()] == ["open", "round"]
    assert [record["name"] for record in Phases().total()] == []
