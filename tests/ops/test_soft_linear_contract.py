# SPDX-License-Identifier: Apache-2.0
"""soft_linear and its gradient and step ops: opcheck, full-graph compile, what is refused and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from discquant.ops import (
    StepOptions,
    soft_linear,
    soft_linear_dfrac,
    soft_linear_dx,
    soft_linear_step_,
    soft_linear_strategy,
)
from discquant.ops._steps import flatten_options

OPS = torch.ops.discquant
STRATEGIES = ("fused", "materialise")


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted, make_grid, device):
    grid = make_grid((6, 32), group_size=16, zero=True)
    x, y = torch.randn(4, 32, device=device), torch.randn(4, 6, device=device)
    q_down, frac = grid.q_down, grid.frac
    if permuted:
        x, y, q_down, frac = (t.t().contiguous().t() for t in (x, y, q_down, frac))
    weight = (q_down, frac, grid.scale, grid.zero_point, None)
    check = torch.library.opcheck
    for strategy in STRATEGIES:
        check(
            OPS.soft_linear_fwd.default, (x, *weight, torch.randn(6, device=device), 4, 16, False, strategy)
        )
        check(OPS.soft_linear_dx.default, (y, *weight, 4, 16, False, strategy))
        check(OPS.soft_linear_dfrac.default, (y, x, q_down, grid.scale, None, 4, 16, torch.float32, strategy))
    other = make_grid((6, 32), group_size=16, minimum=torch.float32, index=True)
    weight, further = (q_down, frac, other.scale, None, None), (other.minimum, other.g_idx)
    check(OPS.soft_linear_fwd.default, (x, *weight, None, 4, 16, False, "fused", *further))
    check(OPS.soft_linear_dx.default, (y, *weight, 4, 16, False, "fused", *further))
    check(
        OPS.soft_linear_dfrac.default,
        (y, x, q_down, other.scale, None, 4, 16, torch.float32, "fused", other.g_idx),
    )
    codes = torch.randint(0, 256, (2, 6, 32), dtype=torch.uint8, device=device)
    options = flatten_options(StepOptions(optimizer="sgd"))
    state = (codes[0], codes[1], grid.scale, None, None)
    table = torch.sort(torch.randn(16, device=device)).values
    check(OPS.soft_linear_step_.default, (y, x, *state, None, None, 16, *options))
    check(OPS.soft_linear_step_.default, (y, x, *state, q_down, table, 16, *options))


@pytest.mark.parametrize("kind", [{}, {"minimum": torch.float32, "index": True}])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compile(strategy, kind, make_grid, device):
    grid = make_grid((6, 32), group_size=16, **kind)

    def layer(x, frac):
        return soft_linear(
            x, grid.q_down, frac, grid.scale, num_bits=4, group_size=16, **grid.further(), strategy=strategy,
            impl="triton",
        ).relu()  # fmt: skip

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 9):
        x = torch.randn(2, tokens, 32, device=device)
        frac, other = (grid.frac.clone().requires_grad_() for _ in range(2))
        out, expected = compiled(x, frac), layer(x, other)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
        assert torch.equal(frac.grad, other.grad)


def test_rejects_bad_input(make_grid, device):
    grid = make_grid((4, 64), group_size=32)
    x = torch.randn(3, 64, device=device)
    good: dict[str, Any] = {
        "x": x, "q_down": grid.q_down, "frac": grid.frac, "scale": grid.scale, "num_bits": 4, "group_size": 32,
        "impl": "triton",
    }  # fmt: skip
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "soft_linear: x must be of type = Tensor, got int", {"x": 1}),
        (TypeError, "soft_linear: x must be of type = Tensor, got NoneType", {"x": None}),
        (TypeError, "soft_linear: scale must be of type = Tensor, got float", {"scale": 1.0}),
        (TypeError, "soft_linear: bias must be of type = Tensor, got list", {"bias": [0.0]}),
        (ValueError, r"soft_linear: x must have a last dimension of = 64, got \[3, 63\]", {"x": x[:, :63]}),
        (ValueError, "soft_linear: x must have a dtype of = .* got torch.int32", {"x": x.int()}),
        (ValueError, r"soft_linear: bias must have shape = \[4\], got \[3\]", {"bias": x[:, 0]}),
        (ValueError, "soft_linear: bias must have a dtype of = .* got torch.int32", {"bias": x[0, :4].int()}),
        (ValueError, "soft_linear: strategy must be one of = .* got fast", {"strategy": "fast"}),
        (ValueError, "soft_linear: impl must be one of = .* got 'fast'", {"impl": "fast"}),
        (ValueError, r"soft_linear: scale must have shape .* = \[4, 2\], got \[4, 1\]", {"scale": grid.scale[:, :1]}),
        (ValueError, r"soft_linear: frac must have shape = .* got \[4\]", {"frac": grid.frac[:, 0]}),
        (ValueError, "soft_linear: frac must have a dtype of = .* got torch.int64", {"frac": grid.frac.long()}),
        (ValueError, r"soft_linear: q_down must be .* = \[4, \[64, 32\]\], got \[4, 63\]",
         {"q_down": grid.q_down[:, :63]}),
        (ValueError, "soft_linear: q_down must have a dtype of = .* got torch.float32", {"q_down": grid.frac}),
        (ValueError, "soft_linear: num_bits must be an integer in = 2..8, got 9", {"num_bits": 9}),
        (ValueError, "soft_linear: group_size must be positive or = -1, got 0", {"group_size": 0}),
        (ValueError, r"soft_linear: table must have shape = \[16\], got \[8\]", {"table": x[0, :8]}),
        (ValueError, "soft_linear: frac must as frac_ref not have dtype = torch.uint16",
         {"frac": grid.frac.to(torch.uint16), "is_reference": True}),
        (NotImplementedError, "soft_linear: impl must cover these arguments = cpp", {"impl": "cpp"}),
        (NotImplementedError, "soft_linear: scale must be a constant = requires_grad False, got True",
         {"scale": grid.scale.clone().requires_grad_()}),
        (NotImplementedError, "soft_linear: zero_point must be a constant = requires_grad False, got True",
         {"zero_point": grid.scale.clone().requires_grad_()}),
        (ValueError, "soft_linear: scale must have a dtype of = .* got torch.float8_e4m3fn",
         {"scale": grid.scale.to(torch.float8_e4m3fn)}),
        (NotImplementedError, "soft_linear: minimum must be a constant = requires_grad False, got True",
         {"minimum": grid.scale.clone().requires_grad_()}),
        (ValueError, "soft_linear: zero_point must with a minimum be = None, got a Tensor",
         {"minimum": grid.scale, "zero_point": grid.scale}),
        (ValueError, r"soft_linear: minimum must have the shape of scale = \[4, 2\], got \[3, 2\]",
         {"minimum": grid.scale[1:]}),
        (ValueError, "soft_linear: g_idx must have a dtype of = .* got torch.float32", {"g_idx": x[0]}),
        (ValueError, r"soft_linear: g_idx must have shape = \[64\], got \[4, 64\]", {"g_idx": grid.q_down}),
    ]  # fmt: skip
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            soft_linear(**{**good, **change})


def test_gradient_ops_reject_bad_input(make_grid, device):
    grid = make_grid((4, 64), group_size=32)
    x, dy = torch.randn(3, 64, device=device), torch.randn(3, 4, device=device)
    common: dict[str, Any] = {"num_bits": 4, "group_size": 32, "impl": "triton"}
    bad: list[tuple[Any, type[Exception], str, dict[str, Any]]] = [
        (soft_linear_dx, ValueError, r"soft_linear_dx: grad_output must have a last dimension of = 4, got \[3, 64\]",
         {"grad_output": x}),
        (soft_linear_dx, TypeError, "soft_linear_dx: grad_output must be of type = Tensor", {"grad_output": None}),
        (soft_linear_dx, ValueError, "soft_linear_dx: strategy must be one of", {"strategy": "best"}),
        (soft_linear_dx, NotImplementedError, "soft_linear_dx: impl must cover these arguments = cpp", {"impl": "cpp"}),
        (soft_linear_dfrac, ValueError, r"soft_linear_dfrac: x must have the tokens of .* = \[3\], got \[2, 64\]",
         {"x": x[:2]}),
        (soft_linear_dfrac, ValueError, "soft_linear_dfrac: x must have the dtype of grad_output = torch.float32",
         {"x": x.half()}),
        (soft_linear_dfrac, ValueError, "soft_linear_dfrac: scale must have shape", {"scale": grid.scale[:3]}),
        (soft_linear_dfrac, TypeError, "soft_linear_dfrac: x must be of type = Tensor, got list", {"x": [1.0]}),
        (soft_linear_dfrac, ValueError, r"soft_linear_dfrac: g_idx must have shape = \[64\], got \[3, 64\]",
         {"g_idx": x}),
        (soft_linear_dx, ValueError, "soft_linear_dx: table must with a minimum be = None, got a Tensor",
         {"minimum": grid.scale, "table": x[0, :16]}),
    ]  # fmt: skip
    for op, error, message, change in bad:
        inputs = {"grad_output": dy, "q_down": grid.q_down, "scale": grid.scale}
        inputs |= {"frac": grid.frac} if op is soft_linear_dx else {"x": x}
        with pytest.raises(error, match=message):
            op(**{**inputs, **common, **change})


def test_step_rejects_bad_input(device):
    codes = torch.zeros(4, 64, dtype=torch.uint8, device=device)
    x, dy = torch.zeros(2, 64, device=device), torch.zeros(2, 4, device=device)
    table = torch.linspace(-1, 1, 16, device=device)
    good: dict[str, Any] = {
        "grad_output": dy, "x": x, "frac": codes, "frac_ref": codes.clone(), "scale": torch.ones(4, 2, device=device),
        "group_size": 32, "options": StepOptions(optimizer="sgd"), "impl": "triton",
    }  # fmt: skip
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"soft_linear_step_: x must have the tokens of grad_output = \[2\], got \[1, 64\]", {"x": x[:1]}),
        (ValueError, r"soft_linear_step_: x must have a last dimension of = 64, got \[2, 63\]", {"x": x[:, :63]}),
        (ValueError, "soft_linear_step_: x must have the dtype of grad_output", {"x": x.half()}),
        (TypeError, "soft_linear_step_: options must be of type = StepOptions, got dict", {"options": {}}),
        (ValueError, "soft_linear_step_: momentum must for lion be = a Tensor, got None",
         {"options": StepOptions(optimizer="lion")}),
        (ValueError, "soft_linear_step_: q_down must with a table be = a Tensor, got None", {"table": table}),
        (ValueError, r"soft_linear_step_: table must have a length of = .* got \[15\]",
         {"table": table[:15], "q_down": codes}),
        (ValueError, "soft_linear_step_: table must have a dtype of = .* got torch.float8_e4m3fn",
         {"table": table.to(torch.float8_e4m3fn), "q_down": codes}),
        (ValueError, "soft_linear_step_: q_down must have a dtype of = .* got torch.float32",
         {"table": table, "q_down": codes.float()}),
        (NotImplementedError, "soft_linear_step_: impl must cover these arguments = triton, got float64",
         {"x": x.double(), "grad_output": dy.double()}),
        (NotImplementedError, "soft_linear_step_: impl must cover these arguments = cpp", {"impl": "cpp"}),
    ]  # fmt: skip
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            soft_linear_step_(**{**good, **change})


def test_strategy_rejects_bad_input():
    x = torch.zeros(2, 64)
    bad: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (TypeError, "x must be of type = Tensor, got int", (3, "dx", (1, 4))),
        (TypeError, "shape must be of type = int, got float", (x, "dx", (1, 4.0))),
        (ValueError, "x must have a dtype of = .* got torch.int64", (x.long(), "dx", (1, 4))),
        (ValueError, "x must have at least dimensions = 1, got 0", (x[0, 0], "dx", (1, 4))),
        (ValueError, "stage must be one of = .* got backward", (x, "backward", (1, 4))),
        (ValueError, "shape must have a length of = 2, got 1", (x, "forward", (4,))),
    ]
    for error, message, args in bad:
        with pytest.raises(error, match=f"soft_linear_strategy: {message}"):
            soft_linear_strategy(*args)
    assert soft_linear_strategy(x, "dfrac", (8, 64)) in STRATEGIES
