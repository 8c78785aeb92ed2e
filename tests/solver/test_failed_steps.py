# SPDX-License-Identifier: Apache-2.0
"""A failed step leaves no trace where the state is streamed: the next ones are those of a run that never failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids
from discquant.solver.solver import NonFiniteGradientError


class Poison(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return a copy."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return NaN."""
        return grad * torch.nan


def _solve(chain: DecoderChain, engine: Engine) -> Solve:
    options = SolverConfig(iters=4, batch_size=4, micro_batch=2, warmup=1, state="u8", start="ref")
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=options)
    ids = torch.randint(3, 61, (8, 12), generator=torch.Generator().manual_seed(1))
    return Solve(chain, lay_grids(chain, config.grid), TokenRows(chain, ids, None, 2), config, engine=engine)


def _bytes(run: Solve) -> dict[str, Tensor]:
    return {
        f"{state.name}.{key}": tensor.clone()
        for block in run.solver.states
        for state in block
        for key, tensor in state.tensors()
    }


@pytest.mark.parametrize("where", ["host", "disk"])
def test_the_next_steps_are_those_of_an_undisturbed_run(
    where: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Blocks 3 and 2 had stepped on the device: what is left of them there must not be read again."""
    chain = DecoderChain(make_model("llama", torch.float32))
    undisturbed, run = _solve(chain, Engine()), _solve(chain, Engine(where, folder=tmp_path))  # type: ignore[arg-type]
    assert run.advance() == undisturbed.advance()
    module = chain.blocks[0].mlp.down_proj
    hook = module.register_forward_pre_hook(lambda module, args: (Poison.apply(args[0]),))
    with pytest.raises(NonFiniteGradientError, match=r"model\.layers\.0\..*as it was before"):
        run.advance()
    hook.remove()
    for _ in range(2):
        assert run.advance() == undisturbed.advance()
        found = _bytes(run)
        assert all(torch.equal(tensor, found[key]) for key, tensor in _bytes(undisturbed).items())
    run.close()
