// SPDX-License-Identifier: Apache-2.0
// Row-tile kernels for AVX-512 with VNNI: four u8 x s8 products and their sum in one instruction.
#include "packed/vectors512.h"

#include "packed/cpu_row_tile.h"

namespace discquant {
namespace packed {
namespace {

struct VectorsVnni : Vectors512 {
  static I part_begin(I acc) { return acc; }
  static I dot(I acc, I codes, I x) { return _mm512_dpbusd_epi32(acc, codes, x); }
  static I part_end(I, I part) { return part; }
};

}  // namespace

const CpuKernels* kernels_avx512vnni(bool streams) { return make_kernels_512<VectorsVnni>(streams); }

}  // namespace packed
}  // namespace discquant
