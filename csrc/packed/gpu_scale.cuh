// SPDX-License-Identifier: Apache-2.0
// The float32 that the low bits of a register hold as one of the three types of scales.
#pragma once

#include "packed/cpu_kernel.h"
#include "packed/gpu_primitives.cuh"

namespace discquant {
namespace packed {

__device__ __forceinline__ float scale_value(uint32_t bits, DType type) {
  const float wide = word_to_float(type == DType::kBFloat16 ? bits << 16 : bits);
  return type == DType::kFloat16 ? half_to_float32(static_cast<uint16_t>(bits)) : wide;
}

// A scale inside the 32 bits that hold it, as bytes to pick: of two that are 16 bits wide the first or the second.
// bfloat16 comes out as float32, so that float16 alone needs a conversion.
__device__ __forceinline__ uint32_t scale_selector(DType type, bool second) {
  if (type == DType::kFloat32) return 0x3210u;
  if (type == DType::kFloat16) return second ? 0x4432u : 0x4410u;
  return second ? 0x3244u : 0x1044u;
}
__device__ __forceinline__ float selected_scale(uint32_t held, uint32_t selector, DType type) {
  const uint32_t bits = pick_bytes(held, selector);
  return type == DType::kFloat16 ? half_to_float32(static_cast<uint16_t>(bits)) : word_to_float(bits);
}

}  // namespace packed
}  // namespace discquant
