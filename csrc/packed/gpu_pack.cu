// SPDX-License-Identifier: Apache-2.0
// pack, unpack, repack and dequantise on the GPU: a thread block per 16 x 128 tile, codes staged in shared memory so
// that both sides are written and read along their own order.
#include <cuda_runtime.h>

#include "packed/gpu_dequantize.cuh"

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
  const int64_t group = call.group_size > 0 ? call.group_size : padded_k(call.k);
  const int64_t blocks = ceil_div(call.row_end, kBlockRows) - call.row_begin / kBlockRows;
  const dim3 grid(static_cast<unsigned>(ceil_div(padded_k(call.k) / kTileK, 2)), static_cast<unsigned>(blocks));
  const auto kernel = call.type == DType::kFloat32   ? call.bits == 4 ? dequantize_kernel<void, 4> : dequantize_kernel<void, 3>
                      : call.type == DType::kFloat16 ? call.bits == 4 ? dequantize_kernel<Half2, 4> : dequantize_kernel<Half2, 3>
                      : call.bits == 4               ? dequantize_kernel<Bfloat2, 4>
                                                     : dequantize_kernel<Bfloat2, 3>;
  kernel<<<grid, 32 * kDequantizeWarps, kDequantizeShared, stream>>>(call, static_cast<int>(group));
  return cudaGetLastError();
}

}  // namespace packed
}  // namespace discquant
