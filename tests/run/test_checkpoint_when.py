# SPDX-License-Identifier: Apache-2.0
"""Of which states a checkpoint is written, and which of several is read."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import DiskSpaceError
from discquant.run import checkpoint
from discquant.run.checkpoint import Checkpointer, has_checkpoint, load_checkpoint
from discquant.solver.chain import DecoderChain
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids


@pytest.fixture
def run(chain: DecoderChain) -> Solve:
    """A solve of six steps, before the first."""
    options = SolverConfig(
        iters=6, batch_size=2, micro_batch=1, warmup=1, start="ref", state="u8", curvature=0.0
    )
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=options)
    ids = torch.randint(3, 61, (8, 8), generator=torch.Generator().manual_seed(1))
    return Solve(chain, lay_grids(chain, config.grid), TokenRows(chain, ids, None, 1), config)


def test_a_state_of_no_step_is_not_written(run: Solve, tmp_path: Path) -> None:
    """After a step that failed half-way the last checkpoint is what a run continues from."""
    writer = Checkpointer(tmp_path, run, 1)
    run.solver._journal.closed = True
    with pytest.raises(RuntimeError, match="failed half-way"):
        writer.save()
    writer.wait()
    assert not has_checkpoint(tmp_path)


def test_none_is_due_while_one_is_written(
    run: Solve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solve would stand until that is complete, however long it has been."""
    now, go, real = [0.0], threading.Event(), checkpoint.save_tensors_atomic

    def slow(*given: Any) -> None:
        assert go.wait(60)
        real(*given)

    monkeypatch.setattr(checkpoint, "save_tensors_atomic", slow)
    writer = Checkpointer(tmp_path, run, clock=lambda: now[0])
    writer.save()
    now[0] += 1e6
    assert not writer.due(checkpoint.SPACING)
    go.set()
    writer.wait()
    now[0] += 1e9
    assert writer.due(checkpoint.SPACING)


def test_a_change_waits_for_its_own_block(
    run: Solve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for the others: each may be changed once it is written, and that does not let the next one go on."""
    gates, real = [threading.Event(), threading.Event()], checkpoint.save_tensors_atomic

    def slow(path: Path, *given: Any) -> None:
        assert gates["-0001-" in path.name].wait(60)
        real(path, *given)

    monkeypatch.setattr(checkpoint, "save_tensors_atomic", slow)
    writer = Checkpointer(tmp_path, run)
    writer.save()
    assert run.solver.before_change is not None
    first, last = changing = [
        threading.Thread(target=run.solver.before_change, args=(index,), daemon=True) for index in range(2)
    ]
    for thread in changing:
        thread.start()
        thread.join(0.1)
    gates[1].set()
    last.join(30)
    first.join(0.2)
    assert first.is_alive() and not last.is_alive()
    gates[0].set()
    first.join(30)
    assert not first.is_alive()
    writer.wait()


def test_a_first_checkpoint_without_room_names_none_to_go_on_from(
    run: Solve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise DiskSpaceError("no room; the same command continues")

    monkeypatch.setattr(checkpoint, "save_tensors_atomic", full)
    writer = Checkpointer(tmp_path, run)
    writer.save()
    with pytest.raises(DiskSpaceError, match=r"continues$"):
        writer.wait()


def test_a_solve_that_is_done_costs_nothing_more(run: Solve, tmp_path: Path) -> None:
    run.solver.step_number = 6
    writer = Checkpointer(tmp_path, run)
    writer.begin(fresh=False)
    assert run.done and (writer.cost, writer.stalled) == (0.0, 0.0)


def test_an_error_of_the_writer_is_raised_once(
    run: Solve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after it is not stopped by it again."""
    writer = Checkpointer(tmp_path, run)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "save_tensors_atomic", lambda *_: 1 / 0)
        writer.save()
        with pytest.raises(ZeroDivisionError):
            writer.wait()
    writer.save()
    writer.wait()
    assert has_checkpoint(tmp_path)


def test_the_newest_of_the_steps_asked_for_is_read(run: Solve, tmp_path: Path) -> None:
    """Ranks go on from the last step that all of them have."""
    writer = Checkpointer(tmp_path, run)
    for _ in range(2):
        run.advance()
        writer.save()
    writer.wait()
    for at_most, found in ((9, 2), (2, 2), (1, 1), (0, None)):
        assert load_checkpoint(tmp_path, run, at_most) == found
        assert run.solver.step_number == (found or 1)


def test_a_checkpoint_of_another_model_is_passed_over(
    run: Solve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of fewer blocks, or of files beside the folder: nothing of it is taken."""
    folder = tmp_path / "checkpoints"
    writer = Checkpointer(folder, run)
    writer.save()
    writer.wait()
    manifest = folder / "step-0000000.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "blocks": facts["blocks"][:1]}))
    assert load_checkpoint(folder, run) is None
    assert "1 blocks instead of 2" in caplog.text
    (folder / facts["blocks"][0]["file"]).rename(tmp_path / "elsewhere.safetensors")
    facts["blocks"][0]["file"] = "../elsewhere.safetensors"
    manifest.write_text(json.dumps(facts))
    assert load_checkpoint(folder, run) is None
