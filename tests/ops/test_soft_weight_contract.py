# SPDX-License-Identifier: Apache-2.0
"""soft_weight: every violation of its contract is an error with the argument's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from discquant.ops import soft_weight


def test_rejects_bad_input(make_grid):
    grid = make_grid((4, 64), group_size=32)
    good = {"num_bits": 4, "group_size": 32}
    bad: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (
            TypeError,
            "soft_weight: frac must be of type = Tensor, got float",
            (grid.q_down, 0.5, grid.scale),
            good,
        ),
        (
            ValueError,
            r"soft_weight: scale must have shape \[out_features, num_groups\] = \[4, 2\], got \[4, 1\]",
            (grid.q_down, grid.frac, grid.scale[:, :1]),
            good,
        ),
        (
            ValueError,
            r"soft_weight: q_down must be .* got \[4, 63\]",
            (grid.q_down[:, :63], grid.frac, grid.scale),
            good,
        ),
        (
            ValueError,
            "soft_weight: q_down must have a dtype",
            (grid.q_down.int(), grid.frac, grid.scale),
            good,
        ),
        (ValueError, "soft_weight: frac must have a dtype", (grid.q_down, grid.frac.int(), grid.scale), good),
        (
            ValueError,
            "soft_weight: num_bits must be an integer in = 2..8, got 9",
            (grid.q_down, grid.frac, grid.scale),
            {**good, "num_bits": 9},
        ),
        (
            ValueError,
            "soft_weight: num_bits with two codes per byte be at most|soft_weight: num_bits must with two",
            (grid.q_down[:, :32], grid.frac, grid.scale),
            {**good, "num_bits": 5},
        ),
        (
            ValueError,
            "soft_weight: group_size must be positive or = -1, got 0",
            (grid.q_down, grid.frac, grid.scale),
            {**good, "group_size": 0},
        ),
        (
            ValueError,
            "soft_weight: zero_point must have the shape of scale",
            (grid.q_down, grid.frac, grid.scale, grid.scale[:1]),
            good,
        ),
        (
            ValueError,
            r"soft_weight: table must have shape = \[16\], got \[8\]",
            (grid.q_down, grid.frac, grid.scale),
            {**good, "table": torch.zeros(8, device=grid.frac.device)},
        ),
        (
            ValueError,
            "soft_weight: dtype must be one of",
            (grid.q_down, grid.frac, grid.scale),
            {**good, "dtype": torch.int8},
        ),
        (
            TypeError,
            "soft_weight: scale must be of type = Tensor, got NoneType",
            (grid.q_down, grid.frac, None),
            good,
        ),
        (
            ValueError,
            "soft_weight: zero_point must have a dtype of = .* got torch.int32",
            (grid.q_down, grid.frac, grid.scale, torch.zeros_like(grid.scale, dtype=torch.int32)),
            good,
        ),
        (
            ValueError,
            "soft_weight: group_size must be positive or = -1, got 32.0",
            (grid.q_down, grid.frac, grid.scale),
            {**good, "group_size": 32.0},
        ),
        (
            ValueError,
            "soft_weight: frac must be on the device = .*, got meta",
            (grid.q_down, grid.frac.to("meta"), grid.scale),
            good,
        ),
        (
            ValueError,
            "soft_weight: scale must have a dtype of = .* got torch.int32",
            (grid.q_down, grid.frac, grid.scale.int()),
            good,
        ),
        (
            ValueError,
            "soft_weight: scale must have a dtype of = .* got torch.float8_e4m3fn",
            (grid.q_down, grid.frac, grid.scale.to(torch.float8_e4m3fn)),
            {**good, "dtype": torch.float32},
        ),
        (
            ValueError,
            "soft_weight: table must have a dtype of = .* got torch.float8_e4m3fn",
            (grid.q_down, grid.frac, grid.scale),
            {**good, "table": torch.zeros(16, device=grid.frac.device).to(torch.float8_e4m3fn)},
        ),
        (
            NotImplementedError,
            "soft_weight: zero_point must be a constant = requires_grad False, got True",
            (grid.q_down, grid.frac, grid.scale, grid.scale.clone().requires_grad_()),
            good,
        ),
        (
            ValueError,
            "soft_weight: frac must as frac_ref not have dtype = torch.uint16",
            (grid.q_down, torch.zeros_like(grid.frac, dtype=torch.uint16), grid.scale),
            {**good, "is_reference": True},
        ),
        (
            ValueError,
            "soft_weight: zero_point must with a table be = None, got a Tensor",
            (grid.q_down, grid.frac, grid.scale, grid.scale),
            {**good, "table": torch.zeros(16, device=grid.frac.device)},
        ),
        (
            NotImplementedError,
            "soft_weight: scale must be a constant = requires_grad False, got True",
            (grid.q_down, grid.frac, grid.scale.clone().requires_grad_()),
            good,
        ),
        (
            ValueError,
            "soft_weight: impl must be one of",
            (grid.q_down, grid.frac, grid.scale),
            {**good, "impl": "cuda"},
        ),
    ]
    other = grid.scale.clone()
    index = torch.zeros(64, dtype=torch.int32, device=other.device)
    for error, message, change in (
        (TypeError, "soft_weight: minimum must be of type = Tensor, got float", {"minimum": 0.5}),
        (TypeError, "soft_weight: g_idx must be of type = Tensor, got list", {"g_idx": [0]}),
        (ValueError, r"soft_weight: minimum must have the shape of scale = \[4, 2\], got \[1, 2\]",
         {"minimum": other[:1]}),
        (ValueError, "soft_weight: minimum must have a dtype of = .* got torch.uint8", {"minimum": other.byte()}),
        (ValueError, "soft_weight: zero_point must with a minimum be = None, got a Tensor",
         {"minimum": other, "zero_point": other}),
        (ValueError, "soft_weight: table must with a minimum be = None, got a Tensor",
         {"minimum": other, "table": torch.zeros(16, device=other.device)}),
        (ValueError, "soft_weight: minimum must be on the device = .*, got meta", {"minimum": other.to("meta")}),
        (NotImplementedError, "soft_weight: minimum must be a constant = requires_grad False, got True",
         {"minimum": other.requires_grad_()}),
        (ValueError, r"soft_weight: g_idx must have shape = \[64\], got \[63\]", {"g_idx": index[1:]}),
        (ValueError, "soft_weight: g_idx must have a dtype of = .* got torch.uint8", {"g_idx": index.byte()}),
        (ValueError, "soft_weight: g_idx must be on the device = .*, got meta", {"g_idx": index.to("meta")}),
        (ValueError, r"soft_weight: scale must with g_idx have shape .* = \[4, 'at least 1'\], got \[4, 0\]",
         {"g_idx": index, "scale": grid.scale[:, :0]}),
        (ValueError, r"soft_weight: scale must with g_idx have shape .* = \[4, 'at least 1'\], got \[3, 2\]",
         {"g_idx": index, "scale": grid.scale[1:]}),
    ):  # fmt: skip
        named = {"scale": grid.scale, **change}
        bad.append((error, message, (grid.q_down, grid.frac), {**good, **named}))
    for error, message, args, kwargs in bad:
        with pytest.raises(error, match=message):
            soft_weight(*args, **{"impl": "triton", **kwargs})


@pytest.mark.parametrize("impl", ["reference", "triton", "auto"])
def test_parameters_of_a_grid_without_gradients(impl, make_grid):
    """Where no gradient is recorded none is asked for: a module's parameters may describe the grid."""
    grid = make_grid((4, 64), zero=True)
    scale, zero = (torch.nn.Parameter(t.float()) for t in (grid.scale, grid.zero_point))
    options = {"num_bits": 4, "group_size": 32, "impl": impl}
    with torch.no_grad():
        weight = soft_weight(grid.q_down, grid.frac, scale, zero, **options)
    assert torch.equal(weight, soft_weight(*grid[:2], scale.detach(), zero.detach(), **options))
