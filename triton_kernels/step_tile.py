# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one projected step on one tile, shared by projected_step and by soft_linear's epilogue.

float32 throughout, in the reference's order; launched without contraction to fused multiply-adds, so that state,
noise and counts equal the reference's bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    REF8,
    U8,
    U16,
    add_noise,
    cast,
    counter_hash,
    decode_position,
    floor_to,
    load_masked,
    one_minus_twice,
    reciprocal,
    reciprocal_normal,
    root_normal,
    saturate,
    saturated_difference,
)
from .step_bytes import (
    UNDEFINED,
    bytes_of_numbers,
    bytes_of_small_numbers,
    bytes_times,
    choose_bytes,
    clamped_place_of_bytes,
    count_bytes,
    gradient_bytes,
    live_bytes,
    numbers_of_bytes,
    place_flags,
    with_sign,
)

ADAMW = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
LION = tl.constexpr(2)
SGD = tl.constexpr(3)
OPTIMIZERS = {"adamw": ADAMW.value, "momentum": MOMENTUM.value, "lion": LION.value, "sgd": SGD.value}

# Weight of the linear term.
ABSENT, UNIT, WEIGHTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Floating scalars of a launch, in the order of the kernels' arguments.
SCALARS = (
    "lr", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "kl_weight", "grad_clamp",
    "linear_weight", "hardening", "first_beta1", "first_beta2", "first_inverse", "second_beta2", "second_inverse",
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
def add_counts(counts_ptr, slot, pair, other, nan, BYTES: tl.constexpr):
    """Add to counts[slot] what `update_tile` counted over at most 65535 elements."""
    if BYTES:
        pair, other = (pair >> 7) + ((pair & 127) << 16), (other >> 7) + ((other & 127) << 16)
        nan = nan >> 7
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
    linear_weight, hardening, first_beta1, first_beta2, first_inverse, second_beta2, second_inverse,
    noise_key, pair, other, nan,
    OPTIMIZER: tl.constexpr, FRAC_KIND: tl.constexpr, REF_KIND: tl.constexpr,
    FIRST_INT: tl.constexpr, SECOND_INT: tl.constexpr, NORMAL: tl.constexpr, BYTES: tl.constexpr,
    LINEAR: tl.constexpr, HARDEN: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Update one tile given its weight gradient and d weight / d frac; `index` counts in the unsharded tensor.

    `mask` is None where the tile lies inside the tensor. Returns `pair`, `other` and `nan`, int32 tiles for
    `add_counts`, with this tile's counts added: live and fractional, moved and saturated, NaN. BYTES (all state 8-bit,
    clamp below 2^126) takes four elements per instruction where that is possible and gives the same bits; LINEAR,
    HARDEN and DECAY leave out terms of weight 0 and products by 1, which no stored code shows (`step_terms`). NORMAL
    takes the root of an 8-bit second moment, and its reciprocal, by Newton steps (`normal_moments`).
    """
    code = load_masked(frac_ptr + offset_f, mask)
    # In bytes masked elements read as frozen ones; else the mask itself excludes them.
    ref_code = load_masked(ref_ptr + offset_r, mask, 63 if BYTES else 0)
    hashed = counter_hash(index, noise_key)
    raw = grad * (slope * kl_weight)
    kl = tl.minimum(tl.maximum(raw, -grad_clamp), grad_clamp)
    excess = tl.abs(raw) - grad_clamp
    if BYTES:
        position = bytes_times(code, 0.003921568859368563)
        live = live_bytes(ref_code)
        moves, saturated, undefined = gradient_bytes(excess, live)
    else:
        position = decode_position(code, FRAC_KIND, tl.float32, True)
        reference = decode_position(ref_code, REF_KIND, tl.float32, True)
        live = (reference != 0.0) & (reference != 1.0)
        if mask is not None:
            live = mask & live
        moves = live & (excess < UNDEFINED)
    g = kl
    if LINEAR != ABSENT:
        linear = one_minus_twice(clamped_place_of_bytes(ref_code) if BYTES else saturate(reference))
        g += linear if LINEAR == UNIT else linear_weight * linear
    if HARDEN:
        g += hardening * one_minus_twice(position)
    if not BYTES:
        g = tl.where(moves, g, 0.0)

    if OPTIMIZER == SGD:
        direction = g
    else:
        stored = load_masked(first_ptr + offset_m, mask)
        first = numbers_of_bytes(stored) if BYTES else stored.to(tl.float32)
        # The unit of an 8-bit moment is in the factor that it is multiplied by anyway.
        kept1, kept2 = (first_beta1, first_beta2) if FIRST_INT else (beta1, beta2)
        if OPTIMIZER == LION:
            direction = kept1 * first + one_minus_beta1 * g
            first = kept2 * first + one_minus_beta2 * g
        else:
            first = kept1 * first + one_minus_beta1 * g
            direction = first
        if OPTIMIZER == ADAMW:
            stored_second = load_masked(second_ptr + offset_v, mask)
            if SECOND_INT:
                kept = (
                    bytes_times(stored_second, second_beta2)
                    if BYTES
                    else stored_second.to(tl.float32) * second_beta2
                )
                second = kept * kept + (one_minus_beta2 * g) * g
                root = root_normal(second) if NORMAL else tl.sqrt_rn(second)
                direction = first * (reciprocal_normal(root + eps) if NORMAL else reciprocal(root + eps))
                scaled = add_noise(root * second_inverse, hashed, SECOND_STREAM)
                rounded = bytes_of_numbers(scaled, tl.uint8) if BYTES else floor_to(scaled, tl.uint8)
            else:
                second = beta2 * stored_second.to(tl.float32) + (one_minus_beta2 * g) * g
                direction = first * reciprocal(tl.sqrt_rn(second) + eps)
                rounded = cast(second, second_ptr.dtype.element_ty)
            rounded = choose(moves, rounded, stored_second, BYTES)
            tl.store(second_ptr + offset_v, rounded, mask=mask)
            if DECAY:
                position = position * decay
        if FIRST_INT:
            noisy = add_noise(first * first_inverse, hashed, FIRST_STREAM)
            rounded_first = bytes_of_numbers(noisy, tl.int8) if BYTES else floor_to(noisy, tl.int8)
        else:
            rounded_first = cast(first, first_ptr.dtype.element_ty)
        tl.store(first_ptr + offset_m, choose(moves, rounded_first, stored, BYTES), mask=mask)

    if OPTIMIZER == LION:
        # lr times the sign: the sign bit alone, and no step at all for zero.
        moved_to = saturated_difference(position, tl.where(direction == 0.0, 0.0, with_sign(lr, direction)))
    else:
        moved_to = saturated_difference(position, lr * direction)
    if FRAC_KIND == U8:
        noisy = add_noise(moved_to * 255.0, hashed, FRAC_STREAM)
        new_code = bytes_of_small_numbers(noisy) if BYTES else floor_to(noisy, tl.uint8)
    elif FRAC_KIND == U16:
        new_code = floor_to(add_noise(moved_to * 65535.0, hashed, FRAC_STREAM), tl.uint16)
    else:
        new_code = cast(moved_to, frac_ptr.dtype.element_ty)
    new_code = choose(moves, new_code, code, BYTES)
    tl.store(frac_ptr + offset_f, new_code, mask=mask)

    if BYTES:
        fractional, moved = place_flags(new_code, ref_code, live)
        pair, other = count_bytes(pair, live, fractional), count_bytes(other, moved, saturated)
        nan = count_bytes(nan, undefined, tl.zeros_like(undefined))
    else:
        fractional = live & is_fractional(new_code, FRAC_KIND)
        moved = live & (above_half(new_code, FRAC_KIND) != above_half(ref_code, REF_KIND))
        saturated = moves & (excess >= 0.0)
        # Two counters of 16 bits in one integer.
        pair += tl.where(live, 1, 0) + tl.where(fractional, 65536, 0)
        other += tl.where(moved, 1, 0) + tl.where(saturated, 65536, 0)
        nan += tl.where(live & ~(excess < UNDEFINED), 1, 0)
    return pair, other, nan


@triton.jit
def choose(moves, new, old, BYTES: tl.constexpr):
    """`new` for coordinates that move, else `old`; `moves` is a flag byte with BYTES, else a condition."""
    if BYTES:
        return choose_bytes(moves, new, old)
    else:
        return tl.where(moves, new, old)


def in_bytes(frac: Tensor, frac_ref: Tensor, momentum: Tensor, second_moment: Tensor, optimizer: str,
             scalars: Mapping[str, float]) -> bool:  # fmt: skip
    """Whether `update_tile` may take its 8-bit way; moments that the optimizer does not have are not looked at."""
    byte = torch.uint8
    return (
        frac.dtype == byte and frac_ref.dtype == byte
        and (optimizer == "sgd" or momentum.dtype == torch.int8)
        and (optimizer != "adamw" or second_moment.dtype == byte)
        and scalars["grad_clamp"] < 2.0**126
    )  # fmt: skip


def normal_moments(scalars: Mapping[str, float]) -> bool:
    """Whether `update_tile` may take NORMAL: no square overflows, and a root that is inexact does not show.

    A square below 2^-126 gives an inexact root, of 2^-63 at most: beside epsilon, and in units of the 8-bit moment,
    that is below what rounds.
    """
    pull = scalars["grad_clamp"] + abs(scalars["linear_weight"]) + abs(scalars["hardening"])
    unit = 1 / scalars["second_inverse"]  # of the second moment's root
    return pull < 2.0**60 and scalars["eps"] >= 2.0**-36 and 2.0**-40 <= unit < 2.0**50


def step_terms(scalars: Mapping[str, float], bytewise: bool) -> tuple[int, bool, bool]:
    """LINEAR, HARDEN, DECAY of `update_tile`; floating state could show the sign of a zero, so it takes every sum."""
    linear = {0.0: ABSENT, 1.0: UNIT}.get(scalars["linear_weight"], WEIGHTED) if bytewise else WEIGHTED
    return linear.value, not bytewise or scalars["hardening"] != 0, scalars["decay"] != 1


def signed32(value: int) -> int:
    """Same 32 bits as a signed integer, so that the argument's type never depends on its value."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def launch_scalars(scalars: Mapping[str, float], keys: Mapping[str, int]) -> list[float | int]:
    """Positional scalars of a launch; keys become signed so that their type never depends on their value."""
    return [float(scalars[name]) for name in SCALARS] + [signed32(keys[name]) for name in KEYS]
