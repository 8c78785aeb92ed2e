# SPDX-License-Identifier: Apache-2.0
"""Reference of `projected_step_`: one optimizer step on `frac`, projected onto [0, 1].

State formats (memory.md section 2): `frac` float32 / bfloat16 / uint8 / uint16; `frac_ref` floating or uint8
(code u is (u - 63) / 126); momentum floating or int8; second moment floating or uint8 (of its root).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from discquant.ops.reference.counter_rng import counter_uniform, step_key
from discquant.ops.reference.soft_weight import (
    FRAC_DENOMINATOR,
    accumulate_dtype,
    exact_quotient,
    expand_groups,
)

Optimizer = Literal["adamw", "momentum", "lion", "sgd"]

FRAC_REF_ZERO = 63  # uint8 code of frac_ref = 0
FRAC_REF_RANGE = 126  # codes per unit: covers [-0.5, 1.5] with 0, 1/2 and 1 on codes
FRAC_STREAM, MOMENT_STREAM, SECOND_STREAM = 0, 1, 2
UNDEFINED = 2.0**127  # a KL gradient that exceeds its clamp by this is taken for an overflow
# Coordinates stepped at once: a dozen temporaries of a large layer would outweigh its state.
SLICE = 1 << 22


@dataclass(frozen=True)
class StepOptions:
    """Scalars of one step; see `projected_step_` for their place in the formula."""

    optimizer: Optimizer = "adamw"
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    kl_weight: float = 200.0
    grad_clamp: float = 1.0
    linear_weight: float = 1.0
    hardening: float = 0.0
    step: int = 1
    moment_bound: float = 2.0
    seed: int = 0
    tensor_id: int = 0
    first_index: int = 0


class StepCounts(NamedTuple):
    """Number of coordinates: free to move; fractional after the step; off nearest; with a clamped KL gradient.

    `nan` counts free coordinates whose KL gradient is NaN, infinite or, beyond the clamp, 2^127 and more; those were
    left as they were, and count as none of the clamped.
    """

    live: int
    fractional: int
    moved: int
    saturated: int
    nan: int = 0


def decode_frac_ref(frac_ref: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `frac_ref` as floating numbers; uint8 code u is (u - 63) / 126."""
    if frac_ref.dtype == torch.uint8:
        return exact_quotient(frac_ref.to(dtype) - FRAC_REF_ZERO, FRAC_REF_RANGE)
    return frac_ref.to(dtype)


def encode_frac_ref(frac_ref: Tensor) -> Tensor:
    """Round floating `frac_ref` to its uint8 code.

    Raises:
        ValueError: A value is NaN or lies outside [-0.5, 1.524], the range of the code.
    """
    code = torch.round(frac_ref.double() * FRAC_REF_RANGE) + FRAC_REF_ZERO
    if not bool(((code >= 0) & (code <= 255)).all()):  # false for NaN too
        low, high = frac_ref.min().item(), frac_ref.max().item()
        raise ValueError(
            f"encode_frac_ref: frac_ref must lie in [-0.5, 1.52] = range of its uint8 code, got [{low:g}, {high:g}]"
        )
    return code.to(torch.uint8)


def _fast_quotient(code: Tensor, denominator: int) -> Tensor:
    """Quotient by the rounded reciprocal: exact at 0 and 1; elsewhere the last bit cannot matter to a step."""
    return code * torch.full((), 1.0 / denominator, dtype=code.dtype, device=code.device)


def _place(frac: Tensor, dtype: torch.dtype) -> Tensor:
    denominator = FRAC_DENOMINATOR.get(frac.dtype)
    return frac.to(dtype) if denominator is None else _fast_quotient(frac.to(dtype), denominator)


def _reference_place(frac_ref: Tensor, dtype: torch.dtype) -> Tensor:
    if frac_ref.dtype == torch.uint8:
        return _fast_quotient(frac_ref.to(dtype) - FRAC_REF_ZERO, FRAC_REF_RANGE)
    return frac_ref.to(dtype)


def _stochastic_code(value: Tensor, low: int, high: int, options: StepOptions, stream: int) -> Tensor:
    """Round to an integer, up with probability equal to the fraction: floor(value + r)."""
    key = step_key(options.seed, options.step, options.tensor_id)
    noise = counter_uniform(key, options.first_index, value.numel(), value.device, stream).view_as(value)
    return torch.floor(value + noise).clamp_(low, high)


def store_frac_(target: Tensor, value: Tensor, options: StepOptions) -> None:
    """Write floating `value` in [0, 1] into `target`, stochastically rounded where it is fixed point."""
    denominator = FRAC_DENOMINATOR.get(target.dtype)
    if denominator is None:
        target.copy_(value)
        return
    code = _stochastic_code((value * denominator).float(), 0, denominator, options, FRAC_STREAM)
    target.copy_(code.to(torch.int32).to(target.dtype))


def _root(value: Tensor) -> Tensor:
    # torch's float32 square root may miss the last bit on a CPU, and that bit can decide a stored code.
    return value.double().sqrt().to(value.dtype)


def bias_corrected(lr: float, betas: tuple[float, float], eps: float, step: int) -> tuple[float, float]:
    """Return AdamW's learning rate and epsilon with the corrections of both moments in them: then the direction is
    m / (sqrt(v) + eps), and no moment needs a product of its own.

    Source:
        Kingma and Ba, Adam, arXiv 1412.6980, end of section 2.
    """
    root = math.sqrt(1 - betas[1] ** step)
    return lr * root / (1 - betas[0] ** step), eps * root


def _kept(moment: Tensor, beta: float, bound: float, dtype: torch.dtype) -> Tensor:
    """beta times a moment; the unit of an 8-bit one is in the factor."""
    if moment.dtype == torch.int8:
        return moment.to(dtype) * (beta * (bound / 127))
    if moment.dtype == torch.uint8:
        return (moment.to(dtype) * (math.sqrt(beta) * (bound / 255))).square()
    return beta * moment.to(dtype)


def _store_moment(target: Tensor, value: Tensor, moves: Tensor, options: StepOptions) -> None:
    before = target.clone()
    if target.dtype == torch.int8:
        scaled = (value * (127 / options.moment_bound)).float()
        target.copy_(_stochastic_code(scaled, -128, 127, options, MOMENT_STREAM).to(torch.int8))
    elif target.dtype == torch.uint8:
        scaled = (_root(value) * (255 / options.moment_bound)).float()
        target.copy_(_stochastic_code(scaled, 0, 255, options, SECOND_STREAM).to(torch.uint8))
    else:
        target.copy_(value)
    target.copy_(torch.where(moves, target, before))


def projected_step_(
    frac: Tensor,
    frac_ref: Tensor,
    weight_grad: Tensor,
    scale: Tensor,
    *,
    group_size: int,
    options: StepOptions,
    momentum: Tensor | None = None,
    second_moment: Tensor | None = None,
) -> Tensor:
    """Take one projected step in place; formula and contract are those of `discquant.ops.projected_step_`.

    Args:
        frac: Changed in place.
        frac_ref: Place that reproduces the original weight.
        weight_grad: Gradient by the weight, [out_features, in_features].
        scale: d weight / d frac, [out_features, num_groups]; group size 1 where it differs per coordinate.
        group_size: Columns per group, -1 for the row.
        options: Scalars.
        momentum: First moment; changed in place.
        second_moment: Second moment; changed in place.

    Returns:
        Counts over this tensor in the order of StepCounts, int64, [5]: nothing here waits for the device.

    Source:
        DiscQuant, arXiv 2501.06417, update rule; 8-bit layout and hardening are this project's.
    """
    rows = max(1, SLICE // max(1, frac.shape[1]))
    counts = torch.zeros(len(StepCounts._fields), dtype=torch.int64, device=frac.device)
    for begin in range(0, frac.shape[0], rows):
        part = slice(begin, begin + rows)
        counts += _step_rows_(
            frac[part],
            frac_ref[part],
            weight_grad[part],
            scale[part],
            group_size,
            dataclasses.replace(options, first_index=options.first_index + begin * frac.shape[1]),
            None if momentum is None else momentum[part],
            None if second_moment is None else second_moment[part],
        )
    return counts


def _step_rows_(
    frac: Tensor,
    frac_ref: Tensor,
    weight_grad: Tensor,
    scale: Tensor,
    group_size: int,
    options: StepOptions,
    momentum: Tensor | None,
    second_moment: Tensor | None,
) -> Tensor:
    """Take the step of some rows; see `projected_step_`."""
    compute = accumulate_dtype(frac, weight_grad)
    position = _place(frac, compute)
    reference = _reference_place(frac_ref, compute)
    live = (reference != 0) & (reference != 1)
    raw = weight_grad.to(compute) * (
        expand_groups(scale.to(compute), group_size, frac.shape[1]) * options.kl_weight
    )
    kl = raw.clamp(-options.grad_clamp, options.grad_clamp)
    g = kl + options.linear_weight * (1 - 2 * reference.clamp(0, 1)) + options.hardening * (1 - 2 * position)
    excess = raw.abs() - options.grad_clamp
    defined = excess < UNDEFINED  # false for NaN
    moves = live & defined
    g = torch.where(moves, g, torch.zeros_like(g))

    b1, b2 = options.betas
    lr = options.lr
    if options.optimizer == "sgd":
        direction = g
    else:
        assert momentum is not None
        m = _kept(momentum, b1, options.moment_bound, compute) + (1 - b1) * g
        direction = m
        if options.optimizer == "lion":
            direction = torch.sign(m)
            m = _kept(momentum, b2, options.moment_bound, compute) + (1 - b2) * g
        if options.optimizer == "adamw":
            assert second_moment is not None
            v = _kept(second_moment, b2, options.moment_bound, compute) + (1 - b2) * g * g
            lr, eps = bias_corrected(lr, options.betas, options.eps, options.step)
            direction = m * (_root(v) + eps).reciprocal()
            _store_moment(second_moment, v, moves, options)
            position = torch.where(moves, position * (1 - options.lr * options.weight_decay), position)
        _store_moment(momentum, m, moves, options)
    moved_to = (position - lr * direction).clamp(0, 1)
    unmoved = frac.clone()
    store_frac_(frac, moved_to, options)
    # Codes that do not move are put back, not rounded again: (u / 255) * 255 may fall just short of u.
    frac.copy_(torch.where(moves, frac.to(compute), unmoved.to(compute)))

    after = _place(frac, compute)
    fractional = live & (after > 0.01) & (after < 0.99)
    moved = live & ((after > 0.5) != (reference > 0.5))
    saturated, nan = moves & (excess >= 0), live & ~defined
    return torch.stack([which.sum() for which in (live, fractional, moved, saturated, nan)])
