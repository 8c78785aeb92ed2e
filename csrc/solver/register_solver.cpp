// SPDX-License-Identifier: Apache-2.0
// Operators soft_weight_cpp2_ and projected_step_cpp2_ for CPU tensors. Schemas and checks of arguments are in
// discquant/ops; here only what a wrong caller could crash on is checked again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <optional>

#include "solver/state.h"

namespace discquant {
namespace solver {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

StateKernels kernels() {
  static const StateKernels chosen = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return kernels_avx512();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      return kernels_avx2();
    }
#endif
    return kernels_scalar();
  }();
  return chosen;
}

Storage storage_of(const Tensor& tensor, Storage byte) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::BFloat16:
      return kBfloat;
    case ScalarType::UInt16:
      return kFrac16;
    case ScalarType::Char:
      return kInt8;
    case ScalarType::Byte:
      return byte;
    default:
      STD_TORCH_CHECK(false, "discquant: a dtype that the C++ solver kernels do not read");
  }
  return kFloat;
}

Buffer buffer_of(const Tensor& tensor, Storage byte) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "discquant: the C++ solver kernels read contiguous tensors only");
  return Buffer{tensor.data_ptr(), storage_of(tensor, byte)};
}

// Scales and what stands beside them may be float16 too, which nothing here writes.
Buffer per_group_of(const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Half) return buffer_of(tensor, kByte);
  STD_TORCH_CHECK(tensor.is_contiguous(), "discquant: the C++ solver kernels read contiguous tensors only");
  return Buffer{tensor.data_ptr(), kHalf};
}

int64_t grain(int64_t cols) { return cols >= 32768 ? 1 : 32768 / (cols > 0 ? cols : 1) + 1; }

void soft_weight(Tensor out, Tensor q_down, Tensor frac, Tensor scale, std::optional<Tensor> zero_point,
                 std::optional<Tensor> table, int64_t num_bits, int64_t group_size, bool is_reference, bool transpose,
                 std::optional<Tensor> minimum, std::optional<Tensor> g_idx) {
  WeightArguments a{};
  a.rows = frac.size(0);
  a.cols = frac.size(1);
  if (a.rows == 0 || a.cols == 0) return;
  a.out = buffer_of(out, kByte);
  a.frac = buffer_of(frac, is_reference ? kRef8 : kFrac8);
  a.scale = per_group_of(scale);
  if (zero_point.has_value()) a.zero = buffer_of(*zero_point, kByte);
  if (table.has_value()) a.table = buffer_of(*table, kByte);
  if (minimum.has_value()) a.minimum = per_group_of(*minimum);
  a.q = static_cast<const uint8_t*>(buffer_of(q_down, kByte).data);
  a.packed = q_down.size(1) != a.cols;
  a.transpose = transpose;
  a.groups = scale.size(1);
  a.group_size = a.groups == 1 ? a.cols : group_size;
  a.levels = 1 << num_bits;
  a.implicit_zero = static_cast<float>(1 << (num_bits - 1));
  if (g_idx.has_value()) {
    STD_TORCH_CHECK(g_idx->scalar_type() == ScalarType::Int && g_idx->is_contiguous() && g_idx->numel() == a.cols,
                    "discquant: g_idx must be contiguous int32, one entry per column");
    a.g_idx = static_cast<const int32_t*>(g_idx->data_ptr());
  }
  const bool grouped = a.g_idx != nullptr ? a.groups > 0 : a.groups * a.group_size >= a.cols;
  STD_TORCH_CHECK(out.numel() == frac.numel() && scale.size(0) == a.rows && grouped &&
                      (!minimum.has_value() || minimum->numel() == scale.numel()),
                  "discquant: shapes of soft_weight disagree");
  const WeightRows run = kernels().weight;
  torch::stable::parallel_for(0, a.rows, grain(a.cols), [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

void projected_step(Tensor frac, Tensor frac_ref, Tensor weight_grad, Tensor scale, std::optional<Tensor> momentum,
                    std::optional<Tensor> second_moment, Tensor counts, int64_t group_size, int64_t optimizer, double lr,
                    double beta1, double one_minus_beta1, double beta2, double one_minus_beta2, double eps, double decay,
                    double kl_weight, double grad_clamp, double linear_weight, double hardening, double first_beta1,
                    double first_beta2, double first_inverse, double second_beta2, double second_inverse, int64_t noise_key, int64_t first_index) {
  StepArguments a{};
  const int64_t rows = frac.size(0);
  a.cols = frac.size(1);
  int64_t* out = static_cast<int64_t*>(counts.data_ptr());
  for (int i = 0; i < 5; ++i) out[i] = 0;
  if (rows == 0 || a.cols == 0) return;
  a.optimizer = static_cast<Optimizer>(optimizer);
  a.frac = buffer_of(frac, kFrac8);
  a.frac_ref = buffer_of(frac_ref, kRef8);
  a.grad = buffer_of(weight_grad, kByte);
  a.scale = buffer_of(scale, kByte);
  STD_TORCH_CHECK(momentum.has_value() || a.optimizer == kSgd, "discquant: momentum is missing");
  STD_TORCH_CHECK(second_moment.has_value() || a.optimizer != kAdamW, "discquant: second_moment is missing");
  if (momentum.has_value()) a.first = buffer_of(*momentum, kByte);
  if (second_moment.has_value()) a.second = buffer_of(*second_moment, kByte);
  a.groups = scale.size(1);
  a.group_size = a.groups == 1 ? a.cols : group_size;
  STD_TORCH_CHECK(frac_ref.numel() == frac.numel() && weight_grad.numel() == frac.numel() && scale.size(0) == rows &&
                      a.groups * a.group_size >= a.cols,
                  "discquant: shapes of projected_step_ disagree");
  const auto f = [](double value) { return static_cast<float>(value); };
  a.scalar = StepScalars{f(lr),           f(beta1),         f(one_minus_beta1), f(beta2),       f(one_minus_beta2), f(eps),
                         f(decay),        f(kl_weight),     f(grad_clamp),      f(linear_weight), f(hardening),
                         f(first_beta1),  f(first_beta2),   f(first_inverse),   f(second_beta2), f(second_inverse)};
  a.noise_key = static_cast<uint32_t>(noise_key);
  a.first_index = static_cast<uint32_t>(first_index);
  std::atomic<int64_t> total[5] = {};
  const StepRows run = kernels().step;
  torch::stable::parallel_for(0, rows, grain(a.cols), [&](int64_t begin, int64_t end) {
    StepCounts part;
    run(a, begin, end, &part);
    total[0] += part.live;
    total[1] += part.fractional;
    total[2] += part.moved;
    total[3] += part.saturated;
    total[4] += part.nan;
  });
  for (int i = 0; i < 5; ++i) out[i] = total[i];
}

}  // namespace
}  // namespace solver
}  // namespace discquant

STABLE_TORCH_LIBRARY_IMPL(discquant, CPU, library) {
  library.impl("soft_weight_cpp2_", TORCH_BOX(&discquant::solver::soft_weight));
  library.impl("projected_step_cpp2_", TORCH_BOX(&discquant::solver::projected_step));
}
