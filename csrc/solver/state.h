// SPDX-License-Identifier: Apache-2.0
// Arguments of the solver's elementwise CPU kernels. No torch header: the instruction-set files see only this.
#pragma once

#include <cstdint>

namespace discquant {
namespace solver {

// How the numbers of a buffer are stored. kRef8 is frac_ref's code: u stands for (u - 63) / 126.
enum Storage : int { kFloat = 0, kBfloat = 1, kFrac8 = 2, kFrac16 = 3, kRef8 = 4, kInt8 = 5, kByte = 6, kHalf = 7 };
// kByte holds plain integers (zero points), and the root of a second moment in 255ths of its bound. kHalf, float16, is
// read only.

enum Optimizer : int { kAdamW = 0, kMomentum = 1, kLion = 2, kSgd = 3 };

struct Buffer {
  void* data = nullptr;
  Storage storage = kFloat;
};

// Every scalar was rounded to float32 once, by the caller, where the reference rounds it. lr and eps hold AdamW's bias
// corrections; first_beta1, first_beta2 and second_beta2 are factors of 8-bit moments, unit included.
struct StepScalars {
  float lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, kl_weight, grad_clamp, linear_weight,
      hardening, first_beta1, first_beta2, first_inverse, second_beta2, second_inverse;
};

struct StepArguments {
  Buffer frac, frac_ref, grad, scale, first, second;  // row-major [rows, cols]; scale [rows, groups]
  int64_t cols, group_size, groups;                   // group_size is cols where one scale serves the row
  Optimizer optimizer;
  StepScalars scalar;
  uint32_t noise_key, first_index;
};

struct StepCounts {
  int64_t live = 0, fractional = 0, moved = 0, saturated = 0, nan = 0;
};

struct WeightArguments {
  Buffer out, frac, scale, zero, table, minimum;  // data of the last three may be null
  const int32_t* g_idx;                           // group of each column, or null
  const uint8_t* q;
  bool packed, transpose;
  int64_t rows, cols, group_size, groups;
  int levels;
  float implicit_zero;
};

using StepRows = void (*)(const StepArguments&, int64_t row_begin, int64_t row_end, StepCounts*);
using WeightRows = void (*)(const WeightArguments&, int64_t row_begin, int64_t row_end);

struct StateKernels {
  StepRows step;
  WeightRows weight;
};

StateKernels kernels_scalar();
StateKernels kernels_avx2();
StateKernels kernels_avx512();

}  // namespace solver
}  // namespace discquant
