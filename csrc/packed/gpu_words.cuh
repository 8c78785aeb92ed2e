// SPDX-License-Identifier: Apache-2.0
// A lane's words of one tile of the kLayoutMma layout: from memory into registers, and k16 step by step out of them.
#pragma once

#include "packed/gpu_primitives.cuh"

namespace discquant {
namespace packed {

// `from` is where the lane's first 16 bytes of the tile lie, from there its last 8 of three bits are `tail` away.
template <int kBits>
__device__ __forceinline__ void load_words(uint32_t (&to)[2 * kBits], const uint8_t* from, uint32_t tail) {
  const uint4 a = load_once16(from);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  if constexpr (kBits == 4) {
    const uint4 b = load_once16(from + 512);
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  } else {
    const uint2 b = load_once8(from + tail);
    to[4] = b.x, to[5] = b.y;
  }
}

// The word of k16 step `step`.
template <int kBits>
__device__ __forceinline__ uint32_t step_word(const uint32_t (&words)[2 * kBits], int step) {
  if constexpr (kBits == 4) return words[step];
  const int first = step < 4 ? 0 : 3, at = step & 3;
  if (at == 3) return loose_word(words[first], words[first + 1], words[first + 2]);
  return words[first + at];
}

}  // namespace packed
}  // namespace discquant
