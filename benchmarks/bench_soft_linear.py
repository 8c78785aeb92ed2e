# SPDX-License-Identifier: Apache-2.0
"""soft_linear: every strategy and tile, forward, dX and d frac, against cuBLAS on the ready weight; the fused step."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, GPU, measure, require_close, require_equal

from discquant.ops import (
    StepOptions,
    projected_step_deferred_,
    soft_linear,
    soft_linear_step_deferred_,
    soft_weight,
)
from discquant.ops.reference import soft_linear as reference

# out_features, in_features of Llama-3 8B (70B in the full set)
SHAPES = [(28672, 4096), (4096, 14336)] if GPU else [(96, 128)]
TOKENS = [512, 4096, 16384] if GPU else [32]
DTYPE = torch.bfloat16 if GPU else torch.float32
STAGES = ("forward", "dx", "dfrac")
PROVIDERS = ["triton-auto", "triton-materialise", "cublas", "paper", "reference", "compiled"]
PROVIDERS += [f"triton-fused-{tile}" for tile in ("compact", "square", "deep", "wide")]


def _problem(shape, tokens):
    rows, cols = shape
    q = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=DEVICE) & 0xEE
    frac = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(rows, cols // 64, device=DEVICE) * 0.01).to(DTYPE)
    x = torch.randn(tokens, cols, device=DEVICE, dtype=DTYPE)
    dy = torch.randn(tokens, rows, device=DEVICE, dtype=DTYPE)
    return q, frac, scale, x, dy


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_soft_linear(benchmark, provider, stage, shape, tokens):
    rows, cols = shape
    if provider.endswith("wide") and (not GPU or torch.cuda.get_device_capability()[0] < 9):
        pytest.skip("the wide tile is for sm_90")
    if provider in ("paper", "reference", "compiled") and stage != "forward":
        pytest.skip("differs from cublas in the forward pass only")
    q, frac, scale, x, dy = _problem(shape, tokens)
    kwargs = {"num_bits": 4, "group_size": 64}
    weight = soft_weight(q, frac, scale, **kwargs, dtype=DTYPE, impl="reference")
    accumulate = torch.float32
    bare = {
        "forward": lambda: torch.mm(x, weight.t()),
        "dx": lambda: torch.mm(dy, weight),
        "dfrac": lambda: torch.mm(dy.t(), x, out_dtype=accumulate) if GPU else torch.mm(dy.t(), x),
    }[stage]
    strategy = provider.split("-")[1] if provider.startswith("triton") else ""
    if provider == "cublas":
        body = bare
    elif provider == "paper":
        low, high = (soft_weight(q, torch.full_like(frac, v), scale, **kwargs, dtype=DTYPE) for v in (0, 255))
        position = (frac.float() / 255).to(DTYPE)
        body = lambda: torch.mm(x, ((1 - position) * low + position * high).t())  # noqa: E731
    elif provider == "reference":
        body = lambda: soft_linear(x, q, frac, scale, **kwargs, impl="reference")  # noqa: E731
    elif provider == "compiled":
        compiled = torch.compile(reference.soft_linear)
        body = lambda: compiled(x, q, frac, scale, **kwargs)  # noqa: E731
    elif strategy == "fused":
        from discquant.triton_kernels import soft_linear as kernels
        from discquant.triton_kernels.soft_linear_tiles import CONFIGS

        config = CONFIGS[provider.rsplit("-", 1)[1]]
        state = (q, frac, scale, None, None)
        body = {
            "forward": lambda: kernels.soft_linear_fwd(x, *state, None, 4, 64, False, config),
            "dx": lambda: kernels.soft_linear_dx(dy, *state, 4, 64, False, config),
            "dfrac": lambda: kernels.soft_linear_dfrac(dy, x, q, scale, None, 4, 64, accumulate, config),
        }[stage]
    else:
        ops = torch.ops.discquant
        body = {
            "forward": lambda: ops.soft_linear_fwd(
                x, q, frac, scale, None, None, None, 4, 64, False, strategy
            ),
            "dx": lambda: ops.soft_linear_dx(dy, q, frac, scale, None, None, 4, 64, False, strategy),
            "dfrac": lambda: ops.soft_linear_dfrac(dy, x, q, scale, None, 4, 64, accumulate, strategy),
        }[stage]

    def gate():
        part = slice(0, 64)
        if stage == "dfrac":
            oracle = dy.t()[part].double() @ x.double()
            baseline = (dy.t()[part] @ x).float()
            if provider != "cublas":
                slope = scale[part].repeat_interleave(64, dim=1)
                oracle, baseline = oracle * slope.double(), baseline * slope.float()
            require_close(body()[part], oracle, baseline)
        else:
            left, right = (x, weight.t()) if stage == "forward" else (dy, weight)
            require_close(body()[part], left[part].double() @ right.double(), left[part] @ right)

    measure(
        benchmark, body, op="soft_linear", provider=provider, mode=stage, shape=f"{tokens}x{rows}x{cols}",
        dtype=str(DTYPE)[6:], gate=None if provider == "paper" else gate, flops=2.0 * tokens * rows * cols, bare=bare,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("optimizer", ["momentum", "lion", "adamw"])
@pytest.mark.parametrize("provider", ["matmul-then-step", "triton-epilogue"])
def test_step(benchmark, provider, optimizer, shape, tokens):
    """Gradient and step: two launches with a float32 gradient between, or the step in the matmul's epilogue."""
    rows, cols = shape
    _, frac, scale, x, dy = _problem(shape, tokens)
    ref = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, device=DEVICE)
    first, second = torch.zeros_like(frac, dtype=torch.int8), torch.zeros_like(frac)
    common = {
        "group_size": 64, "options": StepOptions(optimizer=optimizer), "momentum": first, "second_moment": second,
        "impl": "triton",
    }  # fmt: skip
    gradient = lambda: torch.mm(dy.t(), x, out_dtype=torch.float32) if GPU else torch.mm(dy.t(), x)  # noqa: E731
    if provider == "triton-epilogue":
        body = lambda: soft_linear_step_deferred_(dy, x, frac, ref, scale, **common)  # noqa: E731
    else:
        body = lambda: projected_step_deferred_(frac, ref, gradient(), scale, **common)  # noqa: E731

    def gate():
        # Small integers: the sum over tokens is exact in any order, so both ways must give the same bytes.
        small_x, small_dy = (torch.randint(-4, 5, t.shape, device=DEVICE).to(DTYPE) for t in (x, dy))
        whole = torch.mm(small_dy.t(), small_x, out_dtype=torch.float32) if GPU else small_dy.t() @ small_x
        codes = []
        for fused in (True, False):
            state = {name: t.clone() for name, t in (("momentum", first), ("second_moment", second))}
            codes.append(frac.clone())
            if fused:
                soft_linear_step_deferred_(small_dy, small_x, codes[-1], ref, scale, **{**common, **state})
            else:
                projected_step_deferred_(codes[-1], ref, whole, scale, **{**common, **state})
        require_equal(*codes)

    measure(
        benchmark, body, op="soft_linear_step", provider=provider, mode=optimizer, shape=f"{tokens}x{rows}x{cols}",
        dtype=str(DTYPE)[6:], gate=gate if provider == "triton-epilogue" else None, flops=2.0 * tokens * rows * cols,
        bare=gradient,
    )  # fmt: skip
