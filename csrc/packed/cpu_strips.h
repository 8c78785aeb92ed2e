// SPDX-License-Identifier: Apache-2.0
// What the row-tile kernels share, over a vector type V: words of a strip of rows, their codes, scales, prefetches, places.
//
// V has kRows lanes of 32 bits, one row each, and says of its instruction set:
//   kSums            sums that registers hold beside words and activations
//   kSlowSums        few sums would wait for their own products, so they are split
//   kWordByWord      words of a quad are loaded one by one, for want of registers
//   kBitMatrices     `steal` leaves the bits of word 3 where they lie for V::half_codes to order; integer modes only
//   kWide            a15 of four tokens or more goes by products of 16 bits (takes_pairs)
//   kPrefetch        which words it asks for ahead; scales and zero points always
//   kPairsLooped     pairs abreast are too many for its registers: their sums are kept in memory
#pragma once

#include <cstdint>

#include "packed/cpu_kernel.h"
#include "packed/layout.h"

namespace discquant {
namespace packed {
namespace {

enum class Prefetch {
  kNone,       // no words
  kLines,      // every line of words, early, into the second-level cache
  kPages,      // likewise, but one token of 8 bits asks for pages alone
  kTwoLevels,  // every line twice, shortly before its use into the first-level cache too
};

// The four virtual words of a quad: 32 codes of each of V::kRows rows. With kBitMatrices the last is for `half_codes` only.
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

// The codes of half-byte h of a virtual word. kWide: of every second byte, h from 0 to 3.
template <class V, int kBits, bool kWide>
__attribute__((always_inline)) inline typename V::I half_codes(typename V::I word, int v, int h, typename V::I mask) {
  if constexpr (V::kBitMatrices && !kWide) return V::template half_codes<kBits>(word, v, h, mask);
  return V::bit_and(h == 0 ? word : V::shift_right_var(word, 4 * h), mask);
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
  V::prefetch_first(static_cast<const char*>(w.scale) + (at + kAhead) * size);
  if (w.zero_point != nullptr) V::prefetch_first(reinterpret_cast<const char*>(w.zero_point + at + kAhead));
}

// Of the page after the next the line that lies there as `p` does in its own, in steps of 512 bytes: eight lines of a page.
template <class V>
__attribute__((always_inline)) inline void prefetch_page(const uint32_t* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  V::prefetch_second(reinterpret_cast<const char*>((at & ~uintptr_t{4095}) + 8192 + (at >> 3 & 0x1c0)));
}

// Sums must live in registers, so loops over them are unrolled. The scalar file leaves it out: no registers to save.
#ifndef DISCQUANT_UNROLL
#define DISCQUANT_UNROLL _Pragma("GCC unroll 8")
#endif
// Pairs abreast likewise, but with kPairsLooped.
#ifndef DISCQUANT_UNROLL_PAIRS
#define DISCQUANT_UNROLL_PAIRS DISCQUANT_UNROLL
#endif

// The lines of a strip that begins a row tile, so many bytes ahead.
template <class V, int kBits>
__attribute__((always_inline)) inline void prefetch_strip(const uint32_t* p, int64_t ahead) {
  const char* line = reinterpret_cast<const char*>(p);
  DISCQUANT_UNROLL
  for (int i = 0; i < (kBits == 4 ? 4 : 3); ++i, line += 64) {
    if (V::kPrefetch != Prefetch::kNone) V::prefetch_second(line + ahead);
    if (V::kPrefetch == Prefetch::kTwoLevels) V::prefetch_first(line + kPrefetchNear);
  }
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

}  // namespace
}  // namespace packed
}  // namespace discquant
