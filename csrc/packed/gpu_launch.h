// SPDX-License-Identifier: Apache-2.0
// What a launch must know of the code that a device got: it may be older PTX, translated for a newer device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace discquant {
namespace packed {

// Whether the kernel was compiled for sm_90 or later: only then does its code wait for the kernel before it where launches
// overlap, and read other thread blocks' shared memory. Asked once: all devices of that age get the same code.
template <auto kKernel>
bool compiled_for_sm90() {
  static std::atomic<int> known{-1};
  int found = known.load(std::memory_order_relaxed);
  if (found < 0) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kKernel) != cudaSuccess) return false;
    found = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
    known.store(found, std::memory_order_relaxed);
  }
  return found == 1;
}

}  // namespace packed
}  // namespace discquant
