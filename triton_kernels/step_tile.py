# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one projected step on one tile, shared by projected_step and by soft_linear's epilogue.

float32 throughout, in the reference's order; launched without contraction to fused multiply-adds, so that state,
noise and counts equal the reference's bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from .common import U8, U16, cast, counter_uniform, decode_position, divide, signed32

ADAMW = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
LION = tl.constexpr(2)
SGD = tl.constexpr(3)
OPTIMIZERS = {"adamw": ADAMW.value, "momentum": MOMENTUM.value, "lion": LION.value, "sgd": SGD.value}

# Floating scalars of a launch, in the order of the kernels' arguments.
SCALARS = (
    "lr", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "kl_weight", "grad_clamp",
    "linear_weight", "hardening", "correction1", "correction2", "first_unit", "first_inverse", "second_unit",
    "second_inverse",
)  # fmt: skip
KEYS = ("frac_key", "first_key", "second_key", "first_index")
# Counts are added to one of these slots, so that no single address serialises the whole launch.
COUNT_SLOTS = 128
COUNTS = 5


@triton.jit
def round_up_or_down(value, index, key):
    """Integer, up with probability equal to the fraction."""
    return tl.floor(value + counter_uniform(index, key))


@triton.jit
def update_tile(
    grad, slope, mask, index, offset_f, offset_r, offset_m, offset_v,
    frac_ptr, ref_ptr, first_ptr, second_ptr, counts_ptr, slot,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp,
    linear_weight, hardening, correction1, correction2, first_unit, first_inverse, second_unit, second_inverse,
    frac_key, first_key, second_key,
    OPTIMIZER: tl.constexpr, FRAC_KIND: tl.constexpr, REF_KIND: tl.constexpr,
    FIRST_INT: tl.constexpr, SECOND_INT: tl.constexpr,
):  # fmt: skip
    """Update one tile given its weight gradient and d weight / d frac; `index` counts in the unsharded tensor."""
    code = tl.load(frac_ptr + offset_f, mask=mask, other=0)
    position = decode_position(code, FRAC_KIND, tl.float32)
    # Masked elements read as code 0 of frac_ref: they are excluded by `mask` below, not by their value.
    reference = decode_position(tl.load(ref_ptr + offset_r, mask=mask, other=0), REF_KIND, tl.float32)
    live = mask & (reference != 0.0) & (reference != 1.0)
    raw = grad * (slope * kl_weight)
    finite = raw == raw
    moves = live & finite
    kl = tl.minimum(tl.maximum(raw, -grad_clamp), grad_clamp)
    linear = linear_weight * (1.0 - 2.0 * tl.minimum(tl.maximum(reference, 0.0), 1.0))
    g = kl + linear + hardening * (1.0 - 2.0 * position)
    g = tl.where(moves, g, 0.0)

    if OPTIMIZER == SGD:
        direction = g
    else:
        stored = tl.load(first_ptr + offset_m, mask=mask, other=0)
        first = stored.to(tl.float32)
        if FIRST_INT:
            first = first * first_unit
        if OPTIMIZER == LION:
            blend = beta1 * first + one_minus_beta1 * g
            direction = tl.where(blend > 0.0, 1.0, tl.where(blend < 0.0, -1.0, 0.0))
            first = beta2 * first + one_minus_beta2 * g
        else:
            first = beta1 * first + one_minus_beta1 * g
            direction = first
        if OPTIMIZER == ADAMW:
            stored_second = tl.load(second_ptr + offset_v, mask=mask, other=0)
            second = stored_second.to(tl.float32)
            if SECOND_INT:
                root = second * second_unit
                second = root * root
            second = beta2 * second + (one_minus_beta2 * g) * g
            root_hat = tl.sqrt_rn(divide(second, correction2))
            direction = divide(divide(first, correction1), root_hat + eps)
            if SECOND_INT:
                scaled = round_up_or_down(tl.sqrt_rn(second) * second_inverse, index, second_key)
                rounded = tl.minimum(tl.maximum(scaled, 0.0), 255.0).to(tl.int32).to(tl.uint8)
            else:
                rounded = cast(second, second_ptr.dtype.element_ty)
            tl.store(second_ptr + offset_v, tl.where(finite, rounded, stored_second), mask=mask)
            position = tl.where(moves, position * decay, position)
        if FIRST_INT:
            scaled = round_up_or_down(first * first_inverse, index, first_key)
            rounded_first = tl.minimum(tl.maximum(scaled, -127.0), 127.0).to(tl.int32).to(tl.int8)
        else:
            rounded_first = cast(first, first_ptr.dtype.element_ty)
        tl.store(first_ptr + offset_m, tl.where(finite, rounded_first, stored), mask=mask)

    moved_to = tl.minimum(tl.maximum(position - lr * direction, 0.0), 1.0)
    if FRAC_KIND == U8:
        scaled = round_up_or_down(moved_to * 255.0, index, frac_key)
        new_code = tl.minimum(scaled, 255.0).to(tl.int32).to(tl.uint8)
    elif FRAC_KIND == U16:
        scaled = round_up_or_down(moved_to * 65535.0, index, frac_key)
        new_code = tl.minimum(scaled, 65535.0).to(tl.int32).to(tl.uint16)
    else:
        new_code = cast(moved_to, frac_ptr.dtype.element_ty)
    new_code = tl.where(moves, new_code, code)
    tl.store(frac_ptr + offset_f, new_code, mask=mask)

    after = decode_position(new_code, FRAC_KIND, tl.float32)
    fractional = live & (after > 0.01) & (after < 0.99)
    moved = live & ((after > 0.5) != (reference > 0.5))
    saturated = live & (tl.abs(raw) >= grad_clamp)
    broken = live & (raw != raw)
    # Five counters of 12 bits in one integer: one reduction along the rows, which hold at most 4095 elements.
    packed = live.to(tl.int64) | (fractional.to(tl.int64) << 12) | (moved.to(tl.int64) << 24)
    packed = packed | (saturated.to(tl.int64) << 36) | (broken.to(tl.int64) << 48)
    row_total = tl.sum(packed, axis=1)
    slot_ptr = counts_ptr + slot * 5
    tl.atomic_add(slot_ptr, tl.sum(row_total & 4095, axis=0))
    tl.atomic_add(slot_ptr + 1, tl.sum((row_total >> 12) & 4095, axis=0))
    tl.atomic_add(slot_ptr + 2, tl.sum((row_total >> 24) & 4095, axis=0))
    tl.atomic_add(slot_ptr + 3, tl.sum((row_total >> 36) & 4095, axis=0))
    tl.atomic_add(slot_ptr + 4, tl.sum((row_total >> 48) & 4095, axis=0))


def launch_scalars(scalars: Mapping[str, float], keys: Mapping[str, int]) -> list[float | int]:
    """Positional scalars of a launch; keys become signed so that their type never depends on their value."""
    return [float(scalars[name]) for name in SCALARS] + [signed32(keys[name]) for name in KEYS]
