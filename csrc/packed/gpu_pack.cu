// SPDX-License-Identifier: Apache-2.0
// pack, unpack, repack and dequantise on the GPU: a thread block per 16 x 128 tile, codes staged in shared memory so
// that both sides are written and read along their own order.
#include <cuda_runtime.h>

#include "packed/gpu_linear.h"

namespace discquant {
namespace packed {
namespace {

constexpr int kTileThreads = 128;

// A unit is a lane or a row; each thread takes quads of the tile.
template <class Fn>
__device__ void for_quads(Layout layout, Fn fn) {
  const int quads = unit_words(layout) / 4;
  for (int i = threadIdx.x; i < tile_units(layout) * quads; i += kTileThreads) fn(i / quads, i % quads);
}

__device__ void place(Layout layout, int unit, int word, int nibble, int& row, int& k) {
  if (layout == kLayoutMma)
    mma_code(unit, word, nibble, row, k);
  else
    cpu_code(unit, word, nibble, row, k);
}

__device__ void read_tile(const uint32_t* tile, Layout layout, int bits, uint8_t (*codes)[kTileK]) {
  for_quads(layout, [&](int unit, int quad) {
    uint32_t words[4];
    load_quad(tile, layout, bits, unit, quad, words);
    for (int v = 0; v < 4; ++v)
      for (int nibble = 0; nibble < 8; ++nibble) {
        int row, k;
        place(layout, unit, 4 * quad + v, nibble, row, k);
        codes[row][k] = static_cast<uint8_t>((words[v] >> (4 * nibble)) & 15u);
      }
  });
}

__device__ void write_tile(uint32_t* tile, Layout layout, int bits, uint8_t (*codes)[kTileK]) {
  for_quads(layout, [&](int unit, int quad) {
    uint32_t words[4];
    for (int v = 0; v < 4; ++v) {
      words[v] = 0;
      for (int nibble = 0; nibble < 8; ++nibble) {
        int row, k;
        place(layout, unit, 4 * quad + v, nibble, row, k);
        words[v] |= static_cast<uint32_t>(codes[row][k]) << (4 * nibble);
      }
    }
    store_quad(tile, layout, bits, unit, quad, words);
  });
}

__global__ void pack_kernel(const uint8_t* codes, const uint8_t* zero_point, int64_t n, int64_t k, int bits,
                            int64_t group_size, Layout layout, uint32_t* words) {
  __shared__ uint8_t block[kTileRows][kTileK];
  const int64_t groups = ceil_div(k, group_size);
  for (int i = threadIdx.x; i < kTileRows * kTileK; i += kTileThreads) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kTileRows + i / kTileK;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * kTileK + i % kTileK;
    uint8_t code = static_cast<uint8_t>(1u << (bits - 1));
    if (row < n && column < k) {
      code = codes[row * k + column];
    } else if (zero_point != nullptr) {
      const int64_t g = column / group_size < groups ? column / group_size : groups - 1;
      code = row < n ? zero_point[row * groups + g] : 0;
    }
    block[i / kTileK][i % kTileK] = code & ((1u << bits) - 1);
  }
  __syncthreads();
  write_tile(words + tile_offset(layout, bits, blockIdx.x, blockIdx.y, gridDim.y), layout, bits, block);
}

__global__ void unpack_kernel(const uint32_t* words, int64_t n, int64_t k, int bits, Layout layout, uint8_t* codes) {
  __shared__ uint8_t block[kTileRows][kTileK];
  read_tile(words + tile_offset(layout, bits, blockIdx.x, blockIdx.y, gridDim.y), layout, bits, block);
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows * kTileK; i += kTileThreads) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kTileRows + i / kTileK;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * kTileK + i % kTileK;
    if (row < n && column < k) codes[row * k + column] = block[i / kTileK][i % kTileK];
  }
}

__global__ void repack_kernel(const uint32_t* from, Layout from_layout, uint32_t* to, Layout to_layout, int bits) {
  __shared__ uint8_t block[kTileRows][kTileK];
  read_tile(from + tile_offset(from_layout, bits, blockIdx.x, blockIdx.y, gridDim.y), from_layout, bits, block);
  __syncthreads();
  write_tile(to + tile_offset(to_layout, bits, blockIdx.x, blockIdx.y, gridDim.y), to_layout, bits, block);
}

__device__ float scale_of(const void* scale, DType type, int64_t i) {
  if (type == DType::kFloat32) return static_cast<const float*>(scale)[i];
  const uint16_t bits = static_cast<const uint16_t*>(scale)[i];
  if (type == DType::kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// The float32 product is rounded once, by the cast: what the reference and the CPU do.
__global__ void dequantize_kernel(const GpuDequantize p, int64_t group_size, int64_t first_tile) {
  __shared__ uint8_t block[kTileRows][kTileK];
  const int64_t row_tile = first_tile + blockIdx.x;
  read_tile(p.words + tile_offset(kLayoutMma, p.bits, row_tile, blockIdx.y, gridDim.y), kLayoutMma, p.bits, block);
  __syncthreads();
  const int64_t groups = ceil_div(p.k, group_size);
  for (int i = threadIdx.x; i < kTileRows * kTileK; i += kTileThreads) {
    const int64_t row = row_tile * kTileRows + i / kTileK;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * kTileK + i % kTileK;
    if (row >= p.row_end || column >= p.k) continue;
    const int64_t at = scale_offset(kLayoutMma, row, column / group_size, groups);
    const float zero = p.zero_point != nullptr ? p.zero_point[at] : static_cast<float>(1 << (p.bits - 1));
    const float value = scale_of(p.scale, p.scale_type, at) * (block[i / kTileK][i % kTileK] - zero);
    const int64_t out = (row - p.row_begin) * p.k + column;
    if (p.type == DType::kFloat32) {
      static_cast<float*>(p.out)[out] = value;
    } else {
      uint16_t bits;
      if (p.type == DType::kFloat16)
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
      else
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
      static_cast<uint16_t*>(p.out)[out] = bits;
    }
  }
}

dim3 tiles(int64_t rows, int64_t k) {
  return dim3(static_cast<unsigned>(ceil_div(rows, kTileRows)), static_cast<unsigned>(padded_k(k) / kTileK));
}

}  // namespace

int pack_gpu(const uint8_t* codes, const uint8_t* zero_point, int64_t n, int64_t k, int bits, int64_t group_size,
             Layout layout, uint32_t* words, CUstream_st* stream) {
  if (n == 0) return cudaSuccess;
  pack_kernel<<<tiles(padded_rows(n), k), kTileThreads, 0, stream>>>(
      codes, zero_point, n, k, bits, group_size > 0 ? group_size : padded_k(k), layout, words);
  return cudaGetLastError();
}

int unpack_gpu(const uint32_t* words, int64_t n, int64_t k, int bits, Layout layout, uint8_t* codes,
               CUstream_st* stream) {
  if (n == 0) return cudaSuccess;
  unpack_kernel<<<tiles(n, k), kTileThreads, 0, stream>>>(words, n, k, bits, layout, codes);
  return cudaGetLastError();
}

int repack_gpu(const uint32_t* from, Layout from_layout, uint32_t* to, Layout to_layout, int64_t n, int64_t k,
               int bits, CUstream_st* stream) {
  if (n == 0) return cudaSuccess;
  repack_kernel<<<tiles(padded_rows(n), k), kTileThreads, 0, stream>>>(from, from_layout, to, to_layout, bits);
  return cudaGetLastError();
}

int dequantize_gpu(const GpuDequantize& call, CUstream_st* stream) {
  if (call.row_end == call.row_begin) return cudaSuccess;
  dequantize_kernel<<<tiles(call.row_end - call.row_begin, call.k), kTileThreads, 0, stream>>>(
      call, call.group_size > 0 ? call.group_size : padded_k(call.k), call.row_begin / kTileRows);
  return cudaGetLastError();
}

}  // namespace packed
}  // namespace discquant
