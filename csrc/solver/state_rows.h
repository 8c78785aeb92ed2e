// SPDX-License-Identifier: Apache-2.0
// The solver's elementwise kernels, written as short loops over buffers of kChunk floats that the compiler vectorises.
// Included by one file per instruction set, after the pragma that forbids contraction: with separate multiplications
// and additions every result equals the eager reference bit for bit, whatever the instruction set.
#pragma once

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "solver/state.h"

namespace discquant {
namespace solver {
namespace {

constexpr int kChunk = 512;

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, size = half & 0x7fffu;
  const float subnormal = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
  const uint32_t finite = size < 0x400u ? as_bits(subnormal) : (size << 13) + (112u << 23);
  return as_float((size < 0x7c00u ? finite : (size << 13) | 0x7f800000u) | sign);
}

// Reads n numbers from element `at` on; moments are multiplied by their unit by the caller.
inline void read(const Buffer& buffer, int64_t at, int n, float* __restrict out) {
  switch (buffer.storage) {
    case kFloat:
      std::memcpy(out, static_cast<const float*>(buffer.data) + at, sizeof(float) * n);
      break;
    case kBfloat: {
      const uint16_t* p = static_cast<const uint16_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) out[i] = as_float(static_cast<uint32_t>(p[i]) << 16);
      break;
    }
    case kFrac8: {
      const uint8_t* p = static_cast<const uint8_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) out[i] = static_cast<float>(p[i]) / 255.0f;
      break;
    }
    case kFrac16: {
      const uint16_t* p = static_cast<const uint16_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) out[i] = static_cast<float>(p[i]) / 65535.0f;
      break;
    }
    case kRef8: {
      const uint8_t* p = static_cast<const uint8_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) out[i] = (static_cast<float>(p[i]) - 63.0f) / 126.0f;
      break;
    }
    case kInt8: {
      const int8_t* p = static_cast<const int8_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) out[i] = static_cast<float>(p[i]);
      break;
    }
    case kByte: {
      const uint8_t* p = static_cast<const uint8_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) out[i] = static_cast<float>(p[i]);
      break;
    }
    case kHalf: {
      const uint16_t* p = static_cast<const uint16_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) out[i] = from_half(p[i]);
      break;
    }
  }
}

inline uint16_t to_bfloat(float value) {
  const uint32_t bits = as_bits(value);
  // Round to nearest even; a NaN keeps its sign and becomes quiet.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Last odd factor of an element's hash per stream of noise.
constexpr uint32_t kFracStream = 1u, kFirstStream = 0x27d4eb2fu, kSecondStream = 0x165667b1u;

// out = floor(value + noise), noise keyed by the element's index in the unsharded tensor.
inline void round_stochastically(float* __restrict value, int n, uint32_t index, uint32_t key, uint32_t stream, float low,
                                 float high) {
  for (int i = 0; i < n; ++i) {
    uint32_t h = (index + static_cast<uint32_t>(i)) * 0x9e3779b1u;
    h ^= (h >> 15) ^ key;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u * stream;
    // 16 bits: a signed conversion is exact and has an instruction everywhere.
    const float noise = static_cast<float>(static_cast<int32_t>(h >> 16)) * 0x1p-16f;
    const float rounded = __builtin_floorf(value[i] + noise);
    const float raised = rounded < low ? low : rounded;
    value[i] = raised > high ? high : raised;
  }
}

// Writes where keep[i] is not zero; integers were rounded before.
inline void write(const Buffer& buffer, int64_t at, int n, const float* __restrict value, const int32_t* __restrict keep) {
  switch (buffer.storage) {
    case kFloat: {
      float* p = static_cast<float*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) p[i] = keep[i] ? value[i] : p[i];
      break;
    }
    case kBfloat: {
      uint16_t* p = static_cast<uint16_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) p[i] = keep[i] ? to_bfloat(value[i]) : p[i];
      break;
    }
    case kFrac16: {
      uint16_t* p = static_cast<uint16_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) p[i] = keep[i] ? static_cast<uint16_t>(static_cast<int32_t>(value[i])) : p[i];
      break;
    }
    case kInt8: {
      int8_t* p = static_cast<int8_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) p[i] = keep[i] ? static_cast<int8_t>(static_cast<int32_t>(value[i])) : p[i];
      break;
    }
    default: {
      uint8_t* p = static_cast<uint8_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) p[i] = keep[i] ? static_cast<uint8_t>(static_cast<int32_t>(value[i])) : p[i];
      break;
    }
  }
}

// Square roots in place, correctly rounded; by hand because the errno of sqrtf keeps compilers from vectorising it.
inline void take_roots(float* value, int n) {
  int i = 0;
#if defined(__AVX512F__)
  // The zero-masked form: the plain one makes gcc 12 warn about its own header.
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(value + i, _mm512_maskz_sqrt_ps(0xffff, _mm512_loadu_ps(value + i)));
#elif defined(__AVX2__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(value + i, _mm256_sqrt_ps(_mm256_loadu_ps(value + i)));
#endif
  for (; i < n; ++i) value[i] = __builtin_sqrtf(value[i]);
}

// Repeats one value per group over columns c0 .. c0+n-1 of a row, times `factor`.
inline void spread(const Buffer& grouped, int64_t row, int64_t groups, int64_t group_size, int64_t c0, int n,
                   float factor, float* __restrict out) {
  for (int64_t c = c0; c < c0 + n;) {
    const int64_t g = c / group_size;
    const int64_t end = (g + 1) * group_size < c0 + n ? (g + 1) * group_size : c0 + n;
    float value;
    read(grouped, row * groups + g, 1, &value);
    value *= factor;
    for (; c < end; ++c) out[c - c0] = value;
  }
}

// As `spread`, of the groups that an index names: the nearest one where there is none of that number.
inline void gather(const Buffer& grouped, int64_t row, int64_t groups, const int32_t* __restrict index, int n,
                   float* __restrict out) {
  const auto each = [&](auto value) {
    for (int i = 0; i < n; ++i) {
      const int64_t named = index[i] < 0 ? 0 : index[i];
      out[i] = value(row * groups + (named < groups ? named : groups - 1));
    }
  };
  if (grouped.storage == kBfloat) {
    const uint16_t* p = static_cast<const uint16_t*>(grouped.data);
    each([p](int64_t at) { return as_float(static_cast<uint32_t>(p[at]) << 16); });
  } else if (grouped.storage == kHalf) {
    const uint16_t* p = static_cast<const uint16_t*>(grouped.data);
    each([p](int64_t at) { return from_half(p[at]); });
  } else if (grouped.storage == kByte) {
    const uint8_t* p = static_cast<const uint8_t*>(grouped.data);
    each([p](int64_t at) { return static_cast<float>(p[at]); });
  } else {
    const float* p = static_cast<const float*>(grouped.data);
    each([p](int64_t at) { return p[at]; });
  }
}

inline float as_bfloat(float value) { return as_float(static_cast<uint32_t>(to_bfloat(value)) << 16); }

// Rounded to float16, to nearest even, by integers: one way for every instruction set.
inline float as_half(float value) {
  const uint32_t bits = as_bits(value), size = bits & 0x7fffffffu;
  const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u)) & ~0x1fffu;
  // Below 2^-14 float16 has the multiples of 2^-24, which is the last place of 0.75.
  const uint32_t small = as_bits((as_float(size) + 0.75f) - 0.75f);
  const uint32_t finite = size < 0x38800000u ? small : normal;
  const uint32_t rounded = finite > 0x477fe000u ? 0x7f800000u : finite;  // above 65504
  return as_float((size > 0x7f800000u ? size : rounded) | (bits & 0x80000000u));
}

// Between the levels slope * q + minimum, of which `round` rounds product and sum as the format's engine does.
template <typename Round>
inline void affine_chunk(const float* __restrict slope, const float* __restrict minimum, const uint8_t* __restrict code,
                         const float* __restrict position, int n, Round round, float* __restrict out) {
  for (int i = 0; i < n; ++i) {
    const float q = static_cast<float>(code[i]);
    const float lower = round(round(slope[i] * q) + minimum[i]);
    const float upper = round(round(slope[i] * (q + 1.0f)) + minimum[i]);
    out[i] = position[i] == 1.0f ? upper : lower + position[i] * (upper - lower);
  }
}

// As `read`, places by the rounded reciprocal: exact at 0 and 1, and the last bit elsewhere cannot matter to a step.
inline void read_place(const Buffer& buffer, int64_t at, int n, float* __restrict out) {
  const uint8_t* bytes = static_cast<const uint8_t*>(buffer.data);
  switch (buffer.storage) {
    case kFrac8:
      for (int i = 0; i < n; ++i) out[i] = static_cast<float>(bytes[at + i]) * (1.0f / 255.0f);
      break;
    case kFrac16: {
      const uint16_t* p = static_cast<const uint16_t*>(buffer.data) + at;
      for (int i = 0; i < n; ++i) out[i] = static_cast<float>(p[i]) * (1.0f / 65535.0f);
      break;
    }
    case kRef8:
      for (int i = 0; i < n; ++i) out[i] = (static_cast<float>(bytes[at + i]) - 63.0f) * (1.0f / 126.0f);
      break;
    default:
      read(buffer, at, n, out);
  }
}

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
