// SPDX-License-Identifier: Apache-2.0
// Row-tile kernels for AVX-512 BW without VNNI.
#include "packed/vectors512.h"

#include "packed/cpu_row_tile.h"

namespace discquant {
namespace packed {
namespace {

// A quad adds eight products of two u8 x s8 pairs in 16 bits: 8 * 2 * 15 * 128 = 30720, so nothing saturates.
struct VectorsBw : Vectors512 {
  static I part_begin(I) { return _mm512_setzero_si512(); }
  static I dot(I acc, I codes, I x) {
    acc = _mm512_add_epi16(acc, _mm512_maddubs_epi16(codes, x));
    // In this order: as in the AVX2 file.
    asm("" : "+v"(acc));
    return acc;
  }
  static I part_end(I acc, I part) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(part, _mm512_set1_epi16(1)));
  }
};

}  // namespace

const CpuKernels* kernels_avx512(bool streams) { return make_kernels_512<VectorsBw>(streams); }

}  // namespace packed
}  // namespace discquant
