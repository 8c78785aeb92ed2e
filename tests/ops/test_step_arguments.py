# SPDX-License-Identifier: Apache-2.0
"""What both ops that take a projected step refuse of scalars and of storage: the same words on every implementation."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from discquant.ops import StepOptions, projected_step_, soft_linear_step_

SCALARS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "lr must be of type = float, got str", {"lr": "a"}),
    (TypeError, "kl_weight must be of type = float, got Tensor", {"kl_weight": torch.ones(())}),
    (TypeError, "hardening must be of type = float, got bool", {"hardening": True}),
    (TypeError, "moment_bound must be of type = float, got NoneType", {"moment_bound": None}),
    (TypeError, "betas must be of type = tuple, got NoneType", {"betas": None}),
    (TypeError, "betas must be of type = float, got str", {"betas": (0.9, "b")}),
    (TypeError, "seed must be of type = int, got float", {"seed": 1.5}),
    (TypeError, "step must be of type = int, got float", {"step": 1.5}),
    (TypeError, "tensor_id must be of type = int, got str", {"tensor_id": "7"}),
    (TypeError, "first_index must be of type = int, got float", {"first_index": 1.0}),
    (ValueError, "betas must be two numbers in = [0, 1), got (0.9,)", {"betas": (0.9,)}),
    (ValueError, f"seed must be an integer in = [-2^63, 2^63), got {2**70}", {"seed": 2**70}),
    (ValueError, f"step must be an integer in = [-2^63, 2^63), got {2**63}", {"step": 2**63}),
    (ValueError, "lr must in float32 be = finite, got 1e+39", {"lr": 1e39}),
    (ValueError, "linear_weight must in float32 be = finite, got -inf", {"linear_weight": -float("inf")}),
    (ValueError, "eps must in float32 be finite and at least = 0, got inf", {"eps": float("inf")}),
    (ValueError, "moment_bound must be in = [2^-100, 2^100], got inf", {"moment_bound": float("inf")}),
    (ValueError, "moment_bound must be in = [2^-100, 2^100], got 1e-300", {"moment_bound": 1e-300}),
    (ValueError, "grad_clamp must in float32 be infinite, or finite and at least = 0, got nan",
     {"grad_clamp": float("nan")}),
    (ValueError, "grad_clamp must in float32 be infinite, or finite and at least = 0, got 1e+300",
     {"grad_clamp": 1e300}),
]  # fmt: skip


def _take(
    op: Any, impl: str, options: StepOptions, device: torch.device, **changed: torch.Tensor
) -> torch.Tensor:
    """Step a momentum state of [4, 8]; return its bytes."""
    codes = torch.full((4, 8), 100, dtype=torch.uint8, device=device)
    state = {"frac": codes.clone(), "frac_ref": codes, "momentum": torch.zeros_like(codes, dtype=torch.int8)}
    if options.optimizer == "adamw":
        state["second_moment"] = torch.zeros_like(codes)
    state |= changed
    gradient = {"weight_grad": torch.ones(4, 8, device=device)}
    if op is soft_linear_step_:
        gradient = {"grad_output": torch.ones(3, 4, device=device), "x": torch.ones(3, 8, device=device)}
    scale = torch.ones(4, 1, device=device)
    op(**state, **gradient, scale=scale, group_size=-1, options=options, impl=impl)
    return torch.cat([state["frac"], state["momentum"].view(torch.uint8)])


OPS = [(projected_step_, "reference"), (projected_step_, "triton"), (projected_step_, "cpp")]
OPS += [(soft_linear_step_, "reference"), (soft_linear_step_, "triton")]


@pytest.mark.parametrize(("op", "impl"), OPS)
def test_scalars(op, impl, device):
    """Class, op, argument and value, before any byte is changed."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = StepOptions(optimizer="momentum")
    for error, message, change in SCALARS:
        with pytest.raises(error, match=re.escape(f"{op.__name__}: {message}")):
            _take(op, impl, dataclasses.replace(options, **change), device)
    # Integers for floats, negative keys and a clamp that never bites are what they say.
    wide = dataclasses.replace(options, lr=1, betas=[0, 0.5], seed=-1, tensor_id=-3, grad_clamp=float("inf"))
    assert torch.equal(_take(op, impl, wide, device), _take(op, "reference", wide, device))


@pytest.mark.parametrize(("op", "impl"), OPS)
@pytest.mark.parametrize("name", ["frac", "momentum"])
def test_elements_share_no_address(name, op, impl, device):
    """Rows of one storage, and rows that run into one another; a slice of a transposed tensor is none of them."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = StepOptions(optimizer="momentum")
    dtype = torch.uint8 if name == "frac" else torch.int8
    storage = torch.full((400,), 100, dtype=dtype, device=device)
    for strides in ((0, 1), (1, 0), (7, 1), (1, 3)):
        shared = storage.as_strided((4, 8), strides)
        message = (
            f"{op.__name__}: {name} must hold each element at = its own address, got strides {list(strides)}"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            _take(op, impl, options, device, **{name: shared})
    assert bool((storage == 100).all())
    if impl != "cpp":
        plain = _take(op, impl, options, device, **{name: storage[:32].clone().view(4, 8)})
        for strides in ((9, 1), (8, 1), (1, 4), (2, 8), (40, 3)):
            apart = storage.clone().as_strided((4, 8), strides)
            assert torch.equal(_take(op, impl, options, device, **{name: apart}), plain), strides


@pytest.mark.parametrize(("op", "impl"), OPS)
def test_epsilon_of_adamw(op, impl, device):
    """A coordinate that never had a gradient is divided by it: 0 / 0 where float32 does not hold it."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    for eps in (0.0, 0, 1e-40):
        with pytest.raises(
            ValueError, match=f"{op.__name__}: eps must for adamw, times its bias correction, be"
        ):
            _take(op, impl, StepOptions(eps=eps), device)
    _take(op, impl, StepOptions(eps=1e-30), device)
    _take(op, impl, StepOptions(optimizer="momentum", eps=0.0), device)


@pytest.mark.parametrize(("op", "impl"), OPS)
def test_tensors_share_no_address(op, impl, device):
    """Two tensors that are changed: refused if they overlap, taken if they lie side by side in one storage."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = StepOptions()
    plain = _take(op, impl, options, device)
    blob = torch.zeros(400, dtype=torch.uint8, device=device)

    def views(frac: tuple[int, ...], momentum: tuple[int, ...], second: tuple[int, ...]) -> dict[str, Any]:
        """Views of the blob, each by (first element, row stride, column stride)."""
        blob.fill_(100)
        at = [blob.as_strided((4, 8), strides, first) for first, *strides in (frac, momentum, second)]
        names = ("frac", "momentum", "second_moment")
        return dict(zip(names, (at[0], at[1].view(torch.int8), at[2]), strict=True))

    for refused, name, other in (
        (((0, 8, 1), (0, 8, 1), (200, 8, 1)), "momentum", "frac"),
        (((0, 8, 1), (31, 8, 1), (200, 8, 1)), "momentum", "frac"),
        (((0, 8, 1), (40, 8, 1), (71, 1, 4)), "second_moment", "momentum"),
        (((0, 16, 1), (100, 16, 1), (7, 16, 1)), "second_moment", "frac"),
    ):
        message = f"{op.__name__}: {name} must share no address with = {other}, got one storage"
        with pytest.raises(ValueError, match=re.escape(message)):
            _take(op, impl, options, device, **views(*refused))
        assert bool((blob == 100).all())
    state = views((0, 8, 1), (32, 8, 1), (64, 8, 1))
    for name in ("frac", "second_moment"):
        message = f"{op.__name__}: frac_ref must share no address with = {name}, got one storage"
        with pytest.raises(ValueError, match=re.escape(message)):
            _take(op, impl, options, device, **state, frac_ref=state[name])
    assert bool((blob == 100).all())
    for taken in (
        ((0, 8, 1), (32, 8, 1), (64, 8, 1)),
        ((0, 24, 1), (8, 24, 1), (16, 24, 1)),
        ((0, 24, 3), (1, 24, 3), (2, 24, 3)),
    ):
        if impl == "cpp" and taken[0][1] != 8:
            continue
        state = views(*taken)
        for key, value in state.items():
            value.fill_(100 if key == "frac" else 0)
        assert torch.equal(_take(op, impl, options, device, **state), plain), taken
