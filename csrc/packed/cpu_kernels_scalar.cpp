// SPDX-License-Identifier: Apache-2.0
// Row-tile kernels in plain C++: the fallback of every processor, and what the others are compared with bit for bit.
#pragma GCC optimize("O1")  // higher levels take ten times as long for code that only old processors run
#define DISCQUANT_UNROLL
#include <cmath>

// The vectors never cross a file boundary, so their calling convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "packed/cpu_row_tile.h"
#include "packed/float_types.h"

namespace discquant {
namespace packed {
namespace {

// Sixteen lanes by the compiler's vector extension: it lowers them to whatever the target has, SSE2 or NEON included.
struct VectorsScalar {
  static constexpr int kRows = 16;
  static constexpr int kSums = 16;
  static constexpr bool kSlowSums = false;
  static constexpr bool kWordByWord = false;
  static constexpr bool kBitMatrices = false;
  static constexpr bool kWide = false;
  static constexpr Prefetch kPrefetch = Prefetch::kNone;
  static constexpr bool kPairsLooped = false;
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));
  typedef float F __attribute__((vector_size(64)));
  using Table = int;
  static I load(const uint32_t* p) {
    I r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static I keep(I v) { return v; }
  static F keep_float(F v) { return v; }
  static void store(uint32_t* p, I a) { std::memcpy(p, &a, sizeof a); }
  static void prefetch_first(const char*) {}
  static void prefetch_second(const char*) {}
  static I set1(int32_t v) { return I{} + v; }
  static I bit_and(I a, I b) { return a & b; }
  template <int n>
  static I shift_right(I a) { return (I)((U)a >> n); }
  template <int n>
  static I shift_left(I a) { return (I)((U)a << n); }
  static I shift_right_var(I a, int n) { return (I)((U)a >> n); }
  // Unsigned inside: wrapping is defined, as it is in the vector instructions.
  static I add(I a, I b) { return (I)((U)a + (U)b); }
  static I sub(I a, I b) { return (I)((U)a - (U)b); }
  static I mul(I a, I b) { return (I)((U)a * (U)b); }
  static I load_bytes(const uint8_t* p) {
    I r;
    for (int i = 0; i < kRows; ++i) r[i] = p[i];
    return r;
  }
  static I steal(I a, I b, I c) {
    return (I)((((U)a >> 3) & 0x11111111u) | (((U)b >> 2) & 0x22222222u) | (((U)c >> 1) & 0x44444444u));
  }
  static I part_begin(I acc) { return acc; }
  static I dot(I acc, I codes, I x) {
    for (int j = 0; j < 4; ++j) acc += ((codes >> (8 * j)) & 255) * ((I)((U)x << (24 - 8 * j)) >> 24);
    return acc;
  }
  static I part_end(I, I part) { return part; }
  static F zero_float() { return F{}; }
  static F set1_float(float v) { return F{} + v; }
  static F to_float(I a) { return __builtin_convertvector(a, F); }
  static F add_float(F a, F b) { return a + b; }
  static F sub_float(F a, F b) { return a - b; }
  static F mul_float(F a, F b) { return a * b; }
  // One rounding, as the fused instructions of the other files. Not inlined: it is a library call per lane anyway, and
  // inlining it took the compiler 40 s.
  __attribute__((noinline)) static F fma(F a, F b, F c) {
    F r;
    for (int i = 0; i < kRows; ++i) r[i] = std::fma(a[i], b[i], c[i]);
    return r;
  }
  static void store_float(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static F load_float(const float* p) {
    F r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static F load_half(const uint16_t* p) {
    F r;
    for (int i = 0; i < kRows; ++i) r[i] = half_to_float(p[i]);
    return r;
  }
  static F load_bfloat(const uint16_t* p) {
    F r;
    for (int i = 0; i < kRows; ++i) r[i] = bfloat_to_float(p[i]);
    return r;
  }
  static void store_half(uint16_t* p, F v) {
    for (int i = 0; i < kRows; ++i) p[i] = float_to_half(v[i]);
  }
  static void store_bfloat(uint16_t* p, F v) {
    for (int i = 0; i < kRows; ++i) p[i] = float_to_bfloat(v[i]);
  }
  template <int kBits>
  static Table code_table() { return 0; }
  template <int kBits>
  static F code_to_float(Table, I code) { return to_float(code & ((1 << kBits) - 1)); }
};

}  // namespace

const CpuKernels* kernels_scalar() { return make_kernels<VectorsScalar>(); }

}  // namespace packed
}  // namespace discquant
