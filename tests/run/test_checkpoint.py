# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is written beside the solve restores it bit for bit; a full disk leaves the last one intact."""

from __future__ import annotations

import errno
import json
import multiprocessing
import multiprocessing.process
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import DiskSpaceError
from discquant.run import checkpoint, stored
from discquant.run.checkpoint import Checkpointer, has_checkpoint, load_checkpoint
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of two blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _solve(model: Any, engine: Engine | None = None, **changes: Any) -> Solve:
    options = SolverConfig(
        **{"iters": 6, "batch_size": 2, "micro_batch": 1, "warmup": 1, "start": "ref", **changes}
    )
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=options)
    chain = DecoderChain(model)
    ids = torch.randint(3, 61, (8, 8), generator=torch.Generator().manual_seed(1))
    return Solve(chain, lay_grids(chain, config.grid), TokenRows(chain, ids, None, 1), config, engine=engine)


def _bytes(run: Solve) -> list[Tensor]:
    return [tensor.clone() for block in run.solver.states for state in block for _, tensor in state.tensors()]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("where", ["resident", "host", "disk"])
def test_steps_go_on_while_it_is_written(where: str, model: Any, tmp_path: Path) -> None:
    """The checkpoint holds the state of its step although the next steps are taken at once."""
    run = _solve(model, Engine(where, folder=tmp_path / "state"), state="u8")  # type: ignore[arg-type]
    writer = Checkpointer(tmp_path / "checkpoints", run)
    run.advance()
    at_one, gain = _bytes(run), run.solver.gain.gain
    writer.save()
    run.advance()
    writer.wait()
    assert not _same(at_one, _bytes(run))
    again = _solve(model, state="u8")
    assert load_checkpoint(tmp_path / "checkpoints", again) == 1
    assert _same(at_one, _bytes(again))
    assert (again.solver.gain.gain, again.solver.gain.initial) == (gain, run.solver.gain.initial)
    assert again.solver.gain.target == run.solver.gain.target is not None
    assert gain not in (run.solver.gain.gain, run.solver.gain.initial)
    again.advance()
    assert _same(_bytes(again), _bytes(run))
    assert writer.count == 1
    assert writer.bytes_written > 0
    assert writer.summary(10.0)["share"] == pytest.approx(writer.stalled / 10, abs=1e-4)
    run.close()


def test_a_step_waits_for_the_block_that_is_being_written(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _solve(model)
    writer = Checkpointer(tmp_path, run)
    go, real = threading.Event(), checkpoint.save_tensors_atomic

    def slow(path: Path, tensors: Any, metadata: Any) -> None:
        assert go.wait(60)
        real(path, tensors, metadata)

    monkeypatch.setattr(checkpoint, "save_tensors_atomic", slow)
    before = _bytes(run)
    writer.save()
    stepping = threading.Thread(target=run.advance)
    stepping.start()
    stepping.join(1.0)
    assert stepping.is_alive()
    assert _same(before, _bytes(run)), "a block was changed before it was written"
    go.set()
    stepping.join(60)
    writer.wait()
    assert run.solver.step_number == 1
    assert writer.stalled > 0
    again = _solve(model)
    assert load_checkpoint(tmp_path, again) == 0
    assert _same(before, _bytes(again))


def test_an_unchanged_block_is_not_written_again(model: Any, tmp_path: Path) -> None:
    run = _solve(model)
    writer = Checkpointer(tmp_path, run)
    writer.save()
    writer.wait()
    first = writer.bytes_written
    with torch.no_grad():
        run.solver.states[1][0].frac.mul_(0.5)
    run.solver.step_number = 1
    writer.save()
    writer.wait()
    assert 0 < writer.bytes_written - first < 0.7 * first
    files = [entry["file"] for entry in json.loads((tmp_path / "step-0000001.json").read_text())["blocks"]]
    assert files == ["block-0000-0000000.safetensors", "block-0001-0000001.safetensors"]
    again = _solve(model)
    assert load_checkpoint(tmp_path, again) == 1
    assert _same(_bytes(run), _bytes(again))


def test_two_are_kept_and_parts_of_killed_writes_go(model: Any, tmp_path: Path) -> None:
    run = _solve(model)
    writer = Checkpointer(tmp_path, run)
    (tmp_path / "block-0000-0000099.safetensors").write_bytes(b"part")
    (tmp_path / ".step-0000099.json.tmp").write_bytes(b"part")
    for _ in range(3):
        run.advance()
        writer.save()
    writer.wait()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.startswith("step")] == ["step-0000002.json", "step-0000003.json"]
    assert len(names) == 2 + 4


def _in_memory(folder: Path) -> dict[str, int]:
    """Bytes of each state file in `folder` that this process has in memory: what its maps hold."""
    found = {str(path): 0 for path in folder.rglob("*.state")}
    path = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            path = words[5] if len(words) > 5 else ""
        elif words[0] == "Rss:" and path in found:
            found[path] += int(words[1]) << 10
    return {Path(path).name: size for path, size in found.items()}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel does not tell what maps hold")
def test_a_checkpoint_leaves_no_state_in_memory(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On disk a block is in memory only while it is written or restored, and while its cost is found."""
    folder, state = tmp_path / "checkpoints", tmp_path / "state"
    run = _solve(model, Engine("disk", folder=state))
    run.advance()
    placement = run.solver.placement
    assert placement._lanes is not None
    for lane in placement._lanes:
        lane.wait()
    nothing = {f"block-{index:04d}.state": 0 for index in range(2)}
    assert _in_memory(state) == nothing
    seen: list[dict[str, int]] = []
    write, restore = checkpoint.save_tensors_atomic, checkpoint._restore

    def watched_write(*given: Any) -> None:
        write(*given)
        seen.append(_in_memory(state))

    def watched_restore(path: Path, digest: str, run: Solve, index: int) -> None:
        seen.append(_in_memory(state))
        restore(path, digest, run, index)

    monkeypatch.setattr(checkpoint, "save_tensors_atomic", watched_write)
    monkeypatch.setattr(checkpoint, "_restore", watched_restore)
    writer = Checkpointer(folder, run)
    writer.begin(fresh=True)
    assert _in_memory(state) == nothing
    for _ in range(2):  # the second time no block is written, for none has changed
        writer.save()
        writer.wait()
        assert _in_memory(state) == nothing
    assert [sorted(name for name, held in files.items() if held) for files in seen] == [
        ["block-0001.state"], ["block-0001.state"], ["block-0000.state"],
    ]  # fmt: skip
    seen.clear()
    assert load_checkpoint(folder, run) == 1
    assert seen == [nothing, nothing] and _in_memory(state) == nothing
    run.close()


@pytest.mark.parametrize("kind", ["block", "manifest"])
def test_a_full_disk_leaves_the_last_checkpoint(
    kind: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _solve(model)
    writer = Checkpointer(tmp_path, run)
    run.advance()
    writer.save()
    writer.wait()
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = _bytes(run)
    run.advance()
    real = stored.sync_path

    def full(path: Path) -> None:
        # The first block is written, the second finds no room.
        if (".step-" if kind == "manifest" else "-0001-") in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    monkeypatch.setattr(stored, "sync_path", full)
    writer.save()
    with pytest.raises(DiskSpaceError, match=r"No space left on device.*from the last checkpoint"):
        writer.wait()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == good
    again = _solve(model)
    assert load_checkpoint(tmp_path, again) == 1
    assert _same(kept, _bytes(again))
    monkeypatch.undo()
    writer.save()
    writer.wait()
    assert load_checkpoint(tmp_path, again) == 2


def _forked(work: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def test_kill_while_a_checkpoint_is_written_leaves_the_one_before(model: Any, tmp_path: Path) -> None:
    """kill -9 half-way through a block's file, with the solve waiting for it; the next run ends in the same bytes."""
    run = _solve(model)
    folder, reached = tmp_path / "checkpoints", tmp_path / "reached"

    def work() -> None:
        torch.set_num_threads(1)
        writer = Checkpointer(folder, run)
        run.advance()
        writer.save()
        writer.wait()
        run.advance()
        real = stored.tensor_bytes
        pieces: list[int] = []

        def stuck(tensor: Tensor) -> memoryview:
            pieces.append(tensor.numel())
            if len(pieces) == 30:  # in the second block's file: a block has 7 weights of 3 tensors each
                reached.touch()
                time.sleep(600)
            return real(tensor)

        stored.tensor_bytes = stuck
        writer.save()
        run.advance()

    process = _forked(work)
    deadline = time.monotonic() + 120
    while not reached.exists() and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.02)
    assert reached.exists()
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    names = {path.name for path in folder.iterdir()}
    assert "block-0001-0000002.safetensors" in names and ".block-0000-0000002.safetensors.tmp" in names
    again, whole = _solve(model), _solve(model)
    assert load_checkpoint(folder, again) == 1
    writer = Checkpointer(folder, again)
    for _ in range(2):
        again.advance()
        writer.save()
    writer.wait()
    for _ in range(3):
        whole.advance()
    assert _same(_bytes(again), _bytes(whole))
    left = sorted(path.name for path in folder.iterdir())
    assert [name for name in left if name.startswith("step")] == ["step-0000002.json", "step-0000003.json"]
    assert len(left) == 2 + 4


def test_a_file_system_that_takes_no_more_leaves_the_last_checkpoint(model: Any, tmp_path: Path) -> None:
    """No room for real, by the system's limit on the size of a file, in the middle of a block's file."""
    run = _solve(model)
    said = tmp_path / "said"

    def work() -> None:
        torch.set_num_threads(1)
        folder = tmp_path / "checkpoints"
        writer = Checkpointer(folder, run)
        run.advance()
        writer.save()
        writer.wait()
        size = min(path.stat().st_size for path in folder.glob("block-*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
        run.advance()
        writer.save()
        try:
            writer.wait()
        except DiskSpaceError as error:
            message = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            said.write_text(message)

    process = _forked(work)
    process.join(120)
    assert process.exitcode == 0
    assert "from the last checkpoint" in said.read_text()
    assert not list((tmp_path / "checkpoints").glob(".*"))
    again, whole = _solve(model), _solve(model)
    assert load_checkpoint(tmp_path / "checkpoints", again) == 1
    whole.advance()
    assert _same(_bytes(again), _bytes(whole))


def test_other_errors_of_the_writer_arrive_too(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _solve(model)
    writer = Checkpointer(tmp_path, run)

    def broken(*args: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(checkpoint, "save_tensors_atomic", broken)
    writer.save()
    run.advance()  # not held up for ever
    with pytest.raises(PermissionError, match="read-only"):
        writer.wait()
    assert not has_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest"])
def test_damage_falls_back_to_the_one_before(damage: str, model: Any, tmp_path: Path) -> None:
    run = _solve(model)
    writer = Checkpointer(tmp_path, run)
    for _ in range(2):
        run.advance()
        writer.save()
    writer.wait()
    victim = tmp_path / ("step-0000002.json" if damage == "manifest" else "block-0001-0000002.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
        victim.write_bytes(bytes(content))
    elif damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(bytes(content[:50]))
    again = _solve(model)
    assert load_checkpoint(tmp_path, again) == 1
    assert again.advance().step == 2
    assert _same(_bytes(again), _bytes(run))


def test_paced_by_what_it_costs(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first as one block costs, later ones as the last one did; never sooner than the least spacing."""
    now, real = [0.0], checkpoint.save_tensors_atomic

    def slow(*given: Any) -> None:
        now[0] += 1.5
        real(*given)

    monkeypatch.setattr(checkpoint, "save_tensors_atomic", slow)
    run, folder, first = _solve(model), tmp_path / "checkpoints", checkpoint.SPACING
    writer = Checkpointer(folder, run, clock=lambda: now[0])
    writer.begin(fresh=True)
    assert not list(folder.iterdir()) and (writer.count, writer.stalled) == (0, 1.5)
    for step in (first, 2 * first):
        assert writer.cost == 3.0  # two equal blocks
        run.solver.step_number = step
        for states in run.solver.states:
            states[0].frac.mul_(0.5)  # an unchanged block would cost nothing
        now[0] += 3.0 * (1 / checkpoint.SHARE - 1) - 0.1
        assert not writer.due(step)
        now[0] += 0.2
        assert writer.due(step) and not writer.due(step - 1)
        writer.save()
        writer.wait()
    assert writer.busy == 6.0 and writer.summary(240.0)["every"] is None
    resumed = _solve(model)
    assert load_checkpoint(folder, resumed) == 2 * first
    again = Checkpointer(folder, resumed, clock=lambda: now[0])
    again.begin(fresh=False)
    now[0] += 1000
    assert not again.due(3 * first - 1) and again.due(3 * first)


def test_a_schedule_that_was_asked_for_is_exact(model: Any, tmp_path: Path) -> None:
    writer = Checkpointer(tmp_path, _solve(model), 3)
    writer.cost = 1e9
    assert [step for step in range(1, 10) if writer.due(step)] == [3, 6, 9]
    writer.begin(fresh=True)
    writer.wait()
    assert (tmp_path / "step-0000000.json").exists() and writer.summary(1.0)["every"] == 3
    writer.begin(fresh=False)
    assert writer.count == 1


def test_another_version_is_told(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = _solve(model)
    writer = Checkpointer(tmp_path, run)
    writer.save()
    writer.wait()
    manifest = tmp_path / "step-0000000.json"
    facts = json.loads(manifest.read_text())
    del facts["version"]
    manifest.write_text(json.dumps(facts))
    assert load_checkpoint(tmp_path, _solve(model)) is None
    assert "version 1, this discquant reads 2" in caplog.text


def test_digest_sees_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit of any piece, pieces that changed places, other shapes and names; threads change nothing."""
    monkeypatch.setattr(checkpoint, "PIECE", 64)
    tensors = {"a": torch.arange(100, dtype=torch.int32), "b": torch.arange(7.0), "empty": torch.zeros(0)}
    first = checkpoint._digest(tensors)
    others = [{**tensors, "a": tensors["a"].clone()} for _ in range(100)]
    for place, other in enumerate(others):
        other["a"][place] ^= 1 << 30
    swapped = tensors["a"].clone()
    swapped[:16], swapped[16:32] = tensors["a"][16:32], tensors["a"][:16]
    others += [{**tensors, "a": swapped}, {**tensors, "a": tensors["a"].view(10, 10)}]
    others += [{"c" if name == "a" else name: tensor for name, tensor in tensors.items()}]
    assert len({first, *map(checkpoint._digest, others)}) == 1 + len(others)
    monkeypatch.setattr(checkpoint, "HASHERS", 1)
    assert checkpoint._digest(tensors) == first
