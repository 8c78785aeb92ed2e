// SPDX-License-Identifier: Apache-2.0
// Instances and launches of the kernel for many tokens.
#include "packed/gpu_launch.h"
#include "packed/gpu_prefill.cuh"

namespace discquant {
namespace packed {
namespace {

// Launches, or with `splits` only tells into how many parts it would cut K.
template <class T, int kBits, int kTokens, int kGroupSteps>
int launch(const GpuLinear& call, Prefill plan, cudaStream_t stream, int* splits) {
  constexpr auto kernel = packed_prefill_kernel<T, kBits, kTokens, kGroupSteps>;
  const int bytes = prefill_shared_bytes(kTokens);
  const cudaError_t status = told(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (status != cudaSuccess) return status;
  const Clusters clusters = clusters_at_once<kernel>(call.device, kPrefillThreads, bytes);
  plan.splits = prefill_splits(plan.k_tiles, plan.tiles(call.tokens), clusters);
  if (splits != nullptr) {
    *splits = plan.splits;
    return cudaSuccess;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(call.tokens, kTokens)),
                        static_cast<unsigned>(ceil_div(plan.blocks, kPrefillRows / kBlockRows)),
                        static_cast<unsigned>(plan.splits));
  config.blockDim = dim3(kPrefillThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, 1, static_cast<unsigned>(plan.splits)};
  config.attrs = &cluster;
  config.numAttrs = plan.splits > 1 ? 1 : 0;
  return told(cudaLaunchKernelEx(&config, kernel, call, plan));
}

template <class T, int kBits, int kTokens>
int choose_group(const GpuLinear& call, const Prefill& plan, cudaStream_t stream, int* splits) {
  return plan.unit_groups == 1   ? launch<T, kBits, kTokens, 8>(call, plan, stream, splits)
         : plan.unit_groups == 2 ? launch<T, kBits, kTokens, 4>(call, plan, stream, splits)
                                 : launch<T, kBits, kTokens, 2>(call, plan, stream, splits);
}

template <class T>
int choose(const GpuLinear& call, const Prefill& plan, cudaStream_t stream, int* splits) {
  if (call.bits == 4)
    return plan.tokens == 64 ? choose_group<T, 4, 64>(call, plan, stream, splits)
                             : choose_group<T, 4, 128>(call, plan, stream, splits);
  return plan.tokens == 64 ? choose_group<T, 3, 64>(call, plan, stream, splits)
                           : choose_group<T, 3, 128>(call, plan, stream, splits);
}

int run(const GpuLinear& call, cudaStream_t stream, int* splits) {
  if (call.tokens == 0 || call.out_features == 0) return cudaSuccess;
  Prefill plan{};
  if (call.scale_type != call.type ||
      !make_prefill(call.out_features, call.in_features, call.group_size, call.tokens, call.device, plan))
    return cudaErrorInvalidValue;
  return call.type == DType::kFloat16 ? choose<Half2>(call, plan, stream, splits)
                                      : choose<Bfloat2>(call, plan, stream, splits);
}

}  // namespace

int packed_prefill_gpu(const GpuLinear& call, CUstream_st* stream) { return run(call, stream, nullptr); }

int prefill_splits_gpu(const GpuLinear& call, int& splits) {
  splits = 0;
  return run(call, nullptr, &splits);
}

}  // namespace packed
}  // namespace discquant
