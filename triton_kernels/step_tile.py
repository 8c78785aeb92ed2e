# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one projected step on one tile, shared by projected_step and by soft_linear's epilogue.

float32 throughout, in the reference's order; launched without contraction to fused multiply-adds, so that state,
noise and counts equal the reference's bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from .common import (
    REF8,
    U8,
    U16,
    add_noise,
    cast,
    counter_hash,
    decode_position,
    divide,
    divide_normal,
    floor_to,
    one_minus_twice,
    root_normal,
    saturate,
    saturated_difference,
    signed32,
)

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
KEYS = ("noise_key", "first_index")
# Last odd factor of an element's hash per stream of noise.
FRAC_STREAM, FIRST_STREAM, SECOND_STREAM = tl.constexpr(1), tl.constexpr(0x27D4EB2F), tl.constexpr(0x165667B1)
# Counts are added to one of these slots, so that no single address serialises the whole launch.
COUNT_SLOTS = 128
COUNTS = 5
# A slot fills a cache line of 128 bytes: atomics on one line wait for each other.
SLOT_WIDTH = tl.constexpr(16)


@triton.jit
def above_half(code, KIND: tl.constexpr):
    """Whether a stored place rounds up; codes are compared as integers."""
    if KIND == U8:
        return code.to(tl.int32) > 127
    elif KIND == U16:
        return code.to(tl.int32) > 32767
    elif KIND == REF8:
        return code.to(tl.int32) > 126
    else:
        return code.to(tl.float32) > 0.5


@triton.jit
def is_fractional(code, KIND: tl.constexpr):
    """Whether a stored place lies between 0.01 and 0.99."""
    if KIND == U8:
        return ((code.to(tl.int32) - 3).to(tl.uint32, bitcast=True)) < 250
    elif KIND == U16:
        return ((code.to(tl.int32) - 656).to(tl.uint32, bitcast=True)) < 64224
    else:
        value = code.to(tl.float32)
        return (value > 0.01) & (value < 0.99)


@triton.jit
def add_counts(counts_ptr, slot, pair, other, nan):
    """Add to counts[slot] what `update_tile` returned for at most 65535 elements together."""
    pair, other, nan = (
        tl.sum(tl.sum(pair, axis=1), axis=0),
        tl.sum(tl.sum(other, axis=1), axis=0),
        tl.sum(tl.sum(nan, axis=1), axis=0),
    )
    slot_ptr = counts_ptr + slot * SLOT_WIDTH
    # Relaxed: an ordered one is a memory barrier, which waits for every store of the program.
    tl.atomic_add(slot_ptr, (pair & 65535).to(tl.int64), sem="relaxed")
    tl.atomic_add(slot_ptr + 1, ((pair >> 16) & 65535).to(tl.int64), sem="relaxed")
    tl.atomic_add(slot_ptr + 2, (other & 65535).to(tl.int64), sem="relaxed")
    tl.atomic_add(slot_ptr + 3, ((other >> 16) & 65535).to(tl.int64), sem="relaxed")
    tl.atomic_add(slot_ptr + 4, nan.to(tl.int64), sem="relaxed", mask=nan > 0)


@triton.jit
def update_tile(
    grad, slope, mask, index, offset_f, offset_r, offset_m, offset_v,
    frac_ptr, ref_ptr, first_ptr, second_ptr,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp,
    linear_weight, hardening, correction1, correction2, first_unit, first_inverse, second_unit, second_inverse,
    noise_key,
    OPTIMIZER: tl.constexpr, FRAC_KIND: tl.constexpr, REF_KIND: tl.constexpr,
    FIRST_INT: tl.constexpr, SECOND_INT: tl.constexpr,
):  # fmt: skip
    """Update one tile given its weight gradient and d weight / d frac; `index` counts in the unsharded tensor.

    `mask` is None where the tile lies inside the tensor. Returns int32 tiles for `add_counts`: live and fractional,
    moved and saturated, NaN; tiles may be added up before.
    """
    if mask is None:
        code = tl.load(frac_ptr + offset_f)
        ref_code = tl.load(ref_ptr + offset_r)
    else:
        code = tl.load(frac_ptr + offset_f, mask=mask, other=0)
        ref_code = tl.load(ref_ptr + offset_r, mask=mask, other=0)
    position = decode_position(code, FRAC_KIND, tl.float32, True)
    reference = decode_position(ref_code, REF_KIND, tl.float32, True)
    live = (reference != 0.0) & (reference != 1.0)
    if mask is not None:
        # Masked elements read as code 0 of frac_ref: they are excluded here, not by their value.
        live = mask & live
    hashed = counter_hash(index, noise_key)
    raw = grad * (slope * kl_weight)
    moves = live & (raw == raw)
    kl = tl.minimum(tl.maximum(raw, -grad_clamp), grad_clamp)
    linear = linear_weight * one_minus_twice(saturate(reference))
    g = kl + linear + hardening * one_minus_twice(position)
    g = tl.where(moves, g, 0.0)

    if OPTIMIZER == SGD:
        direction = g
    else:
        if mask is None:
            stored = tl.load(first_ptr + offset_m)
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
            if mask is None:
                stored_second = tl.load(second_ptr + offset_v)
            else:
                stored_second = tl.load(second_ptr + offset_v, mask=mask, other=0)
            second = stored_second.to(tl.float32)
            if SECOND_INT:
                root = second * second_unit
                second = root * root
            second = beta2 * second + (one_minus_beta2 * g) * g
            if SECOND_INT:
                # Bounded moments stay away from subnormal numbers but for zero.
                root_hat = root_normal(second * correction2)
                direction = divide_normal(first * correction1, root_hat + eps)
                scaled = root_normal(second) * second_inverse
                rounded = floor_to(add_noise(scaled, hashed, SECOND_STREAM), tl.uint8)
            else:
                root_hat = tl.sqrt_rn(second * correction2)
                direction = divide(first * correction1, root_hat + eps)
                rounded = cast(second, second_ptr.dtype.element_ty)
            tl.store(second_ptr + offset_v, tl.where(moves, rounded, stored_second), mask=mask)
            position = position * decay
        if FIRST_INT:
            rounded_first = floor_to(add_noise(first * first_inverse, hashed, FIRST_STREAM), tl.int8)
        else:
            rounded_first = cast(first, first_ptr.dtype.element_ty)
        tl.store(first_ptr + offset_m, tl.where(moves, rounded_first, stored), mask=mask)

    moved_to = saturated_difference(position, lr * direction)
    if FRAC_KIND == U8:
        new_code = floor_to(add_noise(moved_to * 255.0, hashed, FRAC_STREAM), tl.uint8)
    elif FRAC_KIND == U16:
        new_code = floor_to(add_noise(moved_to * 65535.0, hashed, FRAC_STREAM), tl.uint16)
    else:
        new_code = cast(moved_to, frac_ptr.dtype.element_ty)
    new_code = tl.where(moves, new_code, code)
    tl.store(frac_ptr + offset_f, new_code, mask=mask)

    fractional = live & is_fractional(new_code, FRAC_KIND)
    moved = live & (above_half(new_code, FRAC_KIND) != above_half(ref_code, REF_KIND))
    saturated = live & (tl.abs(raw) >= grad_clamp)
    # Two counters of 16 bits in one integer.
    pair = tl.where(live, 1, 0) + tl.where(fractional, 65536, 0)
    other = tl.where(moved, 1, 0) + tl.where(saturated, 65536, 0)
    return pair, other, tl.where(live & (raw != raw), 1, 0)


def launch_scalars(scalars: Mapping[str, float], keys: Mapping[str, int]) -> list[float | int]:
    """Positional scalars of a launch; keys become signed so that their type never depends on their value."""
    return [float(scalars[name]) for name in SCALARS] + [signed32(keys[name]) for name in KEYS]
