// SPDX-License-Identifier: Apache-2.0
// Row-tile kernels for AVX2 with FMA and F16C: eight rows to a vector, eight sums in registers at a time.
#include <immintrin.h>

#define DISCQUANT_UNROLL_PAIRS _Pragma("GCC unroll 1")  // kPairsLooped
#include "packed/cpu_row_tile.h"

namespace discquant {
namespace packed {
namespace {

struct Vectors256 {
  static constexpr int kRows = 8;
  static constexpr int kSums = 8;
  static constexpr bool kSlowSums = false;
  // Zen 3, both in turn: 2 to 7 % faster at 3 bits, from the caches and from memory; alike at 4.
  static constexpr bool kWordByWord = true;
  static constexpr bool kBitMatrices = false;
  // Products of int16 need no second sum of 32 bits. On Zen 3, from the caches, both in turn, the best of 25 calls: a15
  // 10 to 14 % faster from four tokens on, as much slower with one.
  static constexpr bool kWide = true;
  // Zen 3, one token, all in turn on all buffers: pages alone take 1.6 of its time.
  static constexpr Prefetch kPrefetch = Prefetch::kLines;
  static constexpr bool kPairsLooped = true;
  using I = __m256i;
  using F = __m256;
  using Table = int;
  static I load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  // In a register from here on: the compiler would load every word twice, once for each nibble.
  static I keep(I v) {
    asm("" : "+x"(v));
    return v;
  }
  static void store(uint32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  // always_inline: GCC takes a function that only prefetches for one without effect, and drops the call.
  __attribute__((always_inline)) static void prefetch_first(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }
  __attribute__((always_inline)) static void prefetch_second(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }
  // As `keep`, for the order of sums.
  static F keep_float(F v) {
    asm("" : "+x"(v));
    return v;
  }
  static I set1(int32_t v) { return _mm256_set1_epi32(v); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  template <int n>
  static I shift_right(I a) { return _mm256_srli_epi32(a, n); }
  template <int n>
  static I shift_left(I a) { return _mm256_slli_epi32(a, n); }
  static I shift_right_var(I a, int n) { return _mm256_srli_epi32(a, n); }
  static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I steal(I a, I b, I c) {
    const I one = _mm256_and_si256(_mm256_srli_epi32(a, 3), _mm256_set1_epi32(0x11111111));
    const I two = _mm256_and_si256(_mm256_srli_epi32(b, 2), _mm256_set1_epi32(0x22222222));
    const I four = _mm256_and_si256(_mm256_srli_epi32(c, 1), _mm256_set1_epi32(0x44444444));
    return _mm256_or_si256(_mm256_or_si256(one, two), four);
  }
  // As in the AVX-512 BW file: eight sums of two products stay below 2^15.
  static I part_begin(I) { return _mm256_setzero_si256(); }
  static I dot(I acc, I codes, I x) {
    acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x));
    // In this order: the compiler would rather make all products first and add them as a tree, out of registers.
    asm("" : "+x"(acc));
    return acc;
  }
  static I part_end(I acc, I part) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }
  static I wide_dot(I acc, I codes, I x) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(codes, x));
    asm("" : "+x"(acc));
    return acc;
  }
  static F zero_float() { return _mm256_setzero_ps(); }
  static F set1_float(float v) { return _mm256_set1_ps(v); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static F add_float(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub_float(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul_float(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static void store_float(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F load_float(const float* p) { return _mm256_loadu_ps(p); }
  static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_bfloat(const uint16_t* p) {
    const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store_half(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bfloat(uint16_t* p, F v) {
    const I bits = _mm256_castps_si256(v);
    const I even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  template <int kBits>
  static Table code_table() { return 0; }
  template <int kBits>
  static F code_to_float(Table, I code) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32((1 << kBits) - 1)));
  }
};

// Zen 3 finds four streams by itself: with lines asked for as well, early or shortly before their use, a15 took 3 to 15 %
// longer, with pages 18 to 25 %.
struct FoundStreams : Vectors256 {
  static constexpr Prefetch kPrefetch = Prefetch::kNone;
};

// One token on Zen 3, both in turn on all buffers, four shapes: 0.72 to 0.92 of the time at 4 bits, 0.77 to 0.97 at 3 bits with
// two threads; with one 0.93 to 0.95 for a8, but 1.02 to 1.06 for a15, which products bound there (and a8 too, 1.1, while
// something else slowed the processor). Two and four tokens, bound by products, took up to 1.1.
CpuKernels one_token_in_streams() {
  CpuKernels kernels = *make_kernels<Vectors256>();
  kernels.abreast = kMaxAbreast;
  kernels.table[0][0][0] = integer_abreast<FoundStreams, 4, 1, 1, kMaxAbreast>;
  kernels.table[0][1][0] = integer_abreast<FoundStreams, 4, 2, 1, kMaxAbreast>;
  kernels.table[1][0][0] = integer_abreast<FoundStreams, 3, 1, 1, kMaxAbreast>;
  kernels.table[1][1][0] = integer_abreast<FoundStreams, 3, 2, 1, kMaxAbreast>;
  return kernels;
}

}  // namespace

const CpuKernels* kernels_avx2(bool streams) {
  static const CpuKernels several = one_token_in_streams();
  return streams ? &several : make_kernels<Vectors256>();
}

}  // namespace packed
}  // namespace discquant
