// SPDX-License-Identifier: Apache-2.0
// The GPU side as an engine would call it: raw device pointers and a stream, no torch header.
#pragma once

#include <cstdint>

#include "packed/cpu_kernel.h"
#include "packed/gpu_walk.h"

struct CUstream_st;

namespace discquant {
namespace packed {

// y[m][n] = sum_k x[m][k] * scale * (q - zero_point)[n][k] + bias[n]; kLayoutMma layout.
struct GpuLinear {
  const void* x;      // 16-byte aligned, rows 16-byte aligned: x_stride and in_features multiples of 8
  int64_t x_stride;   // elements
  DType type;         // of x, bias, y: float16 or bfloat16
  int tokens;
  const uint32_t* words;
  const void* scale;  // [padded_rows / 64][groups][64]
  DType scale_type;
  const uint8_t* zero_point;  // same shape; null: symmetric
  const void* bias;           // null: none
  void* y;                    // [tokens][out_features]
  int64_t out_features;
  int64_t in_features;
  int bits;
  int group_size;        // 32, 64 or a multiple of 128; 0 is the whole row
  uint32_t* workspace;   // gpu_workspace_words() words, 16-byte aligned; the first kMaxBlocks are counters, zero at first
  GpuDevice device;      // with N and K it decides how the sum is split
  // sm_90: the kernel may begin to read words, scale and zero_point while the kernel before it in the stream still runs;
  // set it only if that one does not write them.
  bool settled_weight;
  bool batch_invariant;
};

// Zeros where the device cannot be asked.
GpuDevice gpu_device(int index);
// Number of the graph capture that a stream is in, 0 if in none: a graph must not share its workspace with eager calls.
int64_t gpu_capture_id(CUstream_st* stream);
// Words of workspace for any number of tokens; 0 where the kernel cannot take a weight of this size.
int64_t gpu_workspace_words(int64_t out_features, int64_t in_features, const GpuDevice& device);
// Sixteen tokens at a time. Rows of up to 8 tokens are the same whatever their batch, and so are rows of more; with
// `batch_invariant` all are. The scale multiplies float32 sums of a group; `exact`
// multiplies before the product, rounding each weight to `type` as a dense layer has it. Returns a cudaError_t.
int packed_linear_gpu(const GpuLinear& call, bool exact, CUstream_st* stream);

// The same for many tokens at once: weights rounded to `type`, which the scales must have too. It needs no workspace and
// is not batch-invariant. Returns a cudaError_t; cudaErrorInvalidValue where it cannot run.
int packed_prefill_gpu(const GpuLinear& call, CUstream_st* stream);
// Into how many parts of K, each with a thread block of a cluster, that call would be cut on the current device; its
// pointers are not read. Returns a cudaError_t.
int prefill_splits_gpu(const GpuLinear& call, int& splits);

struct GpuDequantize {
  const uint32_t* words;
  const void* scale;
  DType scale_type;
  const uint8_t* zero_point;
  int64_t row_begin, row_end;  // row_begin a multiple of 16
  int64_t k;
  int bits;
  int64_t group_size;
  void* out;  // [row_end - row_begin][k]
  DType type;
};
int dequantize_gpu(const GpuDequantize& call, CUstream_st* stream);

// Codes [n][k] <-> words, words -> words of the other layout. Codes must fit: the caller checks.
int pack_gpu(const uint8_t* codes, const uint8_t* zero_point, int64_t n, int64_t k, int bits, int64_t group_size,
             Layout layout, uint32_t* words, CUstream_st* stream);
int unpack_gpu(const uint32_t* words, int64_t n, int64_t k, int bits, Layout layout, uint8_t* codes,
               CUstream_st* stream);
int repack_gpu(const uint32_t* from, Layout from_layout, uint32_t* to, Layout to_layout, int64_t n, int64_t k,
               int bits, CUstream_st* stream);

}  // namespace packed
}  // namespace discquant
