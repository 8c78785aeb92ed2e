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

}  // namespace packed
}  // namespace discquant
