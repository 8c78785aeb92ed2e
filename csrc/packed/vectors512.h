// SPDX-License-Identifier: Apache-2.0
// The 16-row vector type of the AVX-512 files. Two differ in the dot product alone; that of AMX also in how it prefetches and
// takes half bytes.
#pragma once

// GCC 12's own intrinsics start from an undefined register, which it then reports as ours (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "packed/cpu_strips.h"

namespace discquant {
namespace packed {
namespace {

struct Vectors512 {
  static constexpr int kRows = 16;
  static constexpr int kSums = 16;
  static constexpr bool kSlowSums = true;
  static constexpr bool kWordByWord = false;
  static constexpr bool kBitMatrices = false;
  static constexpr bool kWide = false;
  static constexpr Prefetch kPrefetch = Prefetch::kPages;
  static constexpr bool kPairsLooped = false;
  using I = __m512i;
  using F = __m512;
  using Table = __m512;
  static I load(const uint32_t* p) {
    I v = _mm512_loadu_si512(p);
    // Keep it in a register: the compiler would rather load every word twice, once for each nibble.
    asm("" : "+v"(v));
    return v;
  }
  static I keep(I v) { return v; }
  static F keep_float(F v) { return v; }
  static void store(uint32_t* p, I v) { _mm512_storeu_si512(p, v); }
  // always_inline: GCC takes a function that only prefetches for one without effect, and drops the call.
  __attribute__((always_inline)) static void prefetch_first(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }
  __attribute__((always_inline)) static void prefetch_second(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }
  static I set1(int32_t v) { return _mm512_set1_epi32(v); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  template <int n>
  static I shift_right(I a) { return _mm512_srli_epi32(a, n); }
  template <int n>
  static I shift_left(I a) { return _mm512_slli_epi32(a, n); }
  static I shift_right_var(I a, int n) { return _mm512_srli_epi32(a, n); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // 0xf8 = a | (b & c): one instruction merges a shifted word under its mask.
  static I steal(I a, I b, I c) {
    const I one = _mm512_and_si512(_mm512_srli_epi32(a, 3), _mm512_set1_epi32(0x11111111));
    const I two = _mm512_ternarylogic_epi32(one, _mm512_srli_epi32(b, 2), _mm512_set1_epi32(0x22222222), 0xf8);
    return _mm512_ternarylogic_epi32(two, _mm512_srli_epi32(c, 1), _mm512_set1_epi32(0x44444444), 0xf8);
  }
  static F zero_float() { return _mm512_setzero_ps(); }
  static F set1_float(float v) { return _mm512_set1_ps(v); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F add_float(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub_float(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul_float(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static void store_float(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F load_float(const float* p) { return _mm512_loadu_ps(p); }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_bfloat(const uint16_t* p) {
    const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store_half(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bfloat(uint16_t* p, F v) {
    const I bits = _mm512_castps_si512(v);
    const I even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even), 16);
    const I chosen = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(chosen));
  }
  // The permute reads four index bits, so a nibble needs no mask; at 3 bits the table repeats and ignores the spare bit.
  template <int kBits>
  static Table code_table() {
    return kBits == 4 ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                      : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
  }
  template <int kBits>
  static F code_to_float(Table table, I code) {
    return _mm512_permutexvar_ps(code, table);
  }
};

}  // namespace
}  // namespace packed
}  // namespace discquant
