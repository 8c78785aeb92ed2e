# SPDX-License-Identifier: Apache-2.0
"""projected_step_: opcheck, full-graph compile, what is refused and in which words, the code of frac_ref."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from discquant.ops import _registry as registry
from discquant.ops import projected_step_, projected_step_deferred_
from discquant.ops._steps import KEYS, OPTIMIZERS, SCALARS, flatten_options, launch_arguments
from discquant.ops.reference.projected_step import decode_frac_ref, encode_frac_ref

OP = torch.ops.discquant.projected_step_.default


@pytest.mark.parametrize("storage", ["8bit", "f32"])
def test_opcheck(storage, make_state, step_options):
    for optimizer in ("adamw", "sgd"):
        state = make_state((4, 48), storage, 16)
        first = None if optimizer == "sgd" else state["momentum"]
        second = None if optimizer == "sgd" else state["second_moment"]
        arguments = (
            state["frac"],
            state["frac_ref"],
            state["weight_grad"],
            state["scale"],
            first,
            second,
            None,
            None,
            16,
        )
        torch.library.opcheck(
            OP, (*arguments, *flatten_options(dataclasses.replace(step_options, optimizer=optimizer)))
        )


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_opcheck_layouts(table, permuted, make_state, make_grid, step_options):
    """State of transposed storage, and the codes and levels of a look-up grid."""
    state = make_state((4, 48), "8bit", 16)
    if permuted:
        state = {name: tensor.t().contiguous().t() for name, tensor in state.items()}
    grid = make_grid((4, 48), group_size=16, packed=True, table=True)
    levels = (grid.q_down, grid.table) if table else (None, None)
    names = ("frac", "frac_ref", "weight_grad", "scale", "momentum", "second_moment")
    arguments = (*(state[name] for name in names), *levels, 16, *flatten_options(step_options))
    torch.library.opcheck(OP, arguments)


@pytest.mark.parametrize("storage", ["8bit", "f32"])
def test_opcheck_cpp(storage, make_state, step_options):
    """The C++ operator, where it is built."""
    state = {name: tensor.cpu() for name, tensor in make_state((4, 48), storage, 16).items()}
    if registry.cpp_problem(torch.device("cpu"), "projected_step_cpp2_") is not None:
        return
    optimizer, scalars, keys = launch_arguments(*flatten_options(step_options))
    names = ("frac", "frac_ref", "weight_grad", "scale", "momentum", "second_moment")
    derived = (*(scalars[name] for name in SCALARS), *(keys[name] for name in KEYS))
    counts = torch.zeros(5, dtype=torch.int64)
    arguments = (*(state[name] for name in names), counts, 16, OPTIMIZERS.index(optimizer), *derived)
    torch.library.opcheck(torch.ops.discquant.projected_step_cpp2_.default, arguments)


def test_compile(make_state, assert_equal, step_options):
    options = dataclasses.replace(step_options, optimizer="momentum")

    def step(frac, frac_ref, grad, scale, momentum):
        return projected_step_deferred_(
            frac, frac_ref, grad * 2, scale, group_size=16, options=options, momentum=momentum, impl="triton"
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 64), (6, 48)):
        state = make_state(shape, "8bit", 16)
        del state["second_moment"]
        other = {name: tensor.clone() for name, tensor in state.items()}
        assert_equal(compiled(*state.values()), step(*other.values()))
        assert_equal(state["frac"], other["frac"])


def test_rejects_bad_input(make_state, step_options):
    state = make_state((4, 64), "8bit", 32)
    good: dict[str, Any] = {**state, "group_size": 32, "options": step_options, "impl": "triton"}
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "projected_step_: frac must be of type = Tensor, got list", {"frac": [1.0]}),
        (TypeError, "projected_step_: options must be of type = StepOptions, got dict", {"options": {}}),
        (
            ValueError,
            r"projected_step_: frac_ref must have the shape of frac = \[4, 64\], got \[4, 63\]",
            {"frac_ref": state["frac_ref"][:, :63]},
        ),
        (
            ValueError,
            r"projected_step_: scale must have shape .* = \[4, 2\], got \[4, 1\]",
            {"scale": state["scale"][:, :1]},
        ),
        (TypeError, "projected_step_: scale must be of type = Tensor, got float", {"scale": 1.0}),
        (TypeError, "projected_step_: weight_grad must be of type = Tensor, got int", {"weight_grad": 1}),
        (
            ValueError,
            "projected_step_: table must without scale be = None, got a Tensor",
            {"scale": None, "table": torch.linspace(-1, 1, 16)},
        ),
        (
            ValueError,
            "projected_step_: q_down must with a table be = a Tensor, got None",
            {"table": torch.linspace(-1, 1, 16)},
        ),
        (
            ValueError,
            "projected_step_: weight_grad must have the shape of frac",
            {"weight_grad": state["weight_grad"][1:]},
        ),
        (ValueError, "projected_step_: weight_grad must have a dtype of", {"weight_grad": state["frac"]}),
        (ValueError, "projected_step_: frac must have a dtype of", {"frac": state["frac"].int()}),
        (
            ValueError,
            "projected_step_: scale must have a dtype of = .* got torch.float8_e4m3fn",
            {"scale": state["scale"].to(torch.float8_e4m3fn), "impl": "auto"},
        ),
        (ValueError, "projected_step_: momentum must for adamw be = a Tensor, got None", {"momentum": None}),
        (
            ValueError,
            "projected_step_: second_moment must have a dtype of",
            {"second_moment": state["momentum"]},
        ),
        (
            ValueError,
            "projected_step_: optimizer must be one of",
            {"options": dataclasses.replace(step_options, optimizer="adagrad")},
        ),  # type: ignore[arg-type]
        (
            ValueError,
            "projected_step_: lr must in float32 be = finite, got nan",
            {"options": dataclasses.replace(step_options, lr=float("nan"))},
        ),
        (
            ValueError,
            "projected_step_: step must be at least = 1, got 0",
            {"options": dataclasses.replace(step_options, step=0)},
        ),
        (
            ValueError,
            "projected_step_: first_index must keep indices in",
            {"options": dataclasses.replace(step_options, first_index=2**32 - 1)},
        ),
        (
            ValueError,
            "projected_step_: frac_ref must be on the device = .*, got meta",
            {"frac_ref": state["frac_ref"].to("meta")},
        ),
        (
            ValueError,
            r"projected_step_: betas must be two numbers in = \[0, 1\), got \(1.0, 0.5\)",
            {"options": dataclasses.replace(step_options, betas=(1.0, 0.5))},
        ),
        (
            ValueError,
            "projected_step_: eps must in float32 be finite and at least = 0, got -1",
            {"options": dataclasses.replace(step_options, eps=-1.0)},
        ),
        (
            ValueError,
            "projected_step_: weight_decay must in float32 be finite and at least = 0, got -0.1",
            {"options": dataclasses.replace(step_options, weight_decay=-0.1)},
        ),
        (
            ValueError,
            "projected_step_: grad_clamp must in float32 be infinite, or finite and at least = 0, got -1",
            {"options": dataclasses.replace(step_options, grad_clamp=-1.0)},
        ),
        (
            ValueError,
            r"projected_step_: moment_bound must be in = \[2\^-100, 2\^100\], got 0",
            {"options": dataclasses.replace(step_options, moment_bound=0.0)},
        ),
        (ValueError, "projected_step_: group_size must be positive or = -1, got -2", {"group_size": -2}),
        (TypeError, "projected_step_: frac_ref must be of type = Tensor, got NoneType", {"frac_ref": None}),
        (
            NotImplementedError,
            "projected_step_: impl must cover these arguments = triton, got float64",
            {"weight_grad": state["weight_grad"].double()},
        ),
    ]
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            projected_step_(**{**good, **change})


def test_frac_ref_code(assert_equal):
    """Round trip of every code; 0, 1/2 and 1 exact; what does not fit is refused."""
    codes = torch.arange(256, dtype=torch.uint8)
    assert_equal(encode_frac_ref(decode_frac_ref(codes, torch.float32)), codes)
    assert_equal(
        encode_frac_ref(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([63, 126, 189], dtype=torch.uint8)
    )
    for value in (-0.51, 1.53, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="encode_frac_ref: frac_ref must lie in"):
            encode_frac_ref(torch.tensor([value]))
