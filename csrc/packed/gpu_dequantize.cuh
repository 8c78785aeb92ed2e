// SPDX-License-Identifier: Apache-2.0
// Packed words to a dense weight. A warp takes one tile (16 rows x 128 k), a thread block the four tiles of a unit and of
// the next one along K; values pass through shared memory, so that every store is 16 bytes of a whole row.
#pragma once

#include <type_traits>

#include "packed/gpu_linear.h"
#include "packed/gpu_scale.cuh"

namespace discquant {
namespace packed {

constexpr int kDequantizeWarps = 8;
constexpr int kRowBytes = kTileK * 2 + 16;  // of a tile's row in shared memory; 16 more, no bank conflicts
constexpr int kDequantizeShared = kDequantizeWarps * kTileRows * kRowBytes;

// The float32 product is rounded once, by the cast: what the reference and the CPU do. T is the type of the result, void
// for float32.
template <class T, int kBits>
__global__ void __launch_bounds__(32 * kDequantizeWarps) dequantize_kernel(const GpuDequantize p, const int group_size) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t k_tiles = padded_k(p.k) / kTileK;
  const int64_t k_tile = static_cast<int64_t>(blockIdx.x) * 2 + warp / 4;
  const int64_t first = (p.row_begin / kBlockRows + blockIdx.y) * kBlockRows + warp % 4 * kTileRows;  // row of the tile
  if (k_tile >= k_tiles || first >= p.row_end || first + kTileRows <= p.row_begin) return;
  uint8_t* const rows = dynamic_shared() + warp * kTileRows * kRowBytes;

  const uint32_t* tile = p.words + tile_offset(kLayoutMma, kBits, first / kTileRows, k_tile, k_tiles);
  uint32_t word[8];
#pragma unroll
  for (int quad = 0; quad < 2; ++quad) load_quad(tile, kLayoutMma, kBits, lane, quad, word + 4 * quad);

  const int groups = static_cast<int>(ceil_div(p.k, group_size));
  const int group_steps = group_size >= kTileK ? 8 : group_size / 16;  // k16 steps of a group in a tile
  const int first_group = static_cast<int>(static_cast<uint32_t>(k_tile) * kTileK / static_cast<uint32_t>(group_size));
  constexpr bool wide = std::is_void_v<T>;
  constexpr int size = wide ? 4 : 2;
  float scale[2] = {0.0f, 0.0f};
  ZeroPair zero[2] = {zero_pair<Half2>(1u << (kBits - 1)), zero_pair<Half2>(1u << (kBits - 1))};
#pragma unroll
  for (int part = 0; part < (wide ? 2 : 1); ++part) {  // float32: 64 k at a time fill the same rows
    warp_barrier();
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      if (wide && step / 4 != part) continue;
      if ((step & (group_steps - 1)) == 0 || (wide && step % 4 == 0)) {
        const int group = first_group + step / group_steps;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int64_t at = scale_offset(kLayoutMma, first + lane / 4 + 8 * r, group < groups ? group : groups - 1, groups);
          scale[r] = scale_value(p.scale_type == DType::kFloat32 ? load_word(p.scale, 4 * at) : load_half(p.scale, 2 * at), p.scale_type);
          if (p.zero_point != nullptr) zero[r] = zero_pair<Half2>(load_byte(p.zero_point, at));
        }
      }
      uint32_t pairs[4];
      dequant_word<Half2, kBits>(word[step], zero[0], zero[1], pairs);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = scale[j & 1] * half_to_float32(static_cast<uint16_t>(pairs[j]));
        const float high = scale[j & 1] * half_to_float32(static_cast<uint16_t>(pairs[j] >> 16));
        const int k = (wide ? step % 4 : step) * 16 + lane % 4 * 2 + (j >> 1) * 8;
        uint8_t* const to = rows + (lane / 4 + 8 * (j & 1)) * kRowBytes + k * size;
        if constexpr (wide) {
          reinterpret_cast<float*>(to)[0] = low;
          reinterpret_cast<float*>(to)[1] = high;
        } else {
          *reinterpret_cast<uint32_t*>(to) = float_pair_to_bits<T>(low, high);
        }
      }
    }
    warp_barrier();
    constexpr int count = 16 / size;  // values of one store
    const int64_t k0 = k_tile * kTileK + part * (kTileK / 2);
    const bool aligned = p.k % count == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    for (int i = lane; i < kTileRows * 16; i += 32) {
      const int64_t row = first + i / 16, k = k0 + i % 16 * count;
      if (row < p.row_begin || row >= p.row_end || k >= p.k) continue;
      const uint8_t* const from = rows + i / 16 * kRowBytes + i % 16 * 16;
      uint8_t* const to = static_cast<uint8_t*>(p.out) + ((row - p.row_begin) * p.k + k) * size;
      if (aligned) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int j = 0; j < count && k + j < p.k; ++j) {
          if (wide)
            reinterpret_cast<float*>(to)[j] = reinterpret_cast<const float*>(from)[j];
          else
            reinterpret_cast<uint16_t*>(to)[j] = reinterpret_cast<const uint16_t*>(from)[j];
        }
      }
    }
  }
}

}  // namespace packed
}  // namespace discquant
