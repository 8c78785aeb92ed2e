// SPDX-License-Identifier: Apache-2.0
// What the CPU does element by element, over a vector type V: activations to integers, codes to weights, a plain read.
// Included by one file per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "packed/cpu_kernel.h"

namespace discquant {
namespace packed {
namespace {

// Whether these activations are pairs of 16 bits, not planes of bytes.
template <class V>
constexpr bool takes_pairs(int planes, int tokens) {
  return V::kWide && planes == 2 && tokens >= 4;
}

// Round half to even for |v| < 2^22 with two additions: every compiler vectorises it, and all give the same bits.
__attribute__((always_inline)) inline float round_even(float v) {
  const float shift = 12582912.0f;
  return (v + shift) - shift;
}

// step = amax / 32639 (or 127), codes = round(x / step) split as 256 * high + low with low in [-128, 127].
// A block with a NaN or infinity gets a NaN step, so the output shows it; one below 2^-100 is taken as zero.
// kWide: the codes of eight k as four words of two, in the order in which words >> 4 h & 0x000f000f hold them.
template <int kPlanes, bool kWide>
__attribute__((always_inline)) inline void quantize_row(const float* x, int64_t blocks, int64_t block_size, int token,
                                                        int tokens, CodeStrides stride, int8_t* codes,
                                                        float* step, int32_t* sum) {
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
    int8_t* out = codes + (kWide ? 2 : 1) * block * stride.block;
    if (kWide) {
      for (int64_t i = 0; i < block_size; i += 8)
        for (int h = 0; h < 4; ++h, out += stride.quad) {
          const int first = (h & 1) * 4 + (h >> 1);
          const int16_t two[2] = {static_cast<int16_t>(whole[i + first]), static_cast<int16_t>(whole[i + first + 2])};
          std::memcpy(out, two, 4);
        }
      continue;
    }
    int8_t bytes[kPlanes][128];
    for (int64_t i = 0; i < block_size; ++i) {
      const int32_t high = kPlanes == 2 ? (whole[i] + 128) >> 8 : whole[i];
      bytes[0][i] = static_cast<int8_t>(high);
      if (kPlanes == 2) bytes[kPlanes - 1][i] = static_cast<int8_t>(whole[i] - 256 * high);
    }
    for (int p = 0; p < kPlanes; ++p, out += stride.plane) {
      if (stride.quad == 4)
        std::memcpy(out, bytes[p], static_cast<size_t>(block_size));
      else
        for (int64_t i = 0; i < block_size; i += 4) std::memcpy(out + i / 4 * stride.quad, bytes[p] + i, 4);
    }
  }
}

template <class V>
void quantize(const float* x, int64_t blocks, int64_t block_size, int planes, int token, int tokens,
              CodeStrides stride, int8_t* codes, float* step, int32_t* sum) {
  if (takes_pairs<V>(planes, tokens))
    quantize_row<2, true>(x, blocks, block_size, token, tokens, stride, codes, step, sum);
  else if (planes == 2)
    quantize_row<2, false>(x, blocks, block_size, token, tokens, stride, codes, step, sum);
  else
    quantize_row<1, false>(x, blocks, block_size, token, tokens, stride, codes, step, sum);
}

template <class V>
__attribute__((always_inline)) inline typename V::F weight_of(const uint8_t* codes, typename V::F scale,
                                                               typename V::F zero) {
  return V::mul_float(scale, V::sub_float(V::to_float(V::load_bytes(codes)), zero));
}

template <class V>
void dequantize(const uint8_t* codes, int64_t count, float scale, float zero, DType type, void* out) {
  const typename V::F s = V::set1_float(scale), z = V::set1_float(zero);
  float* wide = static_cast<float*>(out);
  uint16_t* narrow = static_cast<uint16_t*>(out);
  int64_t i = 0;
  if (type == DType::kFloat32) {
    for (; i + V::kRows <= count; i += V::kRows) V::store_float(wide + i, weight_of<V>(codes + i, s, z));
  } else if (type == DType::kBFloat16) {
    for (; i + V::kRows <= count; i += V::kRows) V::store_bfloat(narrow + i, weight_of<V>(codes + i, s, z));
  } else {
    for (; i + V::kRows <= count; i += V::kRows) V::store_half(narrow + i, weight_of<V>(codes + i, s, z));
  }
  if (i == count) return;
  // The last ones through copies: nothing may be read or written past the end.
  const size_t rest = static_cast<size_t>(count - i);
  uint8_t from[V::kRows] = {0};
  float to[V::kRows];
  uint16_t halves[V::kRows];
  std::memcpy(from, codes + i, rest);
  const typename V::F weight = weight_of<V>(from, s, z);
  if (type == DType::kFloat32) {
    V::store_float(to, weight);
    std::memcpy(wide + i, to, 4 * rest);
    return;
  }
  type == DType::kBFloat16 ? V::store_bfloat(halves, weight) : V::store_half(halves, weight);
  std::memcpy(narrow + i, halves, 2 * rest);
}

template <class V>
void read_all(const void* p, int64_t bytes, int streams, bool prefetch, uint32_t* out) {
  typename V::I acc[4] = {V::set1(0), V::set1(0), V::set1(0), V::set1(0)};
  const int64_t part = bytes / streams / 4;
  for (int64_t at = 0; at < part; at += 4 * V::kRows) {
    const uint32_t* words = static_cast<const uint32_t*>(p) + at;
    for (int stream = 0; stream < streams; ++stream, words += part) {
      if (prefetch)
        for (int line = 0; line < V::kRows / 4; ++line)
          V::prefetch_second(reinterpret_cast<const char*>(words) + kPrefetchBytes + 64 * line);
      for (int c = 0; c < 4; ++c) acc[c] = V::add(acc[c], V::load(words + c * V::kRows));
    }
  }
  const typename V::I sum = V::add(V::add(acc[0], acc[1]), V::add(acc[2], acc[3]));
  V::store(out, sum);
}

}  // namespace
}  // namespace packed
}  // namespace discquant
