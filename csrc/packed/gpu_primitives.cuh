// SPDX-License-Identifier: Apache-2.0
// The instructions that the kernels ask for by name (sm_80 and later), one function each. Compiled with
// DISCQUANT_EMULATE, tests/packed/gpu_emulator.h gives the same functions on the host, so that the kernels themselves
// run in tests without a GPU.
#pragma once

#if defined(DISCQUANT_EMULATE)
#include "gpu_emulator.h"
#else

#include <cstdint>

#include "packed/dequant.h"

namespace discquant {
namespace packed {

__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(128) uint8_t shared[];
  return shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// All `threads` threads of the block; each warp may come to it in another place of the program, and its lanes one by one:
// `barrier.sync` without .aligned, which bar.sync implies.
__device__ __forceinline__ void block_barrier(int threads) {
  __syncwarp();
  asm volatile("barrier.sync 1, %0;" ::"r"(threads) : "memory");
}

// 16 bytes global -> shared without waiting, of which the first `bytes` are read and the rest is zero.
__device__ __forceinline__ void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Ends a group of this thread's copies; wait until all groups but the latest `kLater` are there.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLater>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// Weights are read once: not kept in L1.
__device__ __forceinline__ uint4 load_once16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 load_once8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// Bring the 128 bytes at p into the L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Four, two bytes or one at `p` + `byte`, through L1.
__device__ __forceinline__ uint32_t load_word(const void* p, int64_t byte) {
  return __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(p) + byte));
}
__device__ __forceinline__ uint32_t load_half(const void* p, int64_t byte) {
  return __ldg(reinterpret_cast<const uint16_t*>(static_cast<const uint8_t*>(p) + byte));
}
__device__ __forceinline__ uint32_t load_byte(const void* p, int64_t byte) {
  return __ldg(static_cast<const uint8_t*>(p) + byte);
}

// Four floats that other thread blocks wrote, from the L2.
__device__ __forceinline__ void load_shared_floats(float v[4], const float* p) {
  const float4 found = __ldcg(reinterpret_cast<const float4*>(p));
  v[0] = found.x, v[1] = found.y, v[2] = found.z, v[3] = found.w;
}

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t v[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
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

__device__ __forceinline__ uint32_t shuffle(uint32_t value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// The same in every lane, and the compiler is told so: branches on it need no care for lanes that part.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }

// The same for a value that every lane has.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

// Of lane `r` of this lane's quad.
__device__ __forceinline__ uint32_t quad_shuffle(uint32_t value, int r) {
  return __shfl_sync(0xffffffffu, value, r, 4);
}

// A value that the compiler must keep: it would rather work it out again in every turn of a loop. Nothing less than a
// shuffle hides from ptxas what the value is. Before sm_90 registers are too few for it.
template <class V>
__device__ __forceinline__ V kept(V value) {
#if __CUDA_ARCH__ < 900
  return value;
#else
  const int lane = static_cast<int>(threadIdx.x % 32);
  if constexpr (sizeof(V) == 8) {
    const uint64_t bits = reinterpret_cast<uint64_t>(value);
    const uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits), lane);
    const uint32_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits >> 32), lane);
    return reinterpret_cast<V>(static_cast<uint64_t>(high) << 32 | low);
  } else {
    return __shfl_sync(0xffffffffu, value, lane);
  }
#endif
}

__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// What this thread has seen written, by a barrier also the rest of its block, is seen by who sees the increment.
__device__ __forceinline__ uint32_t increment_released(uint32_t* p) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
  return before;
}

// Warps meet in shared memory again and again, `arrivals` of them each time (mbarrier: a fence could also wait for the
// loads that are on their way). Every lane of a warp calls; what was written before an arrival is seen after the wait.
__device__ __forceinline__ void init_meeting(uint64_t* meeting, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(meeting)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(uint64_t* meeting) {
  __syncwarp();
  if (threadIdx.x % 32 == 0)
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(meeting))
                 : "memory");
}

// Until the meeting of this parity is over: the first is 0, and the one before it, 1, always was.
__device__ __forceinline__ void wait_for_meeting(const uint64_t* meeting, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(over)
                 : "r"(shared_address(meeting)), "r"(parity)
                 : "memory");
  } while (over == 0);
  __syncwarp();
}

// Counts a warp in, orders nothing; returns the count before.
__device__ __forceinline__ uint32_t count_in(uint32_t* count) {
  uint32_t before = 0;
  if (threadIdx.x % 32 == 0)
    asm volatile("atom.relaxed.cta.shared.add.u32 %0, [%1], 1;" : "=r"(before) : "r"(shared_address(count)) : "memory");
  return __shfl_sync(0xffffffffu, before, 0);
}

// In a launch that may overlap the one before it (programmatic dependent launch): wait until that one is over and its
// results are seen, and let the next begin. After any other launch it does nothing.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t float_to_word(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float word_to_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float half_to_float32(uint16_t bits) {
  float value;
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

// Two values, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t float_pair_to_bits(float low, float high) {
  uint32_t bits;
  if constexpr (T::kWide)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Byte i of the result is byte (selector >> 4 i & 15) of `value`, which has zeros from byte 4 on.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t value, uint32_t selector) {
  return __byte_perm(value, 0, selector);
}

// fma(a, b, c), one rounding.
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

}  // namespace packed
}  // namespace discquant
#endif
