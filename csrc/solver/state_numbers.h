// SPDX-License-Identifier: Apache-2.0
// Numbers of the solver's state: read and rounded, chunk by chunk, in one way for every instruction set. Included
// through state_rows.h only, after its pragma.
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

}  // namespace
}  // namespace solver
}  // namespace discquant
