# SPDX-License-Identifier: Apache-2.0
"""soft_linear_step_: the step in the matmul's epilogue against the matmul and a step of its own."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from discquant.ops import (
    StepOptions,
    projected_step_,
    soft_linear,
    soft_linear_step_,
    soft_linear_step_deferred_,
)

MOMENTS = {"adamw": 2, "momentum": 1, "lion": 1, "sgd": 0}


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "lion", "sgd"])
@pytest.mark.parametrize(
    "case",
    [((40, 30, 100), 64, ""), ((33, 70, 130), 32, "packed"), ((9, 20, 40), 8, "plain"), ((3, 5, 7), -1, "")],
)
def test_step_in_the_epilogue(optimizer, case, make_grid, assert_equal, device):
    """The same bytes and counts as the matmul followed by projected_step_, in the 8-bit layout, tables included.

    x and dY hold small integers, so that the sum over tokens is exact in any order.
    """
    (tokens, rows, cols), group_size, table = case
    grid = make_grid((rows, cols), group_size=group_size, table=bool(table), packed=table == "packed")
    groups = 1 if group_size == -1 else -(-cols // group_size)
    x = torch.randint(-8, 9, (tokens, cols), device=device).float()
    grad_output = torch.randint(-8, 9, (tokens, rows), device=device).float()
    frac, frac_ref = torch.randint(0, 256, (2, rows, cols), dtype=torch.uint8, device=device)
    scale = torch.rand(rows, groups, device=device) * 1e-3
    options = StepOptions(optimizer=optimizer, lr=0.05, step=3, seed=1, tensor_id=4, first_index=77)
    results = []
    for fused in (True, False):
        state = {
            "momentum": None if optimizer == "sgd" else torch.full_like(frac, 5, dtype=torch.int8),
            "second_moment": torch.full_like(frac, 9) if optimizer == "adamw" else None,
        }
        codes = frac.clone()
        common = {"group_size": group_size, "options": options, "impl": "triton", **state}
        if table:
            common |= {"q_down": grid.q_down, "table": grid.table}
        if fused:
            counts = soft_linear_step_(grad_output, x, codes, frac_ref, scale, **common)
        else:
            counts = projected_step_(codes, frac_ref, grad_output.t() @ x, scale, **common)
        results.append((codes, state, counts))
    assert results[0][2] == results[1][2]
    assert_equal(results[0][0], results[1][0], "frac")
    for name in ("momentum", "second_moment"):
        if results[0][1][name] is not None:
            assert_equal(results[0][1][name], results[1][1][name], name)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_deferred(impl, assert_equal, device):
    """The variant that does not wait gives the same state, and its counts as a tensor there."""
    x, grad_output = torch.randn(9, 32, device=device), torch.randn(9, 5, device=device)
    frac, frac_ref = torch.randint(0, 256, (2, 5, 32), dtype=torch.uint8, device=device)
    scale, options = torch.rand(5, 1, device=device) * 1e-2, StepOptions(optimizer="sgd", lr=0.05)
    now, later = frac.clone(), frac.clone()
    common = {"group_size": -1, "options": options, "impl": impl}
    counts = soft_linear_step_(grad_output, x, now, frac_ref, scale, **common)
    deferred = soft_linear_step_deferred_(grad_output, x, later, frac_ref, scale, **common)
    assert deferred.device == frac.device and deferred.dtype == torch.int64
    assert deferred.tolist() == list(counts)
    assert_equal(later, now)


@pytest.mark.parametrize(
    ("fused", "impl"),
    [
        (False, "auto"),
        (False, "reference"),
        (False, "triton"),
        (False, "cpp"),
        (True, "auto"),
        (True, "reference"),
        (True, "triton"),
    ],
)
def test_steps_a_parameter(fused, impl, make_grid, assert_equal, device):
    """A leaf that requires grad goes through the layer, backward and the step, as a plain tensor would."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    grid = make_grid((4, 32), group_size=16)
    x, reference = torch.randn(6, 32, device=device), torch.full_like(grid.frac, 0.3)
    options = StepOptions(optimizer="sgd", lr=0.05)
    parameter, plain = torch.nn.Parameter(grid.frac.clone()), grid.frac.clone()
    layer_impl = "auto" if impl == "cpp" else impl
    y = soft_linear(x, grid.q_down, parameter, grid.scale, num_bits=4, group_size=16, impl=layer_impl)
    y.square().sum().backward()
    for frac in (parameter, plain):
        if fused:
            common = {"group_size": 16, "options": options, "impl": impl}
            soft_linear_step_(2 * y.detach(), x, frac, reference, grid.scale, **common)
        else:
            projected_step_(frac, reference, parameter.grad, None, group_size=16, options=options, impl=impl)
    assert parameter.is_leaf and parameter.requires_grad
    assert_equal(parameter.detach(), plain)
    assert not torch.equal(plain, grid.frac)


@pytest.mark.parametrize("storage", ["16bit", "bf16", "f32"])
@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "lion", "sgd"])
def test_wide_state_in_the_epilogue(optimizer, storage, make_state, take_step, step_options, assert_equal):
    """State of 16 bits and floating, every term of the step: bytes and counts of projected_step_ on dY^T x."""
    rows, cols, tokens = 37, 90, 21
    state = make_state((rows, cols), storage)
    x, dy = (
        torch.randint(-8, 9, (tokens, size), device=state["frac"].device).float() for size in (cols, rows)
    )
    state["weight_grad"] = dy.t() @ x
    state["scale"] *= 1e-2
    options = dataclasses.replace(step_options, optimizer=optimizer)
    expected, wanted = take_step(state, 64, options, impl="triton")
    moments = {"momentum": state["momentum"], "second_moment": state["second_moment"]}
    counts = soft_linear_step_(
        dy, x, state["frac"], state["frac_ref"], state["scale"], group_size=64, options=options, impl="triton",
        **{name: moments[name] for name in ("momentum", "second_moment")[: MOMENTS[optimizer]]},
    )  # fmt: skip
    assert counts == wanted
    assert min(counts.live, counts.moved, counts.saturated) > 0
    for name in ("frac", *moments):
        assert_equal(state[name], expected[name], name)


@pytest.mark.gpu
def test_step_on_gpu(assert_equal):
    """Every step tile and optimizer at a Llama shape against matmul and separate step."""
    rows, cols, tokens = 4096, 4096, 4096
    x = torch.randint(-4, 5, (tokens, cols), device="cuda").to(torch.bfloat16)
    dy = torch.randint(-4, 5, (tokens, rows), device="cuda").to(torch.bfloat16)
    frac, ref = torch.randint(0, 256, (2, rows, cols), dtype=torch.uint8, device="cuda")
    scale = torch.rand(rows, cols // 64, device="cuda") * 1e-3
    gradient = torch.mm(dy.t(), x, out_dtype=torch.float32)
    for optimizer, lr in itertools.product(("momentum", "lion", "adamw"), (0.05,)):
        options = dataclasses.replace(StepOptions(), optimizer=optimizer, lr=lr)
        states = []
        for fused in (True, False):
            codes, first = frac.clone(), torch.zeros_like(frac, dtype=torch.int8)
            second = torch.zeros_like(frac)
            common = {"group_size": 64, "options": options, "momentum": first, "second_moment": second}
            if fused:
                soft_linear_step_(dy, x, codes, ref, scale, **common)
            else:
                projected_step_(codes, ref, gradient, scale, **common)
            states.append((codes, first, second))
        for left, right in zip(*states, strict=True):
            assert_equal(left, right, optimizer)
