// SPDX-License-Identifier: Apache-2.0
// packed_linear on tensor cores (sm_80 and later): weights are the A operand of mma.m16n8k16, tokens its n = 8 columns.
// A thread block of four warps walks units of 64 rows x 128 k through a cp.async ring. Warps 0, 1 take even units and
// warps 2, 3 odd ones; each holds 32 rows (two tiles), so that a fragment of activations serves both.
// The walk is cut into equal runs of units by (N, K, processors) alone; a row block shared by several thread blocks is
// summed from the workspace in block order by whoever arrives last, so results depend on neither timing nor batch.
#pragma once

#include "packed/dequant.h"
#include "packed/gpu_linear.h"

namespace discquant {
namespace packed {

constexpr int kThreads = 128;
constexpr int kTokenStride = kTileK * 2 + 16;  // bytes of a token's row in shared memory: 16 more, no bank conflicts
constexpr int kMaxSplitTokens = 16;

template <int kTokenTiles>
__host__ __device__ constexpr int stages() {
  return kTokenTiles <= 2 ? 8 : 3;
}

// Shared memory of one stage: words, tokens, scales (up to four groups), zero points.
template <int kBits, int kTokenTiles>
__host__ __device__ constexpr int stage_bytes() {
  return kBlockRows * kTileK * kBits / 8 + 8 * kTokenTiles * kTokenStride + 4 * kBlockRows * 4 + 4 * kBlockRows;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, of which the first `bytes` are read and the rest is zero.
__device__ __forceinline__ void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Half2) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Bfloat2) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float half_bits_to_float(uint16_t bits, bool bfloat) {
  float value;
  if (bfloat) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

template <class T>
__device__ __forceinline__ uint16_t float_to_bits(float value) {
  uint16_t bits;
  if constexpr (T::kWide)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float scale_value(const void* scales, int i, DType type) {
  if (type == DType::kFloat32) return static_cast<const float*>(scales)[i];
  return half_bits_to_float(static_cast<const uint16_t*>(scales)[i], type == DType::kBFloat16);
}

template <class T, int kBits, int kTokenTiles, bool kExact>
__global__ void __launch_bounds__(kThreads) packed_linear_kernel(const GpuLinear p, const Walk walk) {
  constexpr int kStages = stages<kTokenTiles>();
  constexpr int kWordBytes = kBlockRows * kTileK * kBits / 8;
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kTokenBytes = kTokens * kTokenStride;
  constexpr int kScaleBytes = 4 * kBlockRows * 4;
  constexpr int kStageBytes = stage_bytes<kBits, kTokenTiles>();
  extern __shared__ __align__(128) uint8_t shared[];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int half = warp & 1, parity = warp >> 1;  // rows 32 * half .., units of this parity
  const int row = lane / 4;
  const int64_t first = walk.begin(blockIdx.x), last = walk.begin(blockIdx.x + 1);
  const int first_token = blockIdx.y * kTokens;
  const int scale_size = p.scale_type == DType::kFloat32 ? 4 : 2;
  const int unit_groups = walk.group_size >= kTileK ? 1 : kTileK / walk.group_size;
  const int group_steps = walk.group_size >= kTileK ? 8 : walk.group_size / 16;  // k16 steps of a group in a unit

  auto load = [&](int64_t unit) {
    if (unit < last) {
      uint8_t* stage = shared + (unit - first) % kStages * kStageBytes;
      const uint8_t* from = reinterpret_cast<const uint8_t*>(p.words) + unit * kWordBytes;
      for (int i = threadIdx.x * 16; i < kWordBytes; i += kThreads * 16) copy16(stage + i, from + i, 16);
      const int64_t k0 = unit % walk.k_tiles * kTileK;
      for (int i = threadIdx.x; i < kTokens * 16; i += kThreads) {
        const int token = i / 16, chunk = i % 16;
        const bool live = first_token + token < p.tokens && k0 + chunk * 8 < p.in_features;
        const int64_t at = live ? (first_token + token) * p.x_stride + k0 + chunk * 8 : 0;
        copy16(stage + kWordBytes + token * kTokenStride + chunk * 16, static_cast<const uint16_t*>(p.x) + at, live ? 16 : 0);
      }
      // Scales of a unit's groups lie together: [group][64].
      const int64_t group = unit % walk.k_tiles * kTileK / walk.group_size;
      const int present = walk.groups - group < unit_groups ? static_cast<int>(walk.groups - group) : unit_groups;
      const int64_t at = (unit / walk.k_tiles * walk.groups + group) * kBlockRows;
      uint8_t* scales = stage + kWordBytes + kTokenBytes;
      const uint8_t* scale_from = static_cast<const uint8_t*>(p.scale) + at * scale_size;
      const int scale_bytes = present * kBlockRows * scale_size;
      for (int i = threadIdx.x * 16; i < unit_groups * kBlockRows * scale_size; i += kThreads * 16)
        copy16(scales + i, i < scale_bytes ? scale_from + i : scale_from, i < scale_bytes ? 16 : 0);
      if (p.zero_point != nullptr) {
        for (int i = threadIdx.x * 16; i < unit_groups * kBlockRows; i += kThreads * 16)
          copy16(scales + kScaleBytes + i, i < present * kBlockRows ? p.zero_point + at + i : p.zero_point,
                 i < present * kBlockRows ? 16 : 0);
      }
    }
    asm volatile("cp.async.commit_group;");  // empty past the end, so that counting groups stays simple
  };

  float total[2][kTokenTiles][4];
  auto clear = [](float(&c)[2][kTokenTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[tile][n][i] = 0.0f;
  };
  clear(total);

  auto compute = [&](const uint8_t* stage) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(stage);
    const uint8_t* tokens = stage + kWordBytes;
    const uint8_t* scales = tokens + kTokenBytes;
    const uint8_t* zeros = scales + kScaleBytes;
    uint32_t word[2][8];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const uint32_t* from = words + (2 * half + tile) * (kBits == 4 ? 256 : 192);
      const uint4 a = *reinterpret_cast<const uint4*>(from + lane * 4);
      if constexpr (kBits == 4) {
        const uint4 b = *reinterpret_cast<const uint4*>(from + 128 + lane * 4);
        word[tile][0] = a.x, word[tile][1] = a.y, word[tile][2] = a.z, word[tile][3] = a.w;
        word[tile][4] = b.x, word[tile][5] = b.y, word[tile][6] = b.z, word[tile][7] = b.w;
      } else {
        const uint2 b = *reinterpret_cast<const uint2*>(from + 128 + lane * 2);
        word[tile][0] = a.x, word[tile][1] = a.y, word[tile][2] = a.z, word[tile][3] = steal_word(a.x, a.y, a.z);
        word[tile][4] = a.w, word[tile][5] = b.x, word[tile][6] = b.y, word[tile][7] = steal_word(a.w, b.x, b.y);
      }
    }
    float acc[2][kTokenTiles][4];
    ZeroPair zero[2][2];
    uint32_t pair_scale[2][2];
    clear(acc);
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const int group = step / group_steps;
      if (step % group_steps == 0) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int at = group * kBlockRows + half * 32 + tile * 16 + r * 8 + row;
            zero[tile][r] = zero_pair<T>(p.zero_point != nullptr ? zeros[at] : 1u << (kBits - 1));
            if constexpr (kExact)
              pair_scale[tile][r] = float_to_bits<T>(scale_value(scales, at, p.scale_type)) * 0x10001u;
          }
        }
      }
      // ldmatrix: rows are tokens, so each lane gets k = 2t, 2t+1 (+8) of token g: the B fragment.
      uint32_t b[kTokenTiles][2];
      const uint32_t column = step * 32 + (lane >> 3 & 1) * 16;
      if constexpr (kTokenTiles == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(b[0][0]), "=r"(b[0][1])
                     : "r"(shared_address(tokens + (lane & 7) * kTokenStride + column)));
      } else {
#pragma unroll
        for (int n = 0; n < kTokenTiles; n += 2)
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                       : "=r"(b[n][0]), "=r"(b[n][1]), "=r"(b[n + 1][0]), "=r"(b[n + 1][1])
                       : "r"(shared_address(tokens + (n * 8 + (lane >> 4) * 8 + (lane & 7)) * kTokenStride + column)));
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t a[4];
        dequant_word<T, kBits>(word[tile][step], zero[tile][0], zero[tile][1], a);
        if constexpr (kExact) {
#pragma unroll
          for (int j = 0; j < 4; ++j) a[j] = mul_pair<T>(a[j], pair_scale[tile][j & 1]);
        }
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) mma(kExact ? total[tile][n] : acc[tile][n], a, b[n][0], b[n][1], T());
      }
      if (!kExact && (step + 1) % group_steps == 0) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const int at = group * kBlockRows + half * 32 + tile * 16 + row;
          const float top = scale_value(scales, at, p.scale_type), bottom = scale_value(scales, at + 8, p.scale_type);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              total[tile][n][i] = fmaf(acc[tile][n][i], i < 2 ? top : bottom, total[tile][n][i]);
        }
        clear(acc);
      }
    }
  };

  auto store = [&](int64_t block, int r, int token, float value) {
    const int64_t n = block * kBlockRows + r;
    if (n < p.out_features && first_token + token < p.tokens) {
      if (p.bias != nullptr) value += half_bits_to_float(static_cast<const uint16_t*>(p.bias)[n], !T::kWide);
      static_cast<uint16_t*>(p.y)[(first_token + token) * p.out_features + n] = float_to_bits<T>(value);
    }
  };

  // The end of a row block inside this run: add the two parities, then write or leave to the last of several runs.
  auto finish = [&](int64_t block, float* merge) {
    const int64_t block_units = block * walk.k_tiles;
    const int64_t first_run = walk.run_of(block_units), last_run = walk.run_of(block_units + walk.k_tiles - 1);
    float* partial = reinterpret_cast<float*>(p.workspace + ceil_div(p.out_features, kBlockRows));
    auto slot = [&](int64_t run) { return partial + walk.slot(run, block) * kBlockRows * kMaxSplitTokens; };
    __syncthreads();
    auto each = [&](auto fn) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            fn(half * 32 + tile * 16 + row + (i >= 2 ? 8 : 0), n * 8 + (lane & 3) * 2 + (i & 1), total[tile][n][i]);
    };
    if (parity == 1) each([&](int r, int token, float value) { merge[r * kTokens + token] = value; });
    __syncthreads();
    if (first_run == last_run) {
      if (parity == 0) each([&](int r, int token, float value) { store(block, r, token, value + merge[r * kTokens + token]); });
    } else {
      if (parity == 0)
        each([&](int r, int token, float value) {
          slot(blockIdx.x)[r * kTokens + token] = value + merge[r * kTokens + token];
        });
      __threadfence();
      __syncthreads();
      __shared__ bool arrived_last;
      if (threadIdx.x == 0) {
        const uint32_t arrivals = static_cast<uint32_t>(last_run - first_run);
        arrived_last = atomicAdd(p.workspace + block, 1u) == arrivals;
        if (arrived_last) p.workspace[block] = 0;  // ready for the next launch
      }
      __syncthreads();
      if (arrived_last) {
        __threadfence();
        for (int i = threadIdx.x; i < kBlockRows * kTokens; i += kThreads) {
          float sum = 0.0f;
          for (int64_t run = first_run; run <= last_run; ++run) sum += __ldcg(slot(run) + i);
          store(block, i / kTokens, i % kTokens, sum);
        }
      }
    }
    __syncthreads();
    clear(total);
  };

  for (int i = 0; i < kStages - 1; ++i) load(first + i);
  for (int64_t unit = first; unit < last; ++unit) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2));
    __syncthreads();  // this unit has landed for all, and all are done with the unit whose stage is loaded next
    load(unit + kStages - 1);
    if (((unit - first) & 1) == parity) compute(shared + (unit - first) % kStages * kStageBytes);
    if (unit + 1 == last || (unit + 1) % walk.k_tiles == 0) {
      float* merge = reinterpret_cast<float*>(shared + kStages * kStageBytes);
      finish(unit / walk.k_tiles, merge);
    }
  }
}

template <int kBits, int kTokenTiles>
constexpr int shared_bytes() {
  return stages<kTokenTiles>() * stage_bytes<kBits, kTokenTiles>() + kBlockRows * 8 * kTokenTiles * 4;
}

}  // namespace packed
}  // namespace discquant
