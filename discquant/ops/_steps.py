# SPDX-License-Identifier: Apache-2.0
"""What the ops that take a projected step share: schema of the scalars, launch arguments, checks of the state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops.reference.counter_rng import step_key
from discquant.ops.reference.projected_step import StepOptions, bias_corrected
from discquant.ops.reference.soft_weight import accumulate_dtype, slope

FRAC_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.uint16)
FRAC_REF_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
GRADIENT_DTYPES = registry.FLOAT_DTYPES
# Every scalar reaches the kernels in float32. math.isfinite would break the graph of a compiled caller.
LARGEST = 3.4028234663852886e38
# The smallest whose inverse float32 holds, in numbers that no device takes for zero.
SMALLEST = 2.0**-126
# Beyond these an 8-bit moment's unit or its inverse leaves float32.
MOMENT_BOUNDS = (2.0**-100, 2.0**100)
OPTIMIZERS = ("adamw", "momentum", "lion", "sgd")

SCALAR_SCHEMA = (
    "str optimizer, float lr, float beta1, float beta2, float eps, float weight_decay, float kl_weight, "
    "float grad_clamp, float linear_weight, float hardening, int step, float moment_bound, "
    "int seed, int tensor_id, int first_index"
)
# Derived scalars of a launch, in the order in which every kernel takes them.
SCALARS = (
    "lr", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "kl_weight", "grad_clamp",
    "linear_weight", "hardening", "first_beta1", "first_beta2", "first_inverse", "second_beta2", "second_inverse",
)  # fmt: skip
KEYS = ("noise_key", "first_index")


def flatten_options(options: StepOptions) -> tuple[Any, ...]:
    """Scalars of `options` in the order of the operator's schema."""
    return (
        options.optimizer, options.lr, *options.betas, options.eps, options.weight_decay, options.kl_weight,
        options.grad_clamp, options.linear_weight, options.hardening, options.step, options.moment_bound,
        options.seed, options.tensor_id, options.first_index,
    )  # fmt: skip


def launch_arguments(
    optimizer: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, kl_weight: float,
    grad_clamp: float, linear_weight: float, hardening: float, step: int, moment_bound: float,
    seed: int, tensor_id: int, first_index: int,
) -> tuple[str, dict[str, float], dict[str, int]]:  # fmt: skip
    """Derived scalars and noise keys of a launch; runs in the launcher, where a compiled caller does not trace it.

    `lr` and `eps` hold AdamW's bias corrections; `first_beta1`, `first_beta2` and `second_beta2` are factors of 8-bit
    moments, unit included.
    """
    decay = 1 - lr * weight_decay
    if optimizer == "adamw":
        lr, eps = bias_corrected(lr, (beta1, beta2), eps, step)
    scalars = {
        "lr": lr, "beta1": beta1, "one_minus_beta1": 1 - beta1, "beta2": beta2, "one_minus_beta2": 1 - beta2,
        "eps": eps, "decay": decay, "kl_weight": kl_weight, "grad_clamp": grad_clamp,
        "linear_weight": linear_weight, "hardening": hardening,
        "first_beta1": beta1 * (moment_bound / 127), "first_beta2": beta2 * (moment_bound / 127),
        "first_inverse": 127 / moment_bound,
        "second_beta2": math.sqrt(beta2) * (moment_bound / 255), "second_inverse": 255 / moment_bound,
    }  # fmt: skip
    keys = {"noise_key": step_key(seed, step, tensor_id), "first_index": first_index}
    assert tuple(scalars) == SCALARS
    assert tuple(keys) == KEYS
    return optimizer, scalars, keys


def _check_scalars(op: str, options: StepOptions) -> None:
    betas = options.betas
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"{op}: betas must be of type = tuple, got {type(betas).__name__}")
    whole = {"step": options.step, "seed": options.seed, "tensor_id": options.tensor_id}
    signed = {
        "lr": options.lr, "kl_weight": options.kl_weight, "linear_weight": options.linear_weight,
        "hardening": options.hardening,
    }  # fmt: skip
    positive = {"eps": options.eps, "weight_decay": options.weight_decay}
    registry.require_numbers(op, int, **whole, first_index=options.first_index)
    registry.require_numbers(
        op, float, **signed, **positive, moment_bound=options.moment_bound, grad_clamp=options.grad_clamp
    )
    for beta in betas:
        registry.require_numbers(op, float, betas=beta)
    in_range = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    registry.require(in_range, op, "betas", "be two numbers in", "[0, 1)", betas)
    registry.require(options.step >= 1, op, "step", "be at least", 1, options.step)
    for name, number in whole.items():
        registry.require(-(2**63) <= number < 2**63, op, name, "be an integer in", "[-2^63, 2^63)", number)
    for name, value in signed.items():
        registry.require(abs(value) <= LARGEST, op, name, "in float32 be", "finite", value)
    for name, value in positive.items():
        registry.require(0 <= value <= LARGEST, op, name, "in float32 be finite and at least", 0, value)
    low, high = MOMENT_BOUNDS
    bound = options.moment_bound
    registry.require(low <= bound <= high, op, "moment_bound", "be in", "[2^-100, 2^100]", bound)
    clamp = options.grad_clamp
    # Infinite: no clamp.
    bounded = 0 <= clamp <= LARGEST or clamp == float("inf")
    registry.require(bounded, op, "grad_clamp", "in float32 be infinite, or finite and at least", 0, clamp)
    if options.optimizer == "adamw":
        # A coordinate that never had a gradient is divided by it alone.
        _, eps = bias_corrected(options.lr, (betas[0], betas[1]), options.eps, options.step)
        contract = "for adamw, times its bias correction, be at least"
        registry.require(eps >= SMALLEST, op, "eps", contract, SMALLEST, options.eps)


def check_state(
    op: str, frac: Tensor, frac_ref: Tensor, scale: Tensor, momentum: Tensor | None, second_moment: Tensor | None,
    group_size: int, options: StepOptions,
) -> None:  # fmt: skip
    """Validate the state and the scalars of a step."""
    registry.require_given(op, frac=frac, frac_ref=frac_ref, scale=scale)
    registry.require_tensors(op, momentum=momentum, second_moment=second_moment)
    if not isinstance(options, StepOptions):
        raise TypeError(f"{op}: options must be of type = StepOptions, got {type(options).__name__}")
    registry.require(frac.dim() == 2, op, "frac", "have shape", "[out_features, in_features]", frac.shape)
    registry.require_dtype(op, "frac", frac, FRAC_DTYPES)
    registry.require_dtype(op, "frac_ref", frac_ref, FRAC_REF_DTYPES)
    registry.require(
        frac_ref.shape == frac.shape, op, "frac_ref", "have the shape of frac", frac.shape, frac_ref.shape
    )
    registry.require_group_size(op, group_size)
    registry.require_groups(op, scale, "scale", frac.shape, group_size)
    registry.require_dtype(op, "scale", scale, registry.FLOAT_DTYPES)
    registry.require(
        options.optimizer in OPTIMIZERS, op, "optimizer", "be one of", OPTIMIZERS, options.optimizer
    )
    _check_scalars(op, options)
    last = options.first_index + frac.numel()
    registry.require(
        0 <= options.first_index and last <= 2**32, op, "first_index", "keep indices in", "[0, 2^32)", last
    )
    registry.require_apart(op, "frac", frac)
    needs = (options.optimizer != "sgd", options.optimizer == "adamw")
    for name, moment, needed, code in (
        ("momentum", momentum, needs[0], torch.int8),
        ("second_moment", second_moment, needs[1], torch.uint8),
    ):
        if moment is None:
            registry.require(not needed, op, name, f"for {options.optimizer} be", "a Tensor", None)
            continue
        registry.require(
            moment.shape == frac.shape, op, name, "have the shape of frac", frac.shape, moment.shape
        )
        registry.require_dtype(op, name, moment, (*registry.FLOAT_DTYPES, code))
        if needed:
            registry.require_apart(op, name, moment)
    registry.require_device(
        op, frac, frac_ref=frac_ref, scale=scale, momentum=momentum, second_moment=second_moment
    )


def check_separate(
    op: str, frac: Tensor, momentum: Tensor | None, second_moment: Tensor | None, options: StepOptions,
    **read: Tensor | None,
) -> None:  # fmt: skip
    """Refuse state that shares an address with other state, or with what the step only reads."""
    changed = {"frac": frac}
    if options.optimizer != "sgd" and momentum is not None:
        changed["momentum"] = momentum
    if options.optimizer == "adamw" and second_moment is not None:
        changed["second_moment"] = second_moment
    registry.require_separate(op, read, **changed)


def check_table(op: str, frac: Tensor, q_down: Tensor | None, table: Tensor | None) -> None:
    """Validate the codes and levels of a look-up grid; without a table the codes are not read."""
    registry.require_tensors(op, q_down=q_down, table=table)
    if table is None:
        return
    sizes = [2**bits for bits in range(2, 9)]
    registry.require(
        table.dim() == 1 and table.shape[0] in sizes, op, "table", "have a length of", sizes, table.shape
    )
    registry.require_dtype(op, "table", table, registry.FLOAT_DTYPES)
    if q_down is None:
        raise ValueError(f"{op}: q_down must with a table be = a Tensor, got None")
    registry.require_codes(op, q_down, frac.shape, table.shape[0].bit_length() - 1)
    registry.require_device(op, frac, q_down=q_down, table=table)


def table_scale(
    scale: Tensor, group_size: int, frac: Tensor, q_down: Tensor | None, table: Tensor | None
) -> tuple[Tensor, int]:
    """Return d weight / d frac and its group size: the scale itself, or one value per coordinate with a table."""
    if table is None or q_down is None:
        return scale, group_size
    return slope(q_down, scale, table, group_size, frac.shape[1], accumulate_dtype(frac, scale, table)), 1
