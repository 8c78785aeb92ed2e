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
from discquant.solver.sampled import label_generator, sampled_gradient
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


@pytest.mark.parametrize("always", [True, False])
def test_an_input_that_is_changed_in_place_gives_no_factors(
    always: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What the layer got is gone when its gradient comes; those of a part of the text would be no factors of it."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.out = (torch.nn.Linear(8, size) for size in (8, 8, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden, found = (made := torch.tanh(self.one(x)) + 0), self.two(made)
            return self.out(hidden.add_(found) if always or x[0, 0] > 0 else hidden + found)

    chain, found = ModuleChain(Net()), dict[str, Factors]()
    inputs = torch.randn(16, 8)
    inputs[::8, 0] = torch.tensor([1.0, -1.0])
    batches = TokenRows(chain, inputs, None, 8).batches(range(16))
    generator = label_generator(torch.device("cpu"), 0)
    kronecker_factors(
        chain, batches, lambda index, factors: found.update(factors), total=16, width=64, generator=generator
    )
    assert set(found) == {"one", "out"}
    assert "the input of two in place" in caplog.text


def test_factors_of_a_narrow_model_are_wide() -> None:
    """Its gradients are bfloat16; squares and sums of them are not, for the factors are what all steps go by."""
    torch.manual_seed(0)
    chain, found = ModuleChain(torch.nn.Sequential(torch.nn.Linear(8, 5)).bfloat16()), dict[str, Factors]()
    batch = chain.prepare(torch.randn(64, 8).bfloat16())
    kronecker_factors(
        chain, [batch], lambda index, factors: found.update(factors), total=64, width=16,
        generator=label_generator(torch.device("cpu"), 3),
    )  # fmt: skip
    output = chain.teacher_output(batch)
    g = sampled_gradient(chain, batch, output, label_generator(torch.device("cpu"), 3)).float()
    x, energy = batch.hidden.float(), g.square().sum(dim=1, keepdim=True)
    torch.testing.assert_close(found["0"].outputs[0], g.T @ g / 64)
    torch.testing.assert_close(found["0"].inputs[0], x.T @ (energy * x) / 64)


def test_no_hook_is_left(make_model: Callable[..., Any], token_ids: torch.Tensor) -> None:
    """Nor is one after an error: every step of the solve would run it."""
    chain = DecoderChain(make_model("llama", torch.float32))
    batches = TokenRows(chain, token_ids, None, 2).batches(range(4))

    def gather() -> None:
        generator = label_generator(chain.device, 0)
        kronecker_factors(chain, batches, lambda *_: None, total=48, width=64, generator=generator)

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in chain.model.modules())

    gather()
    assert hooks() == 0

    def fail(module: torch.nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            raise MemoryError

    broken = chain.blocks[1].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        gather()
    broken.remove()
    assert hooks() == 0


def test_factors_are_those_of_the_teacher(make_model: Callable[..., Any], token_ids: torch.Tensor) -> None:
    """Weights that the state holds in place of the model's own: what the model itself would give with them."""
    chain = DecoderChain(make_model("llama", torch.float64))
    batches = TokenRows(chain, token_ids, None, 2).batches(range(4))
    halves = [{ref.param_name: ref.parameter.detach() / 2 for ref in refs} for refs in chain.weights]

    def gather(**given: Any) -> dict[str, Factors]:
        found: dict[str, Factors] = {}
        generator = label_generator(chain.device, 0)
        kronecker_factors(
            chain, batches, lambda _, f: found.update(f), total=48, width=64, generator=generator, **given
        )
        return found

    own, found = gather(), gather(teacher=halves.__getitem__)
    with torch.no_grad():
        for refs in chain.weights:
            for ref in refs:
                ref.parameter.div_(2)
    expected = gather()
    for name, factors in expected.items():
        torch.testing.assert_close(found[name].outputs, factors.outputs)
        torch.testing.assert_close(found[name].inputs, factors.inputs)
        assert not torch.allclose(own[name].outputs, factors.outputs)
