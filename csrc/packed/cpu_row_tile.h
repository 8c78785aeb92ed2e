// SPDX-License-Identifier: Apache-2.0
// The row-tile kernels, written once over a vector type V and included by one file per instruction set.
// Integer sums are exact and every float operation has one fixed order (blocks of k ascending, one accumulator per
// row and token), so a8 and a15 give the same bits on every instruction set, batch size and thread count; fp32 too,
// its four accumulators being k mod 4.
#pragma once

#include <cstdint>
#include <cstring>

#include "packed/cpu_elementwise.h"
#include "packed/cpu_kernel.h"
#include "packed/layout.h"

namespace discquant {
namespace packed {
namespace {

// The four virtual words of a quad: 32 codes of each of V::kRows rows.
template <class V, int kBits>
__attribute__((always_inline)) inline void load_strip(const uint32_t* p, typename V::I w[4]) {
  w[0] = V::load(p);
  w[1] = V::load(p + kTileRows);
  w[2] = V::load(p + 2 * kTileRows);
  w[3] = kBits == 4 ? V::load(p + 3 * kTileRows) : V::steal(w[0], w[1], w[2]);
}

// The same one by one, where four words of every strip would fill the registers: `v` counts up, and what the fourth word
// steals gathers in `stolen`.
template <class V, int kBits>
__attribute__((always_inline)) inline typename V::I next_word(const uint32_t* p, int v, typename V::I& stolen) {
  if (kBits == 3 && v == 3) return stolen;
  const typename V::I word = V::keep(V::load(p + v * kTileRows));
  if (kBits == 3) {
    const typename V::I bits = V::bit_and(V::shift_right_var(word, 3 - v), V::set1(0x11111111 << v));
    stolen = v == 0 ? bits : V::keep(V::bit_or(stolen, bits));
  }
  return word;
}

template <class V>
__attribute__((always_inline)) inline typename V::F load_scale(const CpuWeight& w, int64_t at) {
  switch (w.scale_type) {
    case DType::kFloat16:
      return V::load_half(static_cast<const uint16_t*>(w.scale) + at);
    case DType::kBFloat16:
      return V::load_bfloat(static_cast<const uint16_t*>(w.scale) + at);
    default:
      return V::load_float(static_cast<const float*>(w.scale) + at);
  }
}

// Scales come one line per block, too seldom for the hardware to run ahead of them.
template <class V>
__attribute__((always_inline)) inline void prefetch_scale(const CpuWeight& w, int64_t at) {
  constexpr int64_t kAhead = 8 * kPairRows;
  const int64_t size = w.scale_type == DType::kFloat32 ? 4 : 2;
  V::prefetch_line(static_cast<const char*>(w.scale) + (at + kAhead) * size);
  if (w.zero_point != nullptr) V::prefetch_line(w.zero_point + at + kAhead);
}

// Of the page after the next the line that lies there as `p` does in its own, in steps of 512 bytes: eight lines of a page.
template <class V>
__attribute__((always_inline)) inline void prefetch_page(const uint32_t* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  V::prefetch(reinterpret_cast<const char*>((at & ~uintptr_t{4095}) + 8192 + (at >> 3 & 0x1c0)), 0);
}

// Sums must live in registers, so loops over them are unrolled. The scalar file leaves it out: no registers to save.
#ifndef DISCQUANT_UNROLL
#define DISCQUANT_UNROLL _Pragma("GCC unroll 8")
#endif

// The lines of a strip of a whole row tile, some way ahead.
template <class V, int kBits>
__attribute__((always_inline)) inline void prefetch_strip(const uint32_t* p, int64_t bytes) {
  DISCQUANT_UNROLL
  for (int line = 0; line < (kBits == 4 ? 4 : 3); ++line) V::prefetch(reinterpret_cast<const char*>(p) + 64 * line, bytes);
}

// Where a walk along K is: the block, its group, and the codes of the group from this block on.
struct Place {
  int64_t block, group, left;
  void next(const CpuWeight& w) {
    ++block;
    left -= w.block_size;
    if (left == 0) {
      ++group;
      left = w.group_size;
    }
  }
};

// A strip is V::kRows rows of a pair of row tiles (32 rows). Where it begins, from where the pair does: among the words
// of a quad, and among the sums of one token.
template <class V, int kBits>
constexpr int strip_words(int strip) {
  return strip * V::kRows / kTileRows * (kBits == 4 ? 4 : 3) * kTileRows + strip * V::kRows % kTileRows;
}
template <class V>
constexpr int strip_sums(int strip, int tokens) {
  return strip * V::kRows / kTileRows * tokens * kTileRows + strip * V::kRows % kTileRows;
}

// The first of some strips: its words of the first quad, its scale of the first group, its sums of the first token; and
// whether it begins a row tile: then they ask for the tile's lines to come, which strips share.
struct Strips {
  const uint32_t* words;
  int64_t scale;
  float* sums;
  bool first;
};

// One quad of kStrips strips of a pair: their words times all tokens. `words`: of the first strip.
template <class V, int kBits, int kSweeps, int kTokens, int kStrips, int kChains, bool kWide>
__attribute__((always_inline)) inline void integer_quad(const uint32_t* words, const int32_t* const plane[kSweeps],
                                                        typename V::I (*acc)[kSweeps][kTokens][kChains]) {
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
        codes[s] = V::bit_and(h == 0 ? word[s][v] : V::shift_right_var(word[s][v], 4 * h), mask);
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

// Integer modes, blocks `at` to `end` of K; the sums of earlier blocks are there. kStrips strips are taken together, so
// that one broadcast of the activations serves all; and those of kAbreast neighbouring pairs in turn, quad by quad.
template <class V, int kBits, int kPlanes, int kTokens, int kStrips, int kAbreast = 1>
__attribute__((always_inline)) inline void integer_strips(const CpuWeight& w, const CpuTokens& x, const Strips& strips,
                                                          Place at, int64_t end) {
  using I = typename V::I;
  using F = typename V::F;
  // Wide activations: one plane of 16-bit pairs instead of two of bytes, two codes to a product instead of four.
  constexpr bool kWide = takes_pairs<V>(kPlanes, kTokens);
  constexpr int kSweeps = kWide ? 1 : kPlanes;
  // Few sums leave the multiplier idle while it waits for its own result: split them (integers, so exactly).
  constexpr int kSums = kAbreast * kStrips * kTokens * kSweeps;
  constexpr int kChains = V::kSlowSums ? (kSums <= 2 ? 4 : kSums <= 4 ? 2 : 1) : 1;
  // One token of 8 bits reads as fast as plain loads do, and there the processor's own prefetching is best left alone but
  // for pages, where it stops: on Zen 4 15 to 20 % faster at 4 bits than with every line asked for, up to 14 % at 3. With
  // more tokens it is the other way round, by 6 to 35 %, and with two planes at 3 bits, by 10 to 25 %; two planes at 4 bits
  // gain 5 % or lose 6 by the layer (all kernels in turn on all buffers: where one lies moves a time by as much).
  constexpr bool kPages = !V::kPrefetchAlways && kPlanes == 1 && kTokens == 1;
  constexpr int kStride = 2 * (kBits == 4 ? 4 : 3) * kTileRows;  // to the same rows of the next quad
  const bool first = kStrips * V::kRows >= kTileRows || strips.first;
  const int64_t quads = w.block_size / kQuadK;
  const int64_t pair_words = 2 * w.k_tiles * tile_words(kBits), pair_scales = w.groups * kPairRows;
  constexpr int kPairSums = 2 * kTokens * kTileRows;
  const uint32_t* words = strips.words + at.block * quads * kStride;
  F total[kAbreast][kStrips][kTokens];
  DISCQUANT_UNROLL
  for (int a = 0; a < kAbreast; ++a)
    DISCQUANT_UNROLL
    for (int s = 0; s < kStrips; ++s)
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
    I acc[kAbreast][kStrips][kSweeps][kTokens][kChains];
    DISCQUANT_UNROLL
    for (int a = 0; a < kAbreast; ++a)
      DISCQUANT_UNROLL
      for (int s = 0; s < kStrips; ++s)
        DISCQUANT_UNROLL
        for (int p = 0; p < kSweeps; ++p)
          DISCQUANT_UNROLL
          for (int m = 0; m < kTokens; ++m)
            DISCQUANT_UNROLL
            for (int c = 0; c < kChains; ++c) acc[a][s][p][m][c] = V::set1(0);
    for (int64_t quad = 0; quad < quads; ++quad) {
      DISCQUANT_UNROLL
      for (int a = 0; a < kAbreast; ++a) {
        const uint32_t* from = words + a * pair_words;
        if (kPages) prefetch_page<V>(from);
        DISCQUANT_UNROLL
        for (int s = 0; s < kStrips; ++s)
          if (!kPages && s * V::kRows % kTileRows == 0 && first)
            prefetch_strip<V, kBits>(from + strip_words<V, kBits>(s), kAbreast == 1 ? kPrefetchBytes : kPrefetchAbreast);
        integer_quad<V, kBits, kSweeps, kTokens, kStrips, kChains, kWide>(from, plane, acc[a]);
      }
      words += kStride;
      DISCQUANT_UNROLL
      for (int p = 0; p < kSweeps; ++p) plane[p] += kQuadValues;
    }
    DISCQUANT_UNROLL
    for (int a = 0; a < kAbreast; ++a)
      DISCQUANT_UNROLL
      for (int s = 0; s < kStrips; ++s) {
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
  DISCQUANT_UNROLL
  for (int a = 0; a < kAbreast; ++a)
    DISCQUANT_UNROLL
    for (int s = 0; s < kStrips; ++s)
      DISCQUANT_UNROLL
      for (int m = 0; m < kTokens; ++m)
        V::store_float(strips.sums + a * kPairSums + strip_sums<V>(s, kTokens) + m * kTileRows, total[a][s][m]);
}

// Sums of one block of one strip over the k that are kClass .. kClass + kClasses - 1 mod 4, into sums[m][k mod 4].
template <class V, int kBits, int kTokens, int kClasses, int kClass = 0>
__attribute__((always_inline)) inline void float_block(const CpuWeight& w, const uint32_t* words, const float* values,
                                                       typename V::F zero, bool first, typename V::F sums[kTokens][4]) {
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
  static_assert(kAbreast * 2 * kTileRows / V::kRows * kPlanes * kTokens <= V::kSums, "more sums than registers");
  for (; pairs >= kAbreast; pairs -= kAbreast, pair += kAbreast, out += kAbreast * 2 * kTokens * kTileRows) {
    const Strips strips{w.words + tile_offset(kLayoutCpu, kBits, 2 * pair, 0, w.k_tiles),
                        scale_offset(kLayoutCpu, pair * kPairRows, 0, w.groups), out, true};
    integer_strips<V, kBits, kPlanes, kTokens, 2 * kTileRows / V::kRows, kAbreast>(w, x, strips,
                                                                                  Place{0, 0, w.group_size}, w.blocks);
  }
  integer_pairs<V, kBits, kPlanes, kTokens>(w, x, pair, pairs, out);
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

template <class V>
const CpuKernels* make_kernels() {
#define DISCQUANT_TOKENS(fn, ...) \
  { fn<V, __VA_ARGS__, 1>, fn<V, __VA_ARGS__, 2>, fn<V, __VA_ARGS__, 4>, fn<V, __VA_ARGS__, 6>, fn<V, __VA_ARGS__, 8> }
  static const CpuKernels kernels = {
      {{DISCQUANT_TOKENS(integer_pairs, 4, 1), DISCQUANT_TOKENS(integer_pairs, 4, 2), DISCQUANT_TOKENS(float_pairs, 4)},
       {DISCQUANT_TOKENS(integer_pairs, 3, 1), DISCQUANT_TOKENS(integer_pairs, 3, 2), DISCQUANT_TOKENS(float_pairs, 3)}},
      quantize<V>,
      dequantize<V>,
      read_all<V>,
      8,
      1,
      false};
#undef DISCQUANT_TOKENS
  return &kernels;
}

}  // namespace
}  // namespace packed
}  // namespace discquant
