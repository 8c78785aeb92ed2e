# SPDX-License-Identifier: Apache-2.0
"""One optimizer step on `frac`, projected onto [0, 1], in place and in one pass over the state.

`update_tile` holds the arithmetic, so that the matmul with the step in its epilogue (soft_linear) runs the same
code. float32 throughout, in the reference's order, without contraction: state and noise equal the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import U8, U16, counter_uniform, decode_position, divide, frac_kind, group_mode, load_grouped, signed32

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
    grad, step, mask, index, offset_f, offset_r, offset_m, offset_v,
    frac_ptr, ref_ptr, first_ptr, second_ptr, counts_ptr, slot,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp,
    linear_weight, hardening, correction1, correction2, first_unit, first_inverse, second_unit, second_inverse,
    frac_key, first_key, second_key,
    OPTIMIZER: tl.constexpr, FRAC_KIND: tl.constexpr, REF_KIND: tl.constexpr,
    FIRST_INT: tl.constexpr, SECOND_INT: tl.constexpr,
):  # fmt: skip
    """Update one tile given its weight gradient; `index` is the element's uint32 index in the unsharded tensor."""
    code = tl.load(frac_ptr + offset_f, mask=mask, other=0)
    position = decode_position(code, FRAC_KIND, tl.float32)
    # Masked elements read as code 0 of frac_ref: they are excluded by `mask` below, not by their value.
    reference = decode_position(tl.load(ref_ptr + offset_r, mask=mask, other=0), REF_KIND, tl.float32)
    live = mask & (reference != 0.0) & (reference != 1.0)
    raw = grad * (step * kl_weight)
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
                rounded = second.to(second_ptr.dtype.element_ty)
            tl.store(second_ptr + offset_v, tl.where(finite, rounded, stored_second), mask=mask)
            position = tl.where(moves, position * decay, position)
        if FIRST_INT:
            scaled = round_up_or_down(first * first_inverse, index, first_key)
            rounded_first = tl.minimum(tl.maximum(scaled, -127.0), 127.0).to(tl.int32).to(tl.int8)
        else:
            rounded_first = first.to(first_ptr.dtype.element_ty)
        tl.store(first_ptr + offset_m, tl.where(finite, rounded_first, stored), mask=mask)

    moved_to = tl.minimum(tl.maximum(position - lr * direction, 0.0), 1.0)
    if FRAC_KIND == U8:
        scaled = round_up_or_down(moved_to * 255.0, index, frac_key)
        new_code = tl.minimum(scaled, 255.0).to(tl.int32).to(tl.uint8)
    elif FRAC_KIND == U16:
        scaled = round_up_or_down(moved_to * 65535.0, index, frac_key)
        new_code = tl.minimum(scaled, 65535.0).to(tl.int32).to(tl.uint16)
    else:
        new_code = moved_to.to(frac_ptr.dtype.element_ty)
    new_code = tl.where(moves, new_code, code)
    tl.store(frac_ptr + offset_f, new_code, mask=mask)

    after = decode_position(new_code, FRAC_KIND, tl.float32)
    fractional = live & (after > 0.01) & (after < 0.99)
    moved = live & ((after > 0.5) != (reference > 0.5))
    saturated = live & (tl.abs(raw) >= grad_clamp)
    broken = live & (raw != raw)
    # Five counters of 12 bits in one integer, one reduction; a tile holds at most 4095 elements in a counter.
    packed = live.to(tl.int64) | (fractional.to(tl.int64) << 12) | (moved.to(tl.int64) << 24)
    packed = packed | (saturated.to(tl.int64) << 36) | (broken.to(tl.int64) << 48)
    total = tl.sum(tl.sum(packed, axis=1), axis=0)
    slot_ptr = counts_ptr + slot * 5
    tl.atomic_add(slot_ptr, total & 4095)
    tl.atomic_add(slot_ptr + 1, (total >> 12) & 4095)
    tl.atomic_add(slot_ptr + 2, (total >> 24) & 4095)
    tl.atomic_add(slot_ptr + 3, (total >> 36) & 4095)
    tl.atomic_add(slot_ptr + 4, (total >> 48) & 4095)


@triton.jit(do_not_specialize=KEYS)
def _projected_step_kernel(
    frac_ptr, ref_ptr, grad_ptr, scale_ptr, first_ptr, second_ptr, counts_ptr,
    out_features, in_features,
    stride_fm, stride_fk, stride_rm, stride_rk, stride_gm, stride_gk, stride_sm, stride_sg,
    stride_mm, stride_mk, stride_vm, stride_vk,
    lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp,
    linear_weight, hardening, correction1, correction2, first_unit, first_inverse, second_unit, second_inverse,
    frac_key, first_key, second_key, first_index,
    OPTIMIZER: tl.constexpr, FRAC_KIND: tl.constexpr, REF_KIND: tl.constexpr,
    FIRST_INT: tl.constexpr, SECOND_INT: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    k0 = tl.program_id(0).to(tl.int64) * BLOCK_K
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_m = offs_m < out_features
    mask = mask_m[:, None] & (offs_k < in_features)[None, :]
    grad = tl.load(grad_ptr + offs_m[:, None] * stride_gm + offs_k[None, :] * stride_gk, mask=mask, other=0)
    step = load_grouped(
        scale_ptr, stride_sm, stride_sg, offs_m, mask_m, k0, in_features, tl.float32, BLOCK_M, BLOCK_K, MODE, GROUP
    )
    index = (offs_m[:, None] * in_features + offs_k[None, :] + first_index).to(tl.uint32)
    slot = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) % SLOTS
    update_tile(
        grad.to(tl.float32), step, mask, index,
        offs_m[:, None] * stride_fm + offs_k[None, :] * stride_fk,
        offs_m[:, None] * stride_rm + offs_k[None, :] * stride_rk,
        offs_m[:, None] * stride_mm + offs_k[None, :] * stride_mk,
        offs_m[:, None] * stride_vm + offs_k[None, :] * stride_vk,
        frac_ptr, ref_ptr, first_ptr, second_ptr, counts_ptr, slot,
        lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp,
        linear_weight, hardening, correction1, correction2, first_unit, first_inverse, second_unit, second_inverse,
        frac_key, first_key, second_key,
        OPTIMIZER, FRAC_KIND, REF_KIND, FIRST_INT, SECOND_INT,
    )  # fmt: skip


def launch_scalars(scalars: Mapping[str, float], keys: Mapping[str, int]) -> list[float | int]:
    """Positional scalars of a launch; keys become signed so that their type never depends on their value."""
    return [float(scalars[name]) for name in SCALARS] + [signed32(keys[name]) for name in KEYS]


def projected_step_fwd(
    frac: Tensor, frac_ref: Tensor, weight_grad: Tensor, scale: Tensor, momentum: Tensor | None,
    second_moment: Tensor | None, group_size: int, optimizer: str,
    scalars: Mapping[str, float], keys: Mapping[str, int], block: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Launch one step in place; return int64 counts [5]: live, fractional, moved, saturated, nan."""
    rows, cols = frac.shape
    if frac.numel() == 0:
        return frac.new_zeros(COUNTS, dtype=torch.int64)
    counts = frac.new_zeros((COUNT_SLOTS, COUNTS), dtype=torch.int64)
    block_m, block_k = block or ((4, 256) if cols >= 256 else (16, max(16, triton.next_power_of_2(cols))))
    mode, group = group_mode(group_size, cols, block_k)
    first = frac if momentum is None else momentum
    second = frac if second_moment is None else second_moment
    _projected_step_kernel[(triton.cdiv(cols, block_k), triton.cdiv(rows, block_m))](
        frac, frac_ref, weight_grad, scale, first, second, counts,
        rows, cols,
        *frac.stride(), *frac_ref.stride(), *weight_grad.stride(), *scale.stride(), *first.stride(), *second.stride(),
        *launch_scalars(scalars, keys),
        OPTIMIZER=OPTIMIZERS[optimizer], FRAC_KIND=frac_kind(frac.dtype, False),
        REF_KIND=frac_kind(frac_ref.dtype, True),
        FIRST_INT=first.dtype == torch.int8, SECOND_INT=second.dtype == torch.uint8, MODE=mode, GROUP=group,
        SLOTS=COUNT_SLOTS, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return counts.sum(dim=0)
