// SPDX-License-Identifier: Apache-2.0
// Checks that the CPU and CUDA registrations share. discquant/ops checks first, with friendlier words; these keep any
// caller of torch.ops.discquant.* from reading out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "packed/cpu_kernel.h"
#include "packed/layout.h"

namespace discquant {
namespace packed {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType float_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "packed: ", name, " must be float32, float16 or bfloat16");
      return DType::kFloat32;
  }
}

// `like` says the device.
inline void check_buffer(const Tensor& t, const Tensor& like, ScalarType type, int64_t numel, const char* name) {
  const bool same = t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(same && t.is_contiguous() && t.scalar_type() == type && t.numel() == numel, "packed: ", name,
                  " must be a contiguous tensor of ", numel, " elements of its type and device, got ", t.numel());
}

inline void check_grid(int64_t n, int64_t k, int64_t bits, int64_t group_size, int64_t layout) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(bits == 3 || bits == 4, "packed: num_bits must be 3 or 4, got ", bits);
  STD_TORCH_CHECK(n >= 0 && k > 0 && n < kLimit && k < kLimit, "packed: sizes must be in range, got ", n, " x ", k);
  STD_TORCH_CHECK(group_size == -1 || group_size == 32 || group_size == 64 || (group_size > 0 && group_size % 128 == 0),
                  "packed: group_size must be 32, 64, a multiple of 128 or -1, got ", group_size);
  STD_TORCH_CHECK(layout == kLayoutMma || layout == kLayoutCpu, "packed: layout must be 1 or 2, got ", layout);
}

inline int64_t group_count(int64_t k, int64_t group_size) { return group_size == -1 ? 1 : ceil_div(k, group_size); }

inline void check_weight(const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t n,
                         int64_t k, int64_t bits, int64_t group_size, int64_t layout) {
  check_grid(n, k, bits, group_size, layout);
  check_buffer(words, words, ScalarType::Int, packed_words(n, k, static_cast<int>(bits)), "words");
  const int64_t scales = padded_rows(n) * group_count(k, group_size);
  float_type(scale, "scale");
  check_buffer(scale, words, scale.scalar_type(), scales, "scale");
  if (zero_point) check_buffer(*zero_point, words, ScalarType::Byte, scales, "zero_point");
}

inline const uint32_t* words_of(const Tensor& t) { return static_cast<const uint32_t*>(t.const_data_ptr()); }

inline const uint8_t* bytes_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const uint8_t*>(t->const_data_ptr()) : nullptr;
}

}  // namespace
}  // namespace packed
}  // namespace discquant
