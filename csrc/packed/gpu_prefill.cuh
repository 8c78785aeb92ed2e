// SPDX-License-Identifier: Apache-2.0
// packed_linear for many tokens: weights are the A operand of the tensor cores, from registers, tokens its columns; by
// wgmma on sm_90a, by mma.m16n8k16 elsewhere, whose fragments are the same. A warp streams the words of twice 16 rows from
// memory into registers, one k tile ahead, and makes of each word a fragment, rounded to the type of x as a dense layer
// has it. Activations go through a ring of swizzled tiles in shared memory, filled by asynchronous copies. Under wgmma the
// warp dequantises a k16 step while the tensor cores work on the one before. No atomics; the order of every sum is fixed.
#pragma once

#include "packed/gpu_linear.h"
#include "packed/gpu_prefill.h"
#include "packed/gpu_scale.cuh"
#include "packed/gpu_wgmma.cuh"
#include "packed/gpu_words.cuh"

namespace discquant {
namespace packed {

constexpr int kPrefillThreads = 256;
constexpr int kPrefillUnits = 2;  // of four warps: one fragment of activations serves both

// What a lane holds of a k tile: its words; and of the scales and zero points of its warp's 16 rows, group by group, the
// 32 bits that have the lane's number. Loads only: nothing here may wait for one.
template <int kBits>
struct Held {
  uint32_t words[kPrefillUnits][2 * kBits];
  uint32_t scale[kPrefillUnits];
  uint32_t zero[kPrefillUnits];
};

// kGroupSteps: k16 steps that share a scale: 2, 4, or 8 for groups of 128 and more. The scales have the type of x.
template <bool kWarpgroups, class T, int kBits, int kTokens, int kGroupSteps>
__device__ __forceinline__ void prefill_tile(const GpuLinear& p, const Prefill& plan) {
  constexpr int kAhead = kPrefillStages - 2;  // the stage before the present one may still be read
  constexpr int kHalfBytes = kTokens * 128;   // of a stage: the first 64 k of all tokens, then the others
  constexpr int kStageBytes = 2 * kHalfBytes;
  constexpr int kTileBytes = 256 * kBits;
  constexpr int kUnitBytes = kBlockRows / kTileRows * kTileBytes;
  const uint32_t base = (shared_address(dynamic_shared()) + 1023u) & ~1023u;
  uint8_t* const stages = dynamic_shared() + (base - shared_address(dynamic_shared()));

  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int part = warp % 4;  // the warp's 16 rows of a unit
  const int first_token = static_cast<int>(blockIdx.x) * kTokens;
  const int first_unit = static_cast<int>(blockIdx.y) * (kPrefillRows / kBlockRows) + warp / 4 * kPrefillUnits;
  const int rank = static_cast<int>(blockIdx.z);
  const int begin = plan.k_begin(rank), end = plan.k_begin(rank + 1);

  // A tile of tokens: 16 bytes a thread, a row of x by 16 neighbours. What there is not is zero.
  auto stage_tokens = [&](int k_tile, int stage) {
#pragma unroll
    for (int i = 0; i < kTokens * 16 / kPrefillThreads; ++i) {
      const int at = i * kPrefillThreads + static_cast<int>(threadIdx.x), token = at / 16, chunk = at % 16;
      const int64_t k = static_cast<int64_t>(k_tile) * kTileK + chunk * 8;
      const bool live = first_token + token < p.tokens && k < p.in_features;
      copy16(stages + stage * kStageBytes + chunk / 8 * kHalfBytes + token * 128 + ((chunk ^ token) & 7) * 16,
             static_cast<const uint16_t*>(p.x) + (live ? (first_token + token) * p.x_stride + k : 0), live ? 16 : 0);
    }
  };

  // Units past the last compute it again; nothing of theirs is stored.
  const int unit = first_unit < plan.blocks ? first_unit : plan.blocks - 1;
  const uint32_t more = first_unit + 1 < plan.blocks ? 1 : 0;  // from the first unit to the second
  const uint8_t* const unit_words = reinterpret_cast<const uint8_t*>(p.words) +
                                    static_cast<int64_t>(unit) * plan.k_tiles * kUnitBytes + part * kTileBytes + lane * 16;
  // The place of the warp's first row among the scales, before groups are counted.
  const uint32_t unit_row = static_cast<uint32_t>(unit * plan.groups * kBlockRows + part * kTileRows);
  auto load = [&](Held<kBits>& to, int k_tile) {
    const uint32_t scales_of = static_cast<uint32_t>(plan.group(k_tile, lane / 8)) * kBlockRows + lane % 8 * 2;
    const uint32_t zeros_of = static_cast<uint32_t>(plan.group(k_tile, lane / 4)) * kBlockRows + lane % 4 * 4;
#pragma unroll
    for (int u = 0; u < kPrefillUnits; ++u) {
      const uint32_t later = u * more;
      load_words<kBits>(to.words[u], unit_words + static_cast<int64_t>(later * plan.k_tiles + k_tile) * kUnitBytes, 512u - lane * 8);
      const uint32_t row = unit_row + later * plan.groups * kBlockRows;
      to.scale[u] = load_word(p.scale, int64_t{2} * (row + scales_of));
      to.zero[u] = p.zero_point == nullptr ? 0x01010101u << (kBits - 1) : load_word(p.zero_point, row + zeros_of);
    }
  };

  float total[kPrefillUnits][kTokens / 2] = {};
  uint32_t fragment[2][kPrefillUnits][4];
  uint32_t scale[kPrefillUnits][2];  // of rows lane / 4 and 8 more, both halves
  ZeroPair zero[kPrefillUnits][2];
  auto dequantize = [&](uint32_t (&to)[kPrefillUnits][4], const Held<kBits>& from, int step) {
#pragma unroll
    for (int u = 0; u < kPrefillUnits; ++u) {
      if (step % kGroupSteps == 0) {
        const int group = step / kGroupSteps, row = lane / 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t held = shuffle(from.scale[u], group * 8 + r * 4 + row / 2);
          scale[u][r] = (held >> (row & 1) * 16 & 0xffffu) * 0x10001u;
          zero[u][r] = zero_pair<T>(shuffle(from.zero[u], group * 4 + r * 2 + row / 4) >> row % 4 * 8 & 255u);
        }
      }
      dequant_word<T, kBits>(step_word<kBits>(from.words[u], step), zero[u][0], zero[u][1], to[u]);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[u][j] = mul_pair<T>(to[u][j], scale[u][j & 1]);
    }
  };

  // Of the lane's row in ldmatrix, 16 tokens at a time: the places of its 16 bytes in the four k16 steps of a half.
  const int matrix_token = (lane >> 4) * 8 + (lane & 7);
  auto multiply = [&](const uint32_t (&a)[kPrefillUnits][4], uint32_t from, int step) {
    const uint32_t row = from + step / 4 * kHalfBytes + matrix_token * 128 + ((step % 4 * 2 + (lane >> 3 & 1)) ^ (lane & 7)) * 16;
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j) {
      uint32_t b[4];
      load_matrices(b, row + j * 16 * 128);
#pragma unroll
      for (int u = 0; u < kPrefillUnits; ++u) {
        mma(&total[u][8 * j], a[u], b[0], b[1], T());
        mma(&total[u][8 * j + 4], a[u], b[2], b[3], T());
      }
    }
  };

  Held<kBits> held, next;
  load(next, begin);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i < end) stage_tokens(begin + i, i);
    close_copies();
  }
  int stage = 0;
#pragma unroll 1
  for (int k_tile = begin; k_tile < end; ++k_tile) {
    held = next;
    if constexpr (kWarpgroups) load(next, k_tile + 1 < end ? k_tile + 1 : k_tile);
    wait_for_copies<kAhead - 1>();
    if constexpr (kWarpgroups) show_copies_to_wgmma();
    block_barrier(kPrefillThreads);
    // Every warp has left the k tile before the last one, whose stage is filled anew.
    if (k_tile + kAhead < end) stage_tokens(k_tile + kAhead, stage < 2 ? stage + kAhead : stage - 2);
    close_copies();
    const uint32_t tokens_at = base + static_cast<uint32_t>(stage * kStageBytes);
    stage = stage + 1 == kPrefillStages ? 0 : stage + 1;
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      dequantize(fragment[step & 1], held, step);
      if constexpr (kWarpgroups) {
#pragma unroll
        for (int u = 0; u < kPrefillUnits; ++u)
#pragma unroll
          for (int j = 0; j < 4; ++j) keep(fragment[step & 1][u][j]);  // written before the fence
        wgmma_begin();
#pragma unroll
        for (int u = 0; u < kPrefillUnits; ++u)
          wgmma(total[u], fragment[step & 1][u], swizzled_rows(tokens_at) + (step / 4 * kHalfBytes + step % 4 * 32) / 16, T());
        wgmma_commit();
        wgmma_wait<1>();  // the step before: its fragments may be overwritten
#pragma unroll
        for (int u = 0; u < kPrefillUnits; ++u)
#pragma unroll
          for (int j = 0; j < 4; ++j) keep(fragment[(step + 1) & 1][u][j]);
      } else {
        multiply(fragment[step & 1], tokens_at, step);
        if (step == 3) load(next, k_tile + 1 < end ? k_tile + 1 : k_tile);  // half of `held` is free by now
      }
    }
  }
  if constexpr (kWarpgroups) {
    wgmma_wait<0>();
#pragma unroll
    for (int u = 0; u < kPrefillUnits; ++u)
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) keep(total[u][i]);
  }
  block_barrier(kPrefillThreads);  // nobody reads activations any more

  float* const sums = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int u = 0; u < kPrefillUnits; ++u)
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + (i & 1);
      const int row = (warp / 4 * kPrefillUnits + u) * kBlockRows + part * kTileRows + lane / 4 + (i & 2) * 4;
      sums[token * kPrefillRowStride + row] = total[u][i];
    }
  if (plan.splits > 1)
    cluster_barrier();
  else
    block_barrier(kPrefillThreads);
  // Eight rows of a token at a time; the thread blocks of a cluster take turns.
  const bool whole = p.out_features % 8 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  const DType type = T::kWide ? DType::kFloat16 : DType::kBFloat16;
#pragma unroll 1
  for (int i = rank * kPrefillThreads + static_cast<int>(threadIdx.x); i < kTokens * kPrefillRows / 8;
       i += plan.splits * kPrefillThreads) {
    const int token = i / (kPrefillRows / 8), row = i % (kPrefillRows / 8) * 8;
    const int64_t n = static_cast<int64_t>(blockIdx.y) * kPrefillRows + row;
    if (first_token + token >= p.tokens || n >= p.out_features) continue;
    const uint32_t address = base + static_cast<uint32_t>(token * kPrefillRowStride + row) * 4;
    float sum[8] = {};
#pragma unroll 1
    for (int s = 0; s < plan.splits; ++s) {
      const uint4 low = load_peer16(address, s), high = load_peer16(address + 16, s);
      sum[0] += word_to_float(low.x), sum[1] += word_to_float(low.y), sum[2] += word_to_float(low.z);
      sum[3] += word_to_float(low.w), sum[4] += word_to_float(high.x), sum[5] += word_to_float(high.y);
      sum[6] += word_to_float(high.z), sum[7] += word_to_float(high.w);
    }
    if (p.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (n + j < p.out_features) sum[j] += scale_value(load_half(p.bias, 2 * (n + j)), type);
    }
    uint16_t* const to = static_cast<uint16_t*>(p.y) + static_cast<int64_t>(first_token + token) * p.out_features + n;
    if (whole) {
      uint4 bits;
      bits.x = float_pair_to_bits<T>(sum[0], sum[1]), bits.y = float_pair_to_bits<T>(sum[2], sum[3]);
      bits.z = float_pair_to_bits<T>(sum[4], sum[5]), bits.w = float_pair_to_bits<T>(sum[6], sum[7]);
      *reinterpret_cast<uint4*>(to) = bits;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (n + j < p.out_features) to[j] = float_to_bits<T>(sum[j]);
    }
  }
  if (plan.splits > 1) cluster_barrier();  // shared memory is there until the last peer has read it
}

template <class T, int kBits, int kTokens, int kGroupSteps>
__global__ void __launch_bounds__(kPrefillThreads, 1) packed_prefill_kernel(const GpuLinear p, const Prefill plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  prefill_tile<true, T, kBits, kTokens, kGroupSteps>(p, plan);
#else
  prefill_tile<false, T, kBits, kTokens, kGroupSteps>(p, plan);
#endif
}

}  // namespace packed
}  // namespace discquant
