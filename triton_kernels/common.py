# SPDX-License-Identifier: Apache-2.0
"""Device functions that several kernels share: counter-based noise, decoding and loads of codes, exact arithmetic.

Kinds of `frac` codes: FLOATING; U8 (u / 255); U16 (u / 65535); REF8 (`frac_ref`, (u - 63) / 126).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATING = tl.constexpr(0)
U8 = tl.constexpr(1)
U16 = tl.constexpr(2)
REF8 = tl.constexpr(3)

DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def frac_kind(dtype: torch.dtype, is_reference: bool) -> int:
    """Kind of the codes in a tensor of this dtype; `is_reference` for `frac_ref`."""
    if dtype == torch.uint8:
        return REF8.value if is_reference else U8.value
    return U16.value if dtype == torch.uint16 else FLOATING.value


def adjacent(vector: Tensor | None, absent: Tensor | None = None) -> Tensor | None:
    """Elements next to each other, as kernels address vectors; `absent` where there is none."""
    return absent if vector is None else vector.contiguous()


# Triton's interpreter truncates where it stores float32 as bfloat16; compiled code rounds to nearest even.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def cast(value, DTYPE: tl.constexpr):
    """Round to DTYPE, to nearest even also when interpreted."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def counter_hash(index, key):
    """32 bits from (index, key), from which every stream of an element takes its noise."""
    value = index * 0x9E3779B1
    value = value ^ (value >> 15) ^ key.to(tl.uint32, bitcast=True)
    value = value * 0x85EBCA6B
    value = value ^ (value >> 13)
    return value * 0xC2B2AE35


@triton.jit
def add_noise(value, hashed, FACTOR: tl.constexpr):
    """value + uniform noise in [0, 1): bit for bit the reference's sum. FACTOR is the stream's last product."""
    noise = ((hashed * FACTOR) >> 16).to(tl.float32)
    if INTERPRETED:
        return value + noise * 1.52587890625e-05
    else:
        # The product is exact, so that fusing it changes nothing.
        return tl.fma(noise, 1.52587890625e-05, value)


@triton.jit
def divide(numerator, denominator):
    """Correctly rounded division; the plain operator is approximate in float32 on NVIDIA GPUs."""
    if numerator.dtype == tl.float32:
        return tl.div_rn(numerator, denominator)
    else:
        return numerator / denominator


@triton.jit
def divide_code(code, DENOMINATOR: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr):
    """code / DENOMINATOR, correctly rounded for every code in use (a test tries them all), in two instructions.

    INVERSE is the float32 reciprocal, REST what it lacks: together they are exact to 48 bits.
    """
    if INTERPRETED or code.dtype != tl.float32:
        return divide(code, DENOMINATOR)
    else:
        return tl.fma(code, INVERSE, code * REST)


@triton.jit
def bytes_above(code):
    """2^23 + code, uint8 to float32: a byte below the exponent of 2^23, no slow conversion. Compiled code only."""
    return tl.inline_asm_elementwise(
        """
        prmt.b32 $0, $4, 0x4B000000, 0x7440; prmt.b32 $1, $4, 0x4B000000, 0x7441;
        prmt.b32 $2, $4, 0x4B000000, 0x7442; prmt.b32 $3, $4, 0x4B000000, 0x7443;
        """,
        "=&f,=&f,=&f,=&f,r", [code], dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def byte_minus(code, offset):
    """code - offset, uint8 less integers in float32: exact. Four codes at a time, so for whole tiles only."""
    if INTERPRETED:
        return code.to(tl.float32) - offset
    else:
        return bytes_above(code) - (offset + 8388608.0)


@triton.jit
def reciprocal(value):
    """1 / value in float32, correctly rounded."""
    return divide(tl.full(value.shape, 1.0, tl.float32), value)


@triton.jit
def remainder(left, right, total):
    """total - left * right, rounded once; compiled code only.

    Triton's own minus is a subtraction from zero, which stays an instruction of its own.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .f32 a; neg.f32 a, $1; fma.rn.f32 $0, a, $2, $3; }",
        "=f,f,f,f", [left, right, total], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def reciprocal_normal(value):
    """1 / value in float32 by one Newton step, as CUDA's own rounded reciprocal; nothing near the subnormal numbers.

    Correctly rounded if the approximation of the hardware is never off where a step cannot mend it: one unit too high
    for every value, and 32 of the 2^23 mantissas would miss the last bit.
    """
    if INTERPRETED:
        return reciprocal(value)
    else:
        rough = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.fma(rough, remainder(value, rough, 1.0), rough)


@triton.jit
def root_normal(value):
    """Square root in float32 of zero or more, correctly rounded while nothing is near the subnormal numbers."""
    if INTERPRETED:
        return tl.sqrt_rn(value)
    else:
        inverse = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;",
            "=f,f",
            # Finite for zero, whose root then is zero.
            [tl.maximum(value, 1.1754943508222875e-38)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        guess = value * inverse
        return tl.fma(remainder(guess, guess, value), 0.5 * inverse, guess)


@triton.jit
def saturate(value):
    """Clamp float32 to [0, 1]: a modifier of the addition in machine code."""
    if INTERPRETED:
        return tl.minimum(tl.maximum(value, 0.0), 1.0)
    else:
        return tl.inline_asm_elementwise(
            "add.sat.f32 $0, $1, 0f00000000;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def saturated_difference(left, right):
    """left - right in float32, clamped to [0, 1], in one instruction."""
    if INTERPRETED:
        return saturate(left - right)
    else:
        return tl.inline_asm_elementwise(
            "sub.sat.f32 $0, $1, $2;", "=f,f,f", [left, right], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def floor_to(value, DTYPE: tl.constexpr):
    """Largest integer not above a float32, as near as uint8, int8 or uint16 holds."""
    if INTERPRETED:
        LOW: tl.constexpr = -128.0 if DTYPE == tl.int8 else 0.0
        HIGH: tl.constexpr = 127.0 if DTYPE == tl.int8 else (255.0 if DTYPE == tl.uint8 else 65535.0)
        return tl.minimum(tl.maximum(tl.floor(value), LOW), HIGH).to(tl.int32).to(DTYPE)
    else:
        # The conversion clamps to the range of its type.
        NAME: tl.constexpr = "s8" if DTYPE == tl.int8 else ("u8" if DTYPE == tl.uint8 else "u16")
        code = tl.inline_asm_elementwise(
            "cvt.rmi." + NAME + ".f32 $0, $1;", "=r,f", [value], dtype=tl.int32, is_pure=True, pack=1
        )
        return code.to(DTYPE)


@triton.jit
def one_minus_twice(value):
    """1 - 2 value; the product is exact, so that fusing it changes nothing."""
    if INTERPRETED:
        return 1.0 - 2.0 * value
    else:
        return tl.fma(value, -2.0, 1.0)


@triton.jit
def nibbles_minus(pair, offset):
    """Low and high nibbles less integers in float32, exact: `byte_minus` of two codes per byte."""
    if INTERPRETED:
        return (pair & 15).to(tl.float32) - offset, (pair >> 4).to(tl.float32) - offset
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            and.b32 a, $8, 0x0F0F0F0F; shr.u32 b, $8, 4; and.b32 b, b, 0x0F0F0F0F;
            prmt.b32 $0, a, 0x4B000000, 0x7440; prmt.b32 $1, a, 0x4B000000, 0x7441;
            prmt.b32 $2, a, 0x4B000000, 0x7442; prmt.b32 $3, a, 0x4B000000, 0x7443;
            prmt.b32 $4, b, 0x4B000000, 0x7440; prmt.b32 $5, b, 0x4B000000, 0x7441;
            prmt.b32 $6, b, 0x4B000000, 0x7442; prmt.b32 $7, b, 0x4B000000, 0x7443;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r", [pair], dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
        return low - (offset + 8388608.0), high - (offset + 8388608.0)


@triton.jit
def decode_position(code, KIND: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr = False):
    """Codes to positions, correctly rounded; FAST may miss the last bit of float32 but not at 0, 1/2 and 1."""
    if FAST and ACC == tl.float32:
        value = code.to(ACC)
        if KIND == U8:
            value = value * 0.003921568859368563
        elif KIND == U16:
            value = value * 1.5259021893143654e-05
        elif KIND == REF8:
            value = (value - 63.0) * 0.007936508394777775
        return value
    elif KIND == FLOATING:
        return code.to(ACC)
    elif KIND == U16:
        return divide_code(code.to(ACC), 65535.0, 1.5259021893143654e-05, 3.552767888909125e-15)
    else:
        FIRST: tl.constexpr = 63.0 if KIND == REF8 else 0.0
        value = byte_minus(code, FIRST) if ACC == tl.float32 else code.to(ACC) - FIRST
        if KIND == U8:
            return divide_code(value, 255.0, 0.003921568859368563, -2.319175823606301e-10)
        else:
            return divide_code(value, 126.0, 0.007936508394777775, -4.582698387434192e-10)


@triton.jit
def load_masked(ptr, mask, other=0):
    """Load, or where `mask` is False take `other`; without a mask (None) load all."""
    if mask is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask, other=other)


@triton.jit
def load_pairs(q_ptr, stride_m, stride_k, offs_m, mask_m, k0, in_features, BLOCK_K: tl.constexpr):
    """Load [BLOCK_M, BLOCK_K / 2] bytes of two 4-bit codes each, low nibble first, from column k0 on."""
    offs_b = k0 // 2 + tl.arange(0, BLOCK_K // 2)
    mask = None if mask_m is None else mask_m[:, None] & (offs_b < (in_features + 1) // 2)[None, :]
    return load_masked(q_ptr + offs_m[:, None] * stride_m + offs_b[None, :] * stride_k, mask)


@triton.jit
def load_codes(
    q_ptr, stride_m, stride_k, offs_m, mask_m, k0, in_features, BLOCK_K: tl.constexpr, PACKED: tl.constexpr
):
    """Load [BLOCK_M, BLOCK_K] codes from column k0 on; PACKED has two 4-bit codes per byte.

    Without `mask_m` (None) the tile lies inside the tensor; so in all loads here.
    """
    if PACKED:
        pair = load_pairs(q_ptr, stride_m, stride_k, offs_m, mask_m, k0, in_features, BLOCK_K)
        return tl.interleave(pair & 15, pair >> 4)
    else:
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask = None if mask_m is None else mask_m[:, None] & (offs_k < in_features)[None, :]
        return load_masked(q_ptr + offs_m[:, None] * stride_m + offs_k[None, :] * stride_k, mask)


@triton.jit
def load_codes_minus(
    q_ptr,
    stride_m,
    stride_k,
    offs_m,
    mask_m,
    k0,
    in_features,
    offset,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
):
    """`load_codes` less an integer, in float32."""
    if PACKED:
        pair = load_pairs(q_ptr, stride_m, stride_k, offs_m, mask_m, k0, in_features, BLOCK_K)
        low, high = nibbles_minus(pair, offset)
        return tl.interleave(low, high)
    else:
        codes = load_codes(q_ptr, stride_m, stride_k, offs_m, mask_m, k0, in_features, BLOCK_K, PACKED)
        return byte_minus(codes, offset)
