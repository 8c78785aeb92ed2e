# SPDX-License-Identifier: Apache-2.0
"""Steps that move scales: their gradient is autograd's, their update torch's, and the codes stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import FREE_SCALES, GRID_KINDS, GridConfig, QuantizeConfig, SolverConfig, preset
from discquant.grids import UniformGrid, place_grid
from discquant.grids.uniform import MOST_RESCALED
from discquant.solver import solver as solver_module
from discquant.solver.chain import DecoderChain
from discquant.solver.measure import mean_kl, served_weights
from discquant.solver.rows import TokenRows
from discquant.solver.scale_step import BETAS, EPSILON, WARMUP, scale_gradient, scale_lr, scale_step_
from discquant.solver.soft_block import SoftWeights
from discquant.solver.solve import Solve, lay_grids
from discquant.solver.solver import NonFiniteGradientError


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_gradient_is_autograds(group_size: int, sym: bool) -> None:
    """Of any function of the served weight; 72 columns leave a short last group."""
    weight, direction = torch.randn(5, 72), torch.randn(5, 72)
    grid = place_grid(weight, GridConfig(3, group_size, sym))
    assert isinstance(grid, UniformGrid)
    q = torch.randint(0, 8, (5, 72)).to(torch.uint8)
    change = torch.zeros_like(grid.scale, dtype=torch.float64, requires_grad=True)
    size = 72 if group_size == -1 else group_size
    column = torch.arange(72) // size
    zero = 4.0 if grid.zero_point is None else grid.zero_point.double()[:, column]
    served = (grid.scale.double() * (1 + change))[:, column] * (q.double() - zero)
    (expected,) = torch.autograd.grad((served.sin() * direction).sum(), change)
    grad = (served.detach().cos() * direction).float()
    found = scale_gradient(grid, q, grad)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_groups_that_are_not_contiguous_are_refused() -> None:
    grid = UniformGrid(4, 8, True, torch.ones(2, 2), g_idx=torch.tensor([0, 1] * 8))
    with pytest.raises(ValueError, match="grid must be uniform, of contiguous groups"):
        scale_gradient(grid, torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 16))


@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_update_is_adams(size: float) -> None:
    """Also where gradients are tiny, as each of a billion groups' is; a gradient of zero moves nothing."""
    wanted = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.Adam([wanted], lr=1.0, betas=BETAS, eps=EPSILON)
    change, momentum, second = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4)
    for step in range(1, 9):
        grad = torch.randn(3, 4) * size
        grad[0, 0] = 0.0
        optimizer.param_groups[0]["lr"] = lr = 1e-3 * step
        wanted.grad = grad.clone()
        optimizer.step()
        scale_step_(change, momentum, second, grad, lr=lr, step=step)
    torch.testing.assert_close(change, wanted.detach(), rtol=1e-4, atol=1e-9)
    assert change[0, 0] == 0 and change.abs().max() > 1e-3


def test_a_change_stops_at_what_a_grid_takes() -> None:
    """Not only there, where it is cut: it would wind up, and take as long to come back when the gradient turns."""
    change, momentum, second = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)
    for step in range(1, 31):
        scale_step_(change, momentum, second, torch.tensor([[1.0, -1.0]]), lr=0.1, step=step)
    assert change.tolist() == [[-MOST_RESCALED, MOST_RESCALED]]


def test_learning_rate() -> None:
    config = SolverConfig(iters=8, scale_iters=256)
    rates = [scale_lr(config, step) for step in range(1, 257)]
    assert rates[0] == pytest.approx(config.scale_lr / WARMUP) and max(rates) <= config.scale_lr
    assert rates.index(max(rates)) == WARMUP - 1 and rates[-1] < 1e-4 * config.scale_lr
    assert [scale_lr(SolverConfig(scale_iters=1), 1)] == [config.scale_lr]


def _solve(make_model: Callable[..., Any], solver: SolverConfig, **changes: Any) -> tuple[Solve, TokenRows]:
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=solver, gptq_samples=4)
    chain = DecoderChain(make_model("llama", torch.float32))
    ids = torch.randint(3, 61, (8, 12), generator=torch.Generator().manual_seed(1))
    rows = TokenRows(chain, ids, None, 2)
    run = Solve(chain, lay_grids(chain, config.grid), rows, config, **changes)
    while not run.done:
        run.advance()
    return run, rows


def _kl(run: Solve, rows: TokenRows, grids: Any) -> float:
    served = served_weights(run.chain, grids, run.codes(), torch.float32, torch.float32)
    return mean_kl(run.chain, served, rows.batches(range(len(rows))))


@pytest.mark.parametrize("name", ["default", "paper"])
@pytest.mark.parametrize("state", ["fp32", "u8"])
def test_codes_stay_and_the_loss_falls(state: str, name: str, make_model: Callable[..., Any]) -> None:
    """The codes are those of the same solve without; scales are numbers of the file's dtype, near to where they were.

    The published recipe leaves coordinates between their neighbours: they are rounded before the scales move.
    """
    options = dataclasses.replace(
        preset(name, GridConfig(3, 32)), iters=6, batch_size=4, micro_batch=2, warmup=2, state=state
    )  # type: ignore[arg-type]
    plain, rows = _solve(make_model, options)
    run, _ = _solve(make_model, dataclasses.replace(options, scale_iters=12, scale_lr=1e-2))
    codes, grids = run.codes(), run.grids()
    assert all(torch.equal(q, codes[layer]) for layer, q in plain.codes().items())
    assert _kl(run, rows, grids) < 0.98 * _kl(plain, rows, plain.grids())
    for states in run.solver.states:
        for weight in states:
            laid, moved = weight.grid, grids[weight.name]
            assert isinstance(laid, UniformGrid) and isinstance(moved, UniformGrid)
            assert moved.scale.dtype == torch.bfloat16 and not torch.equal(moved.scale, laid.scale)
            assert (moved.scale / laid.scale - 1).abs().max() < 0.12 + 2.0**-7
            assert torch.equal(laid.scale, plain.grids()[weight.name].scale)
            served = grids[weight.name].dequantize(codes[weight.name], torch.float32)
            assert torch.equal(weight.soft_weight(torch.float32), served)


def test_layers_on_the_state_take_the_scales(make_model: Callable[..., Any]) -> None:
    """`SoftWeights`, as a GPU runs it, serves what dense weights do."""
    options = SolverConfig(iters=2, batch_size=4, micro_batch=2, warmup=1, scale_iters=4, scale_lr=1e-2)
    run, rows = _solve(make_model, options)
    (batch,) = rows.batches(range(2))
    expected = run.chain.run_block(0, batch.hidden, batch.calls[0], run.solver.student(0))
    run.solver.soft = True
    block = run.solver.student_block(0)
    assert isinstance(block, SoftWeights) and block.layers
    with block.placed():
        found = run.chain.run_block(0, batch.hidden, batch.calls[0], block)
    torch.testing.assert_close(found, expected)
    for layer in block.layers.values():
        dense = layer._weight("forward", torch.zeros(1, layer.state.shape[1]))
        assert dense is not None and torch.equal(dense, layer.state.hard_weight(torch.float32))


def test_a_gradient_that_is_not_finite_changes_nothing(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it is found before anything moves, on a GPU afterwards: then the step is taken back."""
    options = SolverConfig(iters=2, batch_size=4, micro_batch=2, warmup=1, scale_iters=2)
    config = QuantizeConfig(grid=GridConfig(3, 32), solver=options, gptq_samples=4)
    chain = DecoderChain(make_model("llama", torch.float32))
    rows = TokenRows(chain, torch.randint(3, 61, (8, 12)), None, 2)
    run = Solve(chain, lay_grids(chain, config.grid), rows, config)
    for _ in range(3):
        run.advance()

    def held() -> dict[str, Tensor]:
        return {
            f"{state.name}.{key}": tensor.clone()
            for block in run.solver.states
            for state in block
            for key, tensor in state.tensors()
        }

    before = held()
    real = solver_module.scale_gradient
    calls: list[int] = []

    def poisoned(*given: Any) -> Tensor:
        calls.append(1)
        found = real(*given)
        return found.fill_(torch.nan) if len(calls) == 4 else found

    monkeypatch.setattr(solver_module, "scale_gradient", poisoned)
    with pytest.raises(
        NonFiniteGradientError, match="must be finite, got NaN or Inf at step 4; the state is as it was"
    ):
        run.advance()
    assert len(calls) > 4 and all(torch.equal(tensor, before[key]) for key, tensor in held().items())
    run.advance()
    assert run.done


@pytest.mark.parametrize("kind", GRID_KINDS)
def test_kinds_whose_scales_are_no_free_numbers_are_refused(kind: Any) -> None:
    solver = SolverConfig(scale_iters=1)
    if kind in FREE_SCALES:
        QuantizeConfig(grid=GridConfig.of_kind(kind), solver=solver)
        return
    with pytest.raises(ValueError, match=f"scale_iters with kind {kind} must be 0"):
        QuantizeConfig(grid=GridConfig.of_kind(kind), solver=solver)
    QuantizeConfig(grid=GridConfig.of_kind(kind), solver=solver, method="gptq")
