# SPDX-License-Identifier: Apache-2.0
"""Whole solves on tiny models: better than nearest, feasible, deterministic, at vertices at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import GridConfig, LossName, QuantizeConfig, SolverConfig, preset
from discquant.solver.chain import DecoderChain
from discquant.solver.gradients import block_gradients
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.measure import mean_kl, served_weights
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids, solve
from discquant.solver.solver import NonFiniteGradientError


def _config(**changes: Any) -> QuantizeConfig:
    options = {"iters": 60, "batch_size": 4, "micro_batch": 2, "warmup": 4, **changes}
    return QuantizeConfig(grid=GridConfig(3, 32, True, "absmax"), solver=SolverConfig(**options))


def _rows(chain: DecoderChain, count: int = 16, micro_batch: int = 2) -> TokenRows:
    ids = torch.randint(3, 61, (count, 12), generator=torch.Generator().manual_seed(1))
    return TokenRows(chain, ids, None, micro_batch)


def _chain(make_model: Callable[..., Any], architecture: str = "llama") -> DecoderChain:
    return DecoderChain(make_model(architecture, torch.float32))


def _hard_kl(chain: DecoderChain, grids: Any, codes: dict[str, Tensor], rows: TokenRows) -> float:
    def served(index: int) -> dict[str, Tensor]:
        return {
            ref.param_name: grids[ref.name].dequantize(codes[ref.name], torch.float32)
            for ref in chain.weights[index]
        }

    return mean_kl(chain, served, rows.batches(range(len(rows))))


@pytest.mark.parametrize("architecture", ["llama", "qwen2-bias", "phi3-fused", "gemma2-softcap"])
def test_better_than_nearest_and_nothing_fractional(
    architecture: str, make_model: Callable[..., Any]
) -> None:
    chain = _chain(make_model, architecture)
    rows = _rows(chain)
    config = _config()
    grids = lay_grids(chain, config.grid)
    run = solve(chain, grids, rows, config)
    ours = _hard_kl(chain, grids, run.codes(), rows)
    nearest = _hard_kl(chain, grids, layerwise_codes(chain, grids, [], "rtn"), rows)
    assert ours < 0.6 * nearest
    for block in run.solver.states:
        for state in block:
            position = state.position()
            assert bool(((position >= 0) & (position <= 1)).all())
            q_down, _ = grids[state.name].neighbours(
                next(r for refs in chain.weights for r in refs if r.name == state.name).matrix()
            )
            q = state.codes()
            assert bool(((q == q_down) | (q == q_down + 1)).all())
            live = position[state.live()]
            assert float(((live > 0.01) & (live < 0.99)).float().mean()) < 0.02


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "lion", "sgd"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "u8"])
def test_every_optimizer_and_layout_lowers_the_loss(
    optimizer: str, state: str, make_model: Callable[..., Any]
) -> None:
    chain = _chain(make_model)
    rows = _rows(chain)
    lr = {"adamw": 0.1, "momentum": 0.1, "lion": 0.05, "sgd": 0.1}[optimizer]
    config = _config(optimizer=optimizer, state=state, lr=lr, iters=40)
    grids = lay_grids(chain, config.grid)
    run = solve(chain, grids, rows, config)
    nearest = _hard_kl(chain, grids, layerwise_codes(chain, grids, [], "rtn"), rows)
    assert _hard_kl(chain, grids, run.codes(), rows) < 0.85 * nearest


@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
def test_every_loss_is_lowered(loss: LossName, make_model: Callable[..., Any]) -> None:
    """Each by its own measure, of rounded codes."""
    chain = _chain(make_model)
    rows = _rows(chain)
    config = _config(loss=loss, iters=24, start="ref")
    grids = lay_grids(chain, config.grid)
    codes = solve(chain, grids, rows, config).codes()

    def measured(codes: Mapping[str, Tensor]) -> float:
        student = served_weights(chain, grids, codes, torch.float32, torch.float32)
        return block_gradients(chain, student, rows.batches(range(16)), lambda *given: None, loss=loss)

    assert measured(codes) < measured(layerwise_codes(chain, grids, [], "rtn"))


@pytest.mark.parametrize("state", ["fp32", "u8"])
def test_same_seed_same_codes_other_seed_other_codes(state: str, make_model: Callable[..., Any]) -> None:
    found = []
    for seed in (0, 0, 1):
        chain = _chain(make_model)
        config = dataclasses.replace(_config(state=state, iters=12, start="random"), seed=seed)
        found.append(solve(chain, lay_grids(chain, config.grid), _rows(chain), config).codes())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_start_from_gptq(make_model: Callable[..., Any]) -> None:
    chain = _chain(make_model)
    rows = _rows(chain)
    config = _config(start="gptq", iters=1)
    grids = lay_grids(chain, config.grid)
    run = Solve(chain, grids, rows, config)
    codes = layerwise_codes(chain, grids, rows.batches(range(16)), "gptq", damp=config.gptq_damp)
    for block in run.solver.states:
        for state in block:
            moved = codes[state.name].int() - state.codes_down().int()
            side = state.position()[state.live()]
            assert bool((side[moved.clamp(0, 1)[state.live()] == 1] >= 0.5).all())
            assert bool((side[moved.clamp(0, 1)[state.live()] == 0] <= 0.5).all())


def test_section_5_rule(make_model: Callable[..., Any]) -> None:
    """With the linear term on and clamp kappa, a weight with |2y - 1| > kappa ends at its nearest point."""
    chain = _chain(make_model)
    rows = _rows(chain)
    kappa = 0.3
    config = _config(
        start="ref",
        lr=0.1,
        grad_clamp=kappa,
        linear_until=1.0,
        harden_from=1.0,
        harden_until=1.0,
        curvature=0.0,
        lr_floor=1.0,
        iters=80,
        kl_weight=200.0,
    )
    grids = lay_grids(chain, config.grid)
    run = solve(chain, grids, rows, config)
    free = 0
    for refs, block in zip(chain.weights, run.solver.states, strict=True):
        for ref, state in zip(refs, block, strict=True):
            _, frac_ref = grids[ref.name].neighbours(ref.matrix())
            bound = (2 * frac_ref.clamp(0, 1) - 1).abs() > kappa
            nearest = grids[ref.name].nearest(ref.matrix())
            assert torch.equal(state.codes()[bound], nearest[bound])
            free += int((state.codes() != nearest)[~bound].sum())
    assert free > 0


def test_on_grid_weights_never_move(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::3] = 0.0
    chain = DecoderChain(model)
    config = _config(iters=10)
    grids = lay_grids(chain, config.grid)
    run = solve(chain, grids, _rows(chain), config)
    state = next(s for s in run.solver.states[0] if s.name.endswith("up_proj"))
    assert bool((state.hard_weight(torch.float32)[:, ::3] == 0).all())


def test_gain_of_gradients_that_are_mostly_zero(make_model: Callable[..., Any]) -> None:
    """Rows of a layer that nothing below them uses: the gain is that of the others."""
    model = make_model("llama", torch.float32)
    config = _config(iters=2, start="ref", curvature=0.0, kl_weight=None)
    gains = []
    for used in (48, 3):
        # The state is the same: grids and live coordinates of the dead rows stay as they are.
        model.model.layers[2].mlp.down_proj.weight.data[:, used:] = 0
        chain = DecoderChain(model, ["*.layers.0.*", "*.layers.1.*", "*self_attn*", "down_proj"])
        run = Solve(chain, lay_grids(chain, config.grid), _rows(chain), config)
        gains.append(run.solver.gain.gain)
        assert run.advance().loss > 0
    assert gains[0] / 100 < gains[1] < gains[0] * 100


def test_nothing_that_may_move(make_model: Callable[..., Any]) -> None:
    """Every weight lies on the grid (all are zero, say): nothing to solve, and no error."""
    model = make_model("llama", torch.float32)
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    chain = DecoderChain(model)
    run = solve(chain, lay_grids(chain, _config().grid), _rows(chain), _config(iters=2))
    assert run.solver.gain.gain == 1.0
    assert all(state.num_live == 0 for block in run.solver.states for state in block)


def test_the_original_model_is_not_changed(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chain = DecoderChain(model)
    config = _config(iters=3)
    solve(chain, lay_grids(chain, config.grid), _rows(chain), config)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nan_in_a_gradient_names_the_tensor(make_model: Callable[..., Any]) -> None:
    chain = _chain(make_model)
    rows = _rows(chain)
    config = _config(iters=3)
    run = Solve(chain, lay_grids(chain, config.grid), rows, config)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.nan

    chain.blocks[2].mlp.down_proj.register_forward_pre_hook(lambda module, args: (Poison.apply(args[0]),))
    before = [[s.frac.clone() for s in block] for block in run.solver.states]
    with pytest.raises(NonFiniteGradientError, match=r"gradient of model\.layers\.2\..*step 1"):
        run.advance()
    for block, kept in zip(run.solver.states, before, strict=True):
        assert all(torch.equal(s.frac, k) for s, k in zip(block, kept, strict=True))


def test_a_weight_that_is_not_finite_is_named(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight"):
        lay_grids(DecoderChain(model), GridConfig())


def test_presets_run(make_model: Callable[..., Any]) -> None:
    for name in ("default", "paper"):
        chain = _chain(make_model)
        grid = GridConfig(3, 32)
        options = dataclasses.replace(preset(name, grid), iters=4, warmup=2, batch_size=2, micro_batch=2)  # type: ignore[arg-type]
        config = QuantizeConfig(grid=grid, solver=options)
        run = solve(chain, lay_grids(chain, grid), _rows(chain), config)
        assert run.done


def _bytes(run: Solve) -> list[Tensor]:
    return [tensor.clone() for block in run.solver.states for state in block for _, tensor in state.tensors()]


def _poison(chain: DecoderChain, block: int) -> Any:
    """Make every gradient below the MLP of a block NaN; the loss stays finite."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.nan

    module = chain.blocks[block].mlp.down_proj
    return module.register_forward_pre_hook(lambda module, args: (Poison.apply(args[0]),))


@pytest.mark.parametrize("state", ["fp32", "bf16", "u8"])
def test_a_step_that_fails_below_changes_no_block(state: str, make_model: Callable[..., Any]) -> None:
    """Blocks 3 and 2 have stepped when block 1's gradient is NaN: all are as before, and the solve can go on."""
    chain = _chain(make_model)
    run = Solve(chain, lay_grids(chain, GridConfig(3, 32)), _rows(chain), _config(iters=4, state=state))
    run.advance()
    before, gain = _bytes(run), run.solver.gain.gain
    hook = _poison(chain, 0)
    with pytest.raises(
        NonFiniteGradientError, match=r"model\.layers\.0\..*step 2; the state is as it was before"
    ):
        run.advance()
    assert all(torch.equal(one, other) for one, other in zip(before, _bytes(run), strict=True))
    assert (run.solver.step_number, run.solver.gain.gain) == (1, gain)
    hook.remove()
    assert run.advance().step == 2
    assert not all(torch.equal(one, other) for one, other in zip(before, _bytes(run), strict=True))


def test_a_failed_step_too_large_to_take_back_closes_the_solver(make_model: Callable[..., Any]) -> None:
    chain = _chain(make_model)
    run = Solve(chain, lay_grids(chain, GridConfig(3, 32)), _rows(chain), _config(iters=4))
    run.solver._journal.limit = 1000
    hook = _poison(chain, 0)
    with pytest.raises(NonFiniteGradientError, match="continue from the last checkpoint"):
        run.advance()
    hook.remove()
    for attempt in (run.advance, run.codes):
        with pytest.raises(RuntimeError, match="failed half-way"):
            attempt()
