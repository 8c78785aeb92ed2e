// SPDX-License-Identifier: Apache-2.0
// Instances and launches of the tensor-core kernel.
#include "packed/gpu_launch.h"
#include "packed/gpu_linear.cuh"

namespace discquant {
namespace packed {
namespace {

template <class T, int kBits, int kTokenTiles, bool kExact, bool kWhole>
int launch_as(const GpuLinear& call, const Walk& walk, cudaStream_t stream) {
  constexpr auto kernel = packed_linear_kernel<T, kBits, kTokenTiles, kExact, kWhole>;
  const int bytes = shared_bytes(call.tokens, walk.slots, walk.chunk_tiles);
  // The device's own limit, not this launch's need: launches of several threads must not lower it for one another.
  const cudaError_t status =
      told(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, call.device.shared_bytes));
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(walk.runs);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = call.settled_weight && call.device.overlaps && compiled_for_sm90<kernel>() ? 1 : 0;
  return told(cudaLaunchKernelEx(&config, kernel, call, walk));
}

template <class T, int kBits, int kTokenTiles, bool kExact>
int launch(const GpuLinear& call, const Walk& walk, cudaStream_t stream) {
  return walk.unit_groups == 1 ? launch_as<T, kBits, kTokenTiles, kExact, true>(call, walk, stream)
                               : launch_as<T, kBits, kTokenTiles, kExact, false>(call, walk, stream);
}

template <class T, int kBits>
int choose(const GpuLinear& call, bool exact, const Walk& walk, cudaStream_t stream) {
  if (call.tokens <= 8)
    return exact ? launch<T, kBits, 1, true>(call, walk, stream) : launch<T, kBits, 1, false>(call, walk, stream);
  return exact ? launch<T, kBits, 2, true>(call, walk, stream) : launch<T, kBits, 2, false>(call, walk, stream);
}

}  // namespace

GpuDevice gpu_device(int index) {
  GpuDevice found{};
  int major = 0;
  const auto ask = [index](int& value, cudaDeviceAttr what) {
    return told(cudaDeviceGetAttribute(&value, what, index)) == cudaSuccess;
  };
  if (!ask(found.multiprocessors, cudaDevAttrMultiProcessorCount) ||
      !ask(found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin) ||
      !ask(major, cudaDevAttrComputeCapabilityMajor))
    return GpuDevice{};
  found.overlaps = major >= 9;
  return found;
}

int64_t gpu_capture_id(CUstream_st* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (told(cudaStreamGetCaptureInfo(stream, &status, &id)) != cudaSuccess) return 0;
  return status == cudaStreamCaptureStatusActive ? static_cast<int64_t>(id) : 0;
}

int64_t gpu_workspace_words(int64_t out_features, int64_t in_features, const GpuDevice& device) {
  Walk few{}, many{};
  if (!make_walk(out_features, in_features, 0, device, 8, few) ||
      !make_walk(out_features, in_features, 0, device, kMaxSplitTokens, many))
    return 0;
  const int64_t a = walk_workspace_words(few), b = walk_workspace_words(many);
  return a > b ? a : b;
}

int packed_linear_gpu(const GpuLinear& call, bool exact, CUstream_st* stream) {
  if (call.tokens == 0 || call.out_features == 0) return cudaSuccess;
  const bool half = call.type == DType::kFloat16;
  for (int done = 0; done < call.tokens; done += kMaxSplitTokens) {
    GpuLinear part = call;
    part.x = static_cast<const uint16_t*>(call.x) + done * call.x_stride;
    part.y = static_cast<uint16_t*>(call.y) + done * call.out_features;
    part.tokens = call.tokens - done < kMaxSplitTokens ? call.tokens - done : kMaxSplitTokens;
    part.settled_weight = call.settled_weight || done > 0;  // the kernel before a later part is ours: it only reads
    Walk walk{};
    const int tokens = part.tokens <= 8 && !call.batch_invariant ? 8 : kMaxSplitTokens;
    if (!make_walk(call.out_features, call.in_features, call.group_size, call.device, tokens, walk))
      return cudaErrorInvalidValue;
    give_slots(walk, part.tokens, call.device);
    const int status = call.bits == 4 ? half ? choose<Half2, 4>(part, exact, walk, stream)
                                             : choose<Bfloat2, 4>(part, exact, walk, stream)
                       : half ? choose<Half2, 3>(part, exact, walk, stream)
                              : choose<Bfloat2, 3>(part, exact, walk, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace packed
}  // namespace discquant
