// SPDX-License-Identifier: Apache-2.0
// What a launch must know of the code that a device got: it may be older PTX, translated for a newer device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "packed/gpu_prefill.h"

namespace discquant {
namespace packed {

// What a call of the runtime returned. It keeps a failure as its last error, too, which whoever launches the next kernel
// would take for its own: told here, it is forgotten there. Errors that spoil the device stay.
inline cudaError_t told(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// Whether the kernel was compiled for sm_90 or later: only then does its code wait for the kernel before it where launches
// overlap, and read other thread blocks' shared memory. Asked once: all devices of that age get the same code.
template <auto kKernel>
bool compiled_for_sm90() {
  static std::atomic<int> known{-1};
  int found = known.load(std::memory_order_relaxed);
  if (found < 0) {
    cudaFuncAttributes attributes{};
    if (told(cudaFuncGetAttributes(&attributes, kKernel)) != cudaSuccess) return false;
    found = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
    known.store(found, std::memory_order_relaxed);
  }
  return found == 1;
}

// How many clusters of 1, 2, 4 and 8 thread blocks with `bytes` of shared memory the current device runs at a time; for all
// launches of a kernel with the same `threads` and `bytes`. Asked once per device.
template <auto kKernel>
Clusters clusters_at_once(const GpuDevice& device, int threads, int bytes) {
  constexpr int kDevices = 64;
  // Sixteen bits each, of which no device needs all; 0 is not known yet.
  static std::atomic<uint64_t> known[kDevices];
  int index = -1;
  if (told(cudaGetDevice(&index)) != cudaSuccess || index >= kDevices) index = -1;
  uint64_t packed = index < 0 ? 0 : known[index].load(std::memory_order_relaxed);
  if (packed == 0) {
    bool asked = true;
    packed = static_cast<uint64_t>(device.multiprocessors);
    for (int i = 1; i < 4 && compiled_for_sm90<kKernel>(); ++i) {
      cudaLaunchAttribute size{};
      size.id = cudaLaunchAttributeClusterDimension;
      size.val.clusterDim = {1, 1, 1u << i};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(1, 1, 1u << i);
      config.blockDim = dim3(static_cast<unsigned>(threads));
      config.dynamicSmemBytes = static_cast<size_t>(bytes);
      config.attrs = &size;
      config.numAttrs = 1;
      int found = 0;
      if (told(cudaOccupancyMaxActiveClusters(&found, kKernel, &config)) != cudaSuccess) {
        found = 0;      // no clusters of that size
        asked = false;  // and once more at the next launch
      }
      packed |= static_cast<uint64_t>(found < 0xffff ? found : 0xffff) << 16 * i;
    }
    if (index >= 0 && asked) known[index].store(packed, std::memory_order_relaxed);
  }
  Clusters clusters{};
  for (int i = 0; i < 4; ++i) clusters.at_once[i] = static_cast<int>(packed >> 16 * i & 0xffff);
  return clusters;
}

}  // namespace packed
}  // namespace discquant
