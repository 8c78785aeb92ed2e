# SPDX-License-Identifier: Apache-2.0
"""Curvature factors of a whole solve: gathered in parts, scaled by the tokens of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.solver import solve
from discquant.solver.chain import DecoderChain
from discquant.solver.curvature import Factors, kronecker_factors
from discquant.solver.kronecker import unpack_triangles
from discquant.solver.module_chain import ModuleChain
from discquant.solver.rows import TokenRows
from discquant.solver.sampled import label_generator
from discquant.solver.solve import Solve, lay_grids


def test_parts_are_scaled_by_the_tokens_of_all(make_model: Callable[..., Any]) -> None:
    """Eight rows, two at a time, of which some are masked: what one pass over all of them finds."""
    chain = DecoderChain(make_model("llama", torch.float32))
    ids = torch.randint(3, 61, (10, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 3:] = False
    options = SolverConfig(
        iters=4, batch_size=2, micro_batch=2, start="ref", curvature=16.0, curvature_samples=8, state="fp32"
    )
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=options)
    rows = TokenRows(chain, ids, mask, 2)
    assert solve.rows_at_once(8, 2) == 2
    run = Solve(chain, lay_grids(chain, config.grid), rows, config)
    found = {state.name: state for states in run.solver.states for state in states}
    # Labels are drawn micro-batch by micro-batch, so that one pass draws the same.
    expected: dict[str, Any] = {}
    kronecker_factors(
        chain, rows.batches(range(8)), lambda index, factors: expected.update(factors),
        total=int(mask[:8].sum()), width=options.curvature_width,
        generator=label_generator(chain.device, config.seed + 29),
    )  # fmt: skip
    assert expected.keys() == found.keys()
    for name, factors in expected.items():
        # In the state the inputs' factor is divided by the energy of all gradients.
        energy = torch.diagonal(factors.outputs, dim1=1, dim2=2).sum()
        for wanted, packed in (
            (factors.inputs / energy, found[name].curvature_in), (factors.outputs, found[name].curvature_out),
        ):  # fmt: skip
            assert packed is not None
            torch.testing.assert_close(unpack_triangles(packed), wanted.float(), rtol=1e-4, atol=1e-6)


def test_an_input_that_is_changed_in_place_gives_no_factors(caplog: pytest.LogCaptureFixture) -> None:
    """What the layer got is gone when its gradient comes."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.out = (torch.nn.Linear(8, size) for size in (8, 8, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.one(x)) + 0
            return self.out(hidden.add_(self.two(hidden)))

    chain, found = ModuleChain(Net()), dict[str, Factors]()
    batches = TokenRows(chain, torch.randn(16, 8), None, 8).batches(range(16))
    generator = label_generator(torch.device("cpu"), 0)
    kronecker_factors(
        chain, batches, lambda index, factors: found.update(factors), total=16, width=64, generator=generator
    )
    assert set(found) == {"one", "out"}
    assert "the input of two in place" in caplog.text
