# SPDX-License-Identifier: Apache-2.0
"""Derivatives of derivatives: right, or refused by name; never silently short of a term."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from discquant.ops import hadamard, linear_kl, soft_linear, soft_weight

DOUBLE = torch.float64


def _ops(impl: str, device: torch.device) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """A function of one leaf per op and argument."""
    q_down = torch.randint(0, 7, (4, 8), dtype=torch.uint8, device=device)
    frac, scale, x = torch.rand(4, 8), torch.rand(4, 1), torch.randn(3, 8)
    frac, scale, x = (t.to(device, DOUBLE) for t in (frac, scale, x))
    leaves = [t.clone().requires_grad_() for t in (x, frac)]
    grid = {"num_bits": 3, "group_size": -1, "impl": impl}
    weight = torch.randn(7, 8, dtype=DOUBLE, device=device)
    return {
        "soft_linear": (lambda x: soft_linear(x, q_down, leaves[1], scale, **grid), leaves[0]),
        "soft_linear by frac": (lambda f: soft_linear(x, q_down, f, scale, **grid), leaves[1]),
        "soft_weight": (lambda f: soft_weight(q_down, f, scale, **grid), leaves[1]),
        "soft_weight of a minimum": (
            lambda f: soft_weight(q_down, f, scale, minimum=-scale, **grid),
            leaves[1],
        ),
        "linear_kl": (lambda x: linear_kl(x, x.detach() + 1, weight, impl=impl).loss, leaves[0]),
        "hadamard": (lambda x: hadamard(x, impl=impl), leaves[0]),
    }


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("soft_linear", "triton"),
        ("soft_linear by frac", "triton"),
        ("soft_weight", "triton"),
        ("soft_weight of a minimum", "triton"),
        ("linear_kl", "triton"),
        ("linear_kl", "reference"),
    ],
)
def test_refused(name, impl, squared, device):
    """Also where the incoming gradient is a constant, and beside a term that has a derivative."""
    function, leaf = _ops(impl, device)[name]
    result = function(leaf)
    total = (result.square() if squared else result).sum()
    (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
    (plain,) = torch.autograd.grad(total, leaf, retain_graph=True)
    assert torch.equal(gradient, plain)
    with pytest.raises(
        NotImplementedError, match=f"{name.split()[0]}: order of the derivative must be at most = 1"
    ):
        (gradient.square().sum() + leaf.square().sum()).backward()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_hessian_of_linear_kl_is_refused(impl, device):
    """Also where nothing but the student leads from the gradient to the leaf: it was zero, without a word."""
    function, leaf = _ops(impl, device)["linear_kl"]
    refused = pytest.raises(
        NotImplementedError, match="linear_kl: order of the derivative must be at most = 1"
    )
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    with refused:
        torch.autograd.grad(gradient.square().sum(), leaf, allow_unused=True)
    with refused:
        torch.autograd.functional.hvp(function, leaf.detach(), torch.ones_like(leaf))


def test_autocast_changes_no_second_derivative(device):
    """Of the references, which have one: their matmuls in it know no autocast either."""

    def derivatives(autocast: bool) -> list[Tensor]:
        torch.manual_seed(0)
        function, leaf = _ops("reference", device)["soft_linear"]
        # In float32: autocast leaves float64 alone.
        x = leaf.detach().float().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
        return [first, second]

    for left, right in zip(derivatives(False), derivatives(True), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("soft_linear", "reference"),
        ("soft_linear by frac", "reference"),
        ("soft_weight", "reference"),
        ("soft_weight of a minimum", "reference"),
        ("hadamard", "reference"),
        ("hadamard", "triton"),
    ],
)
def test_right(name, impl, device):
    function, leaf = _ops(impl, device)[name]
    assert torch.autograd.gradgradcheck(lambda x: function(x).square(), (leaf,))
