# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square norms of a block in one pass: on a GPU torch has a kernel, while `transformers` takes ten operators.

Theirs are half of what a step moves of activations (`python tests/run/step_traffic.py`).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


def _epsilon(module: nn.Module) -> float | None:
    """Return what a norm adds to the mean square, None where it says so under no usual name."""
    for name in ("variance_epsilon", "eps"):
        found = getattr(module, name, None)
        if isinstance(found, float):
            return found
    return None


@torch.no_grad()
def is_rms_norm(module: nn.Module) -> bool:
    """Say whether a module computes y = weight * x / sqrt(mean(x^2) + eps), x [..., n], weight [n], by trying it.

    The mean is over the last dimension. Its class's own forward, which must take one tensor and nothing besides, runs
    on the CPU with other numbers in place of its weight, which may be on any device or not in memory at all. Norms that
    scale by 1 + weight (Gemma's) are others, and so is one whose forward somebody has replaced.
    """
    parameters = dict(module.named_parameters())
    epsilon = _epsilon(module)
    if list(parameters) != ["weight"] or any(True for _ in module.buffers()) or epsilon is None:
        return False
    weight = parameters["weight"]
    alone = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(alone) != 1 or alone[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return False  # a gate that may be left out, say
    if weight.dim() != 1 or isinstance(module, (nn.RMSNorm, nn.LayerNorm)) or "forward" in module.__dict__:
        return False
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu") + 0.5
    x = torch.randn((3, weight.numel()), generator=generator, dtype=torch.float32, device="cpu")
    x *= epsilon**0.5  # so small that it counts
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(values, requires_grad=False)}
    expected = nn.functional.rms_norm(x, weight.shape, values, epsilon)
    try:
        found = type(module).forward(probe, x)
        return bool(torch.allclose(found, expected, rtol=1e-5))
    except Exception:  # whatever it wants, it is not such a norm
        return False


def rms_norms(block: nn.Module) -> list[nn.Module]:
    """Return the norms of a block that `fused` can run."""
    return [module for module in block.modules() if not list(module.children()) and is_rms_norm(module)]


def _forward_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    epsilon = _epsilon(module)

    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # In float32 throughout and rounded once, as engines do; `transformers` rounds before it multiplies by weight.
        return nn.functional.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)

    return forward


@contextlib.contextmanager
def fused(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, these norms are torch's own."""
    try:
        for module in modules:
            module.__dict__["forward"] = _forward_of(module)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
