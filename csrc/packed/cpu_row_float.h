// SPDX-License-Identifier: Apache-2.0
// Row-tile kernels of the fp32 mode.
#pragma once

#include "packed/cpu_strips.h"

namespace discquant {
namespace packed {
namespace {

// Sums of one block of one strip over the k that are kClass .. kClass + kClasses - 1 mod 4, into sums[m][k mod 4].
template <class V, int kBits, int kTokens, int kClasses, int kClass = 0>
__attribute__((always_inline)) inline void float_block(const CpuWeight& w, const uint32_t* words, const float* values,
                                                       typename V::F zero, bool first, typename V::F sums[kTokens][4]) {
  static_assert(!V::kBitMatrices, "word 3 is taken as it is stored");
  using I = typename V::I;
  using F = typename V::F;
  constexpr int kStride = 2 * (kBits == 4 ? 4 : 3) * kTileRows;
  const typename V::Table table = V::template code_table<kBits>();
  F acc[kTokens][kClasses];
  DISCQUANT_UNROLL
  for (int m = 0; m < kTokens; ++m)
    DISCQUANT_UNROLL
    for (int c = 0; c < kClasses; ++c) acc[m][c] = V::zero_float();
  const uint32_t* p = words;
  const float* x = values;
  for (int64_t quad = 0; quad < w.block_size / kQuadK; ++quad) {
    if (kClass == 0 && first) prefetch_strip<V, kBits>(p, kPrefetchBytes);
    I word[4];
    load_strip<V, kBits>(p, word);
    p += kStride;
    DISCQUANT_UNROLL
    for (int v = 0; v < 4; ++v) {
      DISCQUANT_UNROLL
      for (int i = 0; i < 2 * kClasses; ++i) {
        // k = 8v + class + 4h; its nibble is 2 * class + h (cpu_place).
        const int c = i % kClasses, h = i / kClasses;
        const I code = V::shift_right_var(word[v], 4 * (2 * (kClass + c) + h));
        const F weight = V::sub_float(V::template code_to_float<kBits>(table, code), zero);
        DISCQUANT_UNROLL
        for (int m = 0; m < kTokens; ++m)
          acc[m][c] = V::keep_float(
              V::fma(weight, V::set1_float(x[(8 * v + 4 * h + kClass + c) * kTokens + m]), acc[m][c]));
      }
    }
    x += kQuadK * kTokens;
  }
  DISCQUANT_UNROLL
  for (int m = 0; m < kTokens; ++m)
    DISCQUANT_UNROLL
    for (int c = 0; c < kClasses; ++c) sums[m][kClass + c] = acc[m][c];
  if constexpr (kClass + kClasses < 4)
    float_block<V, kBits, kTokens, kClasses, kClass + kClasses>(w, words, values, zero, first, sums);
}

// float32 activations: products of exact (q - z) and x, scaled once per block. Strips and blocks as in `integer_pair`.
template <class V, int kBits, int kTokens>
__attribute__((always_inline)) inline void float_pair(const CpuWeight& w, const CpuTokens& x, int64_t pair, float* out) {
  using F = typename V::F;
  constexpr int kClasses = 4 * kTokens <= V::kSums ? 4 : 2 * kTokens <= V::kSums ? 2 : 1;
  constexpr int kStride = 2 * (kBits == 4 ? 4 : 3) * kTileRows;
  constexpr int kAll = 2 * kTileRows / V::kRows;
  const int64_t quads = w.block_size / kQuadK;
  const uint32_t* words = w.words + tile_offset(kLayoutCpu, kBits, 2 * pair, 0, w.k_tiles);
  const int64_t scales = scale_offset(kLayoutCpu, pair * kPairRows, 0, w.groups);
  const F middle = V::set1_float(static_cast<float>(1 << (kBits - 1)));
  const int together = V::kRows < kTileRows ? kAll : 1;
  for (int begin = 0; begin < kAll; begin += together) {
    for (Place at{0, 0, w.group_size}; at.block < w.blocks; at.next(w)) {
      for (int strip = begin; strip < begin + together; ++strip) {
        const int64_t place = scales + at.group * kPairRows + strip * V::kRows;
        const F zero = w.zero_point != nullptr ? V::to_float(V::load_bytes(w.zero_point + place)) : middle;
        F sums[kTokens][4];
        float_block<V, kBits, kTokens, kClasses>(w, words + at.block * quads * kStride + strip_words<V, kBits>(strip),
                                                 x.values + at.block * w.block_size * kTokens, zero,
                                                 strip * V::kRows % kTileRows == 0, sums);
        const F scale = load_scale<V>(w, place);
        float* total = out + strip_sums<V>(strip, kTokens);
        DISCQUANT_UNROLL
        for (int m = 0; m < kTokens; ++m, total += kTileRows) {
          const F sum = V::add_float(V::add_float(sums[m][0], sums[m][1]), V::add_float(sums[m][2], sums[m][3]));
          V::store_float(total, V::fma(sum, scale, at.block == 0 ? V::zero_float() : V::load_float(total)));
        }
      }
    }
  }
}

template <class V, int kBits, int kTokens>
void float_pairs(const CpuWeight& w, const CpuTokens& x, int64_t pair, int pairs, float* out) {
  for (int i = 0; i < pairs; ++i) float_pair<V, kBits, kTokens>(w, x, pair + i, out + i * 2 * kTokens * kTileRows);
}

}  // namespace
}  // namespace packed
}  // namespace discquant
