# SPDX-License-Identifier: Apache-2.0
"""A checkpoint read into streamed state counts also where a block lies on the compute device already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.run.checkpoint import Checkpointer, load_checkpoint
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids


def _solve(chain: DecoderChain, engine: Engine | None = None) -> Solve:
    options = SolverConfig(iters=6, batch_size=2, micro_batch=1, warmup=1, start="ref", state="u8")
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=options)
    ids = torch.randint(3, 61, (8, 8), generator=torch.Generator().manual_seed(1))
    return Solve(chain, lay_grids(chain, config.grid), TokenRows(chain, ids, None, 1), config, engine=engine)


def _bytes(run: Solve) -> list[Tensor]:
    return [tensor.clone() for block in run.solver.states for state in block for _, tensor in state.tensors()]


@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_block_on_the_device_is_loaded_anew(where: str, chain: DecoderChain, tmp_path: Path) -> None:
    """The gain was measured on it, say: the next step goes on from the checkpoint, not from those bytes."""
    folder = tmp_path / "checkpoints"
    first = _solve(chain)
    for _ in range(2):
        first.advance()
    writer = Checkpointer(folder, first)
    writer.save()
    writer.wait()
    resident, streamed = _solve(chain), _solve(chain, Engine(where, folder=tmp_path / "state"))  # type: ignore[arg-type]
    streamed.solver.placement.fetch(0)
    for run in (resident, streamed):
        assert load_checkpoint(folder, run) == 2
    expected = first.advance()
    assert resident.advance() == streamed.advance() == expected
    found = [_bytes(run) for run in (first, resident, streamed)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    streamed.close()
