# SPDX-License-Identifier: Apache-2.0
"""projected_step_: implementations equal bit for bit, the formula against float64, feasibility, counts, noise."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from discquant.ops import StepCounts, StepOptions, projected_step_
from discquant.ops.reference.counter_rng import counter_uniform, step_key
from discquant.ops.reference.projected_step import decode_frac_ref

OPTIMIZERS = ("adamw", "momentum", "lion", "sgd")


@pytest.mark.parametrize("impl", ["triton", "cpp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("storage", ["8bit", "16bit", "bf16", "f32"])
def test_equals_reference(
    storage, optimizer, impl, make_state, assert_equal, device, take_step, step_options
):
    """State, noise and counts equal the reference bit for bit."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(step_options, optimizer=optimizer)
    for shape, group_size in (((9, 301), 64), ((3, 70), -1)):
        state = make_state(shape, storage, group_size)
        expected, expected_counts = take_step(state, group_size, options, impl="reference")
        actual, counts = take_step(state, group_size, options, impl=impl)
        for name in ("frac", "momentum", "second_moment"):
            assert_equal(actual[name], expected[name], f"{name} {shape}")
        assert counts == expected_counts
        assert not torch.equal(expected["frac"], state["frac"])


@pytest.mark.parametrize("impl", ["triton", "cpp"])
@pytest.mark.parametrize("packed", [False, True])
def test_table_grid(packed, impl, make_state, make_grid, assert_equal, device, take_step, step_options):
    """On a look-up grid the factor is scale * (T[q + 1] - T[q]): bit for bit a step with that factor written out."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(step_options, optimizer="momentum")
    state = make_state((6, 70), "8bit", 16)
    grid = make_grid((6, 70), group_size=16, table=True, packed=packed)
    codes = grid.codes.long()
    gap = state["scale"].repeat_interleave(16, dim=1)[:, :70] * (grid.table[codes + 1] - grid.table[codes])
    expected, counts = take_step({**state, "scale": gap}, 1, options, impl="reference")
    for chosen in (impl, "reference"):
        given = {**state, "q_down": grid.q_down, "table": grid.table}
        actual, found = take_step(given, 16, options, impl=chosen)
        assert found == counts
        assert_equal(actual["frac"], expected["frac"], chosen)
        assert_equal(actual["momentum"], expected["momentum"], chosen)


@pytest.mark.parametrize("impl", ["triton", "cpp", "reference"])
def test_gradient_by_frac(impl, make_state, assert_equal, device, take_step, step_options):
    """scale=None takes the gradient as d frac: the same as a scale of one."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(step_options, optimizer="lion")
    state = make_state((5, 33), "8bit", -1)
    state["scale"] = torch.ones_like(state["scale"])
    expected, counts = take_step(state, -1, options, impl="reference")
    copy = {name: tensor.clone() for name, tensor in state.items()}
    del copy["second_moment"], copy["scale"]
    found = projected_step_(**copy, scale=None, group_size=16, options=options, impl=impl)
    assert found == counts
    assert_equal(copy["frac"], expected["frac"])
    assert_equal(copy["momentum"], expected["momentum"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matches_oracle(optimizer, make_state, assert_close, take_step, step_options):
    """float32 state against the formula in float64."""
    options = dataclasses.replace(step_options, optimizer=optimizer)
    state = make_state((5, 96), "f32", 32)
    actual, _ = take_step(state, 32, options, impl="triton")
    baseline, _ = take_step(state, 32, options, impl="reference")
    wide, _ = take_step(
        {name: tensor.double() for name, tensor in state.items()}, 32, options, impl="reference"
    )
    for name in ("frac", "momentum", "second_moment"):
        assert_close(actual[name], wide[name], baseline[name], name)


def test_formula_by_hand(device):
    """One coordinate per case, worked out by hand: momentum with b1 = 0, clamped, linear, projected."""
    frac = torch.tensor([[0.5, 0.5, 0.02, 0.4, 1.0, 0.3]], dtype=torch.float64, device=device)
    frac_ref = torch.tensor([[0.25, 0.75, 0.25, 0.25, 1.0, 1.5]], dtype=torch.float64, device=device)
    grad = torch.tensor([[0.001, -0.1, 0.0, 0.0, 5.0, 0.0]], dtype=torch.float64, device=device)
    scale = torch.full((1, 1), 2.0, dtype=torch.float64, device=device)
    options = StepOptions(optimizer="momentum", lr=0.1, betas=(0.0, 0.999), kl_weight=100.0, grad_clamp=1.0)
    counts = projected_step_(
        frac, frac_ref, grad, scale, group_size=-1, options=options, momentum=torch.zeros_like(frac)
    )
    # g: 0.2 + 0.5; -1 (clamped) - 0.5; 0.5 (to the wall); 0.5; frozen; frac_ref clamps to 1, so -1
    expected = torch.tensor([[0.43, 0.65, 0.0, 0.35, 1.0, 0.4]], dtype=torch.float64, device=device)
    assert (frac - expected).abs().max() < 1e-15
    assert counts == StepCounts(live=5, fractional=4, moved=1, saturated=1, nan=0)


def test_adamw_is_torchs():
    """Bias corrections in rate and epsilon give what torch.optim.AdamW gives, in float64, away from the walls."""
    place = torch.rand(3, 50, dtype=torch.float64) * 0.4 + 0.3
    theirs = torch.nn.Parameter(place.clone())
    # An epsilon that shows.
    kwargs = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.05}
    optimizer = torch.optim.AdamW([theirs], **kwargs)
    state = {"momentum": torch.zeros_like(place), "second_moment": torch.zeros_like(place)}
    reference, scale = torch.full_like(place, 0.4), torch.ones(3, 1, dtype=torch.float64)
    for step in range(1, 9):
        grad = torch.randn(3, 50, dtype=torch.float64) * 0.03
        options = StepOptions(kl_weight=1.0, grad_clamp=9.0, linear_weight=0.0, step=step, **kwargs)
        projected_step_(place, reference, grad, scale, group_size=-1, options=options, **state)
        theirs.grad = grad
        optimizer.step()
        assert (place - theirs).abs().max() < 1e-14
    assert 0 < place.min() and place.max() < 1


@pytest.mark.parametrize("impl", ["reference", "triton", "cpp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_feasible_and_frozen(optimizer, impl, make_state, device, take_step, step_options):
    """frac stays in [0, 1] under huge gradients; frozen coordinates never move; NaN and Inf leave theirs alone."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    for storage in ("8bit", "f32"):
        state = make_state((4, 64), storage, 32)
        state["weight_grad"] = state["weight_grad"] * 1e30
        state["weight_grad"][1, 1], state["weight_grad"][1, 2] = float("nan"), float("inf")
        reference = decode_frac_ref(state["frac_ref"], torch.float32)
        frozen = (reference == 0) | (reference == 1)
        after, counts = take_step(
            state, 32, dataclasses.replace(step_options, optimizer=optimizer, lr=3.0), impl=impl
        )
        assert torch.equal(after["frac"][frozen], state["frac"][frozen])
        for name in ("frac", "momentum", "second_moment"):
            assert torch.equal(after[name][1, 1:3], state[name][1, 1:3]), name
        assert counts.nan == 2
        assert counts.live == int((~frozen).sum())
        if storage == "f32":
            assert after["frac"].min() >= 0
            assert after["frac"].max() <= 1


@pytest.mark.parametrize("impl", ["reference", "triton", "cpp"])
def test_stochastic_rounding_is_unbiased(impl, device):
    """The mean of many rounded steps is the exact step: 0.3 of a code up, within five standard errors."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    shape = (64, 256)
    frac = torch.full(shape, 100, dtype=torch.uint8, device=device)
    frac_ref = torch.full(shape, 0.25, device=device)
    options = StepOptions(optimizer="sgd", lr=0.3 / 255 * 2, linear_weight=-1.0)  # g = -0.5: up by 0.3 codes
    projected_step_(
        frac, frac_ref, torch.zeros(shape, device=device), torch.ones(64, 1, device=device), group_size=-1,
        options=options, impl=impl,
    )  # fmt: skip
    up = frac.double().mean() - 100
    assert set(frac.unique().tolist()) == {100, 101}
    assert abs(up - 0.3) < 5 * (0.21 / frac.numel()) ** 0.5


def test_noise_is_the_documented_one(device):
    """floor(value + u) with u = counter_uniform(key, index): the kernel's codes from the generator's numbers."""
    frac = torch.full((4, 32), 0, dtype=torch.uint8, device=device)
    ref = torch.full((4, 32), 0.5, device=device)
    options = StepOptions(
        optimizer="sgd", lr=1.0, hardening=-10.4 / 255, linear_weight=0.0, seed=9, step=4, tensor_id=2
    )
    projected_step_(
        frac, ref, torch.zeros(4, 32, device=device), torch.ones(4, 1, device=device), group_size=-1,
        options=options, impl="triton",
    )  # fmt: skip
    noise = counter_uniform(step_key(9, 4, 2), 0, 128, torch.device("cpu")).view(4, 32)
    moved = torch.tensor(10.4 / 255) * 255
    assert torch.equal(frac.cpu(), torch.floor(moved + noise).to(torch.uint8))
