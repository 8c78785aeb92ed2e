// SPDX-License-Identifier: Apache-2.0
// Row-tile kernels of the integer modes, a8 and a15.
#pragma once

#include "packed/cpu_elementwise.h"
#include "packed/cpu_strips.h"

namespace discquant {
namespace packed {
namespace {

// One quad of kStrips strips of a pair: their words times all tokens. `words`: of the first strip.
template <class V, int kBits, int kSweeps, int kTokens, int kStrips, int kChains, bool kWide>
__attribute__((always_inline)) inline void integer_quad(const uint32_t* words, const int32_t* const plane[kSweeps],
                                                        typename V::I (*acc)[kSweeps][kTokens][kChains]) {
  static_assert(!V::kBitMatrices || (!kWide && !V::kWordByWord), "these take word 3 as it is stored");
  using I = typename V::I;
  constexpr int kSteps = kWide ? 4 : 2;
  constexpr uint32_t kMask = (kBits == 4 ? 0x0f0f0f0fu : 0x07070707u) & (kWide ? 0x00ff00ffu : ~0u);
  const I mask = V::set1(static_cast<int32_t>(kMask));
  I word[kStrips][4], stolen[kStrips];
  I part[kStrips][kSweeps][kTokens][kChains];
  DISCQUANT_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    if constexpr (!V::kWordByWord) load_strip<V, kBits>(words + strip_words<V, kBits>(s), word[s]);
    DISCQUANT_UNROLL
    for (int p = 0; p < kSweeps; ++p)
      DISCQUANT_UNROLL
      for (int m = 0; m < kTokens; ++m)
        DISCQUANT_UNROLL
        for (int c = 0; c < kChains; ++c)
          part[s][p][m][c] = kWide ? acc[s][p][m][c] : V::part_begin(acc[s][p][m][c]);
  }
  DISCQUANT_UNROLL
  for (int v = 0; v < 4; ++v) {
    DISCQUANT_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      if constexpr (V::kWordByWord)
        word[s][v] = next_word<V, kBits>(words + strip_words<V, kBits>(s), v, stolen[s]);
      else
        word[s][v] = V::keep(word[s][v]);
    }
    DISCQUANT_UNROLL
    for (int h = 0; h < kSteps; ++h) {
      I codes[kStrips];
      DISCQUANT_UNROLL
      for (int s = 0; s < kStrips; ++s)
        codes[s] = half_codes<V, kBits, kWide>(word[s][v], v, h, mask);
      DISCQUANT_UNROLL
      for (int p = 0; p < kSweeps; ++p) {
        DISCQUANT_UNROLL
        for (int m = 0; m < kTokens; ++m) {
          const I values = V::set1(plane[p][(kSteps * v + h) * kTokens + m]);
          DISCQUANT_UNROLL
          for (int s = 0; s < kStrips; ++s) {
            I& a = part[s][p][m][(kSteps * v + h) % kChains];
            if constexpr (kWide)
              a = V::wide_dot(a, codes[s], values);
            else
              a = V::dot(a, codes[s], values);
          }
        }
      }
    }
  }
  DISCQUANT_UNROLL
  for (int s = 0; s < kStrips; ++s)
    DISCQUANT_UNROLL
    for (int p = 0; p < kSweeps; ++p)
      DISCQUANT_UNROLL
      for (int m = 0; m < kTokens; ++m)
        DISCQUANT_UNROLL
        for (int c = 0; c < kChains; ++c)
          acc[s][p][m][c] = kWide ? part[s][p][m][c] : V::part_end(acc[s][p][m][c], part[s][p][m][c]);
}

// Integer modes, blocks `at` to `end` of K; the sums of earlier blocks are there. For every quad, kTurns sets of
// kStrips strips, one after the other in a pair, take their turns in each of kAbreast neighbouring pairs. A set is taken
// together, so that one broadcast of the activations serves it.
template <class V, int kBits, int kPlanes, int kTokens, int kStrips, int kTurns = 1, int kAbreast = 1>
__attribute__((always_inline)) inline void integer_strips(const CpuWeight& w, const CpuTokens& x, const Strips& strips,
                                                          Place at, int64_t end) {
  using I = typename V::I;
  using F = typename V::F;
  // Wide activations: one plane of 16-bit pairs instead of two of bytes, two codes to a product instead of four.
  constexpr bool kWide = takes_pairs<V>(kPlanes, kTokens);
  constexpr int kSweeps = kWide ? 1 : kPlanes;
  // Few sums leave the multiplier idle while it waits for its own result: split them (integers, so exactly).
  constexpr int kSums = kAbreast * kTurns * kStrips * kTokens * kSweeps;
  constexpr int kChains = V::kSlowSums ? (kSums <= 2 ? 4 : kSums <= 4 ? 2 : 1) : 1;
  // One token of 8 bits reads as fast as plain loads do, and there the processor's own prefetching is best left alone but
  // for pages, where it stops: on Zen 4 15 to 20 % faster at 4 bits than with every line asked for, up to 14 % at 3. With
  // more tokens it is the other way round, by 6 to 35 %, and with two planes at 3 bits, by 10 to 25 %; two planes at 4 bits
  // gain 5 % or lose 6 by the layer (all kernels in turn on all buffers: where one lies moves a time by as much).
  constexpr bool kPages = V::kPrefetch == Prefetch::kPages && kPlanes == 1 && kTokens == 1;
  constexpr int kStride = 2 * (kBits == 4 ? 4 : 3) * kTileRows;  // to the same rows of the next quad
  const bool first = kStrips * V::kRows >= kTileRows || strips.first;
  const int64_t quads = w.block_size / kQuadK;
  const int64_t pair_words = 2 * w.k_tiles * tile_words(kBits), pair_scales = w.groups * kPairRows;
  constexpr int kPairSums = 2 * kTokens * kTileRows;
  constexpr int kAll = kTurns * kStrips;  // strips of a pair
  const uint32_t* words = strips.words + at.block * quads * kStride;
  F total[kAbreast][kAll][kTokens];
  DISCQUANT_UNROLL_PAIRS
  for (int a = 0; a < kAbreast; ++a)
    DISCQUANT_UNROLL
    for (int s = 0; s < kAll; ++s)
      DISCQUANT_UNROLL
      for (int m = 0; m < kTokens; ++m) {
        const float* sum = strips.sums + a * kPairSums + strip_sums<V>(s, kTokens) + m * kTileRows;
        total[a][s][m] = at.block == 0 ? V::zero_float() : V::load_float(sum);
      }
  const int32_t* plane[kSweeps];
  constexpr int kQuadValues = (kWide ? 16 : 8) * kTokens;
  DISCQUANT_UNROLL
  for (int p = 0; p < kSweeps; ++p) plane[p] = x.plane[p] + at.block * quads * kQuadValues;
  for (; at.block < end; at.next(w)) {
    I acc[kAbreast][kAll][kSweeps][kTokens][kChains];
    DISCQUANT_UNROLL_PAIRS
    for (int a = 0; a < kAbreast; ++a)
      DISCQUANT_UNROLL
      for (int s = 0; s < kAll; ++s)
        DISCQUANT_UNROLL
        for (int p = 0; p < kSweeps; ++p)
          DISCQUANT_UNROLL
          for (int m = 0; m < kTokens; ++m)
            DISCQUANT_UNROLL
            for (int c = 0; c < kChains; ++c) acc[a][s][p][m][c] = V::set1(0);
    for (int64_t quad = 0; quad < quads; ++quad) {
      DISCQUANT_UNROLL_PAIRS
      for (int a = 0; a < kAbreast; ++a) {
        const uint32_t* from = words + a * pair_words;
        if (kPages) prefetch_page<V>(from);
        DISCQUANT_UNROLL
        for (int s = 0; s < kAll; ++s)
          if (!kPages && s * V::kRows % kTileRows == 0 && first)
            prefetch_strip<V, kBits>(from + strip_words<V, kBits>(s), kAbreast == 1 ? kPrefetchBytes : kPrefetchAbreast);
        DISCQUANT_UNROLL
        for (int s = 0; s < kAll; s += kStrips)
          integer_quad<V, kBits, kSweeps, kTokens, kStrips, kChains, kWide>(from + strip_words<V, kBits>(s), plane,
                                                                           acc[a] + s);
      }
      words += kStride;
      DISCQUANT_UNROLL
      for (int p = 0; p < kSweeps; ++p) plane[p] += kQuadValues;
    }
    DISCQUANT_UNROLL_PAIRS
    for (int a = 0; a < kAbreast; ++a)
      DISCQUANT_UNROLL
      for (int s = 0; s < kAll; ++s) {
        const int64_t place = strips.scale + a * pair_scales + at.group * kPairRows + s * V::kRows;
        if (s * V::kRows % kTileRows == 0 && first) prefetch_scale<V>(w, place);
        const F scale = load_scale<V>(w, place);
        const I zero = w.zero_point != nullptr ? V::load_bytes(w.zero_point + place) : V::set1(0);
        DISCQUANT_UNROLL
        for (int m = 0; m < kTokens; ++m) {
          I sum[kSweeps];
          DISCQUANT_UNROLL
          for (int p = 0; p < kSweeps; ++p) {
            sum[p] = acc[a][s][p][m][0];
            DISCQUANT_UNROLL
            for (int c = 1; c < kChains; ++c) sum[p] = V::add(sum[p], acc[a][s][p][m][c]);
          }
          I all = sum[0];
          if (kSweeps == 2) all = V::add(V::template shift_left<8>(sum[0]), sum[kSweeps - 1]);
          const I xsum = V::set1(x.sum[at.block * kTokens + m]);
          // The symmetric zero point is a power of two.
          const I shift = w.zero_point != nullptr ? V::mul(zero, xsum) : V::template shift_left<kBits - 1>(xsum);
          const F value = V::to_float(V::sub(all, shift));
          const F step = V::mul_float(scale, V::set1_float(x.step[at.block * kTokens + m]));
          total[a][s][m] = V::fma(value, step, total[a][s][m]);
        }
      }
  }
  DISCQUANT_UNROLL_PAIRS
  for (int a = 0; a < kAbreast; ++a)
    DISCQUANT_UNROLL
    for (int s = 0; s < kAll; ++s)
      DISCQUANT_UNROLL
      for (int m = 0; m < kTokens; ++m)
        V::store_float(strips.sums + a * kPairSums + strip_sums<V>(s, kTokens) + m * kTileRows, total[a][s][m]);
}

// The sums of kStrips strips must fit the registers: V::kSums vectors.
template <class V, int kBits, int kPlanes, int kTokens>
__attribute__((always_inline)) inline void integer_pair(const CpuWeight& w, const CpuTokens& x, int64_t pair, float* out) {
  constexpr int kAll = 2 * kTileRows / V::kRows;
  constexpr int kFit = V::kSums / (kTokens * (takes_pairs<V>(kPlanes, kTokens) ? 1 : kPlanes));
  static_assert(kFit >= 1, "more sums than registers");
  constexpr int kStrips = kFit >= kAll ? kAll : kFit >= 2 ? 2 : 1;
  const uint32_t* words = w.words + tile_offset(kLayoutCpu, kBits, 2 * pair, 0, w.k_tiles);
  const int64_t scale = scale_offset(kLayoutCpu, pair * kPairRows, 0, w.groups);
  // Strips of less than a tile's rows take turns block by block, so that the words still come in one stream.
  const int64_t span = V::kRows < kTileRows ? 1 : w.blocks;
  for (Place at{0, 0, w.group_size}; at.block < w.blocks; at.next(w)) {
    for (int strip = 0; strip < kAll; strip += kStrips) {
      const Strips strips{words + strip_words<V, kBits>(strip), scale + strip * V::kRows,
                          out + strip_sums<V>(strip, kTokens), strip * V::kRows % kTileRows == 0};
      integer_strips<V, kBits, kPlanes, kTokens, kStrips>(w, x, strips, at, at.block + span);
    }
    if (span > 1) break;
  }
}

template <class V, int kBits, int kPlanes, int kTokens>
void integer_pairs(const CpuWeight& w, const CpuTokens& x, int64_t pair, int pairs, float* out) {
  for (int i = 0; i < pairs; ++i)
    integer_pair<V, kBits, kPlanes, kTokens>(w, x, pair + i, out + i * 2 * kTokens * kTileRows);
}

// kAbreast pairs side by side, each a stream of its own to the processor's prefetching.
template <class V, int kBits, int kPlanes, int kTokens, int kAbreast>
void integer_abreast(const CpuWeight& w, const CpuTokens& x, int64_t pair, int pairs, float* out) {
  // Strips that registers hold at a time: those of all pairs, or of one tile where looped pairs keep their sums in memory.
  constexpr int kPair = 2 * kTileRows / V::kRows;
  constexpr int kStrips = V::kPairsLooped ? kPair / 2 : kPair;
  static_assert((V::kPairsLooped ? 1 : kAbreast) * kStrips * kPlanes * kTokens <= V::kSums, "more sums than registers");
  for (; pairs >= kAbreast; pairs -= kAbreast, pair += kAbreast, out += kAbreast * 2 * kTokens * kTileRows) {
    const Strips strips{w.words + tile_offset(kLayoutCpu, kBits, 2 * pair, 0, w.k_tiles),
                        scale_offset(kLayoutCpu, pair * kPairRows, 0, w.groups), out, true};
    integer_strips<V, kBits, kPlanes, kTokens, kStrips, kPair / kStrips, kAbreast>(w, x, strips,
                                                                                  Place{0, 0, w.group_size}, w.blocks);
  }
  integer_pairs<V, kBits, kPlanes, kTokens>(w, x, pair, pairs, out);
}

}  // namespace
}  // namespace packed
}  // namespace discquant
