# SPDX-License-Identifier: Apache-2.0
"""Ranks share a step's micro-batches and give the bytes of one; the sums are a binary tree over micro-batches."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import ConfigError, RankLostError
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.ranks import Ranks, TreeSum
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids


def _run(model: Any, ranks: Ranks, loss: str, out: Path, die_at: int | None) -> None:
    options = SolverConfig(
        iters=2,
        scale_iters=2,
        batch_size=8,
        micro_batch=2,
        warmup=1,
        loss=loss,
        state="u8",
        optimizer="momentum",  # type: ignore[arg-type]
    )
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=options, gptq_samples=4)
    chain = DecoderChain(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (12, 10), generator=generator)
    mask = torch.rand(12, 10, generator=generator) > 0.2
    rows = TokenRows(chain, ids, mask, 2)
    run = Solve(chain, lay_grids(chain, config.grid), rows, config, engine=Engine(ranks=ranks))
    losses = []
    while not run.done:
        if die_at == run.solver.step_number and ranks.rank == ranks.world - 1:
            os._exit(9)  # as a killed process: no goodbye
        losses.append(run.advance().loss)
    tensors = {
        f"{state.name}.{key}": tensor.clone()  # views of one blob
        for block in run.solver.states
        for state in block
        for key, tensor in state.tensors()
    }
    torch.save(
        (tensors, run.codes(), losses, run.solver.gain.gain),
        out / f"{ranks.rank}.pt",
    )


def _child(rank: int, world: int, model: Any, loss: str, out: Path, die_at: int | None) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name need not resolve here
        store = dist.FileStore(str(out / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        _run(model, Ranks(rank, world), loss, out, die_at)
    except RankLostError as error:
        (out / f"{rank}.lost").write_text(str(error))


def _processes(world: int, model: Any, loss: str, out: Path, die_at: int | None = None) -> list[int | None]:
    """Run `world` forked processes (nothing is imported again); return their exit codes."""
    out.mkdir()
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_child, args=(rank, world, model, loss, out, die_at)) for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    alive = [process for process in started if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, "a rank hangs"
    return [process.exitcode for process in started]


@pytest.mark.parametrize(("loss", "worlds"), [("kl", (2, 4)), ("mse", (4,))])
def test_ranks_give_the_bytes_of_one(
    loss: str, worlds: tuple[int, ...], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model("llama", torch.float32)
    assert _processes(1, model, loss, tmp_path / "1") == [0]
    expected = torch.load(tmp_path / "1" / "0.pt")
    for world in worlds:
        folder = tmp_path / str(world)
        assert _processes(world, model, loss, folder) == [0] * world
        for rank in range(world):
            found = torch.load(folder / f"{rank}.pt")
            for one, other in zip(expected[:2], found[:2], strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[key], other[key]) for key in one), (world, rank)
            assert found[2:] == expected[2:]


def test_a_lost_rank_stops_the_others(make_model: Callable[..., Any], tmp_path: Path) -> None:
    codes = _processes(2, make_model("llama", torch.float32), "kl", tmp_path / "2", die_at=1)
    assert codes == [0, 9]
    assert "another rank stopped" in (tmp_path / "2" / "0.lost").read_text()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_tree_order(count: int) -> None:
    """The sum is that of a binary tree over aligned indices, whoever owns the subtrees."""
    values = [torch.randn(7) * 10.0 ** float(torch.randint(-3, 4, ())) for _ in range(count)]

    def tree(begin: int, size: int) -> Tensor | None:
        if begin >= count:
            return None
        if size == 1:
            return values[begin]
        left, right = tree(begin, size // 2), tree(begin + size // 2, size // 2)
        assert left is not None
        return left if right is None else left + right

    whole = 1 << max(0, count - 1).bit_length()
    expected = tree(0, whole)
    assert expected is not None
    found = TreeSum()
    for value in values:
        found.add({"w": value.clone()})
    assert torch.equal(found.total()["w"], expected)
    assert found.total() == {}


def test_a_tree_holds_few_sums() -> None:
    tree = TreeSum()
    for _ in range(64):
        tree.add({"w": torch.ones(1)})
        assert len(tree._parts) <= 7
    assert float(tree.total()["w"]) == 64


def test_spans_are_aligned_subtrees() -> None:
    assert [Ranks(rank, 4).span(8) for rank in range(4)] == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert [Ranks(rank, 2).span(6) for rank in range(2)] == [range(4), range(4, 6)]
    assert Ranks().span(3) == range(3)
    with pytest.raises(ConfigError, match="smaller --micro-batch or fewer ranks"):
        Ranks(0, 4).span(2)
    with pytest.raises(ConfigError, match="power of two, got 3"):
        Ranks(0, 3)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (
            "[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:99. This is typically caused by "
            "a remote worker crashing.",
            "Connection closed by peer [127.0.0.1]:99",
        ),
        ("[127.0.0.1]:99 timed out\nat frame 1", "[127.0.0.1]:99 timed out"),
        ("", "RuntimeError"),
    ],
)
def test_a_lost_rank_is_told_in_few_words(told: str, reason: str) -> None:
    with pytest.raises(RankLostError) as caught, Ranks(0, 2)._together():
        raise RuntimeError(told)
    words = f"another rank stopped or cannot be reached ({reason}); the same command continues"
    assert str(caught.value) == f"ranks: {words}"
