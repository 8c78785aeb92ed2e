// SPDX-License-Identifier: Apache-2.0
// Instances and launches of the tensor-core kernel.
#include <cuda_runtime.h>

#include "packed/gpu_linear.cuh"

namespace discquant {
namespace packed {
namespace {

// Thread blocks of the split walk: a function of the weight and the device only, which makes results batch-invariant.
int64_t split_runs(int64_t n, int64_t k, int multiprocessors) {
  const int64_t units = padded_rows(n) / kBlockRows * (padded_k(k) / kTileK);
  const int64_t wanted = static_cast<int64_t>(multiprocessors) * 2;
  return units < wanted ? units : wanted;
}

template <class T, int kBits, int kTokenTiles, bool kExact>
int launch(const GpuLinear& call, const Walk& walk, int token_blocks, cudaStream_t stream) {
  constexpr int kBytes = shared_bytes<kBits, kTokenTiles>();
  auto kernel = packed_linear_kernel<T, kBits, kTokenTiles, kExact>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<dim3(static_cast<unsigned>(walk.runs), token_blocks), kThreads, kBytes, stream>>>(call, walk);
  return cudaGetLastError();
}

template <class T, int kBits>
int choose(const GpuLinear& call, bool exact, cudaStream_t stream) {
  Walk walk{};
  walk.k_tiles = padded_k(call.in_features) / kTileK;
  const int64_t blocks = padded_rows(call.out_features) / kBlockRows;
  walk.units = blocks * walk.k_tiles;
  walk.group_size = call.group_size > 0 ? call.group_size : static_cast<int>(padded_k(call.in_features));
  walk.groups = static_cast<int>(ceil_div(call.in_features, walk.group_size));
  if (call.tokens <= kMaxSplitTokens) {
    walk.runs = split_runs(call.out_features, call.in_features, call.multiprocessors);
    if (call.tokens <= 8)
      return exact ? launch<T, kBits, 1, true>(call, walk, 1, stream) : launch<T, kBits, 1, false>(call, walk, 1, stream);
    return exact ? launch<T, kBits, 2, true>(call, walk, 1, stream) : launch<T, kBits, 2, false>(call, walk, 1, stream);
  }
  walk.runs = blocks;
  const int token_blocks = static_cast<int>(ceil_div(call.tokens, 64));
  return launch<T, kBits, 8, true>(call, walk, token_blocks, stream);
}

}  // namespace

int gpu_multiprocessors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

int64_t gpu_capture_id(CUstream_st* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (cudaStreamGetCaptureInfo(stream, &status, &id) != cudaSuccess) return 0;
  return status == cudaStreamCaptureStatusActive ? static_cast<int64_t>(id) : 0;
}

int64_t gpu_workspace_words(int64_t out_features, int64_t in_features, int multiprocessors) {
  return ceil_div(out_features, kBlockRows) +
         2 * split_runs(out_features, in_features, multiprocessors) * kBlockRows * kMaxSplitTokens;
}

int packed_linear_gpu(const GpuLinear& call, bool exact, CUstream_st* stream) {
  if (call.tokens == 0 || call.out_features == 0) return cudaSuccess;
  const bool half = call.type == DType::kFloat16;
  if (call.bits == 4) return half ? choose<Half2, 4>(call, exact, stream) : choose<Bfloat2, 4>(call, exact, stream);
  return half ? choose<Half2, 3>(call, exact, stream) : choose<Bfloat2, 3>(call, exact, stream);
}

}  // namespace packed
}  // namespace discquant
