# SPDX-License-Identifier: Apache-2.0
"""Four 8-bit codes at once in a 32-bit register: what the projected step does to its compact state.

Every function has two forms, plain operations where Triton is interpreted and inline assembly where it is compiled;
both give the same bits. Flags lie in the highest bit of their element's byte, the other bits of a flag word are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INTERPRETED, bytes_above

# frac_ref codes of frozen coordinates (place 0 and 1). They differ in bits 1 and 7 only.
ZERO, ONE = tl.constexpr(63), tl.constexpr(189)

# Excess of a KL gradient over its clamp that counts as not finite.
UNDEFINED = tl.constexpr(2.0**127)


@triton.jit
def bytes_times(code, unit):
    """code * unit, uint8 to float32, rounded once."""
    if INTERPRETED:
        return code.to(tl.float32) * unit
    else:
        return tl.fma(bytes_above(code), unit, unit * -8388608.0)  # 2^23 * unit is exact


@triton.jit
def clamped_place_of_bytes(ref_code):
    """(code - 63) / 126 by the rounded reciprocal, clamped to [0, 1]: what the linear term needs of `frac_ref`."""
    if INTERPRETED:
        place = (ref_code.to(tl.float32) - 63.0) * 0.007936508394777775
        return tl.minimum(tl.maximum(place, 0.0), 1.0)
    else:
        # 0xCB00003F is -(2^23 + 63).
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 a, b, c, d;
            prmt.b32 a, $4, 0x4B000000, 0x7440; prmt.b32 b, $4, 0x4B000000, 0x7441;
            prmt.b32 c, $4, 0x4B000000, 0x7442; prmt.b32 d, $4, 0x4B000000, 0x7443;
            add.rn.f32 a, a, 0fCB00003F; add.rn.f32 b, b, 0fCB00003F;
            add.rn.f32 c, c, 0fCB00003F; add.rn.f32 d, d, 0fCB00003F;
            mul.rn.sat.f32 $0, a, 0f3C020821; mul.rn.sat.f32 $1, b, 0f3C020821;
            mul.rn.sat.f32 $2, c, 0f3C020821; mul.rn.sat.f32 $3, d, 0f3C020821;
            }""",
            "=f,=f,=f,=f,r", [ref_code], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def numbers_of_bytes(code):
    """int8 to float32."""
    if INTERPRETED:
        return code.to(tl.float32)
    else:
        # An extraction before a conversion is part of it in machine code.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d;
            bfe.s32 a, $4, 0, 8; bfe.s32 b, $4, 8, 8; bfe.s32 c, $4, 16, 8; bfe.s32 d, $4, 24, 8;
            cvt.rn.f32.s32 $0, a; cvt.rn.f32.s32 $1, b; cvt.rn.f32.s32 $2, c; cvt.rn.f32.s32 $3, d;
            }""",
            "=f,=f,=f,=f,r", [code], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def bytes_of_numbers(value, DTYPE: tl.constexpr):
    """floor(value) as uint8 or int8, as near as the type holds."""
    if INTERPRETED:
        LOW: tl.constexpr = -128.0 if DTYPE == tl.int8 else 0.0
        HIGH: tl.constexpr = 127.0 if DTYPE == tl.int8 else 255.0
        value = tl.where(value == value, value, 0.0)
        return tl.minimum(tl.maximum(tl.floor(value), LOW), HIGH).to(tl.int32).to(DTYPE)
    else:
        KIND: tl.constexpr = "s8" if DTYPE == tl.int8 else "u8"
        code = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d;"
            " cvt.rmi." + KIND + ".f32 a, $1; cvt.rmi." + KIND + ".f32 b, $2;"
            " cvt.rmi." + KIND + ".f32 c, $3; cvt.rmi." + KIND + ".f32 d, $4;"
            " prmt.b32 a, a, b, 0x0040; prmt.b32 c, c, d, 0x0040; prmt.b32 $0, a, c, 0x5410; }",
            "=r,f,f,f,f", [value], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
        return code.to(DTYPE, bitcast=True)


@triton.jit
def bytes_of_small_numbers(value):
    """floor(value) of float32 in [0, 256) as uint8."""
    if INTERPRETED:
        return tl.where(value == value, value, 0.0).to(tl.int32).to(tl.uint8)
    else:
        # Added to 2^23 and rounded down, the integer lies in the lowest byte: no slow conversion.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d;
            add.rm.f32 a, $1, 0f4B000000; add.rm.f32 b, $2, 0f4B000000;
            add.rm.f32 c, $3, 0f4B000000; add.rm.f32 d, $4, 0f4B000000;
            prmt.b32 a, a, b, 0x0040; prmt.b32 c, c, d, 0x0040; prmt.b32 $0, a, c, 0x5410;
            }""",
            "=r,f,f,f,f", [value], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def live_bytes(ref_code):
    """Flag of coordinates that are free to move: `frac_ref` is neither 0 nor 1."""
    if INTERPRETED:
        return tl.where((ref_code != ZERO) & (ref_code != ONE), 128, 0).to(tl.uint8)
    else:
        # Frozen where the bits that both codes share are theirs and bits 1 and 7 differ: a byte of at most 127 that is
        # 0, found by the missing carry into bit 7.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 s, a, b;
            shr.u32 s, $1, 6;
            xor.b32 a, $1, 0x3D3D3D3D; and.b32 a, a, 0x7D7D7D7D;
            xor.b32 b, $1, s; not.b32 b, b; and.b32 b, b, 0x02020202;
            add.u32 a, a, b; add.u32 a, a, 0x7F7F7F7F; and.b32 $0, a, 0x80808080;
            }""",
            "=r,r", [ref_code], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def gradient_bytes(excess, live):
    """From |KL gradient| - clamp: flags of live coordinates that move, that clamp, and whose gradient is not finite."""
    if INTERPRETED:
        moves = (live != 0) & (excess < UNDEFINED)
        saturated = tl.where(moves & (excess >= 0.0), 128, 0).to(tl.uint8)
        undefined = tl.where((live != 0) & ~(excess < UNDEFINED), 128, 0).to(tl.uint8)
        return tl.where(moves, 128, 0).to(tl.uint8), saturated, undefined
    else:
        # The highest byte of a float32: 0x7F from 2^127 on and for NaN, below that where it clamps, 0x80 and more where
        # not; never 0xFF, since the launcher sends a clamp of 2^126 and more another way, so adding 1 carries nowhere.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, c, d, t;
            prmt.b32 a, $3, $4, 0x0073; prmt.b32 c, $5, $6, 0x0073; prmt.b32 d, a, c, 0x5410;
            add.u32 t, d, 0x01010101;
            lop3.b32 $0, $7, d, t, 0xD0;
            lop3.b32 $1, $7, d, t, 0x10;
            lop3.b32 $2, $7, d, t, 0x20;
            }""",
            "=&r,=&r,=&r,f,f,f,f,r", [excess, live], dtype=(tl.uint8, tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def choose_bytes(moves, new, old):
    """`new` where the flag is set, else `old`."""
    if INTERPRETED:
        return tl.where(moves != 0, new, old)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m; prmt.b32 m, $1, 0, 0xBA98; lop3.b32 $0, m, $2, $3, 0xCA; }",
            "=r,r,r,r", [moves, new, old], dtype=old.dtype, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def place_flags(code, ref_code, live):
    """Flags of live coordinates that are fractional (0.01 < place < 0.99) and that lie off the nearest neighbour."""
    if INTERPRETED:
        free, place = live != 0, code.to(tl.int32)
        fractional = tl.where(free & (place > 2) & (place < 253), 128, 0).to(tl.uint8)
        moved = free & ((place > 127) != (ref_code.to(tl.int32) > 126))
        return fractional, tl.where(moved, 128, 0).to(tl.uint8)
    else:
        # Upper halves are mirrored, so that both ends are one comparison; sums of at most 254 carry into no other byte.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 s, a, r;
            prmt.b32 s, $2, 0, 0xBA98; xor.b32 a, $2, s; add.u32 a, a, 0x7D7D7D7D; and.b32 $0, a, $4;
            and.b32 r, $3, 0x7F7F7F7F; add.u32 r, r, 0x01010101;
            lop3.b32 r, r, $3, $2, 0x56; and.b32 $1, r, $4;
            }""",
            "=&r,=&r,r,r,r", [code, ref_code, live], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def count_bytes(total, high, low):
    """Add 128 per flag of `high` and 1 per flag of `low` to int32 `total`; which element of four takes them is open."""
    if INTERPRETED:
        return total + high.to(tl.int32) + (low >> 7).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a;
            shr.u32 a, $9, 7; add.u32 a, a, $8;
            dp4a.u32.u32 $0, a, 0x01010101, $4;
            mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r", [total, high, low], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def with_sign(size, sign):
    """`size`, negated where `sign` is negative."""
    if INTERPRETED:
        return tl.where(sign < 0.0, -size, size)
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80000000, $2, 0x6A;",
            "=f,f,f",
            [sign, size],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
