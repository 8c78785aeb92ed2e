# SPDX-License-Identifier: Apache-2.0
"""One whole solver step on the linears of a Llama-3 8B block, against the bare cuBLAS time of the same matmuls.

Teacher forward, student forward, recompute, dX, dW and the projected step, weights made from the 8-bit state at each
use; attention and norms are left out on both sides. Apart from it, what is not matmul, on a gradient that is there: the
difference of two times that are nearly equal would not tell its bytes.
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, GPU, measure

from discquant.ops import StepOptions, projected_step_deferred_, soft_linear_step_deferred_, soft_weight

LINEARS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)] if GPU else [(96, 64), (64, 128)]
TOKENS = [4096, 16384] if GPU else [32]
DTYPE = torch.bfloat16 if GPU else torch.float32
WEIGHTS = sum(rows * cols for rows, cols in LINEARS)
OPTIONS = StepOptions(optimizer="lion", lr=0.03)
# The traffic of docs/kernels.md, with the gradient that the matmul writes; gives the speed of a copy to targets.py.
BYTES_PER_WEIGHT = 23.6
GRADIENT_BYTES = 4.0
PROVIDERS = ["triton", "triton-epilogue", "paper"] if GPU else ["paper", "cpp", "reference"]


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(dy.t(), x, out_dtype=torch.float32) if GPU else torch.mm(dy.t(), x)


class _Paper:
    """The published way: both neighbours, frac and AdamW state in bf16, interpolation at every forward, autograd."""

    def __init__(self, layer: dict[str, torch.Tensor]) -> None:
        kwargs = {"num_bits": 4, "group_size": 64, "dtype": DTYPE}
        top = torch.full_like(layer["frac"], 255)
        self.low = soft_weight(layer["q"], torch.zeros_like(top), layer["scale"], **kwargs)
        self.high = soft_weight(layer["q"], top, layer["scale"], **kwargs)
        self.frac = (layer["frac"].float() / 255).to(DTYPE).requires_grad_()
        self.linear = 1 - 2 * (layer["ref"].float() / 255).to(DTYPE)
        self.optimizer = torch.optim.AdamW([self.frac], lr=0.1, weight_decay=0.0)

    def weight(self) -> torch.Tensor:
        return (1 - self.frac) * self.low + self.frac * self.high

    def step(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.backward(torch.mm(leaf, self.weight().t()), dy)
        self.frac.grad = (200 * self.frac.grad).clamp_(-1, 1) + self.linear
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.frac.clamp_(0, 1)


def test_paper_way_is_the_same_gradient():
    """The baseline computes what we compute: d frac = Delta dY^T x, in its own precision."""
    layer = {
        "q": torch.randint(0, 256, (8, 32), dtype=torch.uint8, device=DEVICE) & 0xEE,
        "frac": torch.randint(0, 256, (8, 64), dtype=torch.uint8, device=DEVICE),
        "scale": torch.rand(8, 1, device=DEVICE).to(DTYPE), "ref": torch.zeros(8, 64, dtype=torch.uint8, device=DEVICE),
    }  # fmt: skip
    paper = _Paper(layer)
    x, dy = torch.randn(16, 64, device=DEVICE, dtype=DTYPE), torch.randn(16, 8, device=DEVICE, dtype=DTYPE)
    torch.autograd.backward(torch.mm(x, paper.weight().t()), dy)
    expected = (dy.double().t() @ x.double()) * layer["scale"].double()
    error = (paper.frac.grad.double() - expected).abs().max()
    assert error <= 16 * torch.finfo(DTYPE).eps * expected.abs().max()


def _layers(tokens: int) -> list[dict[str, torch.Tensor]]:
    """State of every linear, and activations of so many tokens."""
    layers = []
    for rows, cols in LINEARS:
        frac, ref = torch.randint(0, 256, (2, rows, cols), dtype=torch.uint8, device=DEVICE)
        layers.append({
            "q": torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=DEVICE) & 0xEE,
            "frac": frac, "ref": ref, "scale": torch.rand(rows, cols // 64, device=DEVICE).to(DTYPE) * 0.01,
            "first": torch.zeros_like(frac, dtype=torch.int8),
            "dense": torch.randn(rows, cols, device=DEVICE, dtype=DTYPE),
            "x": torch.randn(tokens, cols, device=DEVICE, dtype=DTYPE),
            "dy": torch.randn(tokens, rows, device=DEVICE, dtype=DTYPE),
        })  # fmt: skip
    return layers


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name in ("triton", "cpp", "reference")])
def test_elementwise(benchmark, provider):
    """A step's three weights and the step itself, each pass over all layers: none finds the last one's in the L2."""
    layers = _layers(tokens=1)
    gradients = [torch.randn_like(layer["dense"], dtype=torch.float32) for layer in layers]
    kwargs = {"num_bits": 4, "group_size": 64, "dtype": DTYPE, "impl": provider}

    def weights(which: str) -> list[torch.Tensor]:
        teacher = which == "ref"
        return [soft_weight(t["q"], t[which], t["scale"], is_reference=teacher, **kwargs) for t in layers]

    def elementwise() -> None:
        for which in (
            "ref",
            "frac",
            "frac",
        ):  # the teacher's, the student's, and those again for the way back
            weights(which)
        for layer, gradient in zip(layers, gradients, strict=True):
            projected_step_deferred_(
                layer["frac"], layer["ref"], gradient, layer["scale"], group_size=64, options=OPTIONS,
                momentum=layer["first"], impl=provider,
            )  # fmt: skip

    measure(
        benchmark, elementwise, op="solver_step", provider=provider, mode="lion, elementwise",
        shape=f"{WEIGHTS} weights", dtype=str(DTYPE)[6:], num_bytes=(BYTES_PER_WEIGHT - GRADIENT_BYTES) * WEIGHTS,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_solver_step(benchmark, provider, tokens):
    impl = provider.split("-")[0]
    layers = _layers(tokens)
    kwargs = {"num_bits": 4, "group_size": 64, "dtype": DTYPE, "impl": impl}
    published = [_Paper(layer) for layer in layers] if provider == "paper" else []

    def paper() -> None:
        with torch.no_grad():
            for layer, way in zip(layers, published, strict=True):
                torch.mm(layer["x"], layer["dense"].t())
                torch.mm(layer["x"], way.weight().t())
        for layer, way in reversed(list(zip(layers, published, strict=True))):
            way.step(layer["x"], layer["dy"])

    def step() -> None:
        for layer in layers:
            teacher = soft_weight(layer["q"], layer["ref"], layer["scale"], is_reference=True, **kwargs)
            torch.mm(layer["x"], teacher.t())
            student = soft_weight(layer["q"], layer["frac"], layer["scale"], **kwargs)
            torch.mm(layer["x"], student.t())
        for layer in reversed(layers):
            student = soft_weight(layer["q"], layer["frac"], layer["scale"], **kwargs)
            torch.mm(layer["x"], student.t())
            torch.mm(layer["dy"], student)
            if provider == "triton-epilogue":
                soft_linear_step_deferred_(
                    layer["dy"], layer["x"], layer["frac"], layer["ref"], layer["scale"], group_size=64,
                    options=OPTIONS, momentum=layer["first"], impl=impl,
                )  # fmt: skip
                continue
            projected_step_deferred_(
                layer["frac"], layer["ref"], _weight_gradient(layer["dy"], layer["x"]), layer["scale"], group_size=64,
                options=OPTIONS, momentum=layer["first"], impl=impl,
            )  # fmt: skip

    def bare() -> None:
        for layer in layers:
            for _ in range(3):
                torch.mm(layer["x"], layer["dense"].t())
            torch.mm(layer["dy"], layer["dense"])
            _weight_gradient(layer["dy"], layer["x"])

    measure(
        benchmark, paper if published else step, op="solver_step", provider=provider,
        mode="adamw" if published else "lion", shape=f"{tokens} tokens, {WEIGHTS} weights", dtype=str(DTYPE)[6:],
        num_bytes=BYTES_PER_WEIGHT * WEIGHTS, flops=10.0 * tokens * WEIGHTS, bare=bare,
    )  # fmt: skip
