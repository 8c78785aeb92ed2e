// SPDX-License-Identifier: Apache-2.0
// The row-tile kernels, written once over a vector type V and included by one file per instruction set.
// Integer sums are exact and every float operation has one fixed order (blocks of k ascending, one accumulator per
// row and token), so a8 and a15 give the same bits on every instruction set, batch size and thread count; fp32 too,
// its four accumulators being k mod 4.
#pragma once

#include <cstdint>
#include <cstring>

#include "packed/cpu_kernel.h"
#include "packed/layout.h"

namespace discquant {
namespace packed {
namespace {

// The four virtual words of a quad: 32 codes of each of V::kRows rows.
template <class V, int kBits>
__attribute__((always_inline)) inline void load_quad(const uint32_t* p, typename V::I w[4]) {
  w[0] = V::load(p);
  w[1] = V::load(p + kTileRows);
  w[2] = V::load(p + 2 * kTileRows);
  w[3] = kBits == 4 ? V::load(p + 3 * kTileRows) : V::steal(w[0], w[1], w[2]);
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

// Rows first .. first + V::kRows - 1 of a row tile, integer modes.
template <class V, int kBits, int kPlanes, int kTokens>
__attribute__((always_inline)) inline void integer_rows(const CpuWeight& w, const CpuTokens& x, int64_t row_tile,
                                                        int first, float* out) {
  using I = typename V::I;
  using F = typename V::F;
  // Few tokens leave the multiplier idle while it waits for its own sum: split the sum (integers, so exactly).
  constexpr int kChains = kTokens * kPlanes <= 1 ? 4 : kTokens * kPlanes <= 2 ? 2 : 1;
  constexpr uint32_t kMask = kBits == 4 ? 0x0f0f0f0fu : 0x07070707u;
  constexpr int kQuadWords = kBits == 4 ? 4 * kTileRows : 3 * kTileRows;
  const I mask = V::set1(static_cast<int32_t>(kMask));
  const int32_t middle = 1 << (kBits - 1);
  const int64_t quads = w.block_size / kQuadK;
  const uint32_t* words = w.words + row_tile * w.k_tiles * tile_words(kBits) + first;
  const int32_t* plane[kPlanes];
  for (int p = 0; p < kPlanes; ++p) plane[p] = x.plane[p];
  F total[kTokens];
  for (int m = 0; m < kTokens; ++m) total[m] = V::zero_float();
  int64_t group = 0;
  int64_t left = w.group_size;
  for (int64_t block = 0; block < w.blocks; ++block) {
    I acc[kPlanes][kTokens][kChains];
    for (int p = 0; p < kPlanes; ++p)
      for (int m = 0; m < kTokens; ++m)
        for (int c = 0; c < kChains; ++c) acc[p][m][c] = V::set1(0);
    for (int64_t quad = 0; quad < quads; ++quad) {
      V::prefetch(words);
      I word[4];
      load_quad<V, kBits>(words, word);
      words += kQuadWords;
      I part[kPlanes][kTokens][kChains];
      for (int p = 0; p < kPlanes; ++p)
        for (int m = 0; m < kTokens; ++m)
          for (int c = 0; c < kChains; ++c) part[p][m][c] = V::part_begin(acc[p][m][c]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const I low = V::bit_and(word[v], mask);
        const I high = V::bit_and(V::template shift_right<4>(word[v]), mask);
        for (int p = 0; p < kPlanes; ++p) {
          for (int m = 0; m < kTokens; ++m) {
            I& a = part[p][m][(2 * v) % kChains];
            a = V::dot(a, low, plane[p][2 * v * kTokens + m]);
            I& b = part[p][m][(2 * v + 1) % kChains];
            b = V::dot(b, high, plane[p][(2 * v + 1) * kTokens + m]);
          }
        }
      }
      for (int p = 0; p < kPlanes; ++p) {
        plane[p] += 8 * kTokens;
        for (int m = 0; m < kTokens; ++m)
          for (int c = 0; c < kChains; ++c) acc[p][m][c] = V::part_end(acc[p][m][c], part[p][m][c]);
      }
    }
    const int64_t at = (row_tile * w.groups + group) * kTileRows + first;
    const F scale = load_scale<V>(w, at);
    const I zero = w.zero_point != nullptr ? V::load_bytes(w.zero_point + at) : V::set1(middle);
    for (int m = 0; m < kTokens; ++m) {
      I sum[kPlanes];
      for (int p = 0; p < kPlanes; ++p) {
        sum[p] = acc[p][m][0];
        for (int c = 1; c < kChains; ++c) sum[p] = V::add(sum[p], acc[p][m][c]);
      }
      I all = sum[0];
      if (kPlanes == 2) all = V::add(V::template shift_left<8>(sum[0]), sum[kPlanes - 1]);
      const int32_t xsum = x.sum[block * kTokens + m];
      // The symmetric zero point is one number, so its product is made once in scalar registers.
      const I shift = w.zero_point != nullptr ? V::mul(zero, V::set1(xsum)) : V::set1(middle * xsum);
      const F value = V::to_float(V::sub(all, shift));
      total[m] = V::fma(value, V::mul_float(scale, V::set1_float(x.step[block * kTokens + m])), total[m]);
    }
    left -= w.block_size;
    if (left == 0) {
      ++group;
      left = w.group_size;
    }
  }
  for (int m = 0; m < kTokens; ++m) V::store_float(out + m * kTileRows + first, total[m]);
}

// The same rows with float32 activations: products of exact (q - z) and x, scaled once per block.
template <class V, int kBits, int kTokens>
__attribute__((always_inline)) inline void float_rows(const CpuWeight& w, const CpuTokens& x, int64_t row_tile,
                                                      int first, float* out) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int kQuadWords = kBits == 4 ? 4 * kTileRows : 3 * kTileRows;
  const int64_t quads = w.block_size / kQuadK;
  const uint32_t* words = w.words + row_tile * w.k_tiles * tile_words(kBits) + first;
  const float* values = x.values;
  const typename V::Table table = V::template code_table<kBits>();
  const F middle = V::set1_float(static_cast<float>(1 << (kBits - 1)));
  F total[kTokens];
  for (int m = 0; m < kTokens; ++m) total[m] = V::zero_float();
  int64_t group = 0;
  int64_t left = w.group_size;
  for (int64_t block = 0; block < w.blocks; ++block) {
    const int64_t at = (row_tile * w.groups + group) * kTileRows + first;
    const F zero = w.zero_point != nullptr ? V::to_float(V::load_bytes(w.zero_point + at)) : middle;
    F acc[kTokens][4];
    for (int m = 0; m < kTokens; ++m)
      for (int c = 0; c < 4; ++c) acc[m][c] = V::zero_float();
    for (int64_t quad = 0; quad < quads; ++quad) {
      V::prefetch(words);
      I word[4];
      load_quad<V, kBits>(words, word);
      words += kQuadWords;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          // k = 8v + i; its nibble is 2 * (i mod 4) + i / 4 (cpu_place).
          const I code = V::shift_right_var(word[v], 4 * (2 * (i & 3) + (i >> 2)));
          const F weight = V::sub_float(V::template code_to_float<kBits>(table, code), zero);
          for (int m = 0; m < kTokens; ++m)
            acc[m][i & 3] = V::fma(weight, V::set1_float(values[(8 * v + i) * kTokens + m]), acc[m][i & 3]);
        }
      }
      values += kQuadK * kTokens;
    }
    const F scale = load_scale<V>(w, at);
    for (int m = 0; m < kTokens; ++m) {
      const F sum = V::add_float(V::add_float(acc[m][0], acc[m][1]), V::add_float(acc[m][2], acc[m][3]));
      total[m] = V::fma(sum, scale, total[m]);
    }
    left -= w.block_size;
    if (left == 0) {
      ++group;
      left = w.group_size;
    }
  }
  for (int m = 0; m < kTokens; ++m) V::store_float(out + m * kTileRows + first, total[m]);
}

template <class V, int kBits, int kPlanes, int kTokens>
void integer_tile(const CpuWeight& w, const CpuTokens& x, int64_t row_tile, float* out) {
  for (int first = 0; first < kTileRows; first += V::kRows)
    integer_rows<V, kBits, kPlanes, kTokens>(w, x, row_tile, first, out);
}

template <class V, int kBits, int kTokens>
void float_tile(const CpuWeight& w, const CpuTokens& x, int64_t row_tile, float* out) {
  for (int first = 0; first < kTileRows; first += V::kRows) float_rows<V, kBits, kTokens>(w, x, row_tile, first, out);
}

// Round half to even for |v| < 2^22 with two additions: every compiler vectorises it, and all give the same bits.
__attribute__((always_inline)) inline float round_even(float v) {
  const float shift = 12582912.0f;
  return (v + shift) - shift;
}

// step = amax / 32639 (or 127), codes = round(x / step) split as 256 * high + low with low in [-128, 127].
// A block with a NaN or infinity gets a NaN step, so the output shows it; one below 2^-100 is taken as zero.
template <int kPlanes>
__attribute__((always_inline)) inline void quantize_row(const float* x, int64_t blocks, int64_t block_size, int token,
                                                        int tokens, int64_t plane_bytes, int8_t* codes, float* step,
                                                        int32_t* sum) {
  const float levels = kPlanes == 2 ? 32639.0f : 127.0f;
  for (int64_t block = 0; block < blocks; ++block) {
    const float* v = x + block * block_size;
    uint32_t top = 0;  // absolute floats compare like integers, and a NaN comes out largest
    for (int64_t i = 0; i < block_size; ++i) {
      uint32_t bits;
      std::memcpy(&bits, v + i, 4);
      bits &= 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    float amax;
    std::memcpy(&amax, &top, 4);
    const bool finite = top < 0x7f800000u;
    const bool live = finite && amax > 7.888609e-31f;
    const float inverse = live ? levels / amax : 0.0f;
    step[block * tokens + token] = live ? amax / levels : finite ? 0.0f : __builtin_nanf("");
    int32_t total = 0;
    int32_t whole[128];
    for (int64_t i = 0; i < block_size; ++i) {
      const int32_t code = live ? static_cast<int32_t>(round_even(v[i] * inverse)) : 0;
      whole[i] = code;
      total += code;
    }
    sum[block * tokens + token] = total;
    int8_t* out = codes + (block * block_size / 4 * tokens + token) * 4;
    for (int64_t i = 0; i < block_size; i += 4, out += 4 * tokens) {
      for (int j = 0; j < 4; ++j) {
        const int32_t code = whole[i + j];
        if (kPlanes == 2) {
          const int32_t high = (code + 128) >> 8;
          out[j] = static_cast<int8_t>(high);
          out[plane_bytes + j] = static_cast<int8_t>(code - 256 * high);
        } else {
          out[j] = static_cast<int8_t>(code);
        }
      }
    }
  }
}

template <class V>
void quantize(const float* x, int64_t blocks, int64_t block_size, int planes, int token, int tokens,
              int64_t plane_bytes, int8_t* codes, float* step, int32_t* sum) {
  if (planes == 2)
    quantize_row<2>(x, blocks, block_size, token, tokens, plane_bytes, codes, step, sum);
  else
    quantize_row<1>(x, blocks, block_size, token, tokens, plane_bytes, codes, step, sum);
}

template <class V>
void read_all(const void* p, int64_t bytes, uint32_t* out) {
  const uint32_t* words = static_cast<const uint32_t*>(p);
  typename V::I acc[4] = {V::set1(0), V::set1(0), V::set1(0), V::set1(0)};
  for (int64_t at = 0; at + 4 * V::kRows * 4 <= bytes; at += 4 * V::kRows * 4, words += 4 * V::kRows)
    for (int c = 0; c < 4; ++c) acc[c] = V::add(acc[c], V::load(words + c * V::kRows));
  const typename V::I sum = V::add(V::add(acc[0], acc[1]), V::add(acc[2], acc[3]));
  V::store(out, sum);
}

template <class V>
const CpuKernels* make_kernels() {
#define DISCQUANT_TOKENS(fn, ...) \
  { fn<V, __VA_ARGS__, 1>, fn<V, __VA_ARGS__, 2>, fn<V, __VA_ARGS__, 4>, fn<V, __VA_ARGS__, 6>, fn<V, __VA_ARGS__, 8> }
  static const CpuKernels kernels = {
      {{DISCQUANT_TOKENS(integer_tile, 4, 1), DISCQUANT_TOKENS(integer_tile, 4, 2), DISCQUANT_TOKENS(float_tile, 4)},
       {DISCQUANT_TOKENS(integer_tile, 3, 1), DISCQUANT_TOKENS(integer_tile, 3, 2), DISCQUANT_TOKENS(float_tile, 3)}},
      quantize<V>,
      read_all<V>};
#undef DISCQUANT_TOKENS
  return &kernels;
}

}  // namespace
}  // namespace packed
}  // namespace discquant
