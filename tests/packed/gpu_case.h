// SPDX-License-Identifier: Apache-2.0
// Weights in buffers of exactly the size that the contract asks for, for the tests on the emulated GPU.
#pragma once

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "gpu_emulator.h"
#include "packed/gpu_linear.h"

using namespace discquant::packed;
static float random_value() { return static_cast<float>(static_cast<int>(random_word() % 2001) - 1000) / 500.0f; }

// Heap memory without a spare byte, aligned as torch aligns.
template <class V>
struct Buffer {
  V* data;
  size_t count;
  explicit Buffer(size_t n) : data(static_cast<V*>(std::aligned_alloc(16, (n * sizeof(V) + 15) / 16 * 16))), count(n) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

static uint16_t to_bits(float value, DType type) {
  return type == DType::kFloat16 ? float_to_half(value) : float_to_bfloat(value);
}
static float from_bits(uint16_t bits, DType type) {
  return type == DType::kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
}

struct Case {
  int n, k, bits, group_size, groups;
  bool symmetric;
  DType type, scale_type;
  std::vector<uint8_t> q;
  Buffer<uint32_t> words;
  Buffer<uint8_t> scale, zero;

  Case(int n_, int k_, int bits_, int group_, bool symmetric_, DType type_, DType scale_type_)
      : n(n_), k(k_), bits(bits_), group_size(group_),
        groups(group_ == 0 ? 1 : static_cast<int>(ceil_div(k_, group_))), symmetric(symmetric_), type(type_),
        scale_type(scale_type_), q(static_cast<size_t>(n_) * k_),
        words(static_cast<size_t>(packed_words(n_, k_, bits_))),
        scale(static_cast<size_t>(padded_rows(n_)) * groups * (scale_type_ == DType::kFloat32 ? 4 : 2)),
        zero(static_cast<size_t>(padded_rows(n_)) * groups) {
    for (auto& code : q) code = static_cast<uint8_t>(random_word() >> 8 & ((1u << bits) - 1));
    for (size_t i = 0; i < zero.count; ++i) {
      const float value = random_value() * 0.01f;
      zero.data[i] = static_cast<uint8_t>(random_word() >> 9 & ((1u << bits) - 1));
      if (scale_type == DType::kFloat32)
        reinterpret_cast<float*>(scale.data)[i] = value;
      else
        reinterpret_cast<uint16_t*>(scale.data)[i] = to_bits(value, scale_type);
    }
    const int64_t k_tiles = padded_k(k) / kTileK;
    for (int64_t row_tile = 0; row_tile < padded_rows(n) / kTileRows; ++row_tile)
      for (int64_t k_tile = 0; k_tile < k_tiles; ++k_tile)
        for (int unit = 0; unit < 32; ++unit)
          for (int quad = 0; quad < 2; ++quad) {
            uint32_t w[4] = {};
            for (int i = 0; i < 4; ++i)
              for (int nibble = 0; nibble < 8; ++nibble) {
                int row, inner;
                mma_code(unit, quad * 4 + i, nibble, row, inner);
                w[i] |= code(row_tile * kTileRows + row, k_tile * kTileK + inner) << (4 * nibble);
              }
            store_quad(words.data + tile_offset(kLayoutMma, bits, row_tile, k_tile, k_tiles), kLayoutMma, bits, unit, quad, w);
          }
  }
  int group_of(int64_t column) const {
    return group_size == 0 ? 0 : static_cast<int>(std::min<int64_t>(column / group_size, groups - 1));
  }
  size_t place(int64_t row, int64_t column) const {
    return static_cast<size_t>(scale_offset(kLayoutMma, row, group_of(column), groups));
  }
  uint32_t zero_of(int64_t row, int64_t column) const {
    return symmetric ? 1u << (bits - 1) : zero.data[place(row, column)];
  }
  // Padding holds the zero point: an exact zero.
  uint32_t code(int64_t row, int64_t column) const {
    return row < n && column < k ? q[static_cast<size_t>(row * k + column)] : zero_of(row, column);
  }
  float scale_at(int64_t row, int64_t column) const {
    return scale_type == DType::kFloat32 ? reinterpret_cast<const float*>(scale.data)[place(row, column)]
                                         : from_bits(reinterpret_cast<const uint16_t*>(scale.data)[place(row, column)], scale_type);
  }
  float weight(int64_t row, int64_t column) const {
    return scale_at(row, column) *
           (static_cast<float>(code(row, column)) - static_cast<float>(zero_of(row, column)));
  }
};

static GpuLinear call_of(const Case& c, const uint16_t* x, int64_t x_stride, int tokens, const uint16_t* bias, uint16_t* y,
                         const GpuDevice& device) {
  GpuLinear call{};
  call.x = x;
  call.x_stride = x_stride;
  call.type = c.type;
  call.tokens = tokens;
  call.words = c.words.data;
  call.scale = c.scale.data;
  call.scale_type = c.scale_type;
  call.zero_point = c.symmetric ? nullptr : c.zero.data;
  call.bias = bias;
  call.y = y;
  call.out_features = c.n;
  call.in_features = c.k;
  call.bits = c.bits;
  call.group_size = c.group_size;
  call.device = device;
  return call;
}

enum class Order { kForward, kBackward, kShuffled };

static std::vector<Place> places(unsigned x, unsigned y, Order order) {
  std::vector<Place> found;
  for (unsigned j = 0; j < y; ++j)
    for (unsigned i = 0; i < x; ++i) found.push_back(Place{i, j, 0});
  if (order == Order::kBackward) std::reverse(found.begin(), found.end());
  if (order == Order::kShuffled)
    for (size_t i = found.size(); i > 1; --i) std::swap(found[i - 1], found[random_word() % i]);
  return found;
}
