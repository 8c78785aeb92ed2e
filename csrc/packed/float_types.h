// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16 to and from float32 in integer arithmetic, round to nearest even. Static: see cpu_kernel.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace discquant {
namespace packed {
namespace {

__attribute__((always_inline)) inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

__attribute__((always_inline)) inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

__attribute__((always_inline)) inline float bfloat_to_float(uint16_t b) {
  return float_of_bits(static_cast<uint32_t>(b) << 16);
}

__attribute__((always_inline)) inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

__attribute__((always_inline)) inline float half_to_float(uint16_t h) {
  // A subnormal is its integer times 2^-24, the unit of float32 at 0.5, so that the subtraction is exact. No float32 on
  // the way is subnormal: in a thread that flushes those to zero (torch.set_flush_denormal) small scales would be lost.
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t small = bits_of_float(float_of_bits(0x3f000000u | magnitude) - 0.5f);
  const uint32_t large = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  return float_of_bits((magnitude < 0x400u ? small : large) | sign);
}

__attribute__((always_inline)) inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the low mantissa bits, rounded by the adder.
    const uint32_t shifted = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | shifted);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace
}  // namespace packed
}  // namespace discquant
