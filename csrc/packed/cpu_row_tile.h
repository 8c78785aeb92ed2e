// SPDX-License-Identifier: Apache-2.0
// The row-tile kernels, written once over a vector type V and included by one file per instruction set.
// Integer sums are exact and every float operation has one fixed order (blocks of k ascending, one accumulator per
// row and token), so a8 and a15 give the same bits on every instruction set, batch size and thread count; fp32 too,
// its four accumulators being k mod 4.
#pragma once

#include "packed/cpu_row_float.h"
#include "packed/cpu_row_integer.h"

namespace discquant {
namespace packed {
namespace {

template <class V>
const CpuKernels* make_kernels() {
#define DISCQUANT_TOKENS(fn, ...) \
  { fn<V, __VA_ARGS__, 1>, fn<V, __VA_ARGS__, 2>, fn<V, __VA_ARGS__, 4>, fn<V, __VA_ARGS__, 6>, fn<V, __VA_ARGS__, 8> }
  static const CpuKernels kernels = {
      {{DISCQUANT_TOKENS(integer_pairs, 4, 1), DISCQUANT_TOKENS(integer_pairs, 4, 2), DISCQUANT_TOKENS(float_pairs, 4)},
       {DISCQUANT_TOKENS(integer_pairs, 3, 1), DISCQUANT_TOKENS(integer_pairs, 3, 2), DISCQUANT_TOKENS(float_pairs, 3)}},
      quantize<V>,
      dequantize<V>,
      read_all<V>,
      8,
      1,
      false};
#undef DISCQUANT_TOKENS
  return &kernels;
}

// Kernels for few products in several streams: as many as their sums leave registers for.
template <class V, int kBits, int kPlanes>
void set_streams(RowPairsFn row[5]) {
  row[0] = integer_abreast<V, kBits, kPlanes, 1, 4>;
  row[1] = integer_abreast<V, kBits, kPlanes, 2, 4 / kPlanes>;
  if constexpr (kPlanes == 1) row[2] = integer_abreast<V, kBits, kPlanes, 4, 2>;
}

template <class V>
CpuKernels with_streams(CpuKernels kernels) {
  kernels.abreast = kMaxAbreast;
  set_streams<V, 4, 1>(kernels.table[0][0]);
  set_streams<V, 4, 2>(kernels.table[0][1]);
  set_streams<V, 3, 1>(kernels.table[1][0]);
  set_streams<V, 3, 2>(kernels.table[1][1]);
  return kernels;
}

// V where the processor prefetches streams: every line is asked for, at two distances.
template <class V>
struct InStreams : V {
  static constexpr Prefetch kPrefetch = Prefetch::kTwoLevels;
};

// `streams`: those for few_products in several streams.
template <class V>
const CpuKernels* make_kernels_512(bool streams) {
  static const CpuKernels several = with_streams<InStreams<V>>(*make_kernels<V>());
  return streams ? &several : make_kernels<V>();
}

}  // namespace
}  // namespace packed
}  // namespace discquant
