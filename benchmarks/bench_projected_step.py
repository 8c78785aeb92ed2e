# SPDX-License-Identifier: Apache-2.0
"""projected_step_: one pass over gradient and state, GB/s against a copy; 8-bit optimisers of others beside it."""

from __future__ import annotations

import functools

import pytest
import torch
from harness import DEVICE, GPU, measure, package, require_equal

from discquant.ops import StepOptions, projected_step_deferred_
from discquant.ops.reference import projected_step as reference

SHAPES = [(28672, 4096), (4096, 14336)] if GPU else [(256, 512)]
OPTIMIZERS = ("momentum", "lion", "adamw")
# Ours first: a run that is cut keeps what the targets ask for.
PROVIDERS = ["triton", "reference", "compiled"] + ([] if GPU else ["cpp"])
PEERS = ("torch-adamw-fused", "bitsandbytes-adamw8bit", "bitsandbytes-lion8bit", "torchao-adamw8bit")


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

    def compiled(codes):
        # The counts wait for the device and end the graph: they are taken, as in every other provider.
        function = _compiled()
        return torch.tensor(function(
            codes, ref, grad, scale, group_size=64, options=options,
            momentum=first if codes is frac else first.clone(),
            second_moment=second if codes is frac else second.clone(),
        ), device=DEVICE)  # fmt: skip

    def step(codes, impl):
        if impl == "compiled":
            return compiled(codes)
        return projected_step_deferred_(
            codes, ref, grad, scale, group_size=64, options=options, impl=impl,
            momentum=first if codes is frac else first.clone(),
            second_moment=second if codes is frac else second.clone(),
        )  # fmt: skip

    def gate():
        expected, actual = frac.clone(), frac.clone()
        counts, wanted = step(actual, provider), step(expected, "reference")
        if provider == "compiled":
            # Its fused multiply-adds may move a stochastic rounding by one code, here and there.
            if ((actual.int() - expected.int()).abs() > 1).any() or (
                actual != expected
            ).float().mean() > 1e-3:
                raise AssertionError("gate: the compiled reference computes something else")
            return
        require_equal(counts, wanted)
        require_equal(actual, expected)

    # frac read and written, frac_ref and the float32 gradient read, moments read and written.
    moments = 4 if optimizer == "adamw" else 2
    measure(
        benchmark, lambda: step(frac, provider), op="projected_step", provider=provider, mode=optimizer,
        shape=f"{rows}x{cols}", dtype="8bit-f32grad", gate=gate, num_bytes=rows * cols * (2 + 1 + 4 + moments + 2 / 64),
    )  # fmt: skip


@functools.cache
def _compiled():
    return torch.compile(reference.projected_step_)


def _peer(provider, parameter):
    """Optimisers of others on a bf16 parameter: plain steps without projection, linear term or counts."""
    if provider == "torch-adamw-fused":
        return torch.optim.AdamW([parameter], fused=GPU)
    library = package("torchao.optim" if provider.startswith("torchao") else "bitsandbytes")
    if library is None or not GPU:
        pytest.skip(f"{provider.split('-')[0]} is not installed here" if GPU else f"{provider} needs a GPU")
    if provider == "torchao-adamw8bit":
        return library.AdamW8bit([parameter])
    kind = library.optim.Lion8bit if "lion" in provider else library.optim.AdamW8bit
    return kind([parameter])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", PEERS)
def test_peers(benchmark, provider, shape):
    rows, cols = shape
    parameter = torch.nn.Parameter(torch.rand(rows, cols, device=DEVICE).bfloat16())
    parameter.grad = torch.randn(rows, cols, device=DEVICE).bfloat16()
    optimizer = _peer(provider, parameter)
    measure(
        benchmark, optimizer.step, op="projected_step", provider=provider,
        mode="adamw" if "adamw" in provider else "lion", shape=f"{rows}x{cols}", dtype="bf16",
    )  # fmt: skip
