// SPDX-License-Identifier: Apache-2.0
// Nibbles to pairs of float16 or bfloat16 by magic numbers: one mask-and-or puts a code into a mantissa, one subtraction
// takes off the magic and the zero point. q - z is exact in both types. On the host the packed arithmetic is emulated,
// so the CPU tests run the very code that the GPU kernels include.
#pragma once

#include <cstdint>

#include "packed/layout.h"

#if !defined(__CUDA_ARCH__)
#include "packed/float_types.h"
#endif

namespace discquant {
namespace packed {

struct Half2 {  // two float16 in 32 bits, the lower k in the lower half
  static constexpr uint32_t kMagic = 0x64006400u;  // 1024: a code in mantissa bits 0..3 adds itself, in bits 4..7 16 q
  static constexpr bool kWide = true;              // ten mantissa bits hold a nibble shifted by four
  static constexpr uint32_t kSixteenth = 0x2c002c00u;
};

struct Bfloat2 {
  static constexpr uint32_t kMagic = 0x43004300u;  // 128
  static constexpr bool kWide = false;             // seven bits hold a shifted 3-bit code only
  static constexpr uint32_t kSixteenth = 0x3d803d80u;
};

#if !defined(__CUDA_ARCH__)
template <class T>
inline uint32_t host_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int h = 0; h < 2; ++h) {
    const uint16_t ah = static_cast<uint16_t>(a >> (16 * h)), bh = static_cast<uint16_t>(b >> (16 * h)),
                   ch = static_cast<uint16_t>(c >> (16 * h));
    const bool half = T::kMagic == Half2::kMagic;
    // Eleven- and eight-bit significands: the product and the sum are exact in double, so one rounding remains.
    const double fa = half ? half_to_float(ah) : bfloat_to_float(ah);
    const double fb = half ? half_to_float(bh) : bfloat_to_float(bh);
    const double fc = half ? half_to_float(ch) : bfloat_to_float(ch);
    const float r = static_cast<float>(fa * fb + fc);
    out |= static_cast<uint32_t>(half ? float_to_half(r) : float_to_bfloat(r)) << (16 * h);
  }
  return out;
}
#endif

// a * b + c per half, one rounding.
template <class T>
DISCQUANT_HD uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  if constexpr (T::kWide)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return host_pair<T>(a, b, c);
#endif
}

// a + c per half. bfloat16 has no packed addition before sm_90, so it is a product with one.
template <class T>
DISCQUANT_HD uint32_t add_pair(uint32_t a, uint32_t c) {
#if defined(__CUDA_ARCH__)
  if constexpr (T::kWide) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(c));
    return d;
  } else {
    return fma_pair<T>(a, 0x3f803f80u, c);
  }
#else
  return host_pair<T>(a, T::kWide ? 0x3c003c00u : 0x3f803f80u, c);
#endif
}

// a * b per half, one rounding.
template <class T>
DISCQUANT_HD uint32_t mul_pair(uint32_t a, uint32_t b) {
  return fma_pair<T>(a, b, 0x80008000u);  // minus zero leaves the product's sign alone
}

// What one row's zero point subtracts: from codes in the low bits, and from codes shifted by four after the 1/16.
struct ZeroPair {
  uint32_t low;
  uint32_t high;
};

// -(magic + z) and -(magic / 16 + z), both halves; integers below 2^11 (float16) and 2^8 (bfloat16) are exact.
template <class T>
DISCQUANT_HD ZeroPair zero_pair(uint32_t z) {
  if constexpr (T::kWide) {
    const uint32_t low = 0xe400u + z;             // -(1024 + z): one ulp is 1
    const uint32_t high = 0xd400u + (z << 4);     // -(64 + z): one ulp is 1/16
    return ZeroPair{low * 0x10001u, high * 0x10001u};
  } else {
    const uint32_t low = 0xc300u + z;             // -(128 + z)
    const uint32_t high = 0xc100u + (z << 4);     // -(8 + z) for z < 8: one ulp is 1/16
    return ZeroPair{low * 0x10001u, high * 0x10001u};
  }
}

// (word & mask) | magic in one instruction where there is one.
template <uint32_t mask, uint32_t magic>
DISCQUANT_HD uint32_t mask_or(uint32_t word) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "n"(mask), "r"(magic));
  return d;
#else
  return (word & mask) | magic;
#endif
}

// Bits of `a` where the mask has ones, of `b` elsewhere.
template <uint32_t mask>
DISCQUANT_HD uint32_t pick_bits(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(d) : "r"(a), "r"(b), "n"(mask));
  return d;
#else
  return (a & mask) | (b & ~mask);
#endif
}

// Virtual word 3 of a quad at 3 bits with rubbish in bit 3 of every nibble, as words 0 to 2 have it: bits picked from
// the shifted words by a mask cost one instruction less than steal_word.
DISCQUANT_HD uint32_t loose_word(uint32_t w0, uint32_t w1, uint32_t w2) {
  return pick_bits<0x44444444u>(w2 >> 1, pick_bits<0x22222222u>(w1 >> 2, w0 >> 3));
}

// One virtual word (k16 step) to the four A registers of mma.m16n8k16, as q - z. Registers 0, 2 belong to row g with
// zero point `top`, 1, 3 to row g + 8 with `bottom`.
template <class T, int kBits>
DISCQUANT_HD void dequant_word(uint32_t word, ZeroPair top, ZeroPair bottom, uint32_t a[4]) {
  constexpr uint32_t kLow = kBits == 4 ? 0x000f000fu : 0x00070007u;
  constexpr uint32_t kHigh = kLow << 4;
  if constexpr (T::kWide || kBits == 3) {
    const uint32_t upper = word >> 8;
    a[0] = add_pair<T>(mask_or<kLow, T::kMagic>(word), top.low);
    a[1] = fma_pair<T>(mask_or<kHigh, T::kMagic>(word), T::kSixteenth, bottom.high);
    a[2] = add_pair<T>(mask_or<kLow, T::kMagic>(upper), top.low);
    a[3] = fma_pair<T>(mask_or<kHigh, T::kMagic>(upper), T::kSixteenth, bottom.high);
  } else {
    a[0] = add_pair<T>(mask_or<kLow, T::kMagic>(word), top.low);
    a[1] = add_pair<T>(mask_or<kLow, T::kMagic>(word >> 4), bottom.low);
    a[2] = add_pair<T>(mask_or<kLow, T::kMagic>(word >> 8), top.low);
    a[3] = add_pair<T>(mask_or<kLow, T::kMagic>(word >> 12), bottom.low);
  }
}

}  // namespace packed
}  // namespace discquant
