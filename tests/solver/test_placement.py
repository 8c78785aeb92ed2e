# SPDX-License-Identifier: Apache-2.0
"""Where the state lives changes no bit: resident, host and disk give the same state, codes and records."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import ConfigError, DiskSpaceError
from discquant.grids import UniformGrid, place_grid
from discquant.solver import memory
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.memory import HostArena, MappedFile
from discquant.solver.placement import Lane, Placement
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids
from discquant.solver.state import WeightState


def _solve(
    make_model: Callable[..., Any], engine: Engine, ignore: tuple[str, ...] = (), **changes: Any
) -> tuple[Solve, list[float]]:
    """Four steps on a chain of six blocks, twice as many as slots; also the loss of each."""
    options = {"iters": 4, "batch_size": 4, "micro_batch": 2, "warmup": 2, **changes}
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=SolverConfig(**options), gptq_samples=4)
    chain = DecoderChain(make_model("llama-six-blocks", torch.float32), ignore)
    ids = torch.randint(3, 61, (12, 12), generator=torch.Generator().manual_seed(1))
    run = Solve(chain, lay_grids(chain, config.grid), TokenRows(chain, ids, None, 2), config, engine=engine)
    losses = []
    while not run.done:
        losses.append(run.advance().loss)
    return run, losses


def _bytes(run: Solve) -> dict[str, Tensor]:
    return {
        f"{state.name}.{key}": tensor.clone()
        for block in run.solver.states
        for state in block
        for key, tensor in state.tensors()
    }


@pytest.mark.parametrize(
    ("state", "optimizer", "teacher", "start"),
    [
        ("fp32", "adamw", "weights", "gptq"),
        ("u8", "momentum", "state", "gptq"),
        ("u8", "adamw", "weights", "ref"),
        ("bf16", "lion", "state", "random"),
    ],
)
def test_same_bytes_everywhere(
    state: str, optimizer: str, teacher: str, start: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"state": state, "optimizer": optimizer, "teacher": teacher, "start": start}
    options["scale_iters"] = 0 if state == "fp32" else 2
    expected, losses = _solve(make_model, Engine(), **options)
    for where, activations in (("host", "resident"), ("host", "host"), ("disk", "disk")):
        engine = Engine(where, activations, folder=tmp_path / where)  # type: ignore[arg-type]
        run, found = _solve(make_model, engine, **options)
        assert found == losses
        for key, tensor in _bytes(expected).items():
            assert torch.equal(tensor, _bytes(run)[key]), (where, key)
        codes = run.codes()
        assert all(torch.equal(q, codes[name]) for name, q in expected.codes().items())
        grids = run.grids()
        assert all(torch.equal(grid.scale, grids[name].scale) for name, grid in expected.grids().items())
        assert run.solver.placement.bytes_in > run.solver.placement.bytes_out > 0
        assert run.solver.placement.slot_bytes < 0.6 * run.solver.placement.nbytes
        run.close()
        assert not list((tmp_path / where).rglob("*.state"))
        assert not list((tmp_path / where).rglob("*.act"))


@pytest.mark.parametrize("where", ["resident", "host", "disk"])
def test_scales_exist_once(where: str, make_model: Callable[..., Any], tmp_path: Path) -> None:
    """The grids that were laid become views of the state, and keep it alive; a copy of one does not."""
    options = SolverConfig(
        iters=1, batch_size=2, micro_batch=2, state="u8", optimizer="momentum", start="ref"
    )
    config = QuantizeConfig(grid=GridConfig(3, 32, False), solver=options)
    chain = DecoderChain(make_model("llama", torch.float32))
    grids, expected = lay_grids(chain, config.grid), lay_grids(chain, config.grid)
    rows = TokenRows(chain, torch.randint(3, 61, (4, 12)), None, 2)
    run = Solve(chain, grids, rows, config, engine=Engine(where, where, folder=tmp_path))  # type: ignore[arg-type]
    run.advance()
    run.close()
    for block in run.solver.placement.homes():
        for state in block.states:
            shared, laid = grids[state.name], expected[state.name]
            assert isinstance(shared, UniformGrid) and isinstance(laid, UniformGrid)
            assert laid.zero_point is not None and shared.zero_point is not None
            assert torch.equal(shared.scale, laid.scale) and torch.equal(shared.zero_point, laid.zero_point)
            inside = range(block.blob.data_ptr(), block.blob.data_ptr() + block.nbytes)
            assert shared.scale.data_ptr() in inside and shared.zero_point.data_ptr() in inside
            apart = shared.copied()
            assert torch.equal(apart.scale, laid.scale) and apart.scale.data_ptr() not in inside


@pytest.mark.parametrize("dense", [(0,), (0, 1, 4), (5,)])
def test_blocks_without_weights_everywhere(
    dense: tuple[int, ...], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Blocks that nobody quantizes have an empty state; also with layers that run on the state."""
    ignore = tuple(f"model.layers.{index}.*" for index in dense)
    options = {"state": "u8", "curvature": 16.0, "curvature_width": 16}
    expected, losses = _solve(make_model, Engine(), ignore, **options)
    for where in ("host", "disk"):
        run, found = _solve(make_model, Engine(where, where, folder=tmp_path / where), ignore, **options)  # type: ignore[arg-type]
        assert found == losses
        assert all(torch.equal(tensor, _bytes(run)[key]) for key, tensor in _bytes(expected).items())
        run.close()
    chain = expected.chain
    expected.solver.soft = True
    before = _bytes(expected)
    expected.solver.step(expected.rows.batches(range(4)))
    assert any(not torch.equal(tensor, before[key]) for key, tensor in _bytes(expected).items())
    assert chain.first == (2 if 1 in dense else 1 if 0 in dense else 0)


def test_a_failed_step_is_taken_back_in_streamed_state(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    from discquant.solver.solver import NonFiniteGradientError

    options = {"iters": 4, "batch_size": 4, "micro_batch": 2, "warmup": 2, "state": "u8"}
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=SolverConfig(**options), gptq_samples=4)
    chain = DecoderChain(make_model("llama", torch.float32))
    ids = torch.randint(3, 61, (12, 12), generator=torch.Generator().manual_seed(1))
    engine = Engine("disk", "disk", folder=tmp_path)
    run = Solve(chain, lay_grids(chain, config.grid), TokenRows(chain, ids, None, 2), config, engine=engine)
    run.advance()
    before = _bytes(run)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.nan

    hook = chain.blocks[0].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: (Poison.apply(args[0]),)
    )
    with pytest.raises(NonFiniteGradientError, match=r"model\.layers\.0\..*as it was before"):
        run.advance()
    hook.remove()
    after = _bytes(run)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert run.advance().step == 2
    run.close()


def test_a_full_disk_is_told_before_the_solve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskSpaceError, match="has no room for 10000 bytes"):
        MappedFile(tmp_path / "x.state", 10_000)
    assert not (tmp_path / "x.state").exists()


def test_an_arena_is_as_long_as_asked() -> None:
    arena = HostArena(12345, pin=False)
    assert arena.tensor.numel() == 12345
    assert arena.problem is None
    assert int(arena.tensor.sum()) == 0


def _mapping(address: int) -> tuple[str, set[str]]:
    """Permissions and flags of the mapping that holds an address."""
    permissions, here = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            begin, end = (int(bound, 16) for bound in words[0].split("-"))
            here, permissions = begin <= address < end, words[1]
        elif here and words[0] == "VmFlags:":
            return permissions, set(words[1:])
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel does not tell its mappings")
def test_an_arena_may_have_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of its own, for shared memory gets them by another switch, which is off; a pinned one is not forked."""
    arena = HostArena(4 << 20, pin=False)
    permissions, flags = _mapping(arena.tensor.data_ptr())
    assert permissions == "rw-p" and "dc" not in flags
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags

    class Runtime:
        def cudaHostRegister(self, base: int, size: int, flags: int) -> int:
            return 0

        def cudaHostUnregister(self, base: int) -> int:
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    pinned = HostArena(4 << 20, pin=True)
    assert "dc" in _mapping(pinned.tensor.data_ptr())[1]


@pytest.mark.parametrize("gpu", [False, True])
def test_a_block_that_kept_its_slot_is_changed_after_it_has_left(
    gpu: bool, streams: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no more blocks than slots none is loaded again: the step before may still be on its way home."""
    weight = torch.randn(8, 32)
    grid = place_grid(weight, GridConfig(3, 32))
    placement = Placement("host")
    if gpu:
        placement._lanes = (Lane(torch.device("cuda")), Lane(torch.device("cuda")))
    for index in range(2):
        placement.add([WeightState(f"w{index}", grid, weight, None, state="u8", optimizer="sgd")])
    placement.fetch(0)
    leave, waited = threading.Event(), []
    _, outward = placement._engines()
    outward.submit(lambda: leave.wait(60) and None)
    placement.write_back(0)
    sent = placement._sent[0]
    placement.fetch(0)  # to be read: both may read at once
    assert not sent.done()
    changing = threading.Thread(target=lambda: placement.fetch(0, change=True))
    monkeypatch.setattr(
        type(streams[0]), "wait_event", lambda _, event: waited.append(event)
    ) if gpu else None
    changing.start()
    changing.join(0.2)
    assert changing.is_alive()
    leave.set()
    changing.join(60)
    assert not changing.is_alive() and sent.done()
    assert not gpu or sent.result() in waited
    placement.close()


def test_unknown_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="placement must be one of"):
        Engine("moon")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="activations must be one of"):
        Engine(activations="moon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="folder must be given"):
        Placement("disk")


def test_auto_is_settled_by_a_plan() -> None:
    with pytest.raises(ConfigError, match="settled by a run's plan"):
        Engine("auto").placement()


def test_arena_is_registered_whole_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One registration each, however large: copies never cross a seam; dropping the arena undoes it."""
    known: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, base: int, size: int, flags: int) -> int:
            known[base] = size
            return 0

        def cudaHostUnregister(self, base: int) -> int:
            del known[base]
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    large = (3 << 30) + 17  # never touched: no memory behind it
    arena = HostArena(large, pin=True)
    assert arena.problem is None and known == {arena.tensor.data_ptr(): large}
    arena.close()
    arena.close()
    assert not known
    dropped = HostArena(4096, pin=True)
    assert len(known) == 1
    del dropped
    assert not known


@pytest.mark.parametrize("broken", [False, True])
def test_a_refused_registration_leaves_no_error_behind(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime keeps the error of a failed call for the thread's next launch; that of a broken device stays."""
    kept: list[str] = []

    class Runtime:
        def cudaHostRegister(self, base: int, size: int, flags: int) -> int:
            kept.append("illegal address" if broken else "out of memory")
            return 2

    def launch() -> None:
        if kept:
            raise RuntimeError(kept[0] if broken else kept.pop())

    def synchronize() -> None:
        if broken:
            raise RuntimeError(kept[0])

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(memory, "_launch", launch, raising=False)
    if broken:
        with pytest.raises(RuntimeError, match="illegal address"):
            HostArena(4096, pin=True)
        return
    refused = HostArena(4096, pin=True)
    assert refused.problem == "cudaHostRegister of 4096 bytes failed with error 2"
    refused.close()
    launch()


def test_nothing_is_let_go_under_a_copy(streams: list[Any]) -> None:
    weight = torch.randn(8, 32)
    grid = place_grid(weight, GridConfig(3, 32))
    placement = Placement("host")
    placement._lanes = (Lane(torch.device("cuda")), Lane(torch.device("cuda")))
    for index in range(2):
        placement.add([WeightState(f"w{index}", grid, weight, None, state="u8", optimizer="sgd")])
    placement.fetch(0)  # begins to load the next one
    placement.close()
    assert not any(stream.under_way for stream in streams)
