# SPDX-License-Identifier: Apache-2.0
"""projected_step_: one pass over gradient and state, GB/s against a copy; 8-bit optimisers of others beside it."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, GPU, measure, package, require_equal

from discquant.ops import StepOptions, projected_step_deferred_

SHAPES = [(28672, 4096), (4096, 14336)] if GPU else [(256, 512)]
OPTIMIZERS = ("momentum", "lion", "adamw")
PROVIDERS = ["reference", "triton"] + ([] if GPU else ["cpp"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_projected_step(benchmark, provider, optimizer, shape):
    rows, cols = shape
    frac, ref = torch.randint(0, 256, (2, rows, cols), dtype=torch.uint8, device=DEVICE)
    grad = torch.randn(rows, cols, device=DEVICE) * 0.01
    scale = torch.rand(rows, cols // 64, device=DEVICE).bfloat16()
    first, second = torch.zeros_like(frac, dtype=torch.int8), torch.zeros_like(frac)
    options = StepOptions(optimizer=optimizer)

    def step(codes, impl):
        return projected_step_deferred_(
            codes, ref, grad, scale, group_size=64, options=options, impl=impl,
            momentum=first if codes is frac else first.clone(),
            second_moment=second if codes is frac else second.clone(),
        )  # fmt: skip

    def gate():
        expected, actual = frac.clone(), frac.clone()
        require_equal(step(actual, provider), step(expected, "reference"))
        require_equal(actual, expected)

    # frac read and written, frac_ref and the float32 gradient read, moments read and written.
    moments = 4 if optimizer == "adamw" else 2
    measure(
        benchmark, lambda: step(frac, provider), op="projected_step", provider=provider, mode=optimizer,
        shape=f"{rows}x{cols}", dtype="8bit-f32grad", gate=gate, num_bytes=rows * cols * (2 + 1 + 4 + moments + 2 / 64),
    )  # fmt: skip


def _peers():
    """Optimisers of others on a bf16 parameter: plain steps without projection, linear term or counts."""
    peers = {"torch-adamw-fused": lambda p: torch.optim.AdamW(p, fused=GPU)}
    bitsandbytes, torchao = package("bitsandbytes"), package("torchao.optim")
    if bitsandbytes is not None and GPU:
        peers["bitsandbytes-adamw8bit"] = lambda p: bitsandbytes.optim.AdamW8bit(p)
        peers["bitsandbytes-lion8bit"] = lambda p: bitsandbytes.optim.Lion8bit(p)
    if torchao is not None and GPU:
        peers["torchao-adamw8bit"] = lambda p: torchao.AdamW8bit(p)
    return peers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", _peers())
def test_peers(benchmark, provider, shape):
    rows, cols = shape
    parameter = torch.nn.Parameter(torch.rand(rows, cols, device=DEVICE).bfloat16())
    parameter.grad = torch.randn(rows, cols, device=DEVICE).bfloat16()
    optimizer = _peers()[provider]([parameter])
    measure(
        benchmark, optimizer.step, op="projected_step", provider=provider,
        mode="adamw" if "adamw" in provider else "lion", shape=f"{rows}x{cols}", dtype="bf16",
    )  # fmt: skip
