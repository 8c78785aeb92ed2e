// SPDX-License-Identifier: Apache-2.0
// The solver's elementwise kernels, written as short loops over buffers of kChunk floats that the compiler vectorises.
// Included by one file per instruction set, after the pragma that forbids contraction: with separate multiplications
// and additions every result equals the eager reference bit for bit, whatever the instruction set.
#pragma once

#include "solver/state_numbers.h"

namespace discquant {
namespace solver {
namespace {

inline void step_chunk(const StepArguments& a, int64_t row, int64_t c0, int n, StepCounts* counts) {
  const StepScalars& s = a.scalar;
  const int64_t at = row * a.cols + c0;
  const uint32_t index = a.first_index + static_cast<uint32_t>(at);
  float position[kChunk], reference[kChunk], raw[kChunk], slope[kChunk], g[kChunk], direction[kChunk];
  float first[kChunk], second[kChunk], root[kChunk];
  int32_t live[kChunk], defined[kChunk], moves[kChunk];
  read_place(a.frac, at, n, position);
  read_place(a.frac_ref, at, n, reference);
  read(a.grad, at, n, raw);
  spread(a.scale, row, a.groups, a.group_size, c0, n, s.kl_weight, slope);

  int32_t live_count = 0, saturated = 0, nan = 0;
  for (int i = 0; i < n; ++i) {
    raw[i] *= slope[i];
    live[i] = (reference[i] != 0.0f) & (reference[i] != 1.0f);
    const float excess = __builtin_fabsf(raw[i]) - s.grad_clamp;
    defined[i] = excess < 0x1p127f;  // false for NaN
    moves[i] = live[i] & defined[i];
    live_count += live[i];
    saturated += moves[i] & (excess >= 0.0f);
    nan += live[i] & (1 - defined[i]);
  }
  for (int i = 0; i < n; ++i) {
    const float raised = raw[i] < -s.grad_clamp ? -s.grad_clamp : raw[i];
    const float kl = raised > s.grad_clamp ? s.grad_clamp : raised;
    const float above = reference[i] < 0.0f ? 0.0f : reference[i];
    const float inside = above > 1.0f ? 1.0f : above;
    const float sum = (kl + s.linear_weight * (1.0f - 2.0f * inside)) + s.hardening * (1.0f - 2.0f * position[i]);
    g[i] = moves[i] ? sum : 0.0f;
  }

  if (a.optimizer == kSgd) {
    std::memcpy(direction, g, sizeof(float) * n);
  } else {
    read(a.first, at, n, first);
    // The unit of an 8-bit moment is in the factor that it is multiplied by anyway.
    const float kept1 = a.first.storage == kInt8 ? s.first_beta1 : s.beta1;
    const float kept2 = a.first.storage == kInt8 ? s.first_beta2 : s.beta2;
    if (a.optimizer == kLion) {
      for (int i = 0; i < n; ++i) {
        const float blend = kept1 * first[i] + s.one_minus_beta1 * g[i];
        direction[i] = blend > 0.0f ? 1.0f : (blend < 0.0f ? -1.0f : 0.0f);
        first[i] = kept2 * first[i] + s.one_minus_beta2 * g[i];
      }
    } else {
      for (int i = 0; i < n; ++i) {
        first[i] = kept1 * first[i] + s.one_minus_beta1 * g[i];
        direction[i] = first[i];
      }
    }
    if (a.optimizer == kAdamW) {
      read(a.second, at, n, second);
      if (a.second.storage == kByte) {
        for (int i = 0; i < n; ++i) {
          const float kept = second[i] * s.second_beta2;
          second[i] = kept * kept;
        }
      } else {
        for (int i = 0; i < n; ++i) second[i] *= s.beta2;
      }
      for (int i = 0; i < n; ++i) second[i] += (s.one_minus_beta2 * g[i]) * g[i];
      std::memcpy(root, second, sizeof(float) * n);
      take_roots(root, n);
      for (int i = 0; i < n; ++i) {
        direction[i] = first[i] * (1.0f / (root[i] + s.eps));
        position[i] = moves[i] ? position[i] * s.decay : position[i];
      }
      if (a.second.storage == kByte) {
        for (int i = 0; i < n; ++i) second[i] = root[i] * s.second_inverse;
        round_stochastically(second, n, index, a.noise_key, kSecondStream, 0.0f, 255.0f);
      }
      write(a.second, at, n, second, moves);
    }
    if (a.first.storage == kInt8) {
      for (int i = 0; i < n; ++i) first[i] *= s.first_inverse;
      round_stochastically(first, n, index, a.noise_key, kFirstStream, -128.0f, 127.0f);
    }
    write(a.first, at, n, first, moves);
  }

  const float units = a.frac.storage == kFrac8 ? 255.0f : a.frac.storage == kFrac16 ? 65535.0f : 1.0f;
  for (int i = 0; i < n; ++i) {
    const float moved_to = position[i] - s.lr * direction[i];
    const float raised = moved_to < 0.0f ? 0.0f : moved_to;
    position[i] = (raised > 1.0f ? 1.0f : raised) * units;
  }
  if (units != 1.0f) round_stochastically(position, n, index, a.noise_key, kFracStream, 0.0f, units);
  write(a.frac, at, n, position, moves);

  read_place(a.frac, at, n, position);
  int32_t fractional = 0, moved = 0;
  for (int i = 0; i < n; ++i) {
    fractional += live[i] & (position[i] > 0.01f) & (position[i] < 0.99f);
    moved += live[i] & ((position[i] > 0.5f) != (reference[i] > 0.5f));
  }
  counts->live += live_count;
  counts->fractional += fractional;
  counts->moved += moved;
  counts->saturated += saturated;
  counts->nan += nan;
}

void step_rows(const StepArguments& a, int64_t row_begin, int64_t row_end, StepCounts* counts) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t c0 = 0; c0 < a.cols; c0 += kChunk) {
      step_chunk(a, row, c0, static_cast<int>(a.cols - c0 < kChunk ? a.cols - c0 : kChunk), counts);
    }
  }
}

inline void weight_chunk(const WeightArguments& a, int64_t row, int64_t c0, int n, const float* levels, float* out) {
  float position[kChunk], slope[kChunk], offset[kChunk];
  uint8_t code[kChunk];
  const auto per_group = [&](const Buffer& grouped, float* values) {
    if (a.g_idx != nullptr) {
      gather(grouped, row, a.groups, a.g_idx + c0, n, values);
    } else {
      spread(grouped, row, a.groups, a.group_size, c0, n, 1.0f, values);
    }
  };
  read(a.frac, row * a.cols + c0, n, position);
  per_group(a.scale, slope);
  if (a.packed) {
    const uint8_t* p = a.q + row * ((a.cols + 1) / 2) + c0 / 2;  // c0 is a multiple of kChunk, which is even
    for (int i = 0; i + 1 < n; i += 2) {
      code[i] = p[i / 2] & 15;
      code[i + 1] = p[i / 2] >> 4;
    }
    if (n & 1) code[n - 1] = p[n / 2] & 15;
  } else {
    std::memcpy(code, a.q + row * a.cols + c0, n);
  }
  if (a.table.data != nullptr) {
    for (int i = 0; i < n; ++i) {
      const float lower = levels[code[i]];
      const float upper = levels[code[i] + 1];
      out[i] = slope[i] * (position[i] == 1.0f ? upper : lower + position[i] * (upper - lower));
    }
    return;
  }
  if (a.minimum.data != nullptr) {
    per_group(a.minimum, offset);
    if (a.minimum.storage == kBfloat) {
      affine_chunk(slope, offset, code, position, n, [](float value) { return as_bfloat(value); }, out);
    } else if (a.minimum.storage == kHalf) {
      affine_chunk(slope, offset, code, position, n, [](float value) { return as_half(value); }, out);
    } else {
      affine_chunk(slope, offset, code, position, n, [](float value) { return value; }, out);
    }
    return;
  }
  if (a.zero.data != nullptr) {
    per_group(a.zero, offset);
  } else {
    for (int i = 0; i < n; ++i) offset[i] = a.implicit_zero;
  }
  for (int i = 0; i < n; ++i) out[i] = slope[i] * ((static_cast<float>(code[i]) - offset[i]) + position[i]);
}

void weight_rows(const WeightArguments& a, int64_t row_begin, int64_t row_end) {
  // One more than a code can be, the last level repeated: no code reads past the table, whatever its width.
  float levels[257];
  float out[kChunk];
  if (a.table.data != nullptr) {
    read(a.table, 0, a.levels, levels);
    for (int i = a.levels; i < 257; ++i) levels[i] = levels[a.levels - 1];
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t c0 = 0; c0 < a.cols; c0 += kChunk) {
      const int n = static_cast<int>(a.cols - c0 < kChunk ? a.cols - c0 : kChunk);
      weight_chunk(a, row, c0, n, levels, out);
      const int64_t step = a.transpose ? a.rows : 1;
      const int64_t at = a.transpose ? c0 * a.rows + row : row * a.cols + c0;
      if (a.out.storage == kFloat) {
        float* p = static_cast<float*>(a.out.data) + at;
        if (step == 1) {
          std::memcpy(p, out, sizeof(float) * n);
        } else {
          for (int i = 0; i < n; ++i) p[i * step] = out[i];
        }
      } else {
        uint16_t* p = static_cast<uint16_t*>(a.out.data) + at;
        if (step == 1) {
          for (int i = 0; i < n; ++i) p[i] = to_bfloat(out[i]);
        } else {
          for (int i = 0; i < n; ++i) p[i * step] = to_bfloat(out[i]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace solver
}  // namespace discquant
