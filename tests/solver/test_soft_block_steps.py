# SPDX-License-Identifier: Apache-2.0
"""Steps of the solver on blocks that run on their state: in the epilogue, and taken back after a NaN."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import SolverConfig
from discquant.ops import soft_linear_step_deferred_
from discquant.solver.chain import DecoderChain
from discquant.solver.placement import Placement, Where
from discquant.solver.state import WeightState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _chain(model: Any) -> DecoderChain:
    return DecoderChain(model.to(DEVICE))


@pytest.mark.parametrize("windows", [1, 2])
def test_solver_steps_on_the_state(
    windows: int,
    make_model: Callable[..., Any],
    token_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    make_states: Callable[..., list[list[WeightState]]],
) -> None:
    """Solver(soft=True) equals the dense solver in float64, also where a measured table asks for the epilogue step."""
    from discquant.solver import solver as module

    fused: list[tuple[int, ...]] = []

    def measured(x: Tensor, *shape: int) -> bool:
        fused.append(shape)
        return True

    results = []
    for soft in (False, True):
        monkeypatch.setattr(module, "step_is_fused", measured)
        chain = _chain(make_model("phi3-fused"))
        states = make_states(chain)
        config = SolverConfig(
            iters=8, lr=0.01, lr_floor=0.01, optimizer="momentum", compute_dtype="float64", kl_weight=50.0
        )
        solver = module.Solver(chain, states, config, soft=soft)
        ids = token_ids.to(DEVICE)
        batches = (
            [chain.prepare(ids[:2])] if windows == 1 else [chain.prepare(ids[i : i + 1]) for i in range(2)]
        )
        records = [solver.step(batches) for _ in range(2)]
        results.append(([state.frac for block in states for state in block], records))
    # Two steps of every layer, inside backward where there is one micro-batch only.
    assert len(fused) == (0 if windows == 2 else 2 * len(results[1][0]))
    assert max(float((a - b).abs().max()) for a, b in zip(results[0][0], results[1][0], strict=True)) < 1e-10
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert abs(one.loss - other.loss) <= 1e-10 * abs(one.loss)
        assert (one.moved, one.fractional, one.saturated) == (other.moved, other.fractional, other.saturated)


def test_gradient_that_is_not_finite_is_named(
    make_model: Callable[..., Any],
    token_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    make_states: Callable[..., list[list[WeightState]]],
) -> None:
    """A NaN on the road backward stops the step with the weight's name, and every state is as it was."""
    from discquant.solver import gradients
    from discquant.solver import solver as module

    chain = _chain(make_model("llama"))
    states = make_states(chain)
    before = [state.frac.clone() for block in states for state in block]
    solver = module.Solver(
        chain,
        states,
        SolverConfig(iters=2, lr=0.01, lr_floor=0.01, compute_dtype="float64", optimizer="momentum"),
        soft=True,
    )
    monkeypatch.setattr(module, "step_is_fused", lambda *_: True)
    honest = gradients.head_loss

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        part = honest(*args, **kwargs)
        return part._replace(grad=torch.full_like(part.grad, torch.nan))

    monkeypatch.setattr(gradients, "head_loss", spoiled)
    with pytest.raises(
        module.NonFiniteGradientError, match=r"solver: the gradient of model\.layers\.2\.\S+ must be"
    ):
        solver.step([chain.prepare(token_ids[:1].to(DEVICE))])
    after = [state.frac for block in states for state in block]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("broken", "impl", "where"),
    [
        ("input", "reference", "resident"),
        ("input", "reference", "host"),
        ("input", "triton", "resident"),
        pytest.param(
            "product",
            "triton",
            "resident",
            marks=pytest.mark.skipif(
                DEVICE.type == "cuda", reason="fused multiply-adds: finite values make no NaN"
            ),
        ),
    ],
)
def test_epilogue_step_that_meets_a_nan_is_taken_back(
    broken: str,
    impl: str,
    where: Where,
    make_model: Callable[..., Any],
    token_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    make_states: Callable[..., list[list[WeightState]]],
) -> None:
    """Layers stepped inside backward before and after the NaN are put back, and the layer is named.

    input: dY holds a NaN.  product: dY and x are finite, but dY^T x is Inf - Inf, which only the step itself sees.
    """
    from discquant.solver import soft_block
    from discquant.solver import solver as module

    chain = _chain(make_model("llama", torch.float32))
    placement = Placement(where, DEVICE)
    for block in make_states(chain, "u8"):
        placement.add(block)
    config = SolverConfig(iters=4, lr=0.05, lr_floor=0.05, optimizer="momentum", kl_weight=50.0, state="u8")
    solver = module.Solver(chain, placement, config, soft=True)
    batches = [chain.prepare(token_ids[:1].to(DEVICE))]
    chosen = ["reference"]

    def step(*args: Any, **options: Any) -> Any:
        return soft_linear_step_deferred_(*args, **options, impl=chosen[0])

    monkeypatch.setattr(module, "step_is_fused", lambda *_: True)
    monkeypatch.setattr(module, "soft_linear_step_deferred_", step)
    solver.step(batches)

    def held() -> list[Tensor]:
        return [block.blob.clone() for block in placement.homes()]

    before, gain = held(), solver.gain.gain
    honest = soft_block.SoftLayer.receive
    named = chain.weights[1][-1].name  # of its block the first in backward

    def spoiled(self: Any, grad_output: Tensor, x: Tensor) -> None:
        if self.state.name == named:
            chosen[0] = impl
            grad_output = grad_output.clone()
            if broken == "input":
                grad_output[0, 0, 0] = torch.nan
            else:
                # A tile's sum may be fused, in which no product overflows: tiles of one sign, then tiles of the other.
                grad_output = torch.full((1, 512, grad_output.shape[-1]), torch.finfo(torch.float32).max)
                grad_output[:, 256:].neg_()
                x = torch.full((1, 512, x.shape[-1]), 2.0)
        honest(self, grad_output, x)
        chosen[0] = "reference"

    with monkeypatch.context() as patch:
        patch.setattr(soft_block.SoftLayer, "receive", spoiled)
        with pytest.raises(
            module.NonFiniteGradientError, match=f"the gradient of {re.escape(named)} must be"
        ):
            solver.step(batches)
    assert (solver.step_number, solver.gain.gain) == (1, gain)
    assert all(torch.equal(one, other) for one, other in zip(before, held(), strict=True))
    solver.step(batches)
    assert not any(torch.equal(one, other) for one, other in zip(before, held(), strict=True))
    placement.close()
