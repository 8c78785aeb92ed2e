// SPDX-License-Identifier: Apache-2.0
// The dequantisation of 32 weights and nothing else: test_native.py counts its instructions.
#include "packed/dequant.h"

using namespace discquant::packed;

template <class T, int kBits>
__device__ void dequantize_32(const uint32_t* words, ZeroPair top, ZeroPair bottom, uint4* out) {
  uint32_t w[4] = {words[0], words[1], words[2], 0};
  if constexpr (kBits == 4)
    w[3] = words[3];
  else
    w[3] = loose_word(w[0], w[1], w[2]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t a[4];
    dequant_word<T, kBits>(w[i], top, bottom, a);
    out[i] = make_uint4(a[0], a[1], a[2], a[3]);
  }
}

extern "C" __global__ void half_4(const uint32_t* w, ZeroPair t, ZeroPair b, uint4* o) { dequantize_32<Half2, 4>(w, t, b, o); }
extern "C" __global__ void half_3(const uint32_t* w, ZeroPair t, ZeroPair b, uint4* o) { dequantize_32<Half2, 3>(w, t, b, o); }
extern "C" __global__ void bfloat_4(const uint32_t* w, ZeroPair t, ZeroPair b, uint4* o) { dequantize_32<Bfloat2, 4>(w, t, b, o); }
extern "C" __global__ void bfloat_3(const uint32_t* w, ZeroPair t, ZeroPair b, uint4* o) { dequantize_32<Bfloat2, 3>(w, t, b, o); }
