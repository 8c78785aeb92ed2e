# SPDX-License-Identifier: Apache-2.0
"""Registered operators of `soft_linear` and its step: schemas, fakes, launchers, choice of strategy and tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops._steps import SCALAR_SCHEMA, launch_arguments
from discquant.ops.reference.soft_linear import weight_gradient
from discquant.ops.soft_linear_table import rule

X_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STRATEGIES = ("auto", "fused", "materialise")
_WEIGHT = "Tensor q_down, Tensor frac, Tensor scale, Tensor? zero_point, Tensor? table"
_OPTIONAL = "Tensor? minimum=None, Tensor? g_idx=None"


def chosen(x: Tensor, stage: str, shape: Sequence[int]) -> tuple[str, str]:
    """Strategy and tile that the table chooses for x of [num_tokens, ...] and a weight of `shape`."""
    if x.is_cuda and x.dtype in (torch.float32, torch.float64):
        # Without tensor cores the fused kernels spill; cuBLAS has exact float32 and float64.
        return "materialise", "compact"
    return rule(x.device, stage, x.numel() // max(1, x.shape[-1]), shape[0] * shape[1])


def _resolve(
    x: Tensor, stage: str, strategy: str, shape: Sequence[int], table: Tensor | None, g_idx: Tensor | None
) -> tuple[str, Any]:
    """Strategy and launch configuration."""
    found, tile = chosen(x, stage, shape)
    tiles = registry.triton_module("soft_linear_tiles")
    tile = tiles.fitting_tile(tile, shape[1], table is not None, g_idx is not None)
    return found if strategy == "auto" else strategy, tiles.CONFIGS[tile]


def _fwd_fake(x: Tensor, q_down: Tensor, frac: Tensor, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], frac.shape[0]))


def _fwd_launch(
    x: Tensor, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
    bias: Tensor | None, num_bits: int, group_size: int, is_reference: bool, strategy: str,
    minimum: Tensor | None = None, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    strategy, config = _resolve(x, "forward", strategy, frac.shape, table, g_idx)
    weight = (q_down, frac, scale, zero_point, table)
    if strategy == "fused":
        out: Tensor = registry.triton_module("soft_linear").soft_linear_fwd(
            x, *weight, bias, num_bits, group_size, is_reference, config, minimum, g_idx
        )
        return out
    dense = registry.triton_module("soft_weight").soft_weight_fwd(
        *weight, num_bits, group_size, x.dtype, is_reference, False, minimum, g_idx
    )
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _dx_fake(grad_output: Tensor, q_down: Tensor, frac: Tensor, *args: Any) -> Tensor:
    return grad_output.new_empty((grad_output.shape[0], frac.shape[1]))


def _dx_launch(
    grad_output: Tensor, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None,
    table: Tensor | None, num_bits: int, group_size: int, is_reference: bool, strategy: str,
    minimum: Tensor | None = None, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    strategy, config = _resolve(grad_output, "dx", strategy, frac.shape, table, g_idx)
    weight = (q_down, frac, scale, zero_point, table)
    if strategy == "fused":
        out: Tensor = registry.triton_module("soft_linear").soft_linear_dx(
            grad_output, *weight, num_bits, group_size, is_reference, config, minimum, g_idx
        )
        return out
    dense = registry.triton_module("soft_weight").soft_weight_fwd(
        *weight, num_bits, group_size, grad_output.dtype, is_reference, False, minimum, g_idx
    )
    return torch.mm(grad_output, dense)


def _dfrac_fake(
    grad_output: Tensor, x: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, strategy: str, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((grad_output.shape[1], x.shape[1]), dtype=dtype)


def _dfrac_launch(
    grad_output: Tensor, x: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, strategy: str, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    strategy, config = _resolve(x, "dfrac", strategy, (grad_output.shape[1], x.shape[1]), table, g_idx)
    if strategy == "fused":
        out: Tensor = registry.triton_module("soft_linear").soft_linear_dfrac(
            grad_output, x, q_down, scale, table, num_bits, group_size, dtype, config, g_idx
        )
        return out
    scaled: Tensor = registry.triton_module("soft_weight").soft_weight_bwd(
        weight_gradient(grad_output, x), q_down, scale, table, num_bits, group_size, dtype, g_idx
    )
    return scaled


def _step_fake(grad_output: Tensor, *args: Any) -> Tensor:
    return grad_output.new_empty(5, dtype=torch.int64)


def _step_launch(
    grad_output: Tensor, x: Tensor, frac: Tensor, frac_ref: Tensor, scale: Tensor, momentum: Tensor | None,
    second_moment: Tensor | None, q_down: Tensor | None, table: Tensor | None, group_size: int, *options: Any,
) -> Tensor:  # fmt: skip
    kernels = registry.triton_module("soft_linear")
    optimizer, scalars, keys = launch_arguments(*options)
    tiles = registry.triton_module("soft_linear_tiles")
    _, tile = rule(x.device, "step", x.shape[0], frac.numel())
    state = (t for t in (frac, frac_ref, momentum, second_moment) if t is not None)
    plain = table is None and all(t.dtype.itemsize == 1 for t in state)
    tile = tiles.fitting_step_tile(tile, frac.shape[1], optimizer, plain)
    counts: Tensor = kernels.soft_linear_step(
        grad_output, x, frac, frac_ref, scale, momentum, second_moment, q_down, table, group_size,
        optimizer, scalars, keys, tiles.STEP_CONFIGS[tile],
    )  # fmt: skip
    return counts


fwd_op = registry.define(
    f"soft_linear_fwd(Tensor x, {_WEIGHT}, Tensor? bias, int num_bits, int group_size, bool is_reference, "
    f"str strategy, {_OPTIONAL}) -> Tensor",
    _fwd_fake,
    _fwd_launch,
)
dx_op = registry.define(
    f"soft_linear_dx(Tensor grad_output, {_WEIGHT}, int num_bits, int group_size, bool is_reference, "
    f"str strategy, {_OPTIONAL}) -> Tensor",
    _dx_fake,
    _dx_launch,
)
dfrac_op = registry.define(
    "soft_linear_dfrac(Tensor grad_output, Tensor x, Tensor q_down, Tensor scale, Tensor? table, int num_bits, "
    "int group_size, ScalarType dtype, str strategy, Tensor? g_idx=None) -> Tensor",
    _dfrac_fake,
    _dfrac_launch,
)
step_op = registry.define(
    "soft_linear_step_(Tensor grad_output, Tensor x, Tensor(a!) frac, Tensor frac_ref, Tensor scale, "
    "Tensor(b!)? momentum, Tensor(c!)? second_moment, Tensor? q_down, Tensor? table, int group_size, "
    f"{SCALAR_SCHEMA}) -> Tensor",
    _step_fake,
    _step_launch,
)
